"""The training script under every configuration of `configuration/accelerate/`, with real processes on this CPU (gloo).

All engines start from one checkpoint and see the same batches, so all must end with the same model. DeepSpeed is tested
where it is installed. Run: `python -m pytest tests/engines/test_engines.py -m "slow or not slow"`. What the fast set
has of it runs in forks: `test_faults.py` takes a run from DDP to FSDP2 under these configurations.
"""

import importlib.util
import json
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import ROOT
from helpers.backbones import REPRESENTATIVES, backed_model
from helpers.workplaces import CausalWorkplace, TranslationWorkplace, free_port, kill_launched, run_here


CONFIGURATIONS = ROOT / "configuration" / "accelerate"
SMALL = {
    "balance_loss_coef": 0,
    "expert_bias_rate": 0.01,
    "distilled_router": "counts",
    "max_frozen_load": 1.5,
    "share_experts_in_stage1": True,
    "reset_gates_at_freeze": True,
    "router_normalization": "standardize",
}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


class Launching:
    """What a workplace gains: runs of its script under `accelerate launch`."""

    def start_launch(self, configuration: str, output: str, *more: str, processes: int = 2, **options):
        """Begin to train."""
        script = [str(ROOT / "scripts" / self.script)]
        command = ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml"), "--num_processes", str(processes)]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", free_port()]
        arguments = self.arguments(output, *more, **options)
        if configuration.startswith(("fsdp", "deepspeed")):
            # With `--use_cpu`, accelerate would take the engine away.
            at = arguments.index("--use_cpu")
            arguments = arguments[:at] + arguments[at + 2 :]
            script.insert(0, str(ROOT / "tests/helpers/scripts/as_on_gpus.py"))
        return subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *command, *script, *arguments],
            cwd=self.folder,
            env=self.environment | {"DS_ACCELERATOR": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def launch(self, *arguments, **options) -> tuple[dict, dict]:
        """Train to the end; return `results.json` and the weights."""
        process = self.start_launch(*arguments, **options)
        try:
            printed, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            kill_launched(process)
            raise
        assert process.returncode == 0, printed[-4000:]
        return self.outcome(arguments[1])

    def outcome(self, output: str) -> tuple[dict, dict]:
        folder = self.folder / output
        return json.loads((folder / "results.json").read_text()), load_file(folder / "model.safetensors")


class Engines(Launching, CausalWorkplace):
    """A corpus, a model of stage 1 to start from, and steps of four sequences however many processes share them."""

    def __init__(self, folder):
        super().__init__(folder)
        self.make("made")

    def make(self, name: str, **settings):
        """Make a checkpoint of stage 1 to start from, without dropout, which processes would draw differently."""
        overrides = json.dumps({"num_experts": 3, "dropout": 0.0, **settings})
        more = ["--config_overrides", overrides, "--stage1_steps", "", "--max_steps", "1", "--save_strategy", "no"]
        run_here("run_clm", *super().arguments(name, *more), folder=self.folder)

    def arguments(self, output: str, *more: str, start: str = "made") -> list[str]:
        text = f"""--model_name_or_path {start} --tokenizer_name {start} --max_steps 8 --stage1_steps 3 --save_steps 4
            --eval_steps 4 --fluctuation_check_steps 0"""
        unset = ["--model_preset", "", "--config_overrides", ""]
        return super().arguments(output, *text.split(), *unset, *more)

    def start_launch(self, configuration, output, *more, processes=2, **options):
        own_share = ["--per_device_train_batch_size", str(4 // processes)]
        return super().start_launch(configuration, output, *own_share, *more, processes=processes, **options)

    def kill_in_next_save(self, configuration: str, output: str, *more: str, delay: float):
        """Train until a checkpoint appears that was not there; kill all processes `delay` seconds later."""
        known = set((self.folder / output).glob("checkpoint-*"))
        process = self.start_launch(configuration, output, *more)
        while set((self.folder / output).glob("checkpoint-*")) <= known:
            assert process.poll() is None, process.communicate()[0][-4000:]
            time.sleep(0.001)
        time.sleep(delay)
        kill_launched(process)


class TranslationEngines(Launching, TranslationWorkplace):
    """A parallel corpus."""


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> Engines:
    return Engines(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def alone(engines):
    return engines.launch("one-process", "alone", processes=1)


def assert_same_model(actual, expected, *, but: tuple[str, ...] = ()):
    """Compare runs; names with one of `but` in them may differ."""
    results, weights = actual
    fingerprints = [ran["router_fingerprint"] for ran, _ in (actual, expected)]
    assert None not in fingerprints
    if "frozen_router" not in but:
        assert fingerprints[0] == fingerprints[1]
    assert results["perplexity"] == pytest.approx(expected[0]["perplexity"], rel=1e-4)
    # FSDP2 and DeepSpeed write the tied head, too.
    assert weights.keys() - {"lm_head.weight"} == expected[1].keys() - {"lm_head.weight"}
    # The gradient of a key's bias is zero but for rounding, and AdamW makes steps of that.
    compared = [name for name in expected[1] if not any(each in name for each in (*but, "k_proj.bias"))]
    torch.testing.assert_close(
        {name: weights[name] for name in compared},
        {name: expected[1][name] for name in compared},
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("configuration", "more"),
    [
        ("ddp", []),
        ("ddp-cpu", []),
        ("fsdp2", []),
        ("fsdp2", ["--gradient_checkpointing", "True"]),
        ("fsdp2", ["--torch_compile", "True", "--torch_compile_backend", "aot_eager"]),
    ],
)
def test_two_processes_come_to_the_model_of_one(engines, alone, configuration, more):
    assert_same_model(engines.launch(configuration, "variant", "--overwrite_output_dir", "True", *more), alone)


@pytest.mark.slow
def test_fsdp_accumulates_as_ddp_does(engines):
    # Not as one process without accumulation: balance counts are per micro-batch.
    accumulated = ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1"]
    expected, actual = (engines.launch(name, f"{name}-2", *accumulated) for name in ("ddp-cpu", "fsdp2"))
    assert_same_model(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp-cpu", "fsdp2"])
def test_four_processes_come_to_the_model_of_one(engines, alone, configuration):
    assert_same_model(engines.launch(configuration, f"{configuration}-4", processes=4), alone)


@pytest.mark.slow
def test_fsdp_killed_inside_saves_resumes_to_the_same_bits(engines):
    steps, more = ["--max_steps", "24", "--save_steps", "3"], []
    whole = engines.launch("fsdp2", "fsdp2-whole", *steps)
    for delay in (0.0, 0.03, 0.1):
        engines.kill_in_next_save("fsdp2", "fsdp2-killed", *steps, *more, delay=delay)
        # The first may have been cut off before there was anything to resume.
        more = ["--resume_from_checkpoint", "latest"]
    resumed = engines.launch("fsdp2", "fsdp2-killed", *steps, *more)
    assert resumed[0]["router_fingerprint"] == whole[0]["router_fingerprint"]
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=0)


@pytest.mark.slow
def test_translation_comes_to_the_same_under_fsdp(tmp_path):
    engines = TranslationEngines(tmp_path)
    (expected, _), (actual, weights) = (engines.launch(name, name) for name in ("ddp-cpu", "fsdp2"))
    assert actual["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-3)
    assert actual["scores"] == expected["scores"]
    assert "model.decoder.embed_tokens.weight" not in weights or torch.equal(
        weights["model.decoder.embed_tokens.weight"], weights["model.encoder.embed_tokens.weight"]
    )


@pytest.mark.slow
@needs_deepspeed
def test_translation_passes_both_stages_under_deepspeed(tmp_path):
    results, _ = TranslationEngines(tmp_path).launch("deepspeed-zero3", "zero3")
    assert [row["stage"] for row in results["stages"]] == [1, 2]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing", "True"]])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_comes_to_the_model_of_one_process(engines, alone, stage, more):
    # D and E^ go on by their momentum there, which the frozen table does not follow.
    ran = engines.launch(f"deepspeed-zero{stage}", "zero", "--overwrite_output_dir", "True", *more)
    assert_same_model(ran, alone, but=("distilled_router",))


@pytest.mark.slow
@pytest.mark.parametrize(
    "configuration",
    ["fsdp2", *(pytest.param(f"deepspeed-zero{stage}", marks=needs_deepspeed) for stage in (1, 3))],
)
@pytest.mark.parametrize("settings", [SMALL, {"distilled_router": "bigram"}], ids=["small", "bigram"])
def test_engines_carry_what_routers_remember(engines, configuration, settings):
    start = f"start-{settings['distilled_router']}"
    if not (engines.folder / start).exists():
        engines.make(start, **settings)
        engines.launch("one-process", f"{start}-alone", processes=1, start=start)
    alone = engines.outcome(f"{start}-alone")
    ran = engines.launch(configuration, "carried", "--overwrite_output_dir", "True", start=start)
    # Sums in another order: the last bits of frozen weights, where they are what is frozen, differ.
    but = ("distilled_router",) if "deepspeed" in configuration else ()
    assert_same_model(ran, alone, but=but if settings is SMALL else (*but, "frozen_router"))


@pytest.mark.slow
@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_a_decoder_of_transformers_comes_to_the_model_of_one_process(engines, family):
    tokenizer = AutoTokenizer.from_pretrained(engines.folder / "made")
    model, start = backed_model(family, vocab_size=len(tokenizer)), family.replace("/", "-")
    for saved in (model, tokenizer):
        saved.save_pretrained(engines.folder / start)
    alone = engines.launch("one-process", f"{start}-alone", processes=1, start=start)
    for configuration in ("ddp-cpu", "fsdp2"):
        assert_same_model(engines.launch(configuration, f"{start}-{configuration}", start=start), alone)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_resumes_after_the_transition(engines, stage):
    whole = engines.launch(f"deepspeed-zero{stage}", f"zero{stage}-whole")
    engines.launch(f"deepspeed-zero{stage}", f"zero{stage}-resumed")
    last = engines.folder / f"zero{stage}-resumed" / "checkpoint-8"
    last.rename(engines.folder / f"zero{stage}-last")
    resumed = engines.launch(f"deepspeed-zero{stage}", f"zero{stage}-resumed", "--resume_from_checkpoint", "latest")
    assert resumed[0]["router_fingerprint"] == whole[0]["router_fingerprint"]
    torch.testing.assert_close(resumed[1], whole[1], rtol=0, atol=0)


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_leave_precision_to_the_recipe_and_name_their_engine(path):
    configuration = yaml.safe_load(path.read_text())
    assert configuration["mixed_precision"] == "no"
    engine = configuration["distributed_type"]
    assert ("fsdp_config" in configuration) == (engine == "FSDP")
    assert ("deepspeed_config" in configuration) == (engine == "DEEPSPEED")

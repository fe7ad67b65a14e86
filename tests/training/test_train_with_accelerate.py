"""Tests of the plain accelerate loop."""

import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.testing import assert_close
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from helpers.forks import Fork
from helpers.workplaces import PRESET, CausalWorkplace, assert_same_saved_weights, load_script, refuse
from modeling_stablemoe import StableMoEForCausalLM, StageTransitionCallback
from modeling_stablemoe.data.text import DataArguments, collate_blocks, load_corpus, pack
from modeling_stablemoe.runs.recipes import load_preset


STEPS, STAGE1_STEPS, VOCABULARY = 6, 3, 280


class LoopWorkplace(CausalWorkplace):
    script = "train_with_accelerate.py"

    def __init__(self, folder):
        super().__init__(folder)
        changed = {"num_experts": 3, "dropout": 0.0, "initializer_range": 0.2}
        (folder / "preset.json").write_text(json.dumps(PRESET | changed))

    def data(self) -> list[str]:
        options = f"--train_files {self.folder / 'corpus.txt'} --vocab_size {VOCABULARY} --block_size 16"
        return [*options.split(), "--document_separator", ""]

    def arguments(self, output: str, *more: str, model: str = "start", stage1: int | None = STAGE1_STEPS) -> list[str]:
        options = {"model_name_or_path": self.folder / model, "output_dir": self.folder / output, "use_cpu": True}
        options |= {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1}
        options |= {} if stage1 is None else {"stage1_steps": stage1}
        return [*self.data(), *(str(part) for name, value in options.items() for part in (f"--{name}", value)), *more]

    def on_two_processes(self, output: str, *more: str, **options) -> str:
        main = load_script("train_with_accelerate").main
        run = Fork(lambda: main(self.arguments(output, *more, **options)), processes=2)
        assert run.wait() == [0, 0], run.output[-3000:]
        return run.output

    def alone(self, output: str, *more: str, **options):
        """On one process, this one."""
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        load_script("train_with_accelerate").main(self.arguments(output, *more, **options))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> LoopWorkplace:
    workplace = LoopWorkplace(tmp_path_factory.mktemp("loop"))
    set_seed(3)
    config = load_preset(workplace.folder / "preset.json", vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0)
    StableMoEForCausalLM(config).save_pretrained(workplace.folder / "start")
    return workplace


@pytest.fixture(scope="module")
def whole(workplace) -> StableMoEForCausalLM:
    """A run of one process that saved its state after each second step."""
    workplace.alone("whole", "--batch_size", "8", "--save_steps", "2")
    return StableMoEForCausalLM.from_pretrained(workplace.folder / "whole")


def assert_same_but_for_rounding(actual, expected):
    # A bias of the keys changes no attention: its gradient is rounding alone, which AdamW makes whole steps of.
    sides = [{n: p for n, p in m.state_dict().items() if "k_proj.bias" not in n} for m in (actual, expected)]
    assert_close(*sides, rtol=1e-3, atol=1e-4)


def test_the_loop_passes_the_transition(workplace, capsys):
    workplace.alone("printed", "--batch_size", "8")
    printed = capsys.readouterr().out
    assert re.findall(r"step (\d): loss .* stage (\d)", printed) == [(str(s), "12"[s >= 3]) for s in range(1, 7)]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[3] < losses[1] - 0.5  # the routing losses are gone
    assert StableMoEForCausalLM.from_pretrained(workplace.folder / "printed").router_fingerprint() in printed


def test_two_processes_learn_what_one_does(workplace, whole):
    printed = workplace.on_two_processes("two", "--batch_size", "4", "--weight_decay", "0.0")
    two = StableMoEForCausalLM.from_pretrained(workplace.folder / "two")
    assert two.router_fingerprint() == whole.router_fingerprint()
    assert_same_but_for_rounding(two, whole)
    assert printed.count("step 6:") == 1


def test_the_loop_is_the_plain_trainer(workplace, tmp_path):
    workplace.alone("accumulated", "--batch_size", "4", "--accumulation_steps", "2")
    loop = StableMoEForCausalLM.from_pretrained(workplace.folder / "accumulated")
    data = DataArguments(train_files=[str(workplace.folder / "corpus.txt")], block_size=16, document_separator="")
    tokenizer = AutoTokenizer.from_pretrained(workplace.folder / "accumulated")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    trainer = Trainer(
        StableMoEForCausalLM.from_pretrained(workplace.folder / "start"),
        TrainingArguments(
            str(tmp_path),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            adam_beta2=0.98,
            data_seed=0,
            seed=0,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=pack(load_corpus(data), tokenizer, 16)["train"],
        data_collator=collate_blocks,
        callbacks=[StageTransitionCallback(STAGE1_STEPS)],
    )
    trainer.train()
    assert loop.router_fingerprint() == trainer.model.router_fingerprint()
    assert_same_but_for_rounding(loop, trainer.model)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumes_from_either_stage_to_the_same_bits(workplace, whole, step):
    state = workplace.folder / "whole" / f"state-{step}"
    workplace.alone(f"resumed-{step}", "--batch_size", "8", "--resume_from", str(state))
    assert_same_saved_weights(workplace.folder / f"resumed-{step}", workplace.folder / "whole")


def test_a_frozen_model_is_trained_further_and_keeps_its_routing(workplace, whole):
    workplace.alone("further", "--weight_decay", "0.5", "--max_steps", "3", model="whole", stage1=None)
    further = StableMoEForCausalLM.from_pretrained(workplace.folder / "further")
    assert further.router_fingerprint() == whole.router_fingerprint()
    assert not torch.equal(further.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    for name, values in further.state_dict().items():  # nothing that stage 1 alone trains has moved
        assert "distilled_router" not in name or torch.equal(values, whole.state_dict()[name])


@pytest.mark.parametrize(
    ("model", "stage1", "message"),
    [
        ("start", None, "`--stage1_steps` must lie in 1..6"),
        ("start", 7, "`--stage1_steps` must lie in 1..6 .* got 7"),
        ("whole", 3, "frozen already: leave `--stage1_steps` out"),
        ("nowhere", 3, "nowhere"),
    ],
)
def test_a_stage_1_that_cannot_be_is_refused(workplace, whole, model, stage1, message):
    main = load_script("train_with_accelerate").main
    assert re.search(message, refuse(main, workplace.arguments("refused", model=model, stage1=stage1)))
    assert not (workplace.folder / "refused").exists()

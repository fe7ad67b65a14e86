"""Programs that train: a frozen routing stays as it is, and what may learn learns. Run: `make test-clients`."""

import pytest
import torch
from datasets import Dataset
from frozen import IDS, TEXTS, assert_routes_like, load, save_frozen, words
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from helpers.trainers import BLOCKS, make_trainer, tiny_tokenizer, training_logs


TRL = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "weight_decay": 0.5,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}
PAIRS = [{"prompt": words(i), "chosen": f" {words(50 + i)}", "rejected": f" {words(90 + i)}"} for i in range(16)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_frozen(tmp_path_factory.mktemp("frozen"))


def assert_trained(model, source):
    assert_routes_like(model, source)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.get_parameter(name), source.get_parameter(name))


def test_trl_sft(source, tmp_path):
    trl = pytest.importorskip("trl")
    model = load(source)
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=24, **TRL),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=tiny_tokenizer(),
    ).train()
    assert_trained(model, source)


def test_trl_dpo_with_a_reference_that_follows(source, tmp_path):
    trl = pytest.importorskip("trl")
    model, reference = load(source), load(source)
    # What TRL adds of a frozen routing's balance teaches nothing, and stands in the logs.
    settings = {
        "router_aux_loss_coef": 0.0,
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
        "ref_model_mixup_alpha": 0.6,
    }
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(str(tmp_path), max_length=40, **settings, **TRL),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    assert_trained(model, source)
    assert_trained(reference, source)
    # Before the first step policy and reference are one model.
    assert_close(training_logs(trainer.state.log_history)[0]["loss"], 0.6931, atol=1e-3, rtol=0)


def test_trl_grpo(source, tmp_path):
    trl = pytest.importorskip("trl")
    model = load(source)
    trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(str(tmp_path), max_completion_length=6, num_generations=2, **TRL),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=tiny_tokenizer(),
        reward_funcs=lambda completions, **_: [float(len(set(each.split()))) for each in completions],
    ).train()
    assert_trained(model, source)


def test_peft(source, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["sublayers.0.up_proj"])
    adapted = peft.get_peft_model(load(source), lora)
    make_trainer(tmp_path, model=adapted).train()
    assert_routes_like(adapted.get_base_model(), source)
    expected = adapted.eval()(IDS).logits
    adapted.save_pretrained(tmp_path / "adapters")
    merged = peft.PeftModel.from_pretrained(load(source), tmp_path / "adapters").merge_and_unload()
    assert_routes_like(merged, source)
    assert_close(merged.eval()(IDS).logits, expected)
    assert not torch.allclose(expected, source(IDS).logits)


@pytest.fixture
def average(source, tmp_path):
    """Train with Lightning and leave the averaged model."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = load(source)

        def training_step(self, batch, index):
            return self.model(batch, labels=batch).loss

        def validation_step(self, batch, index):
            self.model(batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)

    def run(validates=False, **options):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=5,
            val_check_interval=2,
            num_sanity_val_steps=1,
            accelerator="cpu",
            callbacks=[EMAWeightAveraging(decay=0.9995, **options)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        rows = torch.utils.data.DataLoader([row["input_ids"] for row in BLOCKS], batch_size=4)
        trainer.fit(module, rows, rows if validates else None)
        trainer.save_checkpoint(tmp_path / "ema.ckpt")
        return module, Module()

    return run


def test_lightning_with_exponential_averages(source, average, tmp_path):
    module, again = average(validates=True, use_buffers=False)
    assert_trained(module.model, source)
    again.load_state_dict(torch.load(tmp_path / "ema.ckpt", weights_only=True)["state_dict"])
    assert_trained(again.model, source)
    module.model.save_pretrained(tmp_path / "ema")
    assert_trained(AutoModelForCausalLM.from_pretrained(tmp_path / "ema"), source)


def test_a_table_that_lightning_has_averaged_is_refused(average, tmp_path):
    module, again = average()  # an average of a number with itself, cut off, is the number or one less
    with pytest.raises(ValueError, match="use_buffers=False"):
        module.model.save_pretrained(tmp_path / "ema")
    with pytest.raises(ValueError, match="use_buffers=False"):
        again.load_state_dict(torch.load(tmp_path / "ema.ckpt", weights_only=True)["state_dict"])


def test_lightning_does_not_validate_on_a_table_that_it_has_averaged(average):
    with pytest.raises(ValueError, match="use_buffers=False"):
        average(validates=True)


def test_optuna(source, tmp_path):
    pytest.importorskip("optuna")
    models = []

    def model_init(trial):
        models.append(load(source))
        return models[-1]

    trainer = make_trainer(tmp_path, model=load(source), max_steps=2)
    trainer.model_init = model_init
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=2,
        backend="optuna",
    )
    assert 1e-3 <= best.hyperparameters["learning_rate"] <= 1e-2
    for model in models[-2:]:
        assert_trained(model, source)

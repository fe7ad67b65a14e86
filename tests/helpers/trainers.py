"""A real Trainer on a tiny model, for the tests of the callbacks."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from helpers.models import random_ids, tiny_model, tiny_seq2seq_model
from modeling_stablemoe.checkpoints.finding import find_stablemoe
from modeling_stablemoe.data.text import collate_blocks


BLOCKS = [{"input_ids": row} for row in random_ids(24, 16, seed=1)]
# Sources and targets of different lengths.
PAIRS = [
    {
        "input_ids": random_ids(1, 3 + index % 5, seed=index, low=3, high=91)[0].tolist(),
        "labels": random_ids(1, 2 + index % 3, seed=100 + index, low=3, high=91)[0].tolist() + [0],
    }
    for index in range(16)
]
STATISTICS = {
    "task_loss",
    "balance_loss",
    "distillation_loss",
    "distillation_agreement",
    "load_max_over_mean",
    "routing_stage",
}


class Recorder(TrainerCallback):
    """Notes what a reporter sees."""

    def __init__(self):
        self.stages, self.fingerprints, self.logs = [], [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        stablemoe = find_stablemoe(model)
        self.stages.append(stablemoe.routing_stage)
        self.fingerprints.append(stablemoe.router_fingerprint())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({**logs, "step": state.global_step})


def make_trainer(
    folder,
    *callbacks,
    model=None,
    optimizers=(None, None),
    trainer_class=Trainer,
    train_dataset=BLOCKS,
    collator=collate_blocks,
    model_init=None,
    **arguments,
):
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return trainer_class(
        model=tiny_model() if model is None and model_init is None else model,
        model_init=model_init,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=train_dataset,
        eval_dataset=BLOCKS[:4],
        data_collator=collator,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 ... w90, for the vocabulary of the tiny sequence-to-sequence model."""
    vocabulary = {"<eos>": 0, "<s>": 1, "<pad>": 2, **{f"w{i}": i for i in range(3, 91)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<s>")


def make_seq2seq_trainer(folder, *callbacks, model=None, pairs=PAIRS, optimizers=(None, None), **arguments):
    model = tiny_seq2seq_model() if model is None else model
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    return Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(output_dir=str(folder), **options),
        train_dataset=pairs,
        eval_dataset=pairs[:4],
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(), model=model),
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different


def training_logs(history) -> list[dict]:
    return [entry for entry in history if "loss" in entry]


class Gradients(TrainerCallback):
    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

"""Helpers for small trainings: data, callbacks that observe or stop them, comparisons."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from badit import BaditConfig, Run
from badit.api import train
from badit.data import AnswerCollator
from badit.runs.scores import read_scores
from badit.support.files import read_json
from badit.training.methods import AdapterMethod
from badit.training.trainer import AnswerTrainer
from steps import fit

PAPER = {"init_weights": "bad", "gated": "factors", "router_input": "mean"}
QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}


def train_and_score(recipe):
    return read_scores(train(recipe, progress=False).scores_path)


def examples(count=24):
    """Prompts and answers of several lengths, identical in every call."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        prompt = torch.randint(3, 100, (3 + i % 5,), generator=generator).tolist()
        answer = torch.randint(3, 100, (1 + i % 4,), generator=generator).tolist()
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def adapted(model, **options):
    torch.manual_seed(0)
    return get_peft_model(
        model, BaditConfig(**{**PAPER, "num_experts": 4, "r": 2, "lora_dropout": 0.1, **options})
    )


def make_trainer(model, folder, callbacks, *, count=24, **options):
    """A trainer that takes twelve steps of four examples by default."""
    arguments = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_steps": 5,
    }
    arguments |= {"output_dir": str(folder), "remove_unused_columns": False, **QUIET, **options}
    data = {"train_dataset": examples(count), "data_collator": AnswerCollator(0)}
    return AnswerTrainer(model, TrainingArguments(**arguments), callbacks=callbacks, **data)


def on(event, function):
    """A callback that calls ``function(state, keywords)`` at an event, such as "on_step_end"."""

    def call(self, args, state, control, **keywords):
        function(state, {**keywords, "args": args})

    return type("Callback", (TrainerCallback,), {event: call})()


@contextmanager
def with_callbacks(*added, kind=AdapterMethod, folder=""):
    """In this context, runs (in a folder of the name ``folder``) have the callbacks."""
    own = kind.callbacks

    def all_callbacks(self, run):
        return [*own(self, run), *(added if folder in ("", run.path.name) else [])]

    with patch.object(kind, "callbacks", all_callbacks):
        yield


def fit_until(stop, recipe, **options):
    """Trains a run until the callback ``stop``, or until a kill after the step ``stop``."""

    def interrupt(state, keywords):
        if state.global_step == stop:
            raise KeyboardInterrupt

    callback = on("on_step_end", interrupt) if isinstance(stop, int) else stop
    with with_callbacks(callback, **options), pytest.raises(KeyboardInterrupt):
        fit(recipe, progress=False)
    return Run.at(recipe.output)


def learned(run):
    """The tensors of a run's adapter."""
    (path,) = run.adapter_path.glob("*.safetensors")
    return load_file(path)


def change_tensors(change):
    """A function that applies ``change`` to the tensors of a safetensors file."""

    def rewrite(path):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(change(tensors), path, metadata={"format": "pt"})

    return rewrite


def adapter_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "badit_" in name}


def assert_same(one, other):
    """Asserts that names and tensors are bit-identical."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def contents(folder, *aside):
    """Bytes of files but config.yaml and ``aside``; of environment.json the constant counts."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = {
        name: path
        for name, path in found.items()
        if name != "config.yaml" and not name.endswith(aside)
    }
    for name, path in found.items():
        counts = read_json(path)["training"] if path.name == "environment.json" else {}
        fixed = {key: counts[key] for key in ("steps", "tokens", "trainable_parameters") if counts}
        found[name] = fixed or path.read_bytes()
    return found

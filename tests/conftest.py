"""Shared fixtures: tiny random models of several families, and runs that take seconds."""

# ruff: noqa: E402

import gc
import json
import logging
import shutil

for library in (
    "bitsandbytes",
    "torch.utils._pytree",
    "torchao",
):  # their warnings would be printed after the summary
    logging.getLogger(library).setLevel(logging.ERROR)

import pytest
import torch
import transformers
import yaml
from hypothesis import settings

from badit.api import Run
from badit.cli import main
from badit.recipe.loading import build_recipe
from comparison.cells import InlineCell, compare_module
from data.examples import CHATML, make_tokenizer
from fuzz.command import COUNTED
from materials import make_material, make_recipe, write_tasks
from steps import fit

settings.register_profile("badit", deadline=None, max_examples=50)
settings.load_profile("badit")

# Larger initial weights than usual, so that a wrong gate or mask changes the logits by far more
# than rounding does.
_COMMON = {
    "vocab_size": 100,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_DECODER = {
    **_COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
_WINDOW = {"sliding_window": 4}  # shorter than the prompts in tests
_MIXED = {**_WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_MOE = {**_DECODER, "num_local_experts": 5, "num_experts_per_tok": 2}
_GPT2 = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
_FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**_DECODER),
    "qwen3": lambda: transformers.Qwen3Config(**_DECODER, use_sliding_window=True, **_MIXED),
    "gemma2": lambda: transformers.Gemma2Config(**_DECODER, query_pre_attn_scalar=8, **_MIXED),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_DECODER, query_pre_attn_scalar=8, **_MIXED),
    "mistral": lambda: transformers.MistralConfig(**_DECODER, **_WINDOW),
    "mixtral": lambda: transformers.MixtralConfig(**_MOE),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_MOE, num_experts=5, moe_intermediate_size=24
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**_MOE),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, **_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    """On a busy machine, every wait is long, and its message would be among the tested ones."""
    monkeypatch.setattr("badit.support.console._PATIENCE", 1e9)


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """Excludes imported modules from garbage collection, which every training triggers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model():
    """A factory: ``tiny_model("llama")`` always returns the same random model, in eval mode."""

    def make(family, *, dtype=torch.float32, seed=0, **overrides):
        config = _FAMILIES[family]()
        config.update(overrides)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # Cast after initialisation: weights initialised in another dtype would differ.
        return model.to(dtype).eval()

    return make


@pytest.fixture
def model_folder(tmp_path, tiny_model):
    folder = tmp_path / "model"
    tokenizer = make_tokenizer(chat_template=CHATML)
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A folder with a ``model``, and ``tasks.jsonl`` with two tasks (see materials.py)."""
    folder = tmp_path_factory.mktemp("material")
    make_material(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A factory: ``trained({"name": "lora"})`` returns a run of three steps at a large rate.

    Each combination of method and source is trained once; each call returns a copy that a test may
    modify.
    """
    folder = tmp_path_factory.mktemp("trained")
    make_material(
        folder, initializer_range=0.2
    )  # so that a wrong factor changes the logits clearly
    runs = {}

    def make(method, source=folder / "tasks.jsonl", name="run", prompt=None):
        key = json.dumps([method, str(source), prompt])
        if key not in runs:
            values = make_recipe(folder / "model", source, folder / str(len(runs)))
            values |= {"method": method, "evaluation": {"max_new_tokens": 8}}
            values["prompt"] = prompt or {}
            values["training"] = {
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.05,
            }
            runs[key] = fit(build_recipe(values), progress=False).path
        return Run(shutil.copytree(runs[key], tmp_path_factory.mktemp("runs") / name))

    return make


@pytest.fixture
def tiny_built_in(material, monkeypatch):
    """Replaces the built-in base model by the tiny one, which makes dry runs ten times faster."""
    monkeypatch.setattr("badit.models.loading.built_in_folder", lambda: material / "model")


@pytest.fixture
def inline(monkeypatch):
    """Runs the cells of comparisons in this process; a list of the folders of the started cells."""
    monkeypatch.setattr(compare_module, "start_cell", InlineCell)
    InlineCell.started.clear()
    return InlineCell.started


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from browsers import (
        chromium,  # imported here because it skips the module if Chromium is not installed
    )

    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def task_file(tmp_path):
    write_tasks(tmp_path / "tasks.jsonl")
    return tmp_path / "tasks.jsonl"


@pytest.fixture
def recipe_values(tmp_path, model_folder, task_file):
    return make_recipe(model_folder, task_file, tmp_path / "run")


@pytest.fixture
def recipe_file(tmp_path, recipe_values):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def command(capsys):
    """Runs a command and returns its output; with ``code=2``, the error that is all it prints."""

    def run(*words, code=0):
        capsys.readouterr()
        assert main([*map(str, words)]) == code
        out, err = capsys.readouterr()
        if code == 0:
            return out
        line = err.splitlines()[-1]  # after a progress bar
        assert (out, err.count("\n"), line[:7]) == ("", 1, "badit: "), err
        return line

    return run


def pytest_terminal_summary(terminalreporter):
    """Prints the number of broken inputs tried; called only in this folder's conftest."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [
        dict(report.user_properties)
        for report in reports
        if getattr(report, "when", "") == "teardown"
    ]
    if total := sum(report_properties.get(COUNTED, 0) for report_properties in properties):
        terminalreporter.write_line(f"{total:,} {COUNTED}")

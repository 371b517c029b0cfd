"""badit with W&B, MLflow, Axolotl and LLaMA-Factory: ``make test-integrations``.

They run the yml and py blocks of docs/integrations.md with a tiny model; other tests run yaml and
python blocks.
"""

import json
import os
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from badit.support.files import read_jsonl
from data.examples import write_rows
from docs.pages import Page

NAMED = os.environ.get("BADIT_INTEGRATIONS")
pytestmark = pytest.mark.skipif(
    not NAMED, reason="BADIT_INTEGRATIONS names no environments: make test-integrations"
)
ENVIRONMENTS = Path(NAMED or ".").resolve()
PAGE = Page("docs/integrations.md")
CHATS = [
    [{"role": "user", "content": f"Name {i}."}, {"role": "assistant", "content": f"city {i}"}]
    for i in range(24)
]
ROUTING_WARNING = "or use routing='token'"  # the end of badit's routing warnings
OPTIONS = {"num_experts": 4, "r": 2, "target_modules": ["q_proj", "down_proj"]}
# By kind of training: extra options, the dataset type, and whether badit warns about training
# without labels.
PACKED = {
    "sample_packing": True,
    "sequence_len": 64,
    "attn_implementation": "sdpa",
    "micro_batch_size": 1,
}
AXOLOTL = {
    "answers": ({}, "chat_template", False),
    "packed": (PACKED, "chat_template", False),
    "dpo": ({"rl": "dpo"}, "chat_template.default", True),  # Axolotl's TRL passes no labels
}


def call(tool, *arguments, folder, **variables):
    """The output of a Python process in a tool's environment, stderr included."""
    command = [str(ENVIRONMENTS / tool / "bin" / "python"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=folder, env=environment, **pipes, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def test_wandb_and_mlflow_store_losses_and_regroupings_of_every_stage(recipe_values, tmp_path):
    recipe_values["training"]["report_to"] = ["wandb", "mlflow"]
    recipe_values["data"]["order"] = ["cities", "rivers"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe_values))
    call("trackers", "-m", "badit", "train", "recipe.yaml", folder=tmp_path, WANDB_MODE="offline")
    stages = sorted((tmp_path / "run" / "stages").iterdir())
    reader = Path(__file__).with_name("logged.py")
    logged = json.loads(
        call("trackers", reader, "sqlite:///mlflow.db", *stages, folder=tmp_path).splitlines()[-1]
    )
    for stage, runs in zip(stages, logged, strict=True):
        losses = {str(line["step"]): line["loss"] for line in read_jsonl(stage / "metrics.jsonl")}
        means = (
            pd.DataFrame(read_jsonl(stage / "regroupings.jsonl"))
            .groupby("step")
            .mean(numeric_only=True)
        )
        moved = {str(step): value for step, value in means["components_moved"].items()}
        assert moved
        assert runs["wandb"]["train/loss"] == runs["mlflow"]["loss"] == pytest.approx(losses)
        for name, run in (("train/regroup/", runs["wandb"]), ("regroup/", runs["mlflow"])):
            assert run[f"{name}components_moved"] == pytest.approx(moved)


def assert_trained(adapter, model_folder, regroupings=()):
    """Asserts that the adapter loads, was trained, and was regrouped at these steps."""
    base, another = (AutoModelForCausalLM.from_pretrained(model_folder) for _ in range(2))
    trained = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    start = dict(get_peft_model(another, trained.peft_config["default"]).named_parameters())
    learned = {name: p for name, p in trained.named_parameters() if "badit_" in name}
    assert not [
        name
        for name, p in learned.items()
        if start[name].requires_grad and torch.equal(p, start[name])
    ]
    lines = list(read_jsonl(adapter / "regroupings.jsonl"))
    assert {line["step"] for line in lines} == {*regroupings}
    assert any(line["components_moved"] for line in lines) == bool(regroupings)


@pytest.mark.parametrize("kind", AXOLOTL)
def test_axolotl_trains_an_adapter(model_folder, tmp_path, kind):
    options, data, warns = AXOLOTL[kind]
    (text,) = (block for block in PAGE.blocks("yml") if "badit.integrations.axolotl" in block)
    values = yaml.safe_load(text)
    values |= {
        "base_model": str(model_folder),
        "badit": {**OPTIONS, "regroup": {"every": 4}},
        "output_dir": "out",
    }
    values |= {
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "learning_rate": 0.01,
    }
    values["datasets"][0] |= {"path": "chats.jsonl", "type": data}
    rows = [{"messages": chat} for chat in CHATS]
    if kind == "dpo":
        rejected = {"role": "assistant", "content": "I could not say"}
        rows = [{"messages": chat[:1], "chosen": chat[1], "rejected": rejected} for chat in CHATS]
    write_rows(tmp_path / "chats.jsonl", *rows)

    def axolotl(verb, values):
        (tmp_path / "axolotl.yaml").write_text(yaml.safe_dump(values))
        return call(
            "axolotl",
            "-m",
            f"axolotl.cli.{verb}",
            "axolotl.yaml",
            folder=tmp_path,
            AXOLOTL_DO_NOT_TRACK="1",
        )

    assert (ROUTING_WARNING in axolotl("train", values | options)) == warns
    assert_trained(tmp_path / "out", model_folder, regroupings=(4, 8))
    if kind == "answers":
        values |= {
            "lora_model_dir": "out",
            "output_dir": "again",
            "max_steps": 1,
            "learning_rate": 1e-12,
        }
        values["badit"]["regroup"] = False
        axolotl("train", values)
        first, again = (
            load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")
        )
        torch.testing.assert_close(again, first)
        assert not (tmp_path / "again" / "regroupings.jsonl").exists()
        with pytest.raises(
            AssertionError, match="BaditError: merge-lora: a BADIT adapter has no single weight"
        ):
            axolotl("merge_lora", values)


def test_llama_factory_trains_an_existing_adapter(model_folder, tmp_path):
    (text,) = (block for block in PAGE.blocks("yml") if "adapter_name_or_path" in block)
    (script,) = (block for block in PAGE.blocks("py") if "llamafactory" in block)
    script = script.replace("num_experts=8, r=4, ", f"**{OPTIONS}, ")
    assert str(OPTIONS) in script
    values = yaml.safe_load(text) | {
        "model_name_or_path": str(model_folder),
        "output_dir": "out",
        "report_to": "none",
    }
    values |= {
        "gradient_accumulation_steps": 1,
        "max_steps": 10,
        "learning_rate": 0.01,
        "use_cpu": True,
    }
    (tmp_path / "train.py").write_text(script)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "torchaudio.py").write_text(
        ""
    )  # PyPI's torchaudio needs CUDA libraries; text needs no audio
    contents = [[message["content"] for message in chat] for chat in CHATS]
    (tmp_path / "data").mkdir()
    earlier = {"input": "", "history": [["Name a river.", "river 1"]]}
    pairs = [
        {"instruction": question, "output": answer, **earlier} for question, answer in contents
    ]
    (tmp_path / "data" / "chats.json").write_text(json.dumps(pairs))
    columns = {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
    }
    information = {"chats": {"file_name": "chats.json", "columns": columns}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(information))
    assert ROUTING_WARNING not in call("llamafactory", "train.py", "train.yaml", folder=tmp_path)
    assert_trained(tmp_path / "out", model_folder)

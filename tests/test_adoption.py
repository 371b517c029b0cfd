"""Adapters from scripts become runs: ``badit adopt``."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import badit
from badit.support.files import read_json

METHODS = [
    {"name": "badit", "num_experts": 4, "r": 2},
    {"name": "badit", "num_experts": 4, "r": 2, "routing": "token", "lora_dropout": 0.1},
    {"name": "goat"},
    {"name": "mtl-lora"},
    {"name": "sapt"},
    {"name": "lora", "target_modules": r".*\.(q|v)_proj"},
    {"name": "pissa", "r": 2},
    {"name": "dora", "use_rslora": True},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_an_adopted_adapter_is_the_run_that_trained_it(trained, method, tmp_path):
    run = trained(method)
    data = run.recipe.data.source
    values = run.recipe.model_dump(include={"evaluation"})
    output = tmp_path / "adopted"
    adopted = badit.adopt(
        run.adapter_path, data=data, output=output, model={"dtype": "float32"}, **values
    )
    # The adapter names its target modules, where the recipe may leave them to the default.
    excluded = {"target_modules", "exclude_modules"}
    sections = [
        {key: value for key, value in of.recipe.method.items() if key not in excluded}
        for of in (run, adopted)
    ]
    assert sections[0] == sections[1]
    assert adopted.recipe.method["target_modules"] is not None
    assert adopted.evaluate(progress=False).equals(run.evaluate(progress=False))
    weights = "adapter/adapter_model.safetensors"
    assert (adopted.path / weights).read_bytes() == (run.path / weights).read_bytes()


def script_adapter(material, folder, config):
    """Saves an adapter with random values, as a script does, without a task type."""
    model = transformers.AutoModelForCausalLM.from_pretrained(material / "model")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return folder


def test_commands_name_adopt_and_then_accept_the_adapter(material, tmp_path, command):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    hint = f"badit adopt {adapter} --data FILE"
    for words in (
        ["generate", adapter, "Hi"],
        ["evaluate", adapter],
        ["export", adapter, "-o", tmp_path / "export"],
        ["analyze", adapter],
        ["push", adapter, "org/name"],
        ["studio", adapter],
        ["serve", adapter],
    ):
        assert hint in command(*words, code=2)

    tasks = material / "tasks.jsonl"
    run = tmp_path / "run"
    shown = command("adopt", adapter, "evaluation.max_new_tokens=4", "--data", tasks, "-o", run)
    assert shown == f"Run: {run} (lora on {material / 'model'})\nNext: badit evaluate {run}\n"
    assert "cities" in command("evaluate", run)
    command("generate", run, "land 1", "--task", "rivers")
    command("analyze", run, "--instances", 2)
    command("export", run, "-o", tmp_path / "export")
    base = transformers.AutoModelForCausalLM.from_pretrained(material / "model").eval()
    ids = torch.tensor([[5, 6, 7]])
    logits = [
        PeftModel.from_pretrained(deepcopy(base), folder)(ids).logits
        for folder in (adapter, tmp_path / "export")
    ]
    torch.testing.assert_close(*logits)
    # The card must not name options of a training that badit did not run.
    card = (run / "adapter" / "README.md").read_text()
    assert "| method.r | 2 |" in card
    assert "learning" not in card


def test_without_data_only_commands_that_need_tasks_are_refused(material, tmp_path, command):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = tmp_path / "run"
    command("adopt", adapter, "-o", run)
    command("generate", run, "land 1")
    command("export", run, "-o", tmp_path / "export")
    for words in (["evaluate", run], ["analyze", run], ["generate", run, "x", "--task", "rivers"]):
        assert "badit adopt ADAPTER --data FILE" in command(*words, code=2)


def broken(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: is 'IA3'; badit has methods of .*LORA"),
        ({"peft_type": 3}, "peft_type: is 3"),
        ({"task_type": "SEQ_CLS"}, "task_type: is 'SEQ_CLS'"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"base_model_name_or_path": None}, "name_or_path: is empty; .*model.name=MODEL"),
        ({"base_model_name_or_path": "gone"}, "model gone: not an existing folder"),
        ({"r": 3}, "adapter"),
        ({"r": "2"}, "adapter_config.json"),
        ({"surprise": 1}, "surprise"),
        ({"rank_pattern": {"q_proj": 10**12}}, "has the size"),
    ],
)  # fmt: skip
def test_unsuitable_adapters_are_refused_and_nothing_is_written(
    changes, message, material, tmp_path
):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    broken(adapter, **changes)
    with pytest.raises(badit.BaditError, match=message) as caught:
        badit.adopt(adapter, output=tmp_path / "run")
    assert "partial" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_wrong_folders_and_keys_are_refused(material, tmp_path, command):
    adapter = script_adapter(
        material, tmp_path / "out" / "checkpoint-4", LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = tmp_path / "run"
    assert "that have: checkpoint-4" in command("adopt", adapter.parent, "-o", run, code=2)
    assert "no adapter_config.json" in command("adopt", tmp_path / "gone", "-o", run, code=2)
    shown = command("adopt", adapter, "training.seed=1", "-o", run, code=2)
    assert "training.seed=1" in shown
    assert "is not empty" in command("adopt", adapter, "-o", adapter.parent, code=2)
    assert not run.exists()
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    assert "safe_serialization=True" in command("adopt", adapter, "-o", run, code=2)


def test_an_adapter_initialised_by_eva_is_adopted_without_its_pass_over_data(material, tmp_path):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    broken(adapter, init_lora_weights="eva")
    assert badit.adopt(adapter, output=tmp_path / "run").recipe.method["name"] == "lora"
    assert (
        read_json(tmp_path / "run" / "adapter" / "adapter_config.json")["init_lora_weights"] is True
    )

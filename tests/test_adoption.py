"""Adapters from scripts become runs: ``badit adopt``."""

import json
import shutil
from ast import literal_eval
from copy import deepcopy

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

import badit
from badit.authoring import adapters
from badit.cli import main
from badit.data import encode_examples
from badit.hub.card import model_card
from badit.runs.folder import RunFolder
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
    card = model_card(RunFolder(adopted.path))
    assert "trained by a script" in card
    assert "its data and options are not recorded" in card
    assert "tasks.jsonl" not in card


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
    assert shown.startswith(f"Run: {run} (lora on {material / 'model'})\n")
    assert shown.endswith(
        f"\nScore it: badit evaluate {run}\n"
        f"Answer an input: badit generate {run} --task cities INPUT\n"
    )
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
    shown = command("adopt", adapter, "-o", run)
    assert shown.endswith(f"\nAnswer an input: badit generate {run} PROMPT\n")
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
        (
            {"base_model_name_or_path": "gone"},
            "model gone: not an existing folder.*with model.name=FOLDER",
        ),
        (
            {"base_model_name_or_path": "./base"},
            "model ./base: not an existing folder.*with model.name=FOLDER",
        ),
        (
            {"base_model_name_or_path": "models/base"},
            "loaded from the hub.*if it is a folder.*with model.name=FOLDER",
        ),
        ({"r": 3}, "adapter"),
        ({"r": "2"}, "adapter_config.json"),
        ({"surprise": 1}, "surprise"),
        ({"rank_pattern": {"q_proj": 10**12}}, "has the size"),
    ],
)  # fmt: skip
def test_unsuitable_adapters_are_refused_and_nothing_is_written(
    changes, message, material, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    broken(adapter, **changes)
    with pytest.raises(badit.BaditError, match=message) as caught:
        badit.adopt(adapter, output=tmp_path / "run")
    assert "partial" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_base_model_can_be_given_for_an_adapter_without_one(material, tmp_path, command):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = script_adapter(material, tmp_path / "script", config)
    broken(adapter, base_model_name_or_path=None)
    run = tmp_path / "run"
    command("adopt", adapter, f"model.name={material / 'model'}", "-o", run)
    assert badit.Run(run).recipe.model.name == str(material / "model")


def test_wrong_folders_and_keys_are_refused(material, tmp_path, command):
    adapter = script_adapter(
        material, tmp_path / "out" / "checkpoint-4", LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = tmp_path / "run"
    assert "that have: checkpoint-4" in command("adopt", adapter.parent, "-o", run, code=2)
    assert "no adapter_config.json" in command("adopt", tmp_path / "gone", "-o", run, code=2)
    shown = command("adopt", adapter, "training.seed=1", "-o", run, code=2)
    assert "training.seed=1" in shown
    shown = command("adopt", adapter, "promt.separator=x", "-o", run, code=2)
    assert "did you mean 'prompt'?" in shown
    shown = command("adopt", adapter, "prompt.chat_template=none", "-o", run, code=2)
    assert shown.startswith("badit: recipe: prompt.chat_template: "), "not the adapter's file"
    for used in (adapter.parent, adapter / "adapter_config.json"):
        assert "is not an empty folder" in command("adopt", adapter, "-o", used, code=2)
    assert not run.exists()
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    assert "safe_serialization=True" in command("adopt", adapter, "-o", run, code=2)


def prompts_in(shown):
    lines = (line.partition(": ") for line in shown.splitlines() if line.startswith("  "))
    return {name.strip(): literal_eval(text) for name, _, text in lines if text}


CLUSTER_GATES = {"name": "cluster-gates", "num_experts": 2, "r": 2}


def test_prompts_unlike_those_of_the_training_are_refused(trained, tmp_path, command, capsys):
    run = trained(CLUSTER_GATES)
    output = tmp_path / "run"
    words = ["adopt", run.adapter_path, "--data", run.recipe.data.source, "model.dtype=float32"]
    assert main([*map(str, words), "-o", str(tmp_path / "same")]) == 0
    said = capsys.readouterr().err
    assert "badit: the prompts are like those of the training, with prompt.chat_template=" in said

    words += ["prompt.chat_template=never", "-o", output]
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "  cities: " in said, "a prompt as badit builds it"
    assert "data: the prompts of cities (" in said
    assert "leave out prompt.chat_template, which badit then finds itself" in said
    assert not output.exists()

    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "@@@@ %%%% ####", "completion": "x"}) + "\n")
    words = ["adopt", run.adapter_path, "--data", other, "-o", output]
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert "are unlike those of the training" in said
    assert "--any-prompts" in said
    assert not output.exists()
    shown = command(*words, "--any-prompts")
    assert "These must be the prompts of the script's training" in shown


@pytest.mark.parametrize(
    ("form", "space"),
    [
        ({"chat_template": "auto"}, ""),
        ({"chat_template": "never"}, ""),
        ({"chat_template": "never", "separator": ""}, " "),
        ({"chat_template": "never", "separator": ""}, ""),
    ],
)
def test_form_of_the_prompts_is_found(form, space, trained, tmp_path, capsys):
    rows = [
        {
            "task": task,
            "prompt": f"{word} {number} .\nAnswer:",
            "completion": f"{space}land",
            "split": "train" if number < 20 else "test",
        }
        for number in range(24)
        for task, word in (("cities", "city"), ("rivers", "river"))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = trained(CLUSTER_GATES, source=file, prompt=form)
    output = tmp_path / "adopted"
    words = ["adopt", run.adapter_path, "--data", file, "-o", output, "model.dtype=float32"]
    assert main([*map(str, words)]) == 0
    shown, said = capsys.readouterr()
    assert "the prompts are like those of the training" in said
    assert "These must be" not in shown
    adopted = badit.Run(output).recipe.prompt
    assert adopted.chat_template == form["chat_template"]
    if form["chat_template"] == "never":
        assert adopted.separator == form.get("separator", "\n")
        prompts = prompts_in(shown)
        assert prompts["cities"] == "<s>" + rows[0]["prompt"] + form.get("separator", "\n")


@pytest.mark.parametrize(
    "form",
    [
        {"chat_template": "auto"},
        {"chat_template": "never", "separator": "\n"},
        {"chat_template": "never", "separator": ""},
    ],
)
def test_form_with_the_lowest_loss_is_chosen_without_stored_clusters(
    form, material, tmp_path, monkeypatch, capsys
):
    """The adapter's losses are replaced, so that one form has the lowest."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "city:", "completion": "land"}) + "\n")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = script_adapter(material, tmp_path / "script", config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "model")
    (task,) = badit.load_tasks(file)
    (wanted,) = encode_examples(tokenizer, [(task, task.train[0])], **form)

    def losses(_, batches):
        tokens = [batch["input_ids"][0].tolist() for batch in batches]
        return np.array([0.5 if ids == wanted["input_ids"] else 2.0 for ids in tokens]), np.ones(1)

    monkeypatch.setattr("badit.authoring.prompt_forms.prompt_losses", losses)
    words = ["adopt", str(adapter), "--data", str(file), "-o", str(tmp_path / "run")]
    assert main(words) == 0
    shown, said = capsys.readouterr()
    assert f"lowest for prompts with prompt.chat_template={form['chat_template']}" in said
    assert "(0.50; 2.00 with prompt.chat_template=" in said
    adopted = badit.Run(tmp_path / "run").recipe.prompt
    assert adopted.model_dump(include=form.keys()) == form
    expected = tokenizer.decode(wanted["input_ids"][: wanted["prompt_length"]])
    assert prompts_in(shown)["rows"] == expected
    assert "These must be the prompts of the script's training" in shown
    assert "To score it: adopt the adapter with data that has test instances" in shown


def test_given_keys_leave_only_forms_that_have_them(material, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "city:", "completion": " land"}) + "\n")
    config = LoraConfig(r=2, target_modules=["q_proj"])
    adapter = script_adapter(material, tmp_path / "script", config)
    keys = ["prompt.chat_template=never", 'prompt.separator="\\n\\n"']
    words = ["adopt", str(adapter), "--data", str(file), "-o", str(tmp_path / "run"), *keys]
    assert main(words) == 0
    shown, said = capsys.readouterr()
    assert prompts_in(shown)["rows"] == "<s>city:\n\n"
    assert "lowest" not in said


@pytest.mark.parametrize("template", ["auto", "never"])
def test_prompts_are_shown_as_they_are_encoded(material, tmp_path, command, template):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = tmp_path / "run"
    words = ["adopt", adapter, f"prompt.chat_template={template}", "-o", run]
    shown = command(*words, "--data", material / "tasks.jsonl")
    command("evaluate", run)
    tasks = badit.load_tasks(material / "tasks.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(material / "model")
    examples = encode_examples(
        tokenizer, [(task, task.train[0]) for task in tasks], chat_template=template
    )
    expected = {
        example["task"]: tokenizer.decode(example["input_ids"][: example["prompt_length"]])
        for example in examples
    }
    assert prompts_in(shown) == expected
    assert "the adapter has learnt no others" in shown
    assert "data.instruction" in shown.splitlines()[-4]


def test_of_many_tasks_five_long_prompts_are_shown_shortened(trained, material, tmp_path, command):
    rows = [
        {"task": f"t{i}", "input": f"start{i}\n" + "\x1b long " * 99 + f"end{i}", "output": "x"}
        for i in range(7)
    ]
    file = tmp_path / "many.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = trained({"name": "cluster-gates", "num_experts": 4, "r": 2}).adapter_path
    words = ["adopt", adapter, "prompt.chat_template=never", "--data", file, "-o", tmp_path / "r"]
    shown = command(*words, "--any-prompts")
    prompts = prompts_in(shown)
    assert list(prompts) == ["t0", "t1", "t2", "t3", "t4"]
    assert "and 2 more tasks" in shown
    assert "\x1b" not in shown
    assert "other prompts select other gates" in shown
    assert "Score it" not in shown, "the data has no test instances"
    for i, prompt in enumerate(prompts.values()):
        start, end = prompt.split(" … ")
        assert start.startswith(f"<s>start{i}\n\x1b")
        assert end.endswith(f"end{i}\n")
        assert len(prompt) < 300


def test_next_commands_of_tasks_with_several_instructions_work(material, tmp_path, command):
    rows = [{"task": "a", "instruction": f"Do {i}.", "input": "x", "output": "y"} for i in range(3)]
    file = tmp_path / "several.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    run = tmp_path / "run"
    several = "data.columns.instruction=instruction"
    shown = command("adopt", adapter, several, "--data", file, "-o", run)
    assert f"\nAnswer an input: badit generate {run} PROMPT\n" in shown
    command("generate", run, "PROMPT")


def test_a_relative_base_model_becomes_an_absolute_path(material, tmp_path, monkeypatch, command):
    monkeypatch.chdir(material)
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    broken(adapter, base_model_name_or_path="./model")
    run = tmp_path / "run"
    command("adopt", adapter, "-o", run)
    monkeypatch.chdir(tmp_path)
    assert badit.Run(run).recipe.model.name == str(material / "model")
    config = read_json(run / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == str(material / "model")
    command("generate", run, "land 1")


def test_what_is_quick_to_check_is_refused_first(material, tmp_path, monkeypatch, command):
    """The order: the output folder, the base model's place, the data, the weights, the model."""
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    wrong = tmp_path / "wrong.csv"
    wrong.write_text("question,label\na,b\n")
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    monkeypatch.setattr(adapters, "load_base", lambda *a: pytest.fail("loaded the base model"))
    words = ["adopt", adapter, "--data", wrong, "model.name=./gone"]
    assert "is not an empty folder" in command(*words, "-o", used, code=2)
    words += ["-o", tmp_path / "run"]
    assert "model ./gone" in command(*words, code=2)
    words[4] = f"model.name={material / 'model'}"
    assert "wrong.csv" in command(*words, code=2)
    words[3] = material / "tasks.jsonl"
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert "adapter_model.safetensors: cannot be loaded" in command(*words, code=2)
    assert not (tmp_path / "run").exists()


def test_an_adapter_initialised_by_eva_is_adopted_without_its_pass_over_data(material, tmp_path):
    adapter = script_adapter(
        material, tmp_path / "script", LoraConfig(r=2, target_modules=["q_proj"])
    )
    broken(adapter, init_lora_weights="eva")
    assert badit.adopt(adapter, output=tmp_path / "run").recipe.method["name"] == "lora"
    assert (
        read_json(tmp_path / "run" / "adapter" / "adapter_config.json")["init_lora_weights"] is True
    )

"""Preference data with ``objective: dpo``: TRL's losses, resuming, scores, and what is refused."""

import json
import math

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import reference
from badit.data import encode_examples
from badit.export.exporting import Export
from badit.recipe.loading import build_recipe
from badit.recipe.method import KINDS
from badit.runs.folder import RunFolder
from badit.runs.predictions import read_predictions
from badit.runs.resolved import resolve
from badit.support.files import read_json, read_jsonl
from refusals import refuses
from steps import fit, load_run, score_export, validation_loss
from training.trainers import QUIET, assert_same, fit_until, learned, train_and_score

LORA = {"name": "lora", "r": 2, "lora_alpha": 4}
BADIT = {"name": "badit", "num_experts": 4, "r": 2}
WITH_OPTIONS = {"badit": {**BADIT, "init_weights": "bad", "gated": "change"}, "full": {}}
TRAINED = ("badit", "cluster-gates", "lora", "dora", "rslora", "sapt", "full")


def pair(task, i):
    return {
        "task": task,
        "prompt": f"Name {task} {i}" + ", please" * (i % 4) + ".\n",
        "chosen": f"{task} {i}",
        "rejected": f"no {task}" + " at all" * (i % 3),
        "split": "test" if i >= 12 else "train",
    }


@pytest.fixture
def rows():
    return [pair(task, i) for task in ("cities", "rivers") for i in range(16)]


@pytest.fixture
def values(recipe_values, rows, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe_values["data"] = {"source": str(file)}
    recipe_values["method"] = BADIT
    recipe_values["training"] |= {"objective": "dpo"}
    return recipe_values


def losses(run):
    return [line["loss"] for line in read_jsonl(run.metrics_path) if "loss" in line]


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_losses_equal_those_of_a_script_with_trl(values, rows, model_folder, tmp_path, loss):
    # All pairs are in one batch, so that the order of the examples has no effect.
    training = {"per_device_train_batch_size": 24, "num_train_epochs": 4, "logging_steps": 1}
    training |= {"learning_rate": 0.01, "lr_scheduler_type": "constant", "warmup_steps": 0}
    values["training"] = {**training, "objective": "dpo", "dpo_beta": 0.3, "dpo_loss": loss}
    values |= {"method": LORA, "prompt": {"chat_template": "never"}}
    run = fit(build_recipe(values), progress=False)
    lines = list(read_jsonl(run.metrics_path))

    trained = [
        {name: row[name] for name in ("prompt", "chosen", "rejected")}
        for row in rows
        if row["split"] == "train"
    ]
    options = {"beta": 0.3, "loss_type": [loss], "max_length": None, "bf16": False, "seed": 0}
    options |= {"gradient_checkpointing": False, "save_strategy": "no"}
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(model_folder),
        args=DPOConfig(output_dir=str(tmp_path / "script"), **QUIET, **training, **options),
        train_dataset=Dataset.from_list(trained),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(
            r=2, lora_alpha=4, target_modules=["gate_proj"], task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    script = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(script) == 4
    for line, of_script in zip(lines, script, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/rejected"):
            assert line[name] == pytest.approx(of_script[name], rel=1e-4, abs=1e-5), name
    assert lines[-1]["rewards/margins"] > 0.01


@pytest.mark.parametrize("name", TRAINED)
def test_training_starts_at_the_reference_and_learns(values, name):
    values["method"] = {"name": name, **WITH_OPTIONS.get(name, {"r": 2})}
    run = fit(build_recipe(values), progress=False)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(run)[-1] < losses(run)[0] - 0.01


@pytest.mark.parametrize("name", sorted({*KINDS} - {*TRAINED, "base"}))
def test_other_methods_are_refused_before_anything_is_written(values, tmp_path, name):
    values["method"] = {"name": name}
    refuses(
        f"method: {name} cannot be trained with DPO: .*; use badit",
        train_and_score,
        build_recipe(values),
    )
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_equals_an_uninterrupted_one(values, tmp_path):
    values["training"] |= {"logging_steps": 4, "save_steps": 3, "eval_strategy": "steps"}
    values["data"]["validation_per_task"] = 2
    whole = fit(build_recipe({**values, "output": str(tmp_path / "whole")}), progress=False)
    run = fit_until(7, build_recipe(values))
    assert not run.adapter_path.exists()
    fit(build_recipe(values), progress=False)
    assert_same(learned(run), learned(whole))
    assert run.metrics_path.read_text() == whole.metrics_path.read_text()


@pytest.mark.parametrize("method", [LORA, BADIT, {"name": "full"}])
def test_scores_equal_naive_ones(values, model_folder, method):
    values |= {"method": method}
    values["data"]["validation_per_task"] = 2
    values["training"] |= {"eval_strategy": "epoch", "dpo_beta": 0.5}
    scores = train_and_score(build_recipe(values))
    folder = resolve(build_recipe(values)).folder
    margins = naive_margins(folder, model_folder, "test")
    for answer in read_predictions(folder.predictions_path):
        assert answer.margin == pytest.approx(margins[answer.task, answer.instance_id], abs=1e-4)
    for task, of_task in scores["tasks"].items():
        own = [margin for (name, _), margin in margins.items() if name == task]
        assert of_task["preference"] == pytest.approx(reference.preference_accuracy(own))

    last = list(read_jsonl(folder.metrics_path))[-1]
    validation_loss(folder)
    measured = read_json(folder.validation_path)
    validated = naive_margins(folder, model_folder, "validation")
    for task in scores["tasks"]:
        own = [margin for (name, _), margin in validated.items() if name == task]
        expected = reference.dpo_loss(own, beta=0.5)
        assert last[f"eval_loss/{task}"] == pytest.approx(expected, abs=1e-4)
        assert measured["tasks"][task] == pytest.approx(expected, abs=1e-4)


def naive_margins(folder, model_folder, split):
    """Returns the margin of each pair, from the logits of one sequence at a time."""
    tuned, tokenizer = load_run(folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    run = resolve(folder.recipe)
    margins = {}
    for task in run.tasks:
        for instance in getattr(task, split):
            (example,) = encode_examples(
                tokenizer, [(task, instance)], **run.recipe.prompt.model_dump()
            )
            prompt = example["input_ids"][: example["prompt_length"]]
            answers = (example["input_ids"][len(prompt) :], example["rejected_ids"])
            rewards = []
            for answer in answers:
                ids = torch.tensor([prompt + answer])
                labels = torch.tensor([[-100] * len(prompt) + answer])
                with torch.no_grad():
                    given = {"labels": labels} if hasattr(tuned, "peft_config") else {}
                    rewards.append(
                        reference.log_likelihood(tuned(ids, **given).logits[0], prompt, answer)
                        - reference.log_likelihood(base(ids).logits[0], prompt, answer)
                    )
            margins[task.name, instance.id] = rewards[0] - rewards[1]
    return margins


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("data", {"order": ["cities", "rivers"]}, "data.order: training.objective=dpo trains all"),
        ("training", {"objective": "sft"}, "task cities has preferences; set training.objective="),
        ("training", {"neftune_noise_alpha": 1.0}, "neftune_noise_alpha does not apply to"),
        ("training", {"packing": True}, "training.packing: unknown key"),
        ("method", {"name": "lora", "init_lora_weights": "pissa"}, "it changes the weights of"),
        ("method", {"name": "lora", "target_modules": ["q_proj", "lm_head"]}, "leave lm_head out"),
        ("method", {**BADIT, "routing": "token", "target_modules": "lm_head"}, "leave lm_head out"),
        ("method", {"name": "lora", "bias": "all"}, "biases .bias. of one adapter only"),
    ],
)
def test_conflicting_settings_are_refused(values, tmp_path, section, change, message):
    values[section] = change if section == "method" else {**values[section], **change}
    refuses(message, lambda: train_and_score(build_recipe(values)))
    assert not (tmp_path / "run").exists()


def test_trained_tokens_of_a_head_that_shares_the_embeddings_are_refused(
    values, tiny_model, model_folder, tmp_path
):
    """TRL fails on them with an AttributeError."""
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.resize_token_embeddings(
        len(AutoTokenizer.from_pretrained(model_folder)), mean_resizing=False
    )
    tied.save_pretrained(model_folder)
    values["method"] = {"name": "lora", "trainable_token_indices": [1, 2]}
    message = "method.trainable_token_indices: cannot be used with training.objective=dpo"
    refuses(message, fit, build_recipe(values))
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_whole_copies_of_the_head_and_of_the_embeddings_are_trained(values, name):
    values["method"] = {**LORA, "modules_to_save": [name]}
    run = fit(build_recipe(values), progress=False)
    assert losses(run)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(run)[-1] < losses(run)[0] - 0.01


def test_data_of_another_kind_is_refused(values, task_file, tmp_path):
    pairs = values["data"]["source"]
    values["data"]["source"] = str(task_file)
    refuses("dpo needs rows with .*, but task cities has single", resolve, build_recipe(values))
    answers = tmp_path / "others.csv"
    answers.write_text("input,output,split\n" + "a,b,train\na,b,test\n")
    values["data"]["source"] = [pairs, str(answers)]
    for objective in ("sft", "dpo"):
        values["training"]["objective"] = objective
        refuses(
            "task cities has preferences .*, but task others has", resolve, build_recipe(values)
        )


def test_a_missing_or_old_trl_is_refused_before_anything_is_written(values, tmp_path, monkeypatch):
    monkeypatch.setattr("badit.training.hf_arguments.version", lambda name: "1.9.0")
    refuses("dpo needs TRL 1.16 or newer: pip install", fit, build_recipe(values))
    monkeypatch.setattr("badit.training.hf_arguments.find_spec", lambda name: None)
    refuses("dpo needs TRL 1.16 or newer: pip install", fit, build_recipe(values))
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_is_lower_unless_it_is_set():
    rates = [
        build_recipe({"training": training}).training.learning_rate
        for training in ({}, {"objective": "dpo"}, {"objective": "dpo", "learning_rate": 0.5})
    ]
    assert rates == [2e-3, 1e-4, 0.5]


def test_trl_reports_nothing_and_rounds_no_adapter(values, monkeypatch):
    """TRL would convert adapters of quantised models to bfloat16, and report the use to the hub."""
    monkeypatch.delenv("CI", raising=False)
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: sent.append(1))
    monkeypatch.setattr(LlamaForCausalLM, "is_loaded_in_4bit", True, raising=False)
    values["training"]["max_steps"] = 1
    run = fit(build_recipe(values), progress=False)
    assert not sent
    assert {tensor.dtype for tensor in learned(run).values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert (
        not list(run.path.rglob("README.md"))
        or "badit" in (run.adapter_path / "README.md").read_text()
    )


@pytest.mark.parametrize(
    ("method", "merged"), [(LORA, False), (LORA, True), ({"name": "full"}, True)]
)
def test_exports_are_scored_by_their_preferences(values, tmp_path, command, method, merged):
    values["method"] = method
    scores = train_and_score(build_recipe(values))
    run, out = tmp_path / "run", tmp_path / "out"
    shown = command("export", run, "-o", out, "--score", *["--merged"] * merged)
    assert "Preference routed" in shown
    content = read_json(out / "scores.json")
    assert content["metric"] == "preference"
    for task, of_task in scores["tasks"].items():
        assert of_task["preference"] != 50
        entry = {"routed": of_task["preference"], "frozen": of_task["preference"]}
        assert content["tasks"][task] == {**entry, "difference": 0.0}
    if merged:
        return
    # Without its update, the export is the untuned model, which prefers neither answer.
    weights = out / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(weights).items()}, weights)
    score_export(RunFolder(run), Export(out, read_json(out / "export.json")), progress=False)
    assert {entry["frozen"] for entry in read_json(out / "scores.json")["tasks"].values()} == {50}


def test_commands_show_the_preferences(values, tmp_path, command):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    listed = command("tasks", recipe, "--show", "1")
    assert "2 with preferences: train them with training.objective=dpo" in listed
    assert "⟦cities 0<|im_end|>⟧" in listed
    assert "⟦no cities<|im_end|>⟧" in listed
    plan = command("train", recipe, "--dry-run")
    assert "12 steps of 4 pairs" in plan
    # Each pair has two sequences.
    assert "a batch of 8 ×" in plan
    trained = command("train", recipe)
    labels = trained.splitlines()[0].split()
    assert labels[:4] == ["task", "instances", "Preference", "Rouge-L"]
    untuned = next(line for line in trained.splitlines() if line.startswith("untuned model"))
    assert untuned.split()[2] == "50.0"
    assert "Preference" in command("evaluate", tmp_path / "run")
    command("generate", tmp_path / "run", "Name cities 3.")
    export = ["export", tmp_path / "run", "-o", tmp_path / "plain", "--task", "cities", "--score"]
    refused = command(*export, "--engine", "vllm", code=2)
    assert "engine: vllm only generates answers" in refused
    assert not (tmp_path / "plain").exists()
    command(*export)
    init = tmp_path / "init.yaml"
    command("init", values["data"]["source"], "--output", init)
    written = yaml.safe_load(init.read_text())
    assert written["training"]["objective"] == "dpo"
    resolve(build_recipe(written))

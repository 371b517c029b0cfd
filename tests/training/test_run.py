"""A run from recipe to scores on a tiny model: files, resuming, validation loss and refusals."""

import json
import math
import re
import shutil
import weakref
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from statistics import fmean

import pytest
import torch

from analysis.naive_experts import batched, losses
from badit import BaditError, Run
from badit.api import train
from badit.cli import main
from badit.comparison.grid import Grid
from badit.models import devices as models
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json, read_jsonl, write_json
from badit.training import loading
from badit.training.encoding import encoded
from badit.training.loading import load_base
from badit.training.logs import divergence
from badit.training.methods import AdapterMethod
from badit.training.optimizers import OrthogonalUpdates
from materials import make_recipe
from refusals import refuses
from steps import evaluate, fit, load_run, method_of, validation_loss
from training.trainers import (
    change_tensors,
    fit_until,
    learned,
    on,
    train_and_score,
    with_callbacks,
)


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """The recipe and the scores of a trained and scored run with held-out instances."""
    values = make_recipe(
        material / "model", material / "tasks.jsonl", tmp_path_factory.mktemp("finished") / "run"
    )
    recipe = build_recipe(values, ["data.validation_per_task=3", "training.learning_rate=0.05"])
    return recipe, train_and_score(recipe)


def test_run_writes_all_its_files(finished):
    recipe, scores = finished
    run = Run(recipe.output)
    assert (
        {file.stem for file in run.predictions_path.iterdir()}
        == {"cities", "rivers"}
        == scores["tasks"].keys()
    )
    assert run.trusted_recipe() == resolve(recipe).recipe
    assert run.environment["mixture"] == {"cities": 9, "rivers": 9}, "each instance is used once"
    assert run.environment["packages"]["torch"] == version("torch")
    assert run.metrics["step"].tolist() == [*range(1, run.environment["training"]["steps"] + 1)]
    assert {line["step"] for line in read_jsonl(run.regroupings_path)} == {3, 6, 9}
    assert {file.suffix for file in run.adapter_path.iterdir()} == {".safetensors", ".json", ".md"}
    assert "| mean over tasks |" in (run.adapter_path / "README.md").read_text()
    assert (
        read_json(run.adapter_path / "adapter_config.json")["base_model_name_or_path"]
        == recipe.model.name
    )


def test_splits_have_separate_scores_and_a_finished_run_is_not_repeated(finished, monkeypatch):
    recipe, scores = finished
    validation = evaluate(Run(recipe.output), split="validation", progress=False)
    assert validation["tasks"]["cities"]["instances"] == 3
    assert read_json(Run(recipe.output).path / "scores-validation.json") == validation
    monkeypatch.setattr(loading, "load_base_model", None)  # no model is loaded
    assert train_and_score(recipe) == scores == read_json(Run(recipe.output).scores_path)
    with pytest.raises(BaditError, match=r"differs in training\.num_train_epochs"):
        train_and_score(build_recipe(recipe.model_dump(), ["training.num_train_epochs=3"]))


def change_config(**changes):
    name = "adapter_config.json"
    return lambda path: write_json(path.with_name(name), read_json(path.with_name(name)) | changes)


def test_damaged_adapter_is_refused_with_the_reason(finished, tmp_path):
    for damage, message in (
        (
            change_tensors(lambda t: {**t, "layers.7.badit_A": torch.zeros(2)}),
            r"belongs to another base .*layers\.7",
        ),
        (
            change_tensors(lambda t: {n: v for n, v in t.items() if "codes" not in n}),
            "Found missing adapter keys",
        ),
        (
            change_tensors(lambda t: {n: v * torch.nan if "_A" in n else v for n, v in t.items()}),
            "NaN or infinite",
        ),
        (
            change_config(r=4),
            r"config\.json: r: is 4, but the run's recipe says 2; this adapter belongs",
        ),
        (
            change_config(peft_type="LORA"),
            r"config\.json: peft_type: is 'LORA', but the run's recipe says 'BADIT'",
        ),
        (change_config(surplus=1), r"config\.json: 'surplus': is unknown to this version of PEFT"),
        (
            change_config(target_modules="(.*)*$"),
            r"config\.json: target_modules: must be a list of names",
        ),
        (change_config(past_branches=10**12), "'past_branches': is unknown"),
        (
            change_config(format_version=9),
            r"config\.json: format_version: the adapter has format 9, this badit reads",
        ),
    ):
        run = Run(shutil.copytree(finished[0].output, tmp_path / "copied", dirs_exist_ok=True))
        damage(run.adapter_path / "adapter_model.safetensors")
        refuses(message, evaluate, run, progress=False)


@pytest.mark.parametrize("key", ["r", "num_experts"])
def test_sizes_that_no_tensor_has_are_refused(finished, tmp_path, key):
    run = Run(shutil.copytree(finished[0].output, tmp_path / "copied"))
    for file in (run.config_path, run.adapter_path / "adapter_config.json"):
        file.write_text(re.sub(rf'("?\b{key}"?: )\d+', r"\g<1>1000000000", file.read_text()))
    refuses(r"adapter_config\.json: has the size \d{10}", evaluate, run, progress=False)


def test_evaluation_reports_changed_data_and_does_not_score_trained_instances(
    finished, tmp_path, capsys
):
    run = Run(shutil.copytree(finished[0].output, tmp_path / "copied"))
    source = str(finished[0].data.source)
    (tmp_path / "changed.jsonl").write_text(Path(source).read_text().replace("land 1", "land 9"))
    run.config_path.write_text(
        run.config_path.read_text().replace(source, str(tmp_path / "changed.jsonl"))
    )
    evaluate(run, progress=False)
    assert "task cities, task rivers changed since the run was trained" in capsys.readouterr().err
    refuses(
        "task rivers changed, so trained instances may be held",
        evaluate,
        run,
        split="validation",
        progress=False,
    )
    for part in ("inputs", "training"):
        write_json(run.environment_path, {part: [1]})
        refuses(rf"environment\.json: {part}: must be an object", evaluate, run)


def test_resumed_run_keeps_the_fast_dtype_it_started_with(recipe_values, monkeypatch):
    recipe = build_recipe(recipe_values, ["model.dtype=fast"])
    began, apply = [], AdapterMethod.apply
    monkeypatch.setattr(
        AdapterMethod, "apply", lambda *args: began.append(args[1].dtype) or apply(*args)
    )
    monkeypatch.setattr(models, "slowdown", lambda dtype: 36.4)  # a CPU that is slow in 16 bits
    assert models.fast_dtype(torch.device("cuda")) == "bfloat16"
    fit_until(5, recipe)
    monkeypatch.setattr(models, "slowdown", lambda dtype: 0.6)
    assert models.fast_dtype(torch.device("cpu")) == "bfloat16"
    assert fit(recipe, progress=False).environment["dtype"] == "float32"
    assert began == [torch.float32] * 2


def test_base_model_frees_the_previous_one_and_stops_at_the_end_of_turn(recipe_values):
    """Even if the end-of-turn token is not the tokenizer's EOS token."""
    recipe = build_recipe(recipe_values)
    model = method_of(recipe.method).apply(load_base(recipe)[0])
    former = weakref.ref(model.get_base_model())
    del model
    model, tokenizer = load_base(recipe)
    assert former() is None
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    assert end in model.generation_config.eos_token_id


def test_slow_dtype_warns_once(recipe_values, monkeypatch, capsys):
    assert 0 < models.slowdown("bfloat16") < 1000
    monkeypatch.setattr(models, "slowdown", lambda dtype: 36.4)
    models.warn_of_slow_dtype.cache_clear()
    for _ in range(2):
        load_base(build_recipe(recipe_values, ["model.dtype=float16"]))
    models.warn_of_slow_dtype.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes 36.4 times as long as in float32; set model.dtype=float32" in line


def test_data_options_change_the_plan(recipe_values):
    def plan(*overrides):
        return resolve(build_recipe(recipe_values, list(overrides)))

    held_out = "data.validation_per_task=2"
    assert plan("data.weights={rivers: 3}").mixture == {"cities": 6, "rivers": 18}
    assert (plan().training_instances, plan().test_instances) == (24, 8)
    assert plan("data.train_per_task=5").training_instances == 10
    assert plan("data.test_per_task=1").test_instances == 2
    assert [task.name for task in plan("data.tasks=[rivers]").tasks] == ["rivers"]
    assert plan(held_out).training_instances == 20
    validation = plan(held_out, "evaluation.split=validation")
    assert validation.test_instances == 4
    assert plan(held_out, "data.seed=1").tasks[0].validation != validation.tasks[0].validation
    refuses(
        r"has no validation instances; set data\.validation_per_task",
        plan,
        "evaluation.split=validation",
    )


def test_few_mixed_tasks_have_a_cluster_each(recipe_values, tmp_path):
    def clusters(*overrides):
        return resolve(
            build_recipe(recipe_values, ["method={}", *overrides])
        ).method.config.num_clusters

    assert (clusters(), clusters("data.tasks=[rivers]"), clusters("method.num_clusters=5")) == (
        2,
        1,
        5,
    )
    assert clusters("data.order=[rivers, cities]") == 16  # they are found with the first task
    row = {"input": "a", "output": "b"}
    rows = [{**row, "task": f"task {i}", "split": "train" if i < 3 else "test"} for i in range(9)]
    (tmp_path / "official.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert clusters(f"data.source={tmp_path / 'official.jsonl'}") == 3  # six are only scored


def test_invalid_methods_and_optimizers_are_refused(recipe_values, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for method, message in (
        ("{name: full, r: 4}", r"method\.r: full has no such option"),
        ("{name: task-neurons, share: 0}", "method.share: input should be greater than 0, got 0"),
        (
            "{name: task-neurons, score_batches: 0}",
            "method.score_batches: input should be greater than or equal to 1",
        ),
        ("{name: task-neurons}", r"training\.weight_decay: must be 0 with task-neurons"),
        ("{name: full}", "orthogonal trains only adapters; use adamw for full"),
        ("{name: lora}", "orthogonal cannot run with DeepSpeed; use FSDP2, DDP, adamw or lora"),
    ):
        optimizer = "adamw" if "neurons" in method else "orthogonal"
        options = [
            f"method={method}",
            f"training.optimizer={optimizer}",
            "training.weight_decay=0.01",
        ]
        refuses(message, resolve, build_recipe(recipe_values, options))
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    for options, message in (
        (
            ["method={name: full}", "training.optimizer=lora+"],
            r"lora\+ trains only adapters; use adamw for full",
        ),
        (
            ["method={name: full}", "training.router_lr_ratio=0.3"],
            "router_lr_ratio: full has no router",
        ),
        (
            ["method={name: pcgrad}", "training.per_device_train_batch_size=1"],
            "1 has one task for pcgrad; raise it",
        ),
        (["method={name: cagrad}", "data.order=seeded-0"], "cagrad needs several tasks at a time"),
    ):
        refuses(message, resolve, build_recipe(recipe_values, options))
    without_rate = build_recipe({**recipe_values, "method": {"name": "full"}, "training": {}})
    refuses(
        r"training\.learning_rate: the default is for adapters; set it for full",
        train,
        without_rate,
    )
    compared = {
        **recipe_values,
        "training": {},
        "compare": {"methods": {"all": {"name": "full"}}, "reference": "all"},
    }
    refuses(
        r"compare\.methods\.all: training\.learning_rate: the default is",
        Grid,
        build_recipe(compared),
    )


def test_run_applies_scheduler_and_chat_template_options(recipe_values):
    refuses(
        "training: cannot be used .'verbose'",
        fit,
        build_recipe(recipe_values, ["training.log_level=verbose"]),
    )
    shutil.rmtree(recipe_values["output"])
    training = {
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
    }
    training |= {"gradient_checkpointing": True}
    prompt = {
        "encoding": "def+pos1",
        "chat_template": "never",
        "max_source_tokens": 40,
        "max_answer_tokens": 2,
    }
    values = {**recipe_values, "training": recipe_values["training"] | training, "prompt": prompt}
    recipe = build_recipe(values, ["data.sampling=balanced", "model.dtype=bfloat16"])
    train_and_score(recipe)
    run = Run(recipe.output)
    assert run.metrics["learning_rate"].tolist() == [0.01, 0.01]
    assert run.recipe == resolve(recipe).recipe
    assert not run.predictions["prompt"].str.contains("<|im_start|>", regex=False).any()


def naive_loss(recipe):
    """By task, the mean −log p of answer tokens, one example at a time."""
    model, tokenizer = load_run(Run(recipe.output))
    pairs = {
        task.name: [(task, instance) for instance in task.validation]
        for task in resolve(recipe).tasks
    }
    rows = batched(
        {name: encoded(tokenizer, recipe, of_task, model) for name, of_task in pairs.items()}
    )
    return {
        name: fmean(chain(*(losses(model, row) for row in of_task)))
        for name, of_task in rows.items()
    }


@pytest.mark.parametrize(
    "method", [{"gates": "mean_one", "r": 2}, {"name": "mtl-lora", "r": 2}, {"name": "full"}]
)
def test_validation_loss_is_the_mean_of_per_task_token_means(recipe_values, method):
    options = ["data.validation_per_task=3", "training.learning_rate=0.05", "training.max_steps=20"]
    fit(recipe := build_recipe({**recipe_values, "method": method}, options), progress=False)
    validation_loss(run := Run(recipe.output))
    found = read_json(run.validation_path)
    expected = naive_loss(recipe)
    assert found["tasks"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx((expected["cities"] + expected["rivers"]) / 2, rel=1e-5)
    assert expected["cities"] != pytest.approx(expected["rivers"], rel=1e-4)


def test_run_uses_the_optimizer_of_its_recipe(recipe_values, tmp_path):
    used, adapters = [], []
    recipe_values["method"] |= {"gates": "mean_one"}
    recipe_values["training"] |= {"lora_plus_ratio": 4.0, "router_lr_ratio": 0.5, "max_steps": 3}
    for name in ("adamw", "lora+", "orthogonal"):
        recipe = build_recipe(
            recipe_values, [f"training.optimizer={name}", f"output={tmp_path / name}"]
        )
        with with_callbacks(
            on(
                "on_train_begin",
                lambda state, keywords: used.append(keywords["optimizer"].optimizer),
            )
        ):
            adapters.append(learned(fit(recipe, progress=False)))
    assert [group["initial_lr"] for group in used[1].param_groups[:2]] == [1e-2, 4e-2]
    assert [optimizer.param_groups[-1]["initial_lr"] for optimizer in used] == [5e-3] * 3, (
        "the routers' learning rate"
    )
    assert isinstance(used[2], OrthogonalUpdates)
    changed = next(key for key in adapters[0] if key.endswith("badit_B"))
    assert not any(torch.equal(adapters[0][changed], other[changed]) for other in adapters[1:])


@pytest.mark.parametrize("order", [[], ["data.order=[cities, rivers]"]])
def test_training_that_has_diverged_ends_with_code_2_and_keeps_its_files(
    recipe_file, recipe_values, command, order
):
    """With this rate, all gradients are 0 from the third step on; the losses stay finite."""
    options = ["training.learning_rate=1e30", "method.init_weights=lora", *order]
    run = Run.at(recipe_values["output"])
    assert main(["train", str(recipe_file), *options]) == 2
    error = command("train", recipe_file, *options, code=2)  # also when nothing is left to do
    assert f"{run.path}: the training has diverged (the last gradient norms are 0, 0, 0)" in error
    assert "lower training.learning_rate" in error
    assert run.environment["diverged"] == "the last gradient norms are 0, 0, 0"
    assert run.adapter_path.is_dir()
    assert len(run.scores) == 6
    main(["evaluate", str(run.path)])
    assert run.environment["diverged"]


@pytest.mark.parametrize(
    ("norms", "problem"),
    [
        ([], None),
        ([0.1, 0.0], None),
        ([0.1, 0.0, math.nan, 0.0], "the last gradient norms are 0, nan, 0"),
        ([math.inf], "the last gradient norms are inf"),
        ([0.0, 0.0, 1e-30], None),
    ],
)
def test_last_gradient_norms_tell_whether_a_training_has_diverged(norms, problem):
    lines = [{"loss": 1.0, "grad_norm": norm} for norm in norms]
    assert divergence([*lines, {"eval_loss": 1.0}]) == problem


@pytest.mark.usefixtures("tiny_built_in")
def test_checkpoints_of_later_stages_do_not_ask_the_hub(
    recipe_file, recipe_values, command, monkeypatch
):
    def asked(*_):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    model = "model={name: smollm2-135m, dtype: float32}"
    options = ["data.order=[cities, rivers]", "training.max_steps=2", "training.save_steps=1"]
    command("train", recipe_file, model, *options)
    run = Run(recipe_values["output"])
    assert run.recipe.model.name == "smollm2-135m"
    config = json.loads((run.adapter_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "smollm2-135m"

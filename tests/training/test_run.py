"""A run from recipe to scores on a tiny model: its folder, its resuming, its validation loss, what it refuses."""

import shutil
import weakref
from importlib import import_module
from importlib.metadata import version

import pytest
import torch

from badit import models
from badit.data import prompt_text
from badit.errors import BaditError
from badit.evaluate import evaluate, load_run, validation_loss
from badit.evaluate import train_and_score as train
from badit.files import read_json, read_jsonl, write_json
from badit.methods import AdapterMethod, build_method
from badit.recipe import build_recipe
from badit.run import Run
from badit.train import base_model, encoded, fit, make_plan
from badit.tuner import hooks_of
from materials import make_recipe
from training.trainers import change_tensors, fit_until

train_module = import_module("badit.train")  # badit.train is the function


def no_model(*args, **options):
    pytest.fail("loaded a model")


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """A trained and scored run with held-out instances: its recipe and its scores."""
    values = make_recipe(material / "model", material / "tasks.jsonl", tmp_path_factory.mktemp("finished") / "run")
    recipe = build_recipe(values, ["data.validation_per_task=3", "training.learning_rate=0.05"])
    return recipe, train(recipe, progress=False)


def test_a_run_leaves_all_its_files(finished):
    recipe, scores = finished
    run = Run(recipe.output)
    assert read_json(run.scores_path) == scores
    assert set(scores["tasks"]) == {"cities", "rivers"}
    assert {"rouge_l", "rouge_l_instances", "exact_match"} <= scores.keys()
    assert {file.name for file in run.predictions_path.iterdir()} == {"cities.jsonl", "rivers.jsonl"}
    assert run.trusted_recipe() == recipe
    environment = read_json(run.environment_path)
    steps = environment["training"]["steps"]
    assert environment["mixture"] == {"cities": 9, "rivers": 9}, "each instance comes once"
    assert environment["packages"]["torch"] == version("torch")
    assert [line["step"] for line in read_jsonl(run.metrics_path)] == [*range(1, steps + 1)]
    assert {line["step"] for line in read_jsonl(run.regroupings_path)} == {3, 6, 9}
    assert {file.suffix for file in run.adapter_path.iterdir()} == {".safetensors", ".json", ".md"}
    assert "| mean over tasks |" in (run.adapter_path / "README.md").read_text()
    config = read_json(run.adapter_path / "adapter_config.json")
    assert config["base_model_name_or_path"] == recipe.model.name
    assert not list(run.path.glob("*.partial"))


def test_a_sapt_task_with_an_empty_definition_is_trained(recipe_values, tmp_path):
    instances = [{"id": f"x-{i}", "input": f"land {i}", "output": [f"city {i}"]} for i in range(4)]
    (tmp_path / "sapt" / "copa").mkdir(parents=True)
    for split in ("train", "test"):
        write_json(tmp_path / "sapt/copa" / f"{split}.json", {"Definition": [""], "Instances": instances})
    recipe = build_recipe(recipe_values, [f"data.source={tmp_path / 'sapt'}", "training.max_steps=1"])
    (task,) = make_plan(recipe).tasks
    assert (task.definition, len(task.train)) == ("", 4)
    assert prompt_text(task, task.train[0]).startswith("Now complete"), "no blank lines before it"
    assert fit(recipe, progress=False).environment["training"]["steps"] == 1


def test_a_finished_run_is_not_done_again_and_another_recipes_is_refused(finished, monkeypatch):
    recipe, scores = finished
    monkeypatch.setattr(train_module, "load_base_model", no_model)
    assert train(recipe, progress=False) == scores
    with pytest.raises(BaditError, match=r"differs in training\.num_train_epochs"):
        train(build_recipe(recipe.model_dump(), ["training.num_train_epochs=3"]), progress=False)


def test_the_validation_split_is_scored_apart(finished):
    recipe, scores = finished
    validation = evaluate(recipe.output, split="validation", progress=False)
    assert validation["tasks"]["cities"]["instances"] == 3
    assert read_json(Run(recipe.output).path / "scores-validation.json") == validation
    assert read_json(Run(recipe.output).scores_path) == scores


def change_config(**changes):
    def change(path):
        config = path.with_name("adapter_config.json")
        write_json(config, {**read_json(config), **changes})

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_tensors(lambda t: {**t, "layers.7.badit_A": torch.zeros(2)}), r"belongs to another base .*layers\.7"),
        (
            change_tensors(lambda t: {name: tensor for name, tensor in t.items() if "router" not in name}),
            r"adapter: cannot be loaded .Found missing adapter keys",
        ),
        (change_config(r=4), r"config\.json: r: is 4, but the run's recipe says 2; this is another run's adapter"),
        (change_config(peft_type="LORA"), r"config\.json: peft_type: is 'LORA', but the run's recipe says 'BADIT'"),
        (change_config(surplus=1), r"config\.json: 'surplus': is no setting that this PEFT knows"),
        (change_config(target_modules="(.*)*$"), r"config\.json: target_modules: must be a list of names"),
        (change_config(past_branches=10**12), r"'past_branches': is no setting|past_branches: the weights have no"),
        (
            change_config(format_version=9),
            r"config\.json: format_version: the adapter has format 9, this badit reads",
        ),
    ],
)
def test_a_damaged_adapter_is_named(finished, tmp_path, damage, message):
    run = Run(shutil.copytree(finished[0].output, tmp_path / "copied"))
    damage(run.adapter_path / "adapter_model.safetensors")
    with pytest.raises(BaditError, match=message):
        evaluate(run.path, progress=False)


def test_a_folder_without_a_run_or_of_something_else_is_named(recipe_values, tmp_path):
    with pytest.raises(BaditError, match=r"no config\.yaml"):
        evaluate(tmp_path / "nothing")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(BaditError, match="not a run's folder"):
        train(build_recipe(recipe_values), progress=False)
    (tmp_path / "run" / "thesis.tex").unlink()
    Run.prepare(build_recipe(recipe_values))
    with pytest.raises(BaditError, match="no adapter yet"):
        evaluate(tmp_path / "run")
    with pytest.raises(BaditError, match=r"has no validation instances; set data\.validation_per_task"):
        validation_loss(tmp_path / "run")


def test_a_resumed_run_keeps_the_fast_dtype_that_it_began_with(recipe_values, monkeypatch):
    recipe = build_recipe(recipe_values, ["model.dtype=fast"])
    dtypes, apply = [], AdapterMethod.apply

    def noting(self, model, tasks):
        dtypes.append(model.dtype)
        return apply(self, model, tasks)

    monkeypatch.setattr(AdapterMethod, "apply", noting)
    monkeypatch.setattr(models, "slowdown", lambda dtype: 36.4)  # a processor that is slow in 16 bits
    assert models.fast_dtype(torch.device("cuda")) == "bfloat16"
    fit_until(5, recipe)
    monkeypatch.setattr(models, "slowdown", lambda dtype: 0.6)
    assert models.fast_dtype(torch.device("cpu")) == "bfloat16"
    assert fit(recipe, progress=False).environment["dtype"] == "float32"
    assert dtypes == [torch.float32] * 2


def test_an_adapted_model_is_freed_before_the_next_one_is_loaded(recipe_values):
    recipe = build_recipe(recipe_values)
    model = build_method(recipe.method).apply(base_model(recipe)[0])
    former = weakref.ref(model.get_base_model())
    del model
    base_model(recipe)
    assert former() is None


def test_an_answer_ends_where_the_chat_template_ends_it(recipe_values):
    """Also where neither the tokenizer's end token nor the model's is that of a turn."""
    model, tokenizer = base_model(build_recipe(recipe_values))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end != tokenizer.eos_token_id
    assert end in model.generation_config.eos_token_id


def test_of_a_slow_dtype_is_warned_once(recipe_values, monkeypatch, capsys):
    assert 0 < models.slowdown("bfloat16") < 1000
    monkeypatch.setattr(models, "slowdown", lambda dtype: 36.4)
    models.warn_of_slow_dtype.cache_clear()
    for _ in range(2):
        train_module.base_model(build_recipe(recipe_values, ["model.dtype=float16"]))
    models.warn_of_slow_dtype.cache_clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes 36 times as long as in float32; model.dtype=float32 is faster here" in line


def test_every_data_option_reaches_the_plan(recipe_values):
    def plan(*overrides):
        return make_plan(build_recipe(recipe_values, list(overrides)))

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
    with pytest.raises(BaditError, match=r"has no validation instances; set data\.validation_per_task"):
        plan("evaluation.split=validation")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "badit", "num_experts": 0}, r"method: num_experts must be"),
        ({"name": "base", "r": 4}, r"method\.r: unknown key"),
        ({"name": "full", "r": 4}, r"method\.r: unknown key"),
        ({"name": "task-neurons", "share": 0}, r"method: share must be above 0 and at most 1, got 0"),
        ({"name": "task-neurons", "score_batches": 0}, r"method: score_batches must be a whole number of at least 1"),
        ({"name": "task-neurons", "shares": 0.1}, r"method\.shares: unknown key \(did you mean 'share'\?\)"),
        ({"name": "task-neurons"}, r"training\.weight_decay: must be 0 with task-neurons"),
    ],
)
def test_bad_methods_are_named(recipe_values, method, message):
    with pytest.raises(BaditError, match=message):
        make_plan(build_recipe({**recipe_values, "method": method}, ["training.weight_decay=0.01"]))


def test_training_and_prompt_options_have_their_effects(recipe_values):
    training = {"max_steps": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", "warmup_steps": 0}
    training |= {"learning_rate": 1e-2, "gradient_checkpointing": True, "logging_steps": 1}
    prompt = {"encoding": "def+pos1", "chat_template": "never", "max_source_tokens": 40, "max_answer_tokens": 2}
    recipe = build_recipe(
        {**recipe_values, "training": {**training, "per_device_train_batch_size": 4}, "prompt": prompt},
        ["data.sampling=balanced", "model.dtype=bfloat16"],
    )
    train(recipe, progress=False)
    run = Run(recipe.output)
    rates = [line["learning_rate"] for line in read_jsonl(run.metrics_path) if "learning_rate" in line]
    assert rates == [0.01, 0.01]
    assert run.recipe == recipe
    assert not run.predictions["prompt"].str.contains("<|im_start|>", regex=False).any()


def naive_loss(recipe, *, routed_by=None):
    """By task: −log p of all its answer tokens, one example at a time without padding, in double precision.

    ``routed_by``: what the router reads, "prompt" or "all"; None without a router.
    """
    model, tokenizer = load_run(Run(recipe.output))
    by_task = {}
    for task in make_plan(recipe).tasks:
        losses = []
        for instance in task.validation:
            example = encoded(tokenizer, recipe, [(task, instance)], model)[0]
            ids, prompt = torch.tensor([example["input_ids"]]), example["prompt_length"]
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if routed_by is not None:
                length = prompt if routed_by == "prompt" else ids.shape[1]
                inputs["prompt_mask"] = (torch.arange(ids.shape[1]) < length)[None]
            with torch.no_grad(), hooks_of(model).rows_of([task.name]):
                logs_TV = model(**inputs).logits[0].double().log_softmax(dim=-1)
            losses += [-float(logs_TV[position - 1, ids[0, position]]) for position in range(prompt, ids.shape[1])]
        by_task[task.name] = sum(losses) / len(losses)
    return by_task


@pytest.mark.parametrize("method", [None, {"name": "mtl-lora", "r": 2}, {"name": "full"}])
def test_the_validation_loss_is_each_tasks_mean_over_answer_tokens(finished, recipe_values, method, monkeypatch):
    recipe = finished[0]  # BADIT
    if method is not None:
        recipe = build_recipe({**recipe_values, "method": method}, ["data.validation_per_task=3"])
        fit(recipe, progress=False)
    found = validation_loss(recipe.output)
    expected = naive_loss(recipe, routed_by="prompt" if method is None else None)
    assert found["tasks"] == pytest.approx(expected, rel=1e-5)
    assert found["loss"] == pytest.approx((expected["cities"] + expected["rivers"]) / 2, rel=1e-5)
    assert expected["cities"] != pytest.approx(expected["rivers"], rel=1e-3)
    if method is None:
        assert naive_loss(recipe, routed_by="all") != pytest.approx(expected, rel=1e-4), "the answer must not route"
    assert read_json(Run(recipe.output).path / "validation.json") == found
    monkeypatch.setattr(train_module, "load_base_model", no_model)
    assert validation_loss(recipe.output) == found

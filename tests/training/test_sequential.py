"""Tasks learnt one after another: the folders of a sequence, its scores, its resuming, and every method in one."""

from __future__ import annotations

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from badit.baselines import BASELINES
from badit.checkpoint import last_checkpoint
from badit.errors import BaditError
from badit.evaluate import evaluate, load_run, train_and_score
from badit.files import read_json, write_json
from badit.methods import AdapterMethod, Method
from badit.recipe import Recipe, build_recipe
from badit.run import Run
from badit.statistics import FORMS, continual_scores
from badit.train import fit, make_plan
from badit.tuner import hooks_of
from training.trainers import StopAt

# badit.train is the function of that name.
train_module = import_module("badit.train")
Values = dict[str, Any]
scoring = import_module("badit.evaluate")  # badit.evaluate is the function
ORDER = ["rivers", "cities"]
STAGES = ["01-rivers", "02-cities"]
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.1}
OPTIONS: dict[str, Values] = {
    "badit": {"num_experts": 4, "r": 2, "regroup": {"every": 1}},
    "loramoe": {"num_experts": 2, "r": 2},
    "hydralora": {"num_experts": 2, "r": 2},
    "goat": {"num_experts": 2, "r": 4},
    "full": {},
    "task-neurons": {"share": 0.2},
}
METHODS = [*BASELINES, "badit", "pcgrad", "cagrad", "full", "task-neurons"]


def sequence(values: Values, *overrides: str, output: str | Path | None = None) -> Recipe:
    """12 training instances a task in batches of 4: three steps a stage."""
    data = {**values["data"], "order": ORDER}
    overrides = ("training.num_train_epochs=1", "training.save_steps=2", *overrides)
    return build_recipe({**values, "data": data, "output": str(output or values["output"])}, overrides)


def stage(recipe: Recipe, number: int) -> Run:
    return make_plan(recipe).stages[number].folder


def learnt(folder: Run) -> dict[str, torch.Tensor]:
    (path,) = folder.adapter_path.glob("*.safetensors")
    return load_file(path)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def called(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    """The names of the stages' folders that a function of ``module`` was called for, from now on."""
    calls: list[str] = []
    function = getattr(module, name)

    def noting(*args: Any, **kwargs: Any) -> Any:
        folder = next(arg if isinstance(arg, Run) else arg.folder for arg in args if not hasattr(arg, "stages"))
        calls.append(folder.path.name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, noting)
    return calls


def test_every_stage_leaves_its_files_and_the_last_ones_are_the_runs(recipe_values: Values) -> None:
    recipe = sequence({**recipe_values, "method": LORA})
    scores = train_and_score(recipe, progress=False)
    run = Run.existing(recipe.output)
    assert sorted(folder.name for folder in (run.path / "stages").iterdir()) == STAGES
    for number, name in enumerate(STAGES):
        folder = stage(recipe, number)
        assert folder.path == run.path / "stages" / name
        assert {file.stem for file in folder.predictions_path.iterdir()} == set(ORDER)
        assert folder.metrics_path.read_text().count("\n") == 3
        assert read_json(folder.environment_path)["training"]["steps"] == 3
        assert not folder.checkpoints_path.exists()
    last = stage(recipe, 1)
    kept = [file for file in last.adapter_path.iterdir() if file.name != "README.md"]  # the card is the whole run's
    for file in [*kept, *last.predictions_path.iterdir()]:
        assert (run.path / file.relative_to(last.path)).read_bytes() == file.read_bytes()
    assert not equal(learnt(stage(recipe, 0)), learnt(last))
    assert not list(run.path.rglob("*.partial"))
    assert read_json(run.scores_path) == scores
    assert scores["tasks"] == read_json(last.scores_path)["tasks"]
    assert scores["order"] == ORDER
    environment = read_json(run.environment_path)
    assert environment["packages"]
    assert environment["training"]["steps"] == 6
    trainings = [read_json(stage(recipe, number).environment_path)["training"] for number in (0, 1)]
    assert environment["training"]["tokens"] == sum(training["tokens"] for training in trainings)
    assert environment["training"]["trainable_parameters"] == trainings[0]["trainable_parameters"]


@pytest.mark.parametrize("unseen", [True, False])
def test_the_matrix_and_the_scores_drawn_from_it(recipe_values: Values, unseen: bool) -> None:
    recipe = sequence({**recipe_values, "method": LORA}, f"evaluation.unseen_tasks={str(unseen).lower()}")
    scores = train_and_score(recipe, progress=False)
    assert [[score is None for score in row] for row in scores["matrix"]] == [[False, not unseen], [False, False]]
    assert list(read_json(stage(recipe, 0).scores_path)["tasks"]) == (ORDER if unseen else ORDER[:1])

    # A tiny model's scores are all alike, so the stages get others.
    made_up = [[60.0, 10.0 if unseen else None], [40.0, 80.0]]
    for number, row in enumerate(made_up):
        folder = stage(recipe, number)
        content = read_json(folder.scores_path)
        for name, score in zip(ORDER, row, strict=True):
            if score is not None:
                content["tasks"][name]["rouge_l"] = score
        write_json(folder.scores_path, content)
    scores = evaluate(recipe.output, progress=False)
    assert scores["matrix"] == made_up
    for form in FORMS:
        matrix = [[math.nan if score is None else score for score in row] for row in made_up]
        assert scores["continual"][form] == continual_scores(matrix, form=form)._asdict()
    assert scores["continual"]["standard"]["forgetting"] == 20.0
    assert scores["tasks"]["cities"]["rouge_l"] == 80.0


@pytest.mark.parametrize("method", ["badit", "gainlora"])
def test_an_interruption_in_the_second_stage_changes_nothing(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    values = {**recipe_values, "method": {"name": method, "lora_dropout": 0.1, **OPTIONS.get(method, {"r": 2})}}
    whole = sequence(values, output=tmp_path / "whole")
    expected = train_and_score(whole, progress=False)

    recipe = sequence(values)
    trained = called(monkeypatch, train_module, "_train_stage")
    with monkeypatch.context() as patch:
        callbacks = AdapterMethod.callbacks

        def stopping(self: AdapterMethod, run: Run) -> list[TrainerCallback]:
            return [*callbacks(self, run), *([StopAt(3)] if run.path.name == STAGES[1] else [])]

        patch.setattr(AdapterMethod, "callbacks", stopping)
        with pytest.raises(KeyboardInterrupt):
            train_and_score(recipe, progress=False)
    assert not Run(recipe.output).adapter_path.exists()
    checkpoints = stage(recipe, 1).checkpoints_path
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-2"
    assert train_and_score(recipe, progress=False) == expected
    assert trained == [*STAGES, STAGES[1]], "the first stage is not trained again"

    for number in (0, 1):
        assert equal(learnt(stage(whole, number)), learnt(stage(recipe, number)))
    assert equal(learnt(Run(whole.output)), learnt(Run(recipe.output)))


def test_what_is_trained_and_scored_stays_so(recipe_values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sequence({**recipe_values, "method": LORA})
    scores = train_and_score(recipe, progress=False)
    run = Run(recipe.output)
    run.scores_path.unlink()
    stage(recipe, 1).scores_path.unlink()
    trained = called(monkeypatch, train_module, "_train_stage")
    scored = called(monkeypatch, scoring, "_score")
    assert train_and_score(recipe, progress=False) == scores
    assert (trained, scored) == ([], [STAGES[1]])
    assert train_and_score(recipe, progress=False) == scores
    assert (trained, scored) == ([], [STAGES[1]])


def test_another_split_is_scored_in_the_last_state_alone(recipe_values: Values) -> None:
    recipe = sequence({**recipe_values, "method": LORA}, "data.validation_per_task=2")
    fit(recipe, progress=False)
    scores = evaluate(recipe.output, split="validation", progress=False)
    assert "matrix" not in scores
    assert not Run(recipe.output).scores_path.exists()
    assert not stage(recipe, 1).scores_path.exists()


def logits(model: Any) -> torch.Tensor:
    """For a fixed prompt, of the first task."""
    training = model.training
    model.eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), hooks_of(model).rows_of(ORDER[:1]):
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    model.train(training)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_from_the_task_before(
    recipe_values: Values, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": name, **OPTIONS.get(name, {"r": 2})}
    overrides = ["training.max_steps=2", "data.test_per_task=1", "evaluation.max_new_tokens=2"]
    recipe = sequence({**recipe_values, "method": method}, *overrides)
    begun = []
    for kind in (Method, AdapterMethod):
        proceed = kind.proceed

        def noting(self: Any, model: Any, folder: Path, proceed: Any = proceed) -> Any:
            model = proceed(self, model, folder)
            begun.append(logits(model))
            return model

        monkeypatch.setattr(kind, "proceed", noting)
    scores = train_and_score(recipe, progress=False)
    assert len(scores["matrix"]) == 2
    (at_the_start,) = begun
    first, second = (logits(load_run(stage(recipe, number), recipe)[0]) for number in (0, 1))
    assert not torch.equal(first, second), "the second stage learns"
    if name == "sapt":
        assert not torch.equal(first, at_the_start), "the new branch's key takes a share of the weight"
    else:
        torch.testing.assert_close(at_the_start, first, rtol=0, atol=1e-5)


def test_lora_goes_on_where_training_from_scratch_would_not(recipe_values: Values, tmp_path: Path) -> None:
    values = {**recipe_values, "method": LORA}
    recipe = sequence(values)
    fit(recipe, progress=False)
    alone = sequence(values, output=tmp_path / "alone").model_dump()
    alone["data"] |= {"tasks": ["cities"], "order": None}
    fit(build_recipe(alone), progress=False)
    from_scratch = learnt(Run(tmp_path / "alone"))
    assert from_scratch.keys() == learnt(stage(recipe, 1)).keys()
    assert not any(torch.equal(from_scratch[key], tensor) for key, tensor in learnt(stage(recipe, 1)).items())


def test_branches_and_random_numbers_of_two_tasks_are_kept_apart(
    recipe_values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = sequence({**recipe_values, "method": {"name": "o-lora", "r": 2, "lora_dropout": 0.1}})
    initial, seeds = [], []

    class Noting(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            initial.append({key: p.detach().clone() for key, p in model.named_parameters() if "badit_A" in key})
            seeds.append((args.seed, torch.initial_seed()))

    callbacks = AdapterMethod.callbacks
    monkeypatch.setattr(AdapterMethod, "callbacks", lambda self, run: [*callbacks(self, run), Noting()])
    fit(recipe, progress=False)
    first, second = (learnt(stage(recipe, number)) for number in (0, 1))
    trained = [key for key in first if key.endswith(("badit_A", "badit_B"))]
    assert len(trained) == 4, "two layers with two factors"
    for key in trained:
        assert first[f"{key}_past"].numel() == 0
        assert torch.equal(second[f"{key}_past"], first[key])
        assert not torch.equal(second[key], first[key])
    assert all(not torch.equal(initial[0][key], initial[1][key]) for key in initial[0])
    assert seeds[0][0] != seeds[1][0], "which seeds the order of the examples"
    assert seeds[0][1] != seeds[1][1], "which seeds dropout"


def test_sequences_that_cannot_be_trained_are_refused(recipe_values: Values, tmp_path: Path) -> None:
    with pytest.raises(BaditError, match="does not say where task cities comes"):
        make_plan(build_recipe(recipe_values, ["data.order=[rivers]"]))
    lines = (json.loads(line) for line in Path(recipe_values["data"]["source"]).read_text().splitlines())
    tests = [line for line in lines if line["task"] == "rivers" or line["split"] == "test"]
    path = tmp_path / "untrained.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in tests))
    with pytest.raises(BaditError, match="task cities has no training instances and so no place in a sequence"):
        make_plan(build_recipe(recipe_values, [f"data.source={path}", "data.order=seeded-0"]))

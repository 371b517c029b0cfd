"""Sequential training: stage folders, scores, resuming, and every method in a sequence."""

import pytest
import torch

from badit import BaditError, Run
from badit.baselines import BASELINES
from badit.metrics.statistics import FORMS, continual_scores
from badit.recipe.loading import build_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json, write_json
from badit.training import loading
from badit.training.checkpoints import last_checkpoint
from badit.training.methods import AdapterMethod, Method
from baselines.naive import logits
from materials import make_recipe
from steps import evaluate, fit, load_run
from training.trainers import assert_same, fit_until, learned, on, train_and_score, with_callbacks

ORDER = ["rivers", "cities"]
STAGES = ["01-rivers", "02-cities"]
LORA = {"name": "lora", "r": 4, "lora_dropout": 0.1}
SMALL = {"num_experts": 2, "r": 2}
OPTIONS = {
    "loramoe": SMALL,
    "hydralora": SMALL,
    "goat": {**SMALL, "r": 4},
    "full": {},
    "task-neurons": {"share": 0.2},
}
OPTIONS["badit"] = {"num_experts": 4, "r": 2, "regroup": {"every": 1}}
METHODS = [*BASELINES, "badit", "full", "task-neurons"]


def sequence(values, method, *overrides):
    """12 training instances per task in batches of 4: three steps per stage."""
    settings = [
        "training.num_train_epochs=1",
        "training.save_steps=2",
        "data.order=[rivers,cities]",
    ]
    return build_recipe({**values, "method": method}, [*settings, *overrides])


def stages(recipe):
    return [folder for folder, _ in resolve(recipe).stages]


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """The recipe, run and scores of a trained and scored LoRA sequence."""
    values = make_recipe(
        material / "model", material / "tasks.jsonl", tmp_path_factory.mktemp("sequence") / "run"
    )
    recipe = sequence(values, LORA, "data.validation_per_task=2")
    scores = train_and_score(recipe)
    return recipe, Run(recipe.output), scores


def test_each_stage_writes_its_files_and_the_run_has_those_of_the_last(finished):
    recipe, run, scores = finished
    assert sorted((run.path / "stages").iterdir()) == [stage.path for stage in stages(recipe)]
    assert [stage.path.name for stage in stages(recipe)] == STAGES
    run_of_many = resolve(recipe)
    run_of_many.tasks = run_of_many.tasks * 50
    many = [stage.path.name for stage, _ in run_of_many.stages]
    assert (many[0], many) == ("001-rivers", sorted(many))
    first, last = stages(recipe)
    for folder in (first, last):
        assert {file.stem for file in folder.predictions_path.iterdir()} == set(ORDER)
        assert folder.metrics_path.read_text().count("\n") == 3
        assert not folder.checkpoints_path.exists()
    kept = [
        file for file in last.adapter_path.iterdir() if file.name != "README.md"
    ]  # the card is of the whole run
    for file in [*kept, *last.predictions_path.iterdir()]:
        assert (run.path / file.relative_to(last.path)).read_bytes() == file.read_bytes()
    assert scores["tasks"] == read_json(last.scores_path)["tasks"]
    assert scores["order"] == ORDER
    assert run.environment["mixture"] == {"rivers": 10, "cities": 10}, (
        "each task is counted in its own stage"
    )
    whole, one, other = (folder.environment["training"] for folder in (run, first, last))
    assert run.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (whole["steps"], whole["tokens"]) == (6, one["tokens"] + other["tokens"])
    assert whole["trainable_parameters"] == one["trainable_parameters"]


def test_finished_stages_are_not_retrained_or_rescored_except_by_evaluate(finished, monkeypatch):
    recipe, run, scores = finished
    stages(recipe)[0].scores_path.write_text("{}")
    assert evaluate(run, progress=False) == scores
    assert read_json(stages(recipe)[0].scores_path)["rouge_l"] == scores["matrix"][0][0]
    assert "matrix" not in evaluate(run, split="validation", progress=False), (
        "only the last state is scored"
    )
    assert read_json(run.scores_path) == scores
    run.scores_path.unlink()
    stages(recipe)[1].scores_path.unlink()
    first = stages(recipe)[0].scores_path.stat().st_mtime_ns
    monkeypatch.setattr(AdapterMethod, "trainer", lambda *args, **options: pytest.fail("trained"))
    assert train_and_score(recipe) == scores
    assert stages(recipe)[0].scores_path.stat().st_mtime_ns == first
    monkeypatch.setattr(
        loading, "load_base_model", lambda *args, **options: pytest.fail("loaded a model")
    )
    assert train_and_score(recipe) == scores


@pytest.mark.parametrize("unseen", [True, False])
def test_score_matrix_and_continual_scores(recipe_values, unseen):
    recipe = sequence(recipe_values, LORA, f"evaluation.unseen_tasks={str(unseen).lower()}")
    scores = train_and_score(recipe)
    assert [[score is None for score in row] for row in scores["matrix"]] == [
        [False, not unseen],
        [False, False],
    ]
    assert list(read_json(stages(recipe)[0].scores_path)["tasks"]) == (
        ORDER if unseen else ORDER[:1]
    )
    # A tiny model's scores are all alike, so replace them.
    made_up = [[60.0, 10.0 if unseen else None], [40.0, 80.0]]
    for folder, row in zip(stages(recipe), made_up, strict=True):
        content = read_json(folder.scores_path)
        for name in content["tasks"]:
            content["tasks"][name]["rouge_l"] = row[ORDER.index(name)]
        write_json(folder.scores_path, content)
    scores = evaluate(Run(recipe.output), progress=False, resume=True)
    assert scores["matrix"] == made_up
    matrix = [[torch.nan if score is None else score for score in row] for row in made_up]
    assert scores["continual"] == {
        form: continual_scores(matrix, form=form)._asdict() for form in FORMS
    }
    assert (
        scores["continual"]["standard"]["forgetting"],
        scores["tasks"]["cities"]["rouge_l"],
    ) == (20.0, 80.0)


def test_interrupted_second_stage_resumes_to_identical_results(recipe_values, tmp_path):
    method = {"name": "gainlora", "lora_dropout": 0.1, "r": 2}
    whole, recipe = (
        sequence(recipe_values, method, f"output={tmp_path / name}")
        for name in ("whole", "resumed")
    )
    expected = train_and_score(whole)
    assert not fit_until(3, recipe, folder=STAGES[1]).adapter_path.exists()
    first, second = stages(recipe)
    assert last_checkpoint(second.checkpoints_path) == second.checkpoints_path / "checkpoint-2"
    trained_at = first.environment_path.stat().st_mtime_ns
    assert train_and_score(recipe) == expected
    assert first.environment_path.stat().st_mtime_ns == trained_at, (
        "the first stage is not trained again"
    )
    for one, other in zip(
        [*stages(whole), Run(whole.output)], [first, second, Run(recipe.output)], strict=True
    ):
        assert_same(learned(one), learned(other))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_the_second_stage_from_the_first(recipe_values, name, monkeypatch):
    overrides = ["training.max_steps=2", "data.test_per_task=1", "evaluation.max_new_tokens=2"]
    recipe = sequence(recipe_values, {"name": name, **OPTIONS.get(name, {"r": 2})}, *overrides)
    begun, proceed = [], Method.proceed

    def noting(self, model, folder):
        model = proceed(self, model, folder)
        begun.append(logits(model.eval(), rows=ORDER[:1] * 3))
        return model

    monkeypatch.setattr(Method, "proceed", noting)
    assert len(train_and_score(recipe)["matrix"]) == 2
    (at_the_start,) = begun
    first, second = (
        logits(load_run(folder, recipe)[0], rows=ORDER[:1] * 3) for folder in stages(recipe)
    )
    # BADIT's second task has an expert of its own, which these prompts do not use.
    assert torch.equal(first, second) == (name == "badit"), "the second stage learns"
    if name == "sapt":
        assert not torch.equal(first, at_the_start), (
            "the new key reduces the weights of earlier branches"
        )
    else:
        torch.testing.assert_close(at_the_start, first, rtol=0, atol=1e-5)


def test_stages_use_different_seeds_and_initial_weights(recipe_values):
    begun = []

    def begin(state, keywords):
        new_branch = [
            p.detach().clone()
            for key, p in keywords["model"].named_parameters()
            if "badit_A" in key
        ]
        begun.append((new_branch, keywords["args"].seed, torch.initial_seed()))

    with with_callbacks(on("on_train_begin", begin)):
        fit(
            sequence(recipe_values, {"name": "o-lora", "r": 2, "lora_dropout": 0.1}), progress=False
        )
    branches, orders, dropouts = zip(*begun, strict=True)
    assert not any(map(torch.equal, *branches))
    assert len({*orders}) == len({*dropouts}) == 2


def test_data_order_refuses_a_task_without_training_instances(recipe_values, task_file):
    lines = task_file.read_text().splitlines(keepends=True)
    task_file.write_text(
        "".join(line for line in lines if '"rivers"' in line or '"split": "test"' in line)
    )
    with pytest.raises(
        BaditError, match=r"task cities has no training instances, which data\.order needs"
    ):
        resolve(build_recipe(recipe_values, ["data.order=seeded-0"]))

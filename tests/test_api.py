"""The public functions of `badit`, checked against the files that they write."""

import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

import badit
from badit.recipe.loading import load_recipe, make_recipe
from badit.recipe.saved import dump_recipe
from badit.recipe.schema import Recipe
from badit.support.files import read_json


def test_workflow_from_recipe_to_report(recipe_file, tmp_path, capfd):
    assert badit.plan(recipe_file, data={"train_per_task": 5}).training_instances == 10
    assert not (tmp_path / "run").exists()

    run = badit.train(
        recipe_file, training={"max_steps": 3}, output=tmp_path / "run", progress=False
    )
    assert run.path == badit.Run(str(tmp_path / "run")).path
    planned = badit.plan(recipe_file, training={"max_steps": 3}, output=tmp_path / "run")
    assert run.recipe == planned.recipe
    scores = run.scores.pivot(index="task", columns="metric", values="score")
    tasks = read_json(run.path / "scores.json")["tasks"]
    for metric in ("rouge_l", "exact_match"):
        assert scores[metric].to_dict() == {task: entry[metric] for task, entry in tasks.items()}
    assert run.metrics.dropna(subset="loss")["step"].tolist() == [1, 2, 3]
    assert run.tables == {}
    assert "rivers" in run._repr_html_()
    pd.testing.assert_frame_equal(run.evaluate(progress=False), run.scores)

    prompts = ["Name the capital.", "Name the river."]
    answers = run.generate(prompts, max_new_tokens=3)
    assert [
        badit.Run(str(run.path)).generate(prompt, max_new_tokens=3) for prompt in prompts
    ] == answers
    assert "default" in run.load()[0].peft_config

    exported = run.export(tmp_path / "exported", all_tasks=True, score=True, progress=False).folder
    assert (
        read_json(exported / "scores.json")["tasks"]["rivers"]["routed"]
        == scores["rouge_l"]["rivers"]
    )

    tables = run.analyze(instances=2, progress=False)
    assert (
        {file.stem for file in (run.path / "analysis").iterdir()}
        == tables.keys()
        == run.tables.keys()
    )
    rows = read_json(run.path / "analysis" / "gradient_pairs.json")["rows"]
    assert tables["gradient_pairs"].to_numpy().tolist() == rows

    assert (
        badit.write_report(run, tmp_path / "report.html", title="Two tasks")
        == tmp_path / "report.html"
    )
    assert "<h1>Two tasks" in (tmp_path / "report.html").read_text()
    out, err = capfd.readouterr()
    bars = re.search("Training|Encoding|Generating|Gradients|Experts|Angles|Gates", err)
    assert (out, bars) == ("", None), "progress bars are disabled"


def test_make_recipe_accepts_file_dict_or_recipe(recipe_file, recipe_values):
    recipe = load_recipe(recipe_file)
    assert make_recipe(None, {}) == Recipe()
    for source in (recipe_file, recipe_values, recipe):
        assert make_recipe(source, {}) == recipe
        made = make_recipe(
            source, {"training": {"num_train_epochs": 3}, "output": Path("elsewhere")}
        )
        training = recipe.training.model_copy(update={"num_train_epochs": 3.0})
        assert (made.training, made.output) == (training, "elsewhere")
    assert recipe_values["training"]["num_train_epochs"] == 2, "the given values must not change"
    recipe_file.write_text("")
    assert make_recipe(recipe_file, {}) == Recipe()


def test_invalid_calls_raise_badit_error(recipe_file):
    run = recipe_file.parent
    (run / "config.yaml").write_text(dump_recipe(badit.load_recipe(recipe_file)))
    for call, message in (
        (lambda: badit.compare(jobs=0), "jobs: must be at least 1, not 0"),
        (lambda: badit.Run(run).evaluate(), "has no adapter yet"),
        (lambda: badit.Run(run).scores, r"has no scores yet; compute them with: badit evaluate"),
        (lambda: badit.Run(run).generate(["Hello", " "]), "the prompt is empty"),
    ):
        with pytest.raises(badit.BaditError, match=message):
            call()


def test_public_names_are_listed_and_not_hidden_by_submodules():
    assert set(badit.__all__) == set(dir(badit))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = badit.nothing
    modules = {module.name for module in pkgutil.iter_modules(badit.__path__)}
    for name in badit.__all__:
        if name in modules:
            import_module(f"badit.{name}")
        assert not isinstance(getattr(badit, name), ModuleType), "a submodule hides the name"


def test_import_is_silent_and_keeps_logging_and_warning_settings():
    script = """
import logging, warnings
logging.getLogger("torchao").setLevel(logging.CRITICAL)
warnings.simplefilter("error", BytesWarning)
import badit
badit.Run
print(logging.getLogger("torchao").level, warnings.filters[0][0])
badit.BaditConfig, badit.train
import badit.training.fit
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("50 error\n", "")

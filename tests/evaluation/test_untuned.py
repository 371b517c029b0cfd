"""The untuned model's scores at the end of badit train."""

import re

import pytest

from badit.api import Run
from badit.evaluation import untuned
from badit.evaluation.untuned import beside_untuned
from badit.metrics.answers import METRICS
from badit.recipe.loading import build_recipe
from badit.runs.predictions import read_predictions
from badit.runs.resolved import open_run
from badit.support.errors import BaditError


def test_train_ends_with_the_untuned_models_scores_on_the_same_instances(
    recipe_file, tmp_path, command, monkeypatch
):
    arguments = ("train", recipe_file, "training.max_steps=1", "evaluation.untuned=1")
    shown = command(*arguments)
    run = tmp_path / "run"
    assert re.search(r"^task +instances +Rouge-L", shown, re.MULTILINE)
    assert f"Answer an input: badit generate {run} --task cities INPUT" in shown
    assert "the first 1 instance per task" in shown
    assert shown.rstrip().endswith(f"Which tasks conflict: badit analyze {run}")
    base = command("train", recipe_file, "method={name: base}", f"output={tmp_path / 'base'}")
    assert "untuned model" not in base, "the run itself is untuned"

    both = beside_untuned(open_run(Run(run)), progress=False)
    assert both is not None
    for folder, scores in (("base", both.untuned), ("run", both.tuned)):
        first = {}
        for answer in read_predictions(tmp_path / folder / "predictions"):
            first.setdefault(answer.task, answer)
        assert scores["tasks"].keys() == first.keys()
        for task, answer in first.items():
            for name in ("rouge_l", "nll"):
                expected = METRICS[name].score(answer)
                assert scores["tasks"][task][name] == pytest.approx(expected, rel=1e-4)

    monkeypatch.setattr(untuned, "load_base", lambda *a: pytest.fail("answered again"))
    assert command(*arguments) == shown, "the answers are kept"
    monkeypatch.undo()
    # As a kill leaves it before the first file is written.
    for file in (run / untuned.FOLDER).iterdir():
        file.unlink()
    assert command(*arguments) == shown, "missing answers are made again"
    off = command(*arguments[:-1], "evaluation.untuned=0", f"output={tmp_path / 'off'}")
    assert "untuned model" not in off


def test_a_negative_number_of_instances_is_refused():
    with pytest.raises(BaditError, match=r"evaluation\.untuned"):
        build_recipe({}, ["evaluation.untuned=-1"])

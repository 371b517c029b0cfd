"""Resolved runs: complete recipes, runs of the format before, and folders that are in use."""

import json

import pytest
import yaml

from badit.data import Instance, Task
from badit.recipe.loading import build_recipe
from badit.recipe.method import NAMES, resolve_method
from badit.recipe.saved import dump_recipe
from badit.runs.folder import RunFolder
from badit.runs.resolved import open_run, resolve
from refusals import refuses


def tasks(*names):
    instance = Instance(id="0", input="Lima", outputs=("Peru",))
    return [Task(name=name, definition=None, train=[instance], test=[instance]) for name in names]


def resolved(folder, method, count=3):
    recipe = build_recipe({"method": method, "output": str(folder)})
    return resolve(recipe, tasks(*(f"task-{number}" for number in range(count))))


@pytest.mark.parametrize("name", NAMES)
def test_resolved_section_resolves_to_itself(name):
    method = resolve_method({"name": name})
    again = resolve_method(method.section)
    assert (again.section, again.options) == (method.section, method.options)


def test_saved_recipe_has_every_option_of_the_method(tmp_path):
    run = resolved(tmp_path / "run", {"name": "badit", "r": 2})
    run.prepare_folder()
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]
    assert saved == run.recipe.method == run.method.section
    assert (saved["r"], saved["gates"], saved["router_input"]) == (2, "clusters", "standardised")
    assert saved["num_clusters"] == 3, "one per task"
    opened = open_run(RunFolder(tmp_path / "run"))
    assert (opened.recipe, opened.method.options) == (run.recipe, run.method.options)


@pytest.mark.parametrize(
    ("method", "count", "clusters"), [({}, 8, 8), ({}, 9, 16), ({"num_clusters": 5}, 3, 5)]
)
def test_number_of_clusters_is_that_of_up_to_eight_tasks(tmp_path, method, count, clusters):
    run = resolved(tmp_path / "run", {"name": "badit", **method}, count)
    assert run.method.config.num_clusters == clusters


def test_released_preset_is_saved_as_its_options(tmp_path):
    section = resolved(tmp_path / "run", {"name": "badit", "preset": "released"}).method.section
    assert "preset" not in section
    assert (section["init_weights"], section["gates"]) == ("bad", "softmax")
    assert section["regroup"]["solver"] == "paper"


def write_format_4(folder, recipe, method, version=4):
    """Writes config.yaml as an earlier format: the method has only the options of the recipe."""
    values = yaml.safe_load(dump_recipe(recipe)) | {"format": version, "method": method}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "environment.json").write_text("{}")


def test_run_of_format_4_has_the_number_of_clusters_of_its_adapter(tmp_path):
    run = resolved(tmp_path / "run", {"name": "cluster-gates", "r": 2})
    run.prepare_folder()
    write_format_4(run.folder.path, run.recipe, {"name": "badit", "r": 2})
    assert open_run(RunFolder(run.folder.path)).method.config.num_clusters == 16
    run.folder.adapter_path.mkdir()
    config = run.folder.adapter_path / "adapter_config.json"
    config.write_text(json.dumps({"num_clusters": 3}))
    assert open_run(RunFolder(run.folder.path)).recipe == run.recipe


def test_interrupted_run_of_format_4_is_resumed_by_the_same_recipe_only(tmp_path):
    run = resolved(tmp_path / "run", {"name": "cluster-gates", "r": 2})
    run.prepare_folder()
    write_format_4(run.folder.path, run.recipe, {"name": "badit", "r": 2})
    (run.folder.path / "metrics.jsonl").write_text("")
    assert run.has_begun()
    refuses(
        r"run: holds a run of another recipe \(it differs in method\.r\)",
        resolved(tmp_path / "run", {"name": "cluster-gates", "r": 3}).prepare_folder,
    )


@pytest.mark.parametrize("version", [4, 5])
def test_earlier_run_keeps_its_defaults_and_is_resumed_by_their_name(tmp_path, version):
    former = resolved(tmp_path / "run", {"name": "cluster-gates", "r": 2})
    former.prepare_folder()
    saved = {"name": "badit", "r": 2}
    if version == 5:
        new = ("gated", "key", "codes", "permute_codes")
        saved |= {key: value for key, value in former.method.section.items() if key not in new}
        saved["name"] = "badit"
    write_format_4(former.folder.path, former.recipe, saved, version)
    (former.folder.path / "metrics.jsonl").write_text("")

    assert open_run(RunFolder(former.folder.path)).method.title == "cluster-gates"
    assert resolved(tmp_path / "run", {"name": "cluster-gates", "r": 2}).has_begun()
    refuses(
        r"another recipe \(it differs in .*method\.codes.*; write name: cluster-gates, which badit",
        resolved(tmp_path / "run", {"name": "badit", "r": 2}).prepare_folder,
    )


@pytest.mark.parametrize("version", ["", "format: 3\n", "format: 7\n"])
def test_other_formats_are_refused(tmp_path, version):
    (tmp_path / "config.yaml").write_text(f"{version}method: {{name: lora}}\n")
    refuses(r"config\.yaml: format: ", open_run, RunFolder(tmp_path))


def test_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run = resolved(tmp_path, {"name": "lora"})
    refuses(r"exists and is not a run's folder", run.prepare_folder)


def test_folder_of_an_attempt_that_failed_before_its_first_step_is_free(tmp_path):
    run = resolved(tmp_path / "run", {"name": "lora", "r": 2})
    run.prepare_folder()
    for name in ("environment.json", "error.txt", "log.txt", "half.partial"):
        (run.folder.path / name).write_text("")
    other = resolved(tmp_path / "run", {"name": "lora", "r": 4})
    assert not other.has_begun()
    other.prepare_folder()
    assert RunFolder(run.folder.path).recipe == other.recipe

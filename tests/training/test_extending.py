"""``badit extend``: runs that add tasks to runs, resume, train covered tasks and remove tasks."""

import json
import random
import re
import shutil
import signal
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import badit
from badit.cli import main
from badit.data import load_tasks
from badit.evaluation.answers import score_model
from badit.hub.card import model_card
from badit.recipe.loading import build_recipe
from badit.runs.extending import extended_recipe
from badit.runs.resolved import resolve
from badit.support.files import read_json
from badit.training import extending
from badit.training import fit as training
from badit.training.encoding import encoded
from badit.training.extending import report
from badit.training.loading import load_base
from badit.tuner.additions import Survey
from materials import make_material, make_recipe
from refusals import refuses
from steps import fit, load_run
from training import killed
from training.launches import Launches, losses
from training.trainers import assert_same, fit_until, learned

METHOD = {"name": "badit", "num_experts": 4, "r": 2, "lora_dropout": 0.1}
KEY = {**METHOD, "gates": "clusters", "key": "embedding"}
ROUTER = {**METHOD, "gates": "mean_one", "init_weights": "directions"}
# With gates on earlier experts, and few enough directions for the small model.
EXTEND = {"rank": 5, "reused": 4}
OVERRIDES = [f"extend.{key}={value}" for key, value in EXTEND.items()]
NEW = {"animals": "Say which animal lives there.", "colours": "One colour of the things below."}


def write_task(path, name, train=12, test=4):
    """Writes a task whose instruction and inputs are unlike those of the others."""
    rows = [
        {"task": name, "instruction": NEW.get(name, name), "output": f"{name} {i}"}
        | {"input": f"{name[::-1]} {i} " * (1 + i % 3), "split": "train" if i < train else "test"}
        for i in range(train + test)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, tasks.jsonl, and a file of each new task."""
    folder = tmp_path_factory.mktemp("extending")
    # Large weights, so that a wrong factor changes the logits clearly.
    make_material(folder, initializer_range=0.2)
    for name in NEW:
        write_task(folder / f"{name}.jsonl", name)
    return folder


@pytest.fixture(scope="module", params=["key", "router"])
def finished(request, folder):
    """A run on cities and rivers, extended by animals, then by colours."""
    path = folder / request.param
    values = make_recipe(folder / "model", folder / "tasks.jsonl", path / "run")
    values["method"] = KEY if request.param == "key" else ROUTER
    values["training"] |= {"num_train_epochs": 1, "learning_rate": 0.05, "save_steps": 1}
    run = badit.train(values, progress=False)
    first = run.extend(
        folder / "animals.jsonl", output=path / "first", progress=False, extend=EXTEND
    )
    second = first.extend(
        folder / "colours.jsonl",
        output=path / "second",
        progress=False,
        extend={"earlier": str(folder / "tasks.jsonl"), **EXTEND},
    )
    return run, first, second


def logits_and_scores(run, file):
    """Returns logits of test prompts of a file, in one batch, and its scores and answers."""
    model, tokenizer = load_run(run)
    tasks = load_tasks(file)
    texts = [f"{task.name} {i.input}" for task in tasks for i in task.test]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    recipe = run.recipe
    scores, predictions = score_model(model, tokenizer, recipe, tasks, "test", progress=False)
    return logits, json.dumps(scores), predictions


def test_answers_of_earlier_tasks_stay_bit_identical(finished, folder):
    run, first, second = finished
    _, scores, answers = logits_and_scores(run, folder / "tasks.jsonl")
    for extended in (first, second):
        assert logits_and_scores(extended, folder / "tasks.jsonl")[1:] == (scores, answers)
    _, scores, answers = logits_and_scores(first, folder / "animals.jsonl")
    assert logits_and_scores(second, folder / "animals.jsonl")[1:] == (scores, answers)
    before = logits_and_scores(run, folder / "animals.jsonl")[1]
    assert before != scores, "the new expert is used"


def test_a_result_is_a_run_with_the_scores_of_its_tasks(finished):
    _, _, second = finished
    assert set(second.scores["task"]) == {"colours"}
    assert set(read_json(second.earlier_scores_path)["tasks"]) == {"cities", "rivers"}
    config = read_json(second.adapter_path / "adapter_config.json")
    assert [entry["tasks"] for entry in config["extensions"]] == [["animals"], ["colours"]]
    assert isinstance(second.generate("rolam 1"), str)
    assert badit.Run(second.path).environment["training"]["steps"] == 3


def test_earlier_tasks_of_a_finished_run_are_scored_when_their_data_is_given(
    finished, folder, tmp_path
):
    run, first, _ = finished
    copy = shutil.copytree(first.path, tmp_path / "copy")

    def scored(source):
        options = {"output": copy, "progress": False}
        extended = run.extend(
            folder / "animals.jsonl", extend={**EXTEND, "earlier": str(source)}, **options
        )
        return extended, [*read_json(extended.earlier_scores_path)["tasks"]]

    trained = learned(badit.Run(copy))
    assert scored(folder / "tasks.jsonl")[1] == ["cities", "rivers"]
    rivers = tmp_path / "rivers.jsonl"
    rows = (folder / "tasks.jsonl").read_text().splitlines(keepends=True)
    rivers.write_text("".join(row for row in rows if "rivers" in row))
    extended, tasks = scored(rivers)
    assert tasks == ["rivers"]
    assert extended.recipe.extend.earlier == str(rivers)
    modified = extended.earlier_scores_path.stat().st_mtime_ns
    scored(rivers)
    assert extended.earlier_scores_path.stat().st_mtime_ns == modified
    assert_same(learned(extended), trained)
    missing = tmp_path / "missing.jsonl"
    refuses(str(missing), scored, missing)


def test_an_extended_run_can_mix_the_two_nearest_tasks(finished, folder, tmp_path, capsys):
    run, first, _ = finished
    mixing = {**EXTEND, "mixing": 10.0}
    output = tmp_path / "mixed"
    mixed = run.extend(folder / "animals.jsonl", output=output, progress=False, extend=mixing)
    assert_same(learned(mixed), learned(first))  # training passes do not mix
    assert read_json(mixed.adapter_path / "adapter_config.json")["mixing"] == 10.0
    for file in ("tasks.jsonl", "animals.jsonl"):
        found = logits_and_scores(mixed, folder / file)[0]
        assert not torch.equal(found, logits_and_scores(first, folder / file)[0])
    assert "extend.mixing=10" in capsys.readouterr().err
    message = "cities is a task of an earlier run.*as before this task"
    refuses(message, mixed.generate, "land 1", task="cities")
    merge = {"merge": True, "mixing": 0.1}
    fix = "leave extend.mixing out"
    refuses(fix, run.extend, folder / "tasks.jsonl", output=tmp_path / "merged", extend=merge)
    assert not (tmp_path / "merged").exists()


def test_a_task_of_an_earlier_run_is_refused_with_that_run(finished, tmp_path):
    _, first, second = finished
    export = tmp_path / "export"
    for task in ("cities", "animals"):
        message = f"{task} is a task of an earlier run"
        assert str(first.path) in refuses(message, second.generate, "land 1", task=task)
        assert str(first.path) in refuses(message, second.export, export, task=task)
    assert not export.exists()


def test_an_export_per_task_equals_the_run(finished, folder, tmp_path):
    _, _, second = finished
    exported = second.export(tmp_path / "exported", all_tasks=True, progress=False)
    model, tokenizer = load_run(second)
    (task,) = load_tasks(folder / "colours.jsonl")
    # A prompt of the task, which has the gates of the export.
    (example,) = encoded(tokenizer, second.recipe, [(task, task.train[0])], model)
    ids = torch.tensor([example["input_ids"][: example["prompt_length"]]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        base, _ = load_run(second)
        plain = PeftModel.from_pretrained(base.unload(), tmp_path / "exported" / "colours")
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=2e-4, rtol=2e-4)
    assert exported.tasks["colours"].total_error == 0


def test_an_interrupted_extension_resumes_bit_identically(finished, folder, tmp_path):
    _, first, second = finished
    recipe = extended_recipe(first, folder / "colours.jsonl", tmp_path / "again", OVERRIDES, {})
    fit_until(2, recipe)
    assert not (tmp_path / "again" / "adapter").exists()
    resumed = first.extend(
        folder / "colours.jsonl", output=tmp_path / "again", progress=False, extend=EXTEND
    )
    mine = load_file(resumed.adapter_path / "adapter_model.safetensors")
    theirs = load_file(second.adapter_path / "adapter_model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_removed_task_leaves_the_others_bit_identical(finished, folder, tmp_path):
    run, _, second = finished
    removed = second.remove_task("animals", output=tmp_path / "removed")
    for file in ("tasks", "colours"):
        expected = logits_and_scores(second, folder / f"{file}.jsonl")[1:]
        assert logits_and_scores(removed, folder / f"{file}.jsonl")[1:] == expected
    tensors = load_file(removed.adapter_path / "adapter_model.safetensors")
    entries = read_json(removed.adapter_path / "adapter_config.json")["extensions"]
    # Its expert stays while colours uses it.
    uses = [tensor for name, tensor in tensors.items() if name.endswith(f"used_{len(entries)}")]
    is_used = any((used == 4).any() for used in uses)
    assert [entry["tasks"] for entry in entries] == (
        [[], ["colours"]] if len(entries) == 2 else [["colours"]]
    )
    assert is_used == (len(entries) == 2)
    both = removed.remove_task("colours", output=tmp_path / "both")
    tensors = load_file(both.adapter_path / "adapter_model.safetensors")
    assert not any(name.endswith(("_1", "_2")) for name in tensors)
    expected = logits_and_scores(run, folder / "tasks.jsonl")[1:]
    assert logits_and_scores(both, folder / "tasks.jsonl")[1:] == expected
    # Its own task is gone, so it has no data; more tasks can be added to it.
    assert both.recipe.data.source is None
    refuses("cities is a task of an earlier run", both.generate, "land 1", task="cities")
    refuses("data.source: is null.*badit adopt", both.generate, "x", task="colours")
    refuses("data.source: is null.*badit adopt", both.evaluate)
    assert isinstance(both.generate("land 1"), str)
    assert "colours" not in model_card(both)
    added = both.extend(
        folder / "colours.jsonl", output=tmp_path / "added", progress=False, extend=EXTEND
    )
    assert set(added.scores["task"]) == {"colours"}
    refuses("cities: is a task of the joint training", second.remove_task, "cities")
    refuses("task animal: is not an added task.*animals", second.remove_task, "animal")
    refuses("exists; choose another", second.remove_task, "animals", output=tmp_path / "removed")


def test_a_covered_task_is_refused_or_merged(finished, folder, tmp_path, command, capsys):
    _, first, _ = finished
    again = write_task(tmp_path / "again.jsonl", "animals")
    again.write_text(again.read_text().replace('"task": "animals"', '"task": "beasts"'))
    error = command("extend", first.path, again, f"output={tmp_path / 'x'}", code=2)
    assert "task beasts: the clusters of animals already cover its prompts" in error
    assert not (tmp_path / "x").exists()
    merged = first.extend(
        again, output=tmp_path / "merged", overrides=["merge=true"], progress=False
    )
    said = capsys.readouterr().err
    assert "task beasts trains the clusters of animals" in said
    assert "the answers of animals will change" in said
    message = refuses("cities is a task of an earlier run", merged.generate, "x", task="cities")
    assert f"{first.path} answers it as before merge=true" in message
    assert f"badit adopt {merged.adapter_path} --data FILE" in message
    assert isinstance(merged.generate("slamina 1", task="beasts"), str)
    adopted = badit.adopt(
        merged.adapter_path, data=folder / "tasks.jsonl", output=tmp_path / "adopted"
    )
    assert isinstance(adopted.generate("land 1", task="cities"), str)
    before = load_file(first.adapter_path / "adapter_model.safetensors")
    after = load_file(merged.adapter_path / "adapter_model.safetensors")
    changed = {
        name.rsplit(".", 1)[1] for name in after if not torch.equal(after[name], before[name])
    }
    assert changed <= {"A_1", "B_1", "gates_1", "counts_1"}
    assert {"B_1", "counts_1"} <= changed


def test_a_merged_task_is_a_task_of_the_run(finished, folder, tmp_path, capsys):
    _, first, _ = finished
    # Most prompts are those of animals, the others those of cities.
    both = write_task(tmp_path / "both.jsonl", "animals", train=48)
    cities = (folder / "tasks.jsonl").read_text().splitlines(keepends=True)[:6]
    rows = (both.read_text() + "".join(cities)).replace('"task": "cities"', '"task": "both"')
    both.write_text(rows.replace('"task": "animals"', '"task": "both"'))
    overrides = ["merge=true", "data.columns.instruction=instruction"]
    recipe = extended_recipe(first, both, tmp_path / "merged", overrides, {})
    fit_until(2, recipe)
    merged = first.extend(both, output=recipe.output, overrides=overrides, progress=False)
    again = first.extend(both, output=tmp_path / "2", overrides=overrides, progress=False)
    assert_same(learned(merged), learned(again))
    assert "the answers of cities, rivers, animals will change" in capsys.readouterr().err
    config = read_json(merged.adapter_path / "adapter_config.json")
    assert config["tasks"] == ["cities", "rivers", "both"]
    assert config["extensions"][0]["tasks"] == ["animals", "both"]
    counts = {
        name.rsplit(".", 1)[1]: of for name, of in learned(merged).items() if "counts" in name
    }
    assert [int(counts[f"counts_{number}"][:, -1].sum()) for number in (0, 1)] == [6, 48]
    message = "task both: .* has a task of this name"
    refuses(message, merged.extend, both, output=tmp_path / "x", overrides=overrides[1:])
    later = merged.extend(folder / "colours.jsonl", output=tmp_path / "later", progress=False)
    assert "the largest shares" in capsys.readouterr().err
    message = refuses("both is a task of an earlier run", later.generate, "x", task="both")
    assert f"give {merged.path} instead" in message
    refuses("both: was trained together|is a task of the joint", later.remove_task, "both")


def test_refusals_write_nothing(finished, folder, tmp_path, command, trained):
    run, first, _ = finished
    output = tmp_path / "x"

    def refused(*words):
        line = command("extend", *words, f"output={output}", code=2)
        assert not output.exists()
        return line

    animals = folder / "animals.jsonl"
    assert "task animals:" in refused(first.path, animals)
    assert "has a task of this name" in refused(first.path, animals)
    untrained = write_task(tmp_path / "untrained.jsonl", "untrained", train=0)
    assert "training instances" in refused(run.path, untrained)
    assert "give either DATA" in refused(run.path)
    assert refused(run.path, animals, "method.name=lora").startswith(
        f"badit: method.name: badit extend takes the method of {run.path}; leave it out"
    )
    large = "so a new expert has at most rank 32, not 64; set extend.rank=32"
    assert large in refused(run.path, animals, "extend.rank=64")
    missing = tmp_path / "missing.jsonl"
    assert str(missing) in refused(run.path, animals, f"extend.earlier={missing}")
    lora = trained({"name": "lora", "r": 2})
    assert "is a run of lora" in refused(lora.path, animals)
    token = trained({**METHOD, "routing": "token"})
    assert "is a run of badit" in refused(token.path, animals)
    # Another base model or tokenizer.
    moved = shutil.copytree(folder / "model", tmp_path / "model")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert "changed since the run was trained" in refused(run.path, animals, f"model.name={moved}")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_sharded_weights_are_refused_before_anything_is_written(
    finished, folder, tmp_path, monkeypatch, command, engine
):
    run, _, _ = finished
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    output = tmp_path / "x"
    message = "extend: adding a task needs unsharded weights"
    animals = folder / "animals.jsonl"
    assert message in command("extend", run.path, animals, f"output={output}", code=2)
    values = make_recipe(folder / "model", folder / "tasks.jsonl", output)
    values |= {"method": KEY, "data": {**values["data"], "order": "seeded-0"}}
    refuses(message, badit.train, values, progress=False)
    assert not output.exists()


def test_a_recipe_is_checked_like_the_command(finished, folder, tmp_path, monkeypatch):
    _, first, second = finished
    recipe = extended_recipe(first, folder / "animals.jsonl", tmp_path / "x", OVERRIDES, {})
    refuses("task animals: .* has a task of this name", badit.train, recipe, progress=False)
    assert not (tmp_path / "x").exists()
    # As of a comparison's cell.
    cell = resolve(
        build_recipe({**recipe.model_dump(exclude_unset=True), "output": str(tmp_path / "cell")})
    )
    cell.prepare_folder()
    refuses("task animals: .* has a task of this name", training.fit, cell)
    models = []

    def load(*arguments, **options):
        assert all(model() is None for model in models), "an earlier model is still alive"
        base, tokenizer = load_base(*arguments, **options)
        models.append(weakref.ref(base))
        return base, tokenizer

    for module in (extending, training):
        monkeypatch.setattr(module, "load_base", load)
    values = {"earlier": str(folder / "tasks.jsonl")}
    recipe = extended_recipe(
        first, folder / "colours.jsonl", tmp_path / "y", OVERRIDES, {"extend": values}
    )
    run = badit.train(recipe, progress=False)
    assert len(models) == 2
    assert_same(learned(run), learned(second))
    assert read_json(run.earlier_scores_path) == read_json(second.earlier_scores_path)


def test_prompts_taken_from_earlier_tasks_are_counted_and_refused(
    finished, folder, tmp_path, command
):
    run, _, _ = finished
    line = command(
        "extend",
        run.path,
        folder / "animals.jsonl",
        "extend.largest_taken=0",
        "extend.coverage=1",
        f"output={tmp_path / 'x'}",
        code=2,
    )
    assert re.search(r"too many prompts of (cities|rivers) \(0.0 %\), (cities|rivers) \(0.0", line)


def test_a_report_has_small_shares_too():
    taken = {"a": 0.001, "b": 0.0301, "c": 0.002, "d": 0.0}
    (line,) = report(Survey([], {"new": {"a": 0.04}}, taken, 0.0123, {}))
    assert line == (
        "about 1.2 % of the earlier prompts would be nearest to the new tasks; the largest "
        "shares: b (3.0 %), c (0.2 %), a (0.1 %)"
    )


def test_new_tasks_are_compared_with_one_another(finished, tmp_path, capsys):
    run, _, _ = finished
    names = ("animals", "beasts", "colours")
    files = [write_task(tmp_path / f"{name}.jsonl", name) for name in names]
    files[1].write_text(files[0].read_text().replace('"task": "animals"', '"task": "beasts"'))
    together = tmp_path / "together.jsonl"
    together.write_text("".join(file.read_text() for file in files))
    run.extend(together, output=tmp_path / "x", overrides=OVERRIDES, progress=False)
    said = capsys.readouterr().err
    assert re.search(r"task animals cannot be told apart from beasts \(\d+\.\d %\)", said)
    assert "task colours" not in said


def test_a_sequence_adds_its_later_tasks(folder, tmp_path, capsys):
    values = make_recipe(folder / "model", folder / "tasks.jsonl", tmp_path / "run")
    values["method"] = {**KEY, "num_clusters": 2, "regroup": {"every": 1}}
    values["training"] |= {"num_train_epochs": 1, "learning_rate": 0.05}
    values["data"]["order"] = ["rivers", "cities"]
    run = badit.train(values, progress=False)
    said = capsys.readouterr().err
    assert re.search(r"about \d+\.\d % of the earlier prompts .* shares: rivers \(", said)
    stages = [stage for stage, _ in resolve(build_recipe(values)).stages]
    first, last = (load_file(stage.adapter_path / "adapter_model.safetensors") for stage in stages)
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    config = read_json(run.adapter_path / "adapter_config.json")
    assert (config["tasks"], [e["tasks"] for e in config["extensions"]]) == (
        ["rivers"],
        [["cities"]],
    )
    recipe = build_recipe(values, ["extend.rank=64", f"output={tmp_path / 'large'}"])
    refuses("set extend.rank=32", badit.train, recipe, progress=False)
    assert not (tmp_path / "large" / "stages").exists()
    values["output"] = str(tmp_path / "shared")
    shared = fit(build_recipe(values, ["extend.own_experts=false"]), progress=False)
    assert not read_json(shared.adapter_path / "adapter_config.json")["extensions"]


def test_the_command_removes_and_shows_help(finished, tmp_path, capsys):
    _, _, second = finished
    output = tmp_path / "removed"
    assert main(["extend", str(second.path), "--remove", "animals", f"output={output}"]) == 0
    assert str(output) in capsys.readouterr().out


@pytest.mark.slow
def test_three_extensions_killed_in_between_equal_uninterrupted_ones(folder, tmp_path, processes):
    values = make_recipe(folder / "model", folder / "tasks.jsonl", tmp_path / "run")
    values["method"] = KEY
    values["training"] |= {"num_train_epochs": 1, "save_steps": 1}
    run = badit.train(values, progress=False)
    whole, stopped = run, run
    third = write_task(tmp_path / "seasons.jsonl", "seasons")
    rng = random.Random(0)
    for number, data in enumerate((folder / "animals.jsonl", folder / "colours.jsonl", third)):
        whole = whole.extend(
            data, output=tmp_path / f"whole{number}", progress=False, extend=EXTEND
        )
        output = tmp_path / f"stopped{number}"
        words = ["extend", str(stopped.path), str(data), f"output={output}", *OVERRIDES]
        for event in ("file", "on_step_end"):
            strike = (event, rng.randint(1, 3), signal.SIGKILL)
            status, said = killed.end(killed.start(processes, words, output, *strike))
            assert status == -signal.SIGKILL, said
        status, said = killed.end(killed.start(processes, words, output))
        assert status == 0, said
        stopped = badit.Run(output)
        theirs, mine = learned(whole), learned(stopped)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
        _, *expected = logits_and_scores(run, folder / "tasks.jsonl")
        assert logits_and_scores(stopped, folder / "tasks.jsonl")[1:] == tuple(expected)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_extend_as_one_or_are_refused(recipe_values, tmp_path, processes, engine):
    launches = Launches(recipe_values, tmp_path, processes)
    launches.train_alone("run", batch=4)
    data = write_task(tmp_path / "animals.jsonl", "animals")
    _extends(launches, tmp_path / "run", data, *OVERRIDES)
    if engine == "fsdp2":
        said = launches.train("refused", 2, engine, code=2)
        assert "extend: adding a task needs unsharded weights" in said
        return
    launches.train_alone("one", batch=4)
    launches.train("two", 2, engine)
    _assert_alike(launches, "two", "one")


@pytest.mark.slow
@pytest.mark.parametrize("gates", ["clusters", "mean_one"])
def test_two_processes_merge_as_one_or_are_refused(recipe_values, tmp_path, processes, gates):
    """The experts of added tasks are trained further, but with a router not those of the run."""
    recipe_values["method"] |= {"gates": gates}
    launches = Launches(recipe_values, tmp_path, processes)
    launches.train_alone("run", batch=4)
    data = write_task(tmp_path / "animals.jsonl", "animals")
    _extends(launches, tmp_path / "run", data, *OVERRIDES)
    launches.train_alone("first", batch=4)
    again = tmp_path / "again.jsonl"
    again.write_text(data.read_text().replace('"task": "animals"', '"task": "beasts"'))
    _extends(launches, tmp_path / "first", again, "merge=true")
    launches.train_alone("one", batch=4)
    launches.train("two", 2, "ddp")
    _assert_alike(launches, "two", "one")

    rows = (tmp_path / "tasks.jsonl").read_text().splitlines(keepends=True)
    cities = "".join(row for row in rows if '"task": "cities"' in row)
    again.write_text(cities.replace('"task": "cities"', '"task": "towns"'))
    columns = "data.columns.instruction=instruction"
    _extends(launches, tmp_path / "first", again, "merge=true", columns)
    if gates == "mean_one":
        said = launches.train("refused", 2, "ddp", code=2)
        assert "tasks of the joint training are trained in one process only" in said
        return
    launches.train_alone("joint", batch=4)
    launches.train("joint of two", 2, "ddp")
    _assert_alike(launches, "joint of two", "joint")


def _extends(launches, run, data, *overrides):
    """Makes the launches extend a run by tasks of 12 instances, so that all steps are full."""
    launches.command = "extend"
    launches.settings = lambda name, batch: [
        str(run),
        str(data),
        f"output={run.parent / name}",
        *overrides,
        f"training.per_device_train_batch_size={batch}",
        "training.eval_strategy='no'",
        "training.eval_steps=null",
    ]


def _assert_alike(launches, two, one):
    two, one = launches.run(two), launches.run(one)
    torch.testing.assert_close(learned(two), learned(one), rtol=0, atol=1e-4)
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)

"""The command line: help, exit codes, one-line errors, and the demo with a tiny model."""

import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import yaml

from badit import BaditError
from badit.cli import main
from badit.cli.app import app
from badit.cli.entry import _EXAMPLES
from badit.recipe.loading import load_recipe
from badit.support.files import read_json

# Commands whose arguments and names are checked without the slow libraries.
QUICK = [
    ["keys"],
    ["keys", "--schema"],
    ["train", "superni-cpu", "data.source=nowhere.csv"],
    ["train", "demo", "method.nam=x"],
    ["train", "demo", "model.name=nowhere"],
    ["compare", "demo", "training.learning_rat=1"],
    ["init", "nowhere.csv"],
    ["analyze", "nowhere"],
    ["analyze", "smollm2-135m", "--data", "nowhere.csv"],
    *([name, "nowhere"] for name in ("adopt", "evaluate", "report", "studio", "serve", "harness")),
    ["generate", "nowhere", "Hi"],
    ["export", "nowhere", "-o", "x"],
    ["push", "nowhere", "a/b"],
    ["table", "nowhere"],
]
MAIN = "from badit.cli import main; main"


def test_every_command_and_parameter_has_help(command):
    shown = command("--help")
    for name in (name for name in app if not name.startswith("-")):
        assert name in shown
        assert f"Usage: badit {name}" in command(name, "--help")
        arguments = app[name].assemble_argument_collection(parse_docstring=True)
        assert all(argument.parameter.help for argument in arguments), name
        required = [argument for argument in arguments if argument.required]
        assert all(argument.field_info.name in _EXAMPLES for argument in required), name
        # A positional argument is not shown as an option; --output is the documented form.
        for argument in arguments:
            is_both = argument.field_info.is_positional and argument.field_info.is_keyword
            assert not is_both or argument.name == "--output", argument.name


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import badit", "numpy torch transformers peft pydantic"),
        # One process for all: each would take a second to start.
        (f"{MAIN}; [main(words) for words in {QUICK!r}]", "torch transformers peft scipy"),
        *((f"{MAIN}({words!r})", "torch transformers peft pydantic")
          for words in (["--help"], ["train", "--help"], ["--version"])),
    ],
)  # fmt: skip
def test_imports_recipes_and_help_do_not_load_heavy_libraries(statement, heavy):
    script = f"import sys; {statement}; print('loaded', *{{*{heavy.split()}}} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "loaded"


def test_invalid_input_gives_one_line_and_exit_code_2(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["trian"], 'Did you mean "train"?'),
        (["train", "x", "a=1", "--dry-run", "b=2", "--nope"], "--nope"),
        (["train"], "RECIPE requires an argument. For example: badit train recipe.yaml."),
        (
            ["push", "run"],
            "REPOSITORY requires an argument. For example: badit push runs/recipe ORG/",
        ),
        (
            ["export", "run", "--all-tasks"],
            "For example: badit export runs/recipe --all-tasks -o exports.",
        ),
        (["train", "missing.yaml"], "missing.yaml: cannot be read"),
        (["evaluate", "missing-run"], "missing-run: has no config.yaml"),
        (
            ["train", "superni-cpu", "data.source=nowhere/rows.csv"],
            "nowhere/rows.csv: no such file or folder",
        ),
    ):
        assert message in command(*arguments, code=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start this command without the launcher" in command("evaluate", "missing-run", code=2)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_tasks_lists_suite_debug_raises_and_interruption_exits_with_130(
    command, capsys, monkeypatch, tmp_path
):
    shown = command("tasks", "builtin")
    assert "review_sentiment" in shown
    assert "16 tasks, all valid" in shown
    (tmp_path / "a.jsonl").write_text(
        '{"task": "a", "instruction": "Do.", "output": "y", "split": "test"}\n'
    )
    assert main(["tasks", str(tmp_path / "a.jsonl"), "--show", "1"]) == 0, (
        "also without training instances"
    )

    with pytest.raises(BaditError):
        main(["--debug", "tasks", "missing-data"])
    monkeypatch.setattr("badit.data.load_sources", Mock(side_effect=KeyboardInterrupt))
    assert main(["tasks", "builtin"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_overrides_may_follow_flags(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: {train_per_task: 3, test_per_task: 2}\n")
    shown = command(
        "train", "recipe.yaml", "data.train_per_task=4", "--dry-run", "output=somewhere"
    )
    assert (
        "16 tasks, 64 training and 32 test instances; the run would be written to somewhere"
        in shown
    )
    assert shown.startswith("16 tasks")
    assert shown.count("\n") == 7, "no recipe"
    assert "add --verbose" in shown
    expected = "Next: badit train recipe.yaml data.train_per_task=4 output=somewhere\n"
    assert shown.endswith(expected)
    given = ["output=somewhere", "data.validation_per_task=2"]
    shown = command("train", "recipe.yaml", *given, "--dry-run", "--verbose")
    assert shown.startswith("16 tasks, 48 training, 32 held-out and 32 test instances; the run")
    assert "\nNext: badit train recipe.yaml output=somewhere data.validation_per_task=2\n" in shown
    one_split = command("train", "recipe.yaml", *given, "evaluation.split=validation", "--dry-run")
    assert one_split.startswith("16 tasks, 48 training and 32 validation instances; the run")
    recipe = yaml.safe_load(shown.partition("\n\n")[2])
    assert recipe["output"] == "somewhere"
    assert recipe["method"]["num_experts"] == 8, "as in config.yaml, with every default"
    assert "add --dry-run" in command("train", "recipe.yaml", "--verbose", code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(("variables", "red"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_terminal_shows_progress_and_red_errors_unless_no_color(tmp_path, variables, red):
    (tmp_path / "recipe.yaml").write_text("trainig: {}")
    terminal, stderr = os.openpty()
    environment = {**os.environ, "TERM": "xterm", **variables}
    command = [sys.executable, "-m", "badit", "train", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=stderr, env=environment, check=False
    )
    os.close(stderr)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    assert (done.returncode, done.stdout) == (2, b"")
    assert "badit: reading the recipe …" in shown
    assert ("\x1b[31mbadit: " in shown) == red
    assert "trainig: unknown key" in shown


@pytest.mark.parametrize("fails", [False, True])
def test_demo_compares_and_writes_a_report(
    fails, inline, recipe_values, monkeypatch, capsys, tmp_path
):
    recipe, output = tmp_path / "demo.yaml", tmp_path / "demo"
    methods = {
        "lora": {"name": "lora", "r": 4, "training": {"learning_rate": 1e38 if fails else 1e-3}}
    }
    recipe.write_text(
        yaml.safe_dump(recipe_values | {"compare": {"methods": methods, "seeds": [0]}})
    )
    monkeypatch.setattr("badit.recipe.loading.shipped_recipes", lambda: {"demo": recipe})
    assert main(["demo", f"output={output}", "training.max_steps=2"]) == int(fails)
    shown = capsys.readouterr().out
    assert ("no finished run: lora" in shown) == fails
    assert shown.endswith(f"Results: {output}/results.json\nReport: {output}/report.html\n")
    assert "lora" in (output / "report.html").read_text()


def test_evaluate_prints_the_scores_of_the_chosen_split(recipe_file, tmp_path, command):
    command("train", recipe_file, "training.max_steps=1", "data.validation_per_task=2")
    (tmp_path / "run" / "scores.json").unlink()
    shown = command(
        "evaluate", tmp_path / "run", "--split", "validation", "--batch-size", 1
    ).split()
    assert shown[-1] == f"{read_json(tmp_path / 'run' / 'scores-validation.json')['nll']:.3f}"


def test_help_fills_its_lines(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    paragraphs = command("adopt", "--help").partition("╭")[0].strip().split("\n\n")
    lines = paragraphs[-1].splitlines()
    first_words = [line.split()[0] for line in lines[1:]]
    pairs = zip(lines, first_words, strict=False)
    assert all(len(f"{line.rstrip()} {word}") > 80 for line, word in pairs)


def test_help_of_analyze_names_all_that_data_can_be(command):
    shown = " ".join(command("analyze", "--help").replace("│", " ").split())
    assert "data.source: a file, a folder, a pattern with *, a dataset on the hub or" in shown


def test_help_of_extend_names_its_overrides(command):
    shown = " ".join(command("extend", "--help").replace("│", " ").split())
    assert all(word in shown for word in ("extend.rank=16", "data.order=seeded-0", "merge=true"))


def test_init_train_and_analyze_turn_a_csv_into_scores_and_a_report(
    tiny_built_in, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    rows = [
        f"{task},{task} of land {i},{task} {i}" for task in ("capital", "river") for i in range(8)
    ]
    (tmp_path / "data.csv").write_text("\n".join(["task,question,answer", *rows]))
    for command in (["init", "data.csv"], ["train", "recipe.yaml"], ["analyze", "runs/recipe"]):
        assert main(command) == 0
    assert (
        main(
            ["init", "data.csv", "data.columns={input: question, output: answer}", "-o", "own.yaml"]
        )
        == 0
    )
    assert load_recipe("own.yaml").data.columns == {"input": "question", "output": "answer"}
    assert main(["init", "data.csv", "training.seed=1", "-o", "other.yaml"]) == 2
    assert read_json(tmp_path / "runs/recipe/scores.json")["tasks"].keys() == {"capital", "river"}
    assert "capital" in (tmp_path / "runs/recipe/report.html").read_text()
    shown = capsys.readouterr().out
    assert f"Report: runs{os.sep}recipe{os.sep}report.html" in shown
    assert "the first 1 instance per task" in shown or "instances per task" in shown
    analysed = shown.split("Which tasks conflict: badit analyze runs/recipe\n")[1]
    assert analysed.index("of tasks") < analysed.index("\n  badit ") < analysed.index("Tables: ")
    assert "gradient_overall" not in analysed, "the list of tables"
    # The first recipe holds out a quarter of each task's eight rows.
    assert (
        "The gradients rest on 2 instances per task.\nThe split that was measured has no more"
        in analysed
    )
    assert "or train again with more instances per task." in analysed
    assert read_json(tmp_path / "runs/recipe/analysis.json")["instances"] == {
        "available": {"capital": 2, "river": 2},
        "most_held_out": {"capital": 2, "river": 2},
        "tested": {"capital": 0, "river": 0},
    }

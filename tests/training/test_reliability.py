"""Locks, kills in the first write, moved runs, changed inputs, and the model's limits."""

import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from badit import Run, load_tasks
from badit.cli import main
from badit.comparison.worker import start_cell
from badit.data import Task
from badit.data import examples as examples_module
from badit.data.prompts import Prompt
from badit.recipe.loading import build_recipe
from badit.runs.fingerprints import keep_inputs
from badit.support.files import OWNER, exclusive
from badit.training import encoding
from badit.training.encoding import refuse_beyond_model
from data.examples import CHATML
from fuzz.command import STRESS
from refusals import refuses
from training import killed
from training.trainers import assert_same, change_tensors, fit_until, learned

HOLD = "import sys; from pathlib import Path; from badit.support.files import exclusive\n"
HOLD += "with exclusive(Path(sys.argv[1])):\n"


@pytest.fixture
def recipe_values(recipe_values):
    return recipe_values | {"training": {"max_steps": 2}}


@pytest.fixture
def run(recipe_file, recipe_values):
    assert main(["train", str(recipe_file)]) == 0
    return Run(recipe_values["output"])


def test_run_in_use_is_refused_until_its_process_is_killed(run, recipe_file, command):
    output = str(run.path)
    held = [sys.executable, "-c", HOLD + "    print('held', flush=True); sys.stdin.read()", output]
    with subprocess.Popen(held, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        trains = [["train", str(recipe_file)], ["train", str(recipe_file), "method.name=base"]]
        for words in (*trains, ["evaluate", output], ["analyze", output]):
            assert f"{output}: is in use by process {other.pid} on " in command(*words, code=2)
        refuses("is in use by process", start_cell, run.path, score=True, threads=None, device=None)
        other.kill()
    assert main(["train", str(recipe_file)]) == 0
    assert not Path(output, OWNER).exists()
    with exclusive(Path(output)), exclusive(Path(output)):  # the lock is reentrant within a process
        assert main(["evaluate", output]) == 0


def test_comparison_in_use_is_refused(recipe_file, recipe_values, tmp_path, command):
    folder = tmp_path / "comparison"
    folder.mkdir()
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)
    methods = "compare={methods: {lora: {name: lora, r: 2}}, reference: lora}"
    message = command("compare", recipe_file, methods, f"output={folder}", code=2)
    assert f"{folder}: is in use by another process" in message


def test_run_that_failed_before_training_starts_again_with_corrections(
    recipe_file, recipe_values, capsys, monkeypatch
):
    for mistake in (
        "method.target_modules=[gate_prj]",
        "model.name=/nowhere",
        "training.optim=galore_adamw",
    ):
        assert main(["train", str(recipe_file), mistake]) == 2
    data = Path(recipe_values["data"]["source"])
    data.write_text(data.read_text().replace("land 1", "land 9"))
    with (
        monkeypatch.context() as patch
    ):  # only rank 0 compares the data with those of the first attempt
        patch.setenv("RANK", "1")
        keep_inputs(
            Run(recipe_values["output"]), {"task cities": "changed", "task rivers": "changed"}
        )
    assert main(["train", str(recipe_file)]) == 0
    assert main(["evaluate", recipe_values["output"]]) == 0
    assert "changed" not in capsys.readouterr().err
    assert main(["train", str(recipe_file), "method.r=1"]) == 2, "now it has results"


def test_refused_process_does_not_remove_a_new_folder_of_another_process(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def made_and_locked_by_another(path, **_):
        os.mkdir(path)
        fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", made_and_locked_by_another)
        refuses(f"{folder}: is in use by another process", exclusive(folder).__enter__)
    assert folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(STRESS))
def test_second_process_on_the_same_folder_is_refused(
    attempt, recipe_file, recipe_values, tmp_path, processes
):
    """Both succeed if they happen to run one after the other."""
    pair = [
        killed.start(processes, ["train", str(recipe_file)], tmp_path / name)
        for name in ("one", "other")
    ]
    ends = [killed.end(process) for process in pair]
    assert sorted(code for code, _ in ends) in ([0, 2], [0, 0]), ends
    assert all("is in use by" in said for code, said in ends if code)
    assert main(["train", str(recipe_file), f"output={tmp_path / 'alone'}"]) == 0
    alone, shared = Run(tmp_path / "alone"), Run(recipe_values["output"])
    assert shared.metrics_path.read_bytes() == alone.metrics_path.read_bytes()
    assert_same(learned(shared), learned(alone))


def test_foreign_folder_is_untouched_and_leftover_first_writes_do_not_block(
    recipe_file, recipe_values, command
):
    output = Path(recipe_values["output"])
    output.mkdir()
    (output / "notes.txt").touch()
    assert f"{output}: exists and is not a run's folder" in command("train", recipe_file, code=2)
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    assert main(["train", str(recipe_file), f"output={output}-new", "data.source=/nowhere"]) == 2
    assert not Path(f"{output}-new").exists()
    (output / "notes.txt").unlink()
    for name in (OWNER, "config.yaml.partial"):
        (output / name).write_text("model:")
    assert main(["train", str(recipe_file)]) == 0
    assert not list(output.rglob("*.partial"))


def test_moved_run_uses_its_current_folder(recipe_file, recipe_values, tmp_path):
    """Its config.yaml names the old folder, which still holds the original and must not change."""
    assert main(["train", str(recipe_file), "data.order=seeded-0"]) == 0
    old, moved = Path(recipe_values["output"]), tmp_path / "moved"
    shutil.copytree(old, moved)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    for scores in moved.rglob("scores.json"):
        scores.unlink()
    assert Run(moved).recipe.output == str(moved)
    assert main(["evaluate", str(moved)]) == 0
    assert len(list(moved.rglob("scores.json"))) == len(list(old.rglob("scores.json")))
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_training_with_an_added_task_continues_with_its_number_of_clusters(
    recipe_file, recipe_values, task_file, command
):
    run = fit_until(2, build_recipe(recipe_values, ["training.save_steps=1"]))
    lines = task_file.read_text().splitlines(keepends=True)
    task_file.write_text(
        "".join([*lines, *(line.replace('"rivers"', '"lakes"') for line in lines)])
    )
    options = ["training.save_steps=1", "--allow-changed-inputs"]
    command("train", recipe_file, *options)
    assert run.recipe.method["num_clusters"] == 2


def test_run_with_changed_tasks_or_base_weights_is_refused(
    run, recipe_file, task_file, model_folder, command
):
    shutil.rmtree(run.adapter_path)
    run.scores_path.unlink()
    lines = task_file.read_text().splitlines(keepends=True)
    of_one = [line for line in lines if '"cities"' in line]
    added = [line.replace('"rivers"', '"lakes"') for line in lines if '"rivers"' in line]
    longer = [*lines, lines[-1].replace('"input": "', '"input": "more ')]
    for changed, name in (
        (lines + added, "lakes"),
        (of_one, "rivers"),
        (lines[:-1], "rivers"),
        (longer, "rivers"),
    ):
        task_file.write_text("".join(changed))
        assert f"{run.path}: task {name} changed since the run began" in command(
            "train", recipe_file, code=2
        )
    assert main(["train", str(recipe_file), "--allow-changed-inputs"]) == 0
    assert run.environment["changed_inputs"] == ["task rivers"]
    inputs = run.environment["inputs"]
    task_file.write_text("".join(lines))
    assert main(["train", str(recipe_file), "--allow-changed-inputs"]) == 0
    assert run.environment["inputs"] == inputs  # those of the training
    task_file.write_text("".join(longer))
    larger = change_tensors(
        lambda tensors: {name: tensor * 1.5 for name, tensor in tensors.items()}
    )
    larger(model_folder / "model.safetensors")
    assert "changed since the run was trained; restore it" in command("evaluate", run.path, code=2)
    shutil.rmtree(run.adapter_path)
    run.scores_path.unlink()
    assert f"{run.path}: the base model changed" in command("train", recipe_file, code=2)


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_template(folder):
    (folder / "chat_template.jinja").write_text(CHATML.replace("|im_end|>", "|im_end|>!"))


def change_splitting(folder):
    """The same vocabulary and template, but other tokens for the same text."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-40]
    path.write_text(json.dumps(content))


def change_epsilon(folder):
    change_json(folder / "config.json", rms_norm_eps=0.1)


def change_positions(folder):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    change_json(folder / "config.json", rope_parameters=rope)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (change_template, "the tokenizer"),
        (change_splitting, "the tokenizer"),
        (change_epsilon, "the model's rms_norm_eps"),
        (change_positions, "the model's rope_parameters"),
    ],
)
def test_training_with_another_tokenizer_or_configuration_is_refused(
    recipe_file, recipe_values, model_folder, command, change, name
):
    run = fit_until(
        2, build_recipe(recipe_values, ["training.max_steps=4", "training.save_steps=1"])
    )
    options = ["training.max_steps=4", "training.save_steps=1"]
    inputs = run.environment["inputs"]
    change(model_folder)
    error = command("train", recipe_file, *options, code=2)
    assert f"{run.path}: {name} changed since the run began; restore" in error
    assert run.environment["inputs"] == inputs
    assert main(["train", str(recipe_file), *options, "--allow-changed-inputs"]) == 0
    changed = {name}
    if name == "the tokenizer":
        changed.add("the encoded training examples")
    assert set(run.environment["changed_inputs"]) == changed


def test_training_with_other_token_ids_of_the_same_tokenizer_is_refused(
    recipe_file, recipe_values, command, monkeypatch
):
    """As a chat template that writes the date, or another release's way of encoding."""
    options = ["training.max_steps=4", "training.save_steps=1"]
    run = fit_until(2, build_recipe(recipe_values, options))
    encode = examples_module.encode_examples

    def other_encode(*arguments, **keywords):
        examples = encode(*arguments, **keywords)
        return [{**example, "input_ids": [5, *example["input_ids"][1:]]} for example in examples]

    monkeypatch.setattr(examples_module, "encode_examples", other_encode)
    error = command("train", recipe_file, *options, code=2)
    assert f"{run.path}: the encoded training examples changed since the run began" in error


def test_runs_of_earlier_releases_without_these_fingerprints_continue(
    recipe_file, recipe_values, model_folder, command
):
    options = ["training.max_steps=4", "training.save_steps=1"]
    run = fit_until(2, build_recipe(recipe_values, options))
    inputs = run.environment["inputs"]
    early = {
        name: value
        for name, value in inputs.items()
        if name == "the base model" or name.startswith("task ")
    }
    change_json(run.environment_path, inputs=early)
    change_json(model_folder / "config.json", a_later_setting=1)
    command("train", recipe_file, *options)
    assert run.environment["inputs"] == {**inputs, "the model's a_later_setting": "1"}
    change_json(run.environment_path, inputs=early)
    change_template(model_folder)
    change_epsilon(model_folder)
    command("evaluate", run.path)


def test_sequence_records_the_encoded_examples_of_each_task(recipe_values, recipe_file, command):
    command("train", recipe_file, "data.order=[cities, rivers]")
    inputs = Run(recipe_values["output"]).environment["inputs"]
    names = [name for name in inputs if name.startswith("the encoded")]
    assert names == [f"the encoded training examples of {task}" for task in ("cities", "rivers")]


def test_finished_run_with_another_tokenizer_or_configuration(run, model_folder, capsys, command):
    command("evaluate", run.path)
    assert "changed" not in capsys.readouterr().err
    change_template(model_folder)
    for words in (["evaluate", run.path], ["generate", run.path, "Lima", "--max-new-tokens", "2"]):
        assert main([*map(str, words)]) == 0
        assert "the tokenizer changed since the run was trained" in capsys.readouterr().err
    change_positions(model_folder)
    error = command("evaluate", run.path, code=2)
    assert (
        "has changed since the run was trained (the model's rope_parameters); restore it" in error
    )


def test_generate_for_a_task_uses_the_prompt_format_of_training(run, recipe_values, monkeypatch):
    seen = []
    encode = encoding.encode_prompts
    monkeypatch.setattr(
        encoding, "encode_prompts", lambda t, new, **kw: seen.extend(new) or encode(t, new, **kw)
    )
    trained_with = run.predictions.query("task == 'cities'")["prompt"].iloc[0]
    instance = load_tasks(recipe_values["data"]["source"], tasks=["cities"])[0].test[0]
    run.generate([instance.input], task="cities", max_new_tokens=2)
    assert " ".join("".join(seen[0][:3]).split()) in " ".join(trained_with.split())
    run.generate(["as it is"], task="cities", raw=True, max_new_tokens=2)
    assert seen[1] == "as it is"
    refuses(
        r"'citys' \(did you mean 'cities'\?\); known: cities, rivers$",
        run.generate,
        "Lima",
        task="citys",
    )
    monkeypatch.setattr(Task, "has_several_instructions", True)
    refuses("--task: cities has several instructions", run.generate, "Lima", task="cities")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin\n"))
    assert main(["generate", str(run.path), "-", "--max-new-tokens", "2"]) == 0
    assert seen[2] == Prompt("", "from stdin", "", is_message=True)


def test_instances_beyond_model_positions_or_embeddings_are_refused(tiny_model):
    example = {"task": "cities", "id": "7", "input_ids": [5] * 60}
    model, rotary = (
        tiny_model("gpt2", n_positions=64),
        tiny_model("llama", max_position_embeddings=20),
    )
    refuse_beyond_model([example], model, new_tokens=4)
    refuse_beyond_model([example], rotary)
    refuses(
        "has 60 tokens plus 5 new, but the model has 64 positions",
        refuse_beyond_model,
        [example],
        model,
        new_tokens=5,
    )
    example["input_ids"] = [100]
    refuses(
        "cities/7: token id 100 is beyond the model's 100 embeddings",
        refuse_beyond_model,
        [example],
        rotary,
    )


def test_prompts_beyond_model_positions_are_refused_by_commands(
    tiny_model, recipe_values, tmp_path, command
):
    """GPT-2 with 96 positions, for whose Conv1D layers PEFT changes and saves a LoRA setting."""
    folder = Path(recipe_values["model"]["name"])
    vocabulary = len(AutoTokenizer.from_pretrained(folder))
    tiny_model("gpt2", n_positions=96, vocab_size=vocabulary, eos_token_id=2).save_pretrained(
        folder
    )
    recipe, output, held_out = (
        tmp_path / "gpt2.yaml",
        recipe_values["output"],
        tmp_path / "long.jsonl",
    )
    values = {
        "method": {"name": "lora", "r": 2},
        "training": {"max_steps": 1},
        "prompt": {"chat_template": "never"},
    }
    recipe.write_text(yaml.safe_dump(recipe_values | values))
    assert main(["train", str(recipe)]) == 0
    one = {"task": "lakes", "instruction": "Name it.", "input": "land " * 120, "output": "sea"}
    rows = [{**one, "split": split, "input": "land"} for split in ("train", "train", "test")]
    held_out.write_text("\n".join(map(json.dumps, [*rows, *[{**one, "split": "validation"}] * 2])))
    evaluated = [
        "output=" + str(tmp_path / "new"),
        f"data.source={held_out}",
        "training.eval_strategy=epoch",
    ]
    for words in (
        ["generate", output, "land " * 120],
        ["generate", output, "land", "--task=cities", "--max-new-tokens=100"],
        ["analyze", "--data", str(held_out), output],
        ["train", str(recipe), *evaluated],
    ):
        assert "96 positions; lower prompt.max_source_tokens" in command(*words, code=2), words


def test_chat_template_that_raises_or_loses_text_is_refused(recipe_file, model_folder, command):
    for template, message in (
        (
            "{{ raise_exception('no roles') }}",
            r"chat_template: cannot be rendered \(no roles\); use prompt.chat",
        ),
        (
            "{% for message in messages %}<s>{% endfor %}",
            "chat_template: the rendered prompt lacks the message text",
        ),
        ("{{ ''.__class__.__mro__ }}", "chat_template: cannot be rendered"),
    ):
        (model_folder / "chat_template.jinja").write_text(template)
        assert re.search(message, command("train", recipe_file, code=2))


def test_generate_from_a_file_prints_json_lines(trained, tmp_path, command):
    run = trained({"name": "badit", "num_experts": 4, "r": 2})
    text, rows, folder = tmp_path / "inputs.txt", tmp_path / "inputs.jsonl", str(run.path)
    text.write_text("Lima\n\nRome\n")
    rows.write_text('{"input": "Lima"}\n{"input": "Rome", "id": 3}\n')
    answers = run.generate(["Lima", "Rome"], task="cities", max_new_tokens=3)
    for file in (text, rows):
        shown = command("generate", folder, f"--file={file}", "--task=cities", "--max-new-tokens=3")
        printed = [json.loads(line) for line in shown.splitlines()]
        assert [(line["input"], line["answer"]) for line in printed] == [
            *zip(["Lima", "Rome"], answers, strict=True)
        ]
    rows.write_text('{"input": 3}\n{"input": "It\\u0092s"}\n')
    shown = command("generate", folder, f"--file={rows}", "--max-new-tokens=1")
    assert [json.loads(line)["input"] for line in shown.splitlines()] == ["3", "It\x92s"]
    rows.write_text('{"input": "Lima"}\n{"text": "Rome"}\n')
    assert "line 2: input: must be a text or a number" in command(
        "generate", folder, f"--file={rows}", code=2
    )
    assert "give either a prompt, or --file FILE" in command("generate", folder, code=2)

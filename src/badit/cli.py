"""The command line: ``badit COMMAND …``. Some commands are functions of badit and methods of Run, with their docs.

A command returns what it prints, or an exit code. Everything heavy is imported inside the command.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from badit import __version__
from badit.environment import is_main_process, quiet_notices, status
from badit.errors import BaditError, explained, say, show
from badit.files import lines_of, read_json, write_text
from badit.run import Run, analyze
from badit.run import compare as run_comparison
from badit.run import train as run_training

app = App(
    name="badit",
    help="Multi-task instruction tuning by basic-ability decomposition. --debug before a command shows tracebacks.",
    version=f"badit {__version__}",
    help_flags=["--help", "-h"],
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(help="Install completion for your shell, and say where.")
Output = Annotated[str, Parameter(name=["--output", "-o"])]


@app.command
def train(recipe: str, *overrides: str, dry_run: bool = False, allow_changed_inputs: bool = False) -> str | None:
    """Train and score a recipe.

    The same command continues after an interruption; what is done is not done again.

    Args:
        recipe: a YAML file, such as recipes/superni-cpu.yaml.
        overrides: key=value, such as training.num_train_epochs=2 output=runs/mine.
        dry_run: check recipe, data and model, say what would be done, and stop.
        allow_changed_inputs: continue a run although its data or base weights have changed, and record that.
    """
    made = _read_recipe(recipe, overrides)
    if dry_run:
        from badit.recipe import dump_recipe

        return "\n".join([dump_recipe(made), *_load("badit.authoring").check(made)])
    _load("badit.evaluate")
    run = run_training(made, allow_changed_inputs=allow_changed_inputs)
    if not is_main_process():
        return None
    return f"{_score_table(made.method.get('name', 'badit'), run)}\n\nRun: {run.path}"


@app.command
def compare(recipe: str, *overrides: str, jobs: int = 1, dry_run: bool = False) -> str | int:
    """Train and score methods with the same budget, each at its best learning rate.

    The same command continues after an interruption: finished runs are kept, failed ones are tried again. Print the
    table again, in other formats too, with: badit table OUTPUT

    Args:
        recipe: a YAML file with a compare section, such as recipes/superni-cpu.yaml.
        overrides: key=value, such as compare.seeds=[0] output=runs/mine.
        jobs: runs at a time; they share the cores and GPUs.
        dry_run: validate everything, show methods, budgets and what a run takes, and stop.
    """
    made = _read_recipe(recipe, overrides)
    if dry_run:
        return "\n".join(_load("badit.authoring").check_comparison(made))
    _load("badit.compare")
    # A batch system's SIGTERM must reach the running cells as Ctrl-C does: they have sessions of their own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = run_comparison(made, jobs=jobs)
    path = Path(made.output) / _load("badit.results").RESULTS
    show(f"{_load('badit.render').table(path)}\n\nResults: {path}")
    return int("failed" in set(results.cells["status"]))


@app.command
def table(
    results: str,
    *,
    format: Literal["text", "markdown", "latex", "csv"] = "text",
    metric: str = "rouge_l",
    by_task: bool = False,
    released: bool = False,
) -> str:
    """Print a comparison's results as text, Markdown, LaTeX or CSV.

    Args:
        results: a comparison's results.json, or the folder that holds it.
        format: the form of the table.
        metric: the metric of differences, ranks and --by-task: rouge_l, exact_match or nll.
        by_task: a row per task and a column per method.
        released: forgetting and transfer as SAPT's released code computes them.
    """
    return _load("badit.render").table(results, form=format, metric=metric, by_task=by_task, released=released)


@app.command
def report(
    run: str, *more: str, output: Output = "report.html", figures: str | None = None, title: str | None = None
) -> str:
    """Write one page of scores, curves, interference and experts, with its figures.

    The page needs no network and no other file. What it shows of interference and experts is measured by: badit analyze
    RUN. Differences between runs are taken to the first.

    Args:
        run: a run's folder, a comparison's, or a results.json.
        more: further ones, shown side by side.
        output: the page.
        figures: a folder for every figure as .svg and .pdf.
        title: the page's heading (default: the runs' names).
    """
    _load("badit.report.page")
    page = _load("badit.report").write_report([run, *more], output, title=title, figures=figures)
    return f"Report: {page}" + (f"\nFigures: {figures}" if figures else "")


@app.command
def init(data: str = "builtin", *overrides: str, output: Output = "recipe.yaml") -> str:
    """Write a first recipe for your data, with comments.

    Args:
        data: as in a recipe's data.source: a file, a folder, a data set of the hub or 'builtin'.
        overrides: what the data needs to be read, such as data.columns={input: text, output: label}.
        output: the recipe's file, which must not exist.
    """
    if Path(output).exists():
        raise BaditError(f"{output}: exists; choose another --output")
    write_text(Path(output), _load("badit.authoring").first_recipe(data, output, overrides))
    return f"Recipe: {output}\nNext: badit train {shlex.quote(output)} --dry-run"


@app.command
def keys(prefix: str = "", *, schema: bool = False) -> str:
    """Print every key of a recipe, with its default and meaning.

    Args:
        prefix: the keys that begin with this alone, such as training or method.r.
        schema: print a JSON schema for editors instead.
    """
    authoring = _load("badit.authoring")
    if schema:
        return json.dumps(authoring.schema(), indent=2, ensure_ascii=False)
    found = [row for row in authoring.recipe_keys() if row[0].startswith(prefix)]
    if not found:
        raise BaditError(f"{prefix!r:.60}: no key begins so; see badit keys")
    width = max(len(key) for key, _, _ in found)
    return "\n".join(f"{key:{width}}  {default:16}  {text}" for key, default, text in found)


@app.command
def tasks(source: str, *overrides: str, show: int = 0) -> str:
    """List and validate task data, and show how a model would see it.

    Args:
        source: a recipe, or data as in a recipe's data.source: a file, a folder, a data set of the hub or 'builtin'.
        overrides: key=value, such as data.columns={input: text, output: label} or data.format=superni.
        show: number of training prompts per task to print as the model gets them, with statistics.
    """
    from badit.recipe import build_recipe, load_recipe

    is_recipe = Path(source).suffix in (".yaml", ".yml")
    recipe = load_recipe(source, overrides) if is_recipe else build_recipe({"data": {"source": source}}, overrides)
    return _load("badit.preview").preview(recipe, show)


@app.command
def studio(run: str, *, port: int = 8642, browser: bool = True, trust_remote_code: bool = False) -> None:
    """Try a run's adapter in the browser: answers, gates, and mixtures by hand.

    The page listens on 127.0.0.1, for this machine alone. Ctrl-C ends it.

    Args:
        run: a run's folder, of any method that trains an adapter.
        port: the port; 0 takes a free one.
        browser: open the page.
        trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.
    """
    _load("badit.studio.server").serve(run, port=port, browser=browser, trust_remote_code=trust_remote_code)


@app.command
def serve(
    run: str,
    exports: str | None = None,
    *,
    url: str = "http://127.0.0.1:8000",
    port: int = 8001,
    trust_remote_code: bool = False,
) -> None:
    """Route prompts as a run does, in front of vLLM: an OpenAI-compatible proxy.

    Requests for the model 'auto' are routed, others are passed on. It listens on 127.0.0.1. See docs/serving.md.

    Args:
        run: a run's folder, of a method whose gates follow the prompt.
        exports: what 'badit export RUN --all-tasks' has written and vLLM serves: a prompt goes to the nearest. Without
            it every prompt gets a LoRA with its own gates, which vLLM must be allowed to load.
        url: vLLM's server.
        port: the proxy's port; 0 takes a free one.
        trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.
    """
    _load("badit.studio.server")  # which names the extra that both need
    _load("badit.serve").serve(run, exports, url=url, port=port, trust_remote_code=trust_remote_code)


@app.command
def harness(run: str, *options: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Run lm-evaluation-harness on a run.

    For example: badit harness RUN --tasks arc_easy,gsm8k --apply_chat_template --batch_size 8

    It needs badit[eval]. See docs/lm-eval.md.

    Args:
        run: a run's folder.
        options: what 'lm_eval run' takes, except the model.
    """
    _load("badit.harness").run_command_line(run, list(options))


def _derive(function: Callable[..., Any], show: Callable[..., str | None], module: str = "badit.evaluate") -> None:
    """Makes a method of Run, or a function of a path, a command; ``show(run or path, result, options)`` is printed."""
    first, *others = inspect.signature(function).parameters.values()
    of_run = first.name == "self"
    parameters = [first.replace(name="run" if of_run else first.name, annotation="str")]
    for one in others:
        kind = one.annotation.replace("AnyPath", "Output" if one.name == "output" else "str")
        parameters.append(one.replace(annotation=kind))

    def command(path: str, *arguments: Any, **options: Any) -> str | None:
        found = Run(path) if of_run else path
        _load(module)
        return show(found, function(found, *arguments, **options), options)

    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__ = function.__name__
    run = "Args:\n            run: a run's folder.\n"
    command.__doc__ = (function.__doc__ or "").replace("Args:\n", run if of_run else "Args:\n", 1)
    app.command(command)


def _shown_tables(target: str, tables: Any, options: dict[str, Any]) -> str:
    is_folder = any((Path(target) / name).is_file() for name in ("config.yaml", "results.json"))
    folder = Path(options.get("output") or (target if is_folder else "runs/analysis"))
    rows = [[name, f"{len(frame):,}"] for name, frame in tables.items()]
    listed = _load("badit.render").text_table(["table", "rows"], rows, right={1})
    # Tables in another folder than their run or comparison are shown together with its scores and losses.
    shown = [target, folder] if is_folder and not folder.samefile(target) else [folder]
    return f"{listed}\n\nTables: {folder / 'analysis'}\n{_report_if_possible(shown, folder / 'report.html')}"


def _shown_export(run: Run, exported: Any, options: dict[str, Any]) -> str:
    """What was written, the commands that serve it, and what a fixed mixture costs, if it was scored."""
    from badit.card import Base
    from badit.export import SCORES
    from badit.models import resolve_model
    from badit.render import cost_table, exported_rank

    folder, base = shlex.quote(str(exported.folder)), shlex.quote(resolve_model(run.recipe.model.name))
    facts = {"mixture": exported.mixture or "none to choose: the run does the same for every prompt"}
    if exported.merged:
        facts |= {"model": folder, "vLLM": f"vllm serve {folder}", "llama.cpp": f"convert_hf_to_gguf.py {folder}"}
    else:
        served, adapter = exported.tasks.values() or [exported], f"{folder}/TASK" if exported.tasks else folder
        modules = " ".join(shlex.quote(f"{each.folder.resolve().name}={each.folder}") for each in served)
        command = f"vllm serve {base} --enable-lora --max-lora-rank {exported.max_lora_rank}"
        facts |= {
            "rank": exported_rank(exported),
            "adapter": adapter,
            "vLLM": f"{command} --lora-modules {modules}",
            "llama.cpp": f"convert_lora_to_gguf.py {adapter}{'' if Base.of(run.recipe).hub_id else f' --base {base}'}",
        }
    shown = "\n".join(f"{name:10} {value}" for name, value in facts.items())
    path = exported.folder / SCORES
    return f"{shown}\n\n{cost_table(read_json(path))}\n\nScores: {path}" if path.is_file() else shown


_derive(analyze, _shown_tables, "badit.analysis")
_derive(Run.evaluate, lambda run, scores, options: _score_table(str(run.path), run))
_derive(Run.export, _shown_export)
_derive(Run.push, lambda run, address, options: address)


@app.command
def generate(
    run: str,
    prompt: str | None = None,
    *,
    file: str | None = None,
    task: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 50,
    trust_remote_code: bool = False,
) -> str:
    """Answer one prompt, or those of a file, with a run's adapter.

    Args:
        run: a run's folder.
        prompt: the prompt's text, or - to read it from standard input.
        file: a text on each line, or in "input" of each line of a .jsonl; the answers are printed as JSON lines.
        task: a task of the run's data, by name or number: the text is an input, and becomes the prompt that it was
            trained with.
        raw: with --task, take the text as a whole prompt. Methods that tell tasks apart need the task anyway.
        max_new_tokens: the longest answer, in tokens.
        trust_remote_code: run Python code that comes with the run's base model, if its recipe asks for it as well.
    """
    if (prompt is None) == (file is None):
        raise BaditError("generate: give a prompt, or --file FILE with one on each line")
    found = Run(run)
    texts = sys.stdin.read() if prompt == "-" else _inputs(Path(file)) if file else prompt or ""
    _load("badit.evaluate")
    options = {"max_new_tokens": max_new_tokens, "trust_remote_code": trust_remote_code}
    answers = found.generate(texts, task=task, raw=raw, progress=file is not None, **options)
    if isinstance(texts, str):
        return answers
    pairs = ({"input": text, "answer": answer} for text, answer in zip(texts, answers, strict=True))
    return "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)


def _inputs(file: Path) -> list[str]:
    """The texts on a file's lines, blank ones left out."""
    texts = []
    for number, line in lines_of(file):
        if line.strip():
            text = read_json(file, line, number).get("input") if file.suffix == ".jsonl" else line.rstrip("\r\n")
            if not isinstance(text, str):
                raise BaditError(f"{file}: line {number}: input: must be a text")
            texts.append(text)
    return texts


@app.command
def demo(*, output: Output = "runs/demo", epochs: float = 1.0, seed: int = 0) -> None:
    """Tune SmolLM2 on the built-in tasks with LoRA and BADIT, and compare.

    The same command continues after an interruption; remove the output folder to start over.

    Args:
        output: where the three runs go.
        epochs: passes over the training data.
        seed: of the adapters, the batches and dropout.
    """
    _load("badit.evaluate")
    _load("badit.demo").run_demo(Path(output), epochs, seed)
    runs = [Path(output) / name for name in ("lora", "base", "badit")]  # differences are taken to the first
    show(_report_if_possible(runs, Path(output) / "report.html"))


def _read_recipe(path: str, overrides: Sequence[str]) -> Any:
    """A recipe whose data is there: what is wrong with it is known before the heavy imports."""
    from badit.recipe import load_recipe

    with status("reading the recipe"):
        made = load_recipe(path, overrides)
        for source in made.data.sources():
            source.refuse_missing()
    return made


def _load(module: str) -> Any:
    """Imports a module, which may take seconds, so that what follows takes none."""
    with status("loading libraries"):
        return import_module(module)


def _score_table(name: str, run: Run) -> str:
    return _load("badit.render").score_table({name: run.scores})


def _report_if_possible(runs: Sequence[str | Path], output: Path) -> str:
    """Writes the page and says where it is, or says what it would need."""
    report = _load("badit.report")
    if not report.has_extra():
        return "For a page of figures: pip install 'badit[report]', then badit report " + " ".join(map(str, runs))
    return f"Report: {report.write_report(runs, output)}"


def _complain(text: str) -> None:
    for line in text.splitlines():
        say(f"badit: {line}", red=True)


def quiet_libraries() -> None:
    """Hides the progress bars and notices of transformers, tokenizers, torch and torchao; badit shows its own."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    quiet_notices()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 if a part failed, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words[:1]
    if not debug:
        quiet_libraries()
    try:
        with explained():
            found = app(words[debug:], exit_on_error=False, print_error=False)
        if isinstance(found, str):
            show(found)
    except CycloptsError as error:
        command = " ".join(["badit", *(error.command_chain or [])])
        _complain(f"{error} See: {command} --help")
        return 2
    except BaditError as error:
        if debug:
            raise
        # Of several processes all meet the same bad input, and the first reports it; in training one may be alone.
        torch = sys.modules.get("torch")
        is_training = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_main_process() or is_training:
            _complain(str(error))
        return 2
    except KeyboardInterrupt:
        if is_main_process():
            say("")
            _complain("interrupted; the same command continues from the last checkpoint")
        return 130
    except BrokenPipeError:  # the reader (head, less) has closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return found if isinstance(found, int) else 0

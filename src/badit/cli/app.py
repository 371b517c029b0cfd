"""The command line: ``badit COMMAND …``. Some commands are functions of badit or methods of Run, with their docstrings.

A command returns the text to print, or an exit code. Slow imports are inside the commands.
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
from typing import Annotated, Any, Literal  # noqa: F401 (Literal is in annotations of derived commands)

from cyclopts import App, CycloptsError, Parameter
from cyclopts.types import NonNegativeInt, Port, PositiveInt

from badit import __version__
from badit.api import Run, analyze, table
from badit.support.console import is_main_process, quiet_notices, say, show, status
from badit.support.errors import BaditError, explained
from badit.support.files import lines_of, read_json, write_text

app = App(
    name="badit",
    help="Tunes a model on many tasks and compares methods. --debug before a command shows tracebacks.",
    version=f"badit {__version__}",
    help_format="plaintext",
    default_parameter=Parameter(negative_bool=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command(
    help="Install completion for your shell, and print the path of the script."
)
Output = Annotated[str, Parameter(name=["--output", "-o"])]
Enabled = Annotated[
    bool, Parameter(negative_bool="no-")
]  # a flag that is set unless --no-NAME is given
Overrides = Annotated[
    str, Parameter(help="key=value, such as training.num_train_epochs=2 output=runs/mine.")
]
LocalPort = Annotated[Port, Parameter(help="the port to listen on; 0 selects a free one.")]
RunFolder = Annotated[str, Parameter(help="a run's folder.")]
Trust = Annotated[
    bool,
    Parameter(help="run the base model's own Python code, if the run's recipe allows this too."),
]


@app.command
def train(
    recipe: str, *overrides: Overrides, dry_run: bool = False, allow_changed_inputs: bool = False
) -> str | None:
    """Train and score a recipe.

    The same command resumes an interrupted run. Finished work is not repeated.

    Args:
        recipe: a YAML file, or the name of a recipe that comes with badit, such as own-tasks.
        dry_run: check recipe, data and model, print the steps and the estimated costs, and exit without training.
        allow_changed_inputs: resume the run even if its data or base weights have changed, and record the change.
    """
    made = _read_recipe(recipe, overrides)
    if dry_run:
        shown = _load("badit.recipe.saved").dump_recipe(made)
        return "\n".join([shown, *_load("badit.authoring.dry_run").check(made)])
    run = _load("badit.api").train(made, allow_changed_inputs=allow_changed_inputs)
    return (
        f"{_load('badit.runs.scores').score_table(run.scores)}\n\nRun: {run.path}"
        if is_main_process()
        else None
    )


@app.command
def compare(
    recipe: str, *overrides: str, jobs: PositiveInt = 1, dry_run: bool = False
) -> str | int:
    """Train and score methods, each at its best learning rate of compare.learning_rates.

    The same command resumes an interrupted comparison: finished runs are kept, failed runs are repeated.
    It prints a table (again, also in other formats: badit table OUTPUT) and writes OUTPUT/report.html.

    Args:
        recipe: a YAML file with a compare section, or the name of one that comes with badit, such as own-tasks.
        overrides: key=value, such as compare.seeds=[0] output=runs/mine.
        jobs: number of runs at a time; they share the cores and GPUs.
        dry_run: check everything, print the methods, their budgets and the estimated costs of one run, and exit.
    """
    made = _read_recipe(recipe, overrides)
    if dry_run:
        return "\n".join(_load("badit.authoring.dry_run").check_comparison(made))
    # SIGTERM (from a batch system) is handled like Ctrl-C: the cells run in separate sessions and must be stopped too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = _load("badit.comparison.compare").compare(made, jobs=jobs)
    path = Path(made.output) / _load("badit.comparison.results").RESULTS
    show(f"{table(path)}\n\nResults: {path}")
    show(_report_if_possible([made.output], path.with_name("report.html")))
    return int("failed" in set(results.cells["status"]))


@app.command
def report(
    run: str,
    *more: str,
    output: Output = "report.html",
    figures: str | None = None,
    title: str | None = None,
) -> str:
    """Write an HTML report with figures: scores, curves, interference and experts.

    The page is one file and needs no network. Differences between runs are relative to the first run.
    For interference and experts, first run: badit analyze RUN

    Args:
        run: a run's folder, a comparison's folder, or a results.json.
        more: further runs or comparisons, shown side by side.
        output: the HTML file.
        figures: a folder to which every figure is written as .svg and .pdf.
        title: the page's heading (default: the runs' names).
    """
    page = _load("badit.report").write_report([run, *more], output, title=title, figures=figures)
    return f"Report: {page}" + (f"\nFigures: {figures}" if figures else "")


@app.command
def init(data: str = "builtin", *overrides: str, output: Output = "recipe.yaml") -> str:
    """Write a first recipe for your data, with comments.

    Args:
        data: the recipe's data.source: a file, a folder, a dataset on the hub or 'builtin'.
        overrides: data keys that are needed to read the data, such as data.columns.input=text.
        output: the recipe's file, which must not exist yet.
    """
    if Path(output).exists():
        raise BaditError(f"{output}: already exists; choose another --output")
    write_text(
        Path(output), _load("badit.authoring.first_recipe").first_recipe(data, output, overrides)
    )
    return f"Recipe: {output}\nNext: badit train {shlex.quote(output)} --dry-run"


@app.command
def keys(prefix: str = "", *, schema: bool = False) -> str:
    """Print every key of a recipe, with its default and meaning.

    Args:
        prefix: print only the keys that start with this, such as training or method.r.
        schema: print a JSON schema of all keys, for editors, instead.
    """
    authoring = _load("badit.authoring.keys")
    if schema:
        return json.dumps(authoring.schema(), indent=2, ensure_ascii=False)
    found = [row for row in authoring.recipe_keys() if row[0].startswith(prefix)]
    if not found:
        raise BaditError(
            f"{prefix!r:.60}: no recipe key starts with this; list them all with: badit keys"
        )
    width = max(len(key) for key, _, _ in found)
    return "\n".join(f"{key:{width}}  {default:16}  {text}" for key, default, text in found)


@app.command
def tasks(source: str, *overrides: str, show: NonNegativeInt = 0) -> str:
    """List and validate task data, and print prompts in the model's input format.

    Args:
        source: a recipe, or a value of its data.source: a file, a folder, a dataset on the hub or 'builtin'.
        overrides: key=value, such as data.columns.input=text or data.format=superni.
        show: number of training prompts per task to print in the model's input format, with token statistics.
    """
    from badit.recipe.loading import build_recipe, load_recipe, shipped_recipes

    is_recipe = Path(source).suffix in (".yaml", ".yml") or (
        source in shipped_recipes() and not Path(source).exists()
    )
    recipe = (
        load_recipe(source, overrides)
        if is_recipe
        else build_recipe({"data": {"source": source}}, overrides)
    )
    return _load("badit.authoring.preview").preview(recipe, show)


@app.command
def studio(
    run: str, *, port: LocalPort = 8642, browser: Enabled = True, trust_remote_code: Trust = False
) -> None:
    """Try a run's adapter in the browser: see its answers and gates, and set gates by hand.

    The server listens on 127.0.0.1, so only this machine can reach it. Ctrl-C stops it.

    Args:
        run: a run's folder, of any method that trains an adapter.
        browser: open the page in the browser.
    """
    _load("badit.integrations.web")  # names the extra if it is missing
    _load("badit.integrations.studio.server").serve(
        Run(run, trust_remote_code=trust_remote_code), port=port, browser=browser
    )


@app.command
def serve(
    run: str,
    exports: str | None = None,
    *,
    url: str = "http://127.0.0.1:8000",
    port: LocalPort = 8001,
    trust_remote_code: Trust = False,
) -> None:
    """Start an OpenAI-compatible proxy in front of vLLM that routes prompts with a run's gates.

    Requests for the model 'auto' are routed, others are passed on. It listens on 127.0.0.1. See docs/serving.md.

    Args:
        run: a run's folder, of a method whose gates depend on the prompt.
        exports: the folder written by 'badit export RUN --all-tasks', whose LoRAs vLLM serves; a prompt goes to the
            nearest one. By default each prompt gets a LoRA with its own gates, which vLLM must be allowed to load.
        url: the address of the vLLM server.
    """
    _load("badit.integrations.web")  # names the extra if it is missing
    _load("badit.integrations.proxy").serve(
        Run(run, trust_remote_code=trust_remote_code), exports, url=url, port=port
    )


@app.command
def harness(run: RunFolder, *options: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> None:
    """Run lm-evaluation-harness on a run.

    For example: badit harness RUN --tasks arc_easy,gsm8k --apply_chat_template --batch_size 8

    This requires badit[eval]. See docs/lm-eval.md.

    Args:
        options: the options of 'lm_eval run', except the model.
    """
    _load("badit.integrations.lm_eval").run_command_line(run, list(options))


def _derive(
    function: Callable[..., Any],
    show: Callable[..., str | None],
    module: str = "badit.evaluation.scoring",
) -> None:
    """Adds a command from a method of Run or a function of a path; it prints ``show(run or path, result, options)``.

    The method's command has the run's folder and, if it shows progress (loads the model), Run's ``trust_remote_code``.
    """
    first, *others = inspect.signature(function).parameters.values()
    of_run = first.name == "self"
    parameters = [
        first.replace(name="run", annotation="RunFolder")
        if of_run
        else first.replace(annotation="str")
    ]
    for one in others:
        kind = one.annotation.replace("AnyPath", "Output" if one.name == "output" else "str")
        parameters.append(one.replace(annotation="Enabled" if one.default is True else kind))
    if of_run and "progress" in function.__annotations__:
        parameters.append(
            parameters[-1].replace(name="trust_remote_code", default=False, annotation="Trust")
        )

    def command(path: str, *arguments: Any, **options: Any) -> str | None:
        found = (
            Run(path, trust_remote_code=options.pop("trust_remote_code", False)) if of_run else path
        )
        _load(module)
        return show(found, function(found, *arguments, **options), options)

    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    app.command(command)


def _shown_tables(target: str, tables: Any, options: dict[str, Any]) -> str:
    is_folder = any((Path(target) / name).is_file() for name in ("config.yaml", "results.json"))
    folder = Path(options.get("output") or (target if is_folder else "runs/analysis"))
    rows = [[name, f"{len(frame):,}"] for name, frame in tables.items()]
    listed = _load("badit.support.text").text_table(["table", "rows"], rows, right={1})
    # If the tables are not in the target's folder, the report gets both folders: scores and losses are in the target's.
    shown = [target, folder] if is_folder and not folder.samefile(target) else [folder]
    return f"{listed}\n\nTables: {folder / 'analysis'}\n{_report_if_possible(shown, folder / 'report.html')}"


def _shown_export(run: Run, exported: Any, options: dict[str, Any]) -> str:
    """Returns the export's facts, the commands that serve it, and the score difference of its gates, if measured."""
    from badit.export.exporting import SCORES
    from badit.export.scoring import cost_table
    from badit.hub.card import hub_id
    from badit.models import resolve_model

    section, folder = run.recipe.model, shlex.quote(str(exported.folder))
    base, on_hub = resolve_model(section.name), hub_id(run.recipe)
    facts = {
        "mixture": exported.record["mixture"]
        or "none: the run has no gates that depend on the prompt"
    }
    if exported.rank is None:
        facts |= {
            "model": folder,
            "vLLM": f"vllm serve {folder}",
            "llama.cpp": f"convert_hf_to_gguf.py {folder}",
        }
    else:
        adapter = f"{folder}/TASK" if exported.tasks else folder
        command = [
            "vllm",
            "serve",
            base,
            *(["--revision", section.revision] if section.revision else []),
        ]
        command += [
            "--enable-lora",
            "--max-lora-rank",
            str(exported.max_lora_rank),
            "--lora-modules",
        ]
        command += [
            f"{each.folder.resolve().name}={each.folder}"
            for each in exported.tasks.values() or [exported]
        ]
        rank, error = f"{exported.rank}, exact", exported.record.get("relative_error")
        if error is not None:
            module, worst = max(error["modules"].items(), key=lambda of_module: of_module[1])
            rank = f"{exported.rank} of {exported.record['exact_rank']}: relative error {error['total']:.2g} overall "
            rank += f"(Frobenius norm), at most {worst:.2g} per module ({module})"
        facts |= {"rank": rank, "adapter": adapter, "vLLM": shlex.join(command)}
        facts["llama.cpp"] = (
            f"convert_lora_to_gguf.py {adapter}{'' if on_hub else f' --base {shlex.quote(base)}'}"
        )
    shown = "\n".join(f"{name:10} {value}" for name, value in facts.items())
    path = exported.folder / SCORES
    return (
        f"{shown}\n\n{cost_table(read_json(path))}\n\nScores: {path}" if path.is_file() else shown
    )


_derive(analyze, _shown_tables, "badit.analysis")
_derive(table, lambda path, text, options: text, "badit.comparison.tables")
_derive(Run.evaluate, lambda run, scores, options: _load("badit.runs.scores").score_table(scores))
_derive(Run.export, _shown_export)
_derive(Run.push, lambda run, address, options: address)


@app.command
def generate(
    run: RunFolder,
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    *,
    file: str | None = None,
    task: str | None = None,
    raw: bool = False,
    max_new_tokens: int = 50,
    trust_remote_code: Trust = False,
) -> str:
    """Answer one prompt, or every prompt of a file, with a run's adapter.

    Args:
        prompt: the text of the prompt, or - to read it from standard input.
        file: a file with one text per line, or a .jsonl with the key "input" in each line; prints JSON lines.
        task: name or number of a task of the run's data; the text is then an input, and is formatted as in the
            task's training prompts.
        raw: use the text unchanged as the prompt; also with --task, for methods that need the task of every row.
        max_new_tokens: maximum number of tokens of an answer.
    """
    if (prompt is None) == (file is None):
        raise BaditError("generate: give either a prompt, or --file FILE with one prompt per line")
    found = Run(run, trust_remote_code=trust_remote_code)
    texts = (
        sys.stdin.read().removesuffix("\n")
        if prompt == "-"
        else _inputs(Path(file))
        if file
        else prompt or ""
    )
    _load("badit.evaluation.scoring")
    answers = found.generate(
        texts, task=task, raw=raw, max_new_tokens=max_new_tokens, progress=file is not None
    )
    if isinstance(texts, str):
        return answers
    pairs = ({"input": text, "answer": answer} for text, answer in zip(texts, answers, strict=True))
    return "\n".join(json.dumps(pair, ensure_ascii=False) for pair in pairs)


def _inputs(file: Path) -> list[str]:
    """The texts of a file, one per line; blank lines are skipped."""
    texts = []
    for number, line in lines_of(file):
        if line.strip():
            text = (
                read_json(file, line, number).get("input")
                if file.suffix == ".jsonl"
                else line.rstrip("\r\n")
            )
            if not isinstance(text, str | int | float):
                raise BaditError(f"{file}: line {number}: input: must be a text or a number")
            texts.append(str(text))
    if not texts:
        raise BaditError(f"{file}: has no prompts; write one per line")
    return texts


@app.command
def demo(*overrides: Overrides) -> str | int:
    """Tune SmolLM2 on the built-in tasks with LoRA and with BADIT, and compare them: 'badit compare demo'.

    The same command resumes an interrupted demo. To start over, remove the output folder.
    """
    return compare(str(_load("badit.recipe.loading").shipped_recipes()["demo"]), *overrides)


def _read_recipe(path: str, overrides: Sequence[str]) -> Any:
    """Reads a recipe and checks that its data exists, so that errors are reported before the slow imports."""
    with status("reading the recipe"):
        made = _load("badit.recipe.loading").load_recipe(path, overrides)
        for source in made.data.sources():
            source.refuse_missing()
    return made


def _load(module: str) -> Any:
    """Imports a module, which may take seconds, and shows a status line meanwhile."""
    with status("loading libraries"):
        return import_module(module)


def _report_if_possible(runs: Sequence[str | Path], output: Path) -> str:
    """Writes the report and returns a line with its path, or with the command that installs its extra."""
    report = _load("badit.report")
    if not report.has_extra():
        command = shlex.join(["badit", "report", *map(str, runs)])
        return f"For a report with figures: pip install 'badit[report]', then {command}"
    return f"Report: {report.write_report(runs, output)}"


def _complain(text: str) -> None:
    for line in text.splitlines():
        say(f"badit: {line}", red=True)


def quiet_libraries() -> None:
    """Hides notices of transformers, datasets, tokenizers, torch and torchao, unless environment variables are set."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors are also raised
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    quiet_notices()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 if a part failed, 2 for bad input, 130 if interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words[:1]
    if not debug:
        quiet_libraries()
    try:
        with explained():
            if os.environ.get("WORLD_SIZE", "1") != "1" and "train" not in words[debug : debug + 1]:
                raise BaditError(
                    "only badit train runs in several processes; start this command without the launcher"
                )
            found = app(words[debug:], exit_on_error=False, print_error=False)
        if isinstance(found, str) and is_main_process():
            show(found)
    except CycloptsError as error:
        _complain(f"{error} See: {' '.join(['badit', *(error.command_chain or [])])} --help")
        return 2
    except BaditError as error:
        if debug:
            raise
        # All processes find the same bad input, so only rank 0 reports it. In training, a single rank can fail.
        torch = sys.modules.get("torch")
        is_training = (
            torch is not None
            and torch.distributed.is_available()
            and torch.distributed.is_initialized()
        )
        if is_main_process() or is_training:
            _complain(str(error))
        return 2
    except KeyboardInterrupt:
        if is_main_process():
            say("")
            resumes = not {"train", "compare", "demo", "analyze"}.isdisjoint(
                words[debug : debug + 1]
            )
            _complain("interrupted" + ("; run the same command again to resume" if resumes else ""))
        return 130
    except BrokenPipeError:  # the reader of the pipe (head, less) has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return found if isinstance(found, int) else 0

"""The entry point: runs a command, prints its result, and turns errors into exit codes."""

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from cyclopts import CycloptsError, MissingArgumentError

from badit.cli.app import app
from badit.support.console import is_main_process, quiet_notices, say, show
from badit.support.errors import BaditError, explained

# In the order of `badit --help`.
_COMMANDS = (
    "train",
    "extend",
    "compare",
    "report",
    "init",
    "adopt",
    "keys",
    "tasks",
    "studio",
    "serve",
    "harness",
    "analyze",
    "table",
    "evaluate",
    "export",
    "push",
    "generate",
)
# A command's module adds it to the app.
for _name in _COMMANDS:
    import_module(f"badit.cli.{_name}")

# Of the required arguments of all commands.
_EXAMPLES = {
    "adapter": "outputs/checkpoint-100",
    "output": "--all-tasks -o exports",
    "recipe": "recipe.yaml",
    "repository": "ORG/NAME",
    "results": "runs/compared",
    "run": "runs/recipe",
    "source": "my-tasks.csv",
    "target": "runs/recipe",
}
_RESUMABLE = {"train", "extend", "compare", "demo", "analyze"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0, 1 if a part failed, 2 for bad input, 130 if interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = words[:1] == ["--debug"]
    if debug:
        words = words[1:]
    else:
        quiet_libraries()
    # Otherwise transformers downloads code for some layers and runs it.
    os.environ.setdefault("USE_HUB_KERNELS", "NO")
    try:
        with explained():
            _refuse_launcher(words)
            # cyclopts raises its errors, so that all errors are printed in the same form.
            result = app(words, exit_on_error=False, print_error=False)
        if isinstance(result, str) and is_main_process():
            show(result)
    except CycloptsError as error:
        command = " ".join(["badit", *(error.command_chain or [])])
        _complain(f"{error}{_example(error)} See: {command} --help")
        return 2
    except BaditError as error:
        if debug:
            raise
        # All processes find the same bad input, so only rank 0 reports it. In training, a single
        # rank can fail.
        if is_main_process() or _is_training_in_processes():
            _complain(str(error))
        return 2
    except KeyboardInterrupt:
        _report_interruption(words)
        return 130
    except BrokenPipeError:  # the reader of the pipe (head, less) has closed it
        # Python flushes stdout again when it exits, which would fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return result if isinstance(result, int) else 0


def _example(error: CycloptsError) -> str:
    """Returns an example of a command whose required arguments are incomplete."""
    if not isinstance(error, MissingArgumentError) or not error.command_chain:
        return ""
    (name,) = error.command_chain
    required = [
        _EXAMPLES[argument.field_info.name]
        for argument in app[name].assemble_argument_collection()
        if argument.required
    ]
    return f" For example: {shlex.join(['badit', name])} {' '.join(required)}."


def _refuse_launcher(words: Sequence[str]) -> None:
    is_launched = os.environ.get("WORLD_SIZE", "1") != "1"
    if is_launched and words[:1] not in (["train"], ["extend"]):
        fix = "start this command without the launcher"
        raise BaditError(f"only badit train and badit extend run in several processes; {fix}")


def _is_training_in_processes() -> bool:
    # A process that has not imported torch has not begun to train.
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available():
        return False
    return torch.distributed.is_initialized()


def _report_interruption(words: Sequence[str]) -> None:
    if not is_main_process():
        return
    say("")
    resumes = not _RESUMABLE.isdisjoint(words[:1])
    _complain("interrupted" + ("; run the same command again to resume" if resumes else ""))


def _complain(text: str) -> None:
    for line in text.splitlines():
        say(f"badit: {line}", red=True)


def quiet_libraries() -> None:
    """Hides notices of libraries, unless environment variables are set."""
    # Libraries read their verbosity when they are imported, which is later.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # its errors are also raised
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    quiet_notices()

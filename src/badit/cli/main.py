"""``badit VERB …``: parsing, and turning expected failures into one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from badit import __version__
from badit.cli.quiet import quiet_environment
from badit.errors import BaditError, one_line

# verb -> what `badit --help` says of it. badit/cli/VERB.py has its `configure(parser)` and
# `execute(options)`, which may return an exit code.
VERBS = {
    "demo": "tune SmolLM2 on the built-in tasks with LoRA and BADIT, and compare",
    "train": "train and score a recipe",
    "compare": "train and score methods side by side, at each one's best learning rate",
    "table": "print a comparison's results as text, Markdown, LaTeX or CSV",
    "evaluate": "score a run's adapter again, on the test or the validation split",
    "analyze": "measure interference between tasks, and what a run's experts do",
    "report": "write one page of scores, curves, interference and experts, with its figures",
    "export": "write a run as a plain LoRA or a merged model, for PEFT, vLLM and llama.cpp",
    "push": "upload a run's adapter or an export to the Hugging Face hub, with a model card",
    "harness": "run lm-evaluation-harness on a run",
    "generate": "answer one prompt with a run's adapter",
    "studio": "try a run's adapter in the browser: answers, gates, and mixtures by hand",
    "tasks": "list and validate task data",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, 1 if a part failed, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="badit", description="Multi-task instruction tuning by basic-ability decomposition."
    )
    parser.add_argument("--version", action="version", version=f"badit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and all logs")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, summary in VERBS.items():
        subparser = verbs.add_parser(verb, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the chosen verb's module is imported, which keeps `badit --help` quick.
        if verb in arguments:
            module = import_module(f"badit.cli.{verb}")
            module.configure(subparser)
            subparser.set_defaults(execute=module.execute)
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list at the first flag; `--jobs 2 output=runs/mine` means an override all the same.
    if rest and hasattr(options, "overrides") and not any(word.startswith("-") for word in rest):
        options.overrides += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not options.debug:
        quiet_environment()
    try:
        code = options.execute(options)
    except BaditError as error:
        if options.debug:
            raise
        if _is_first_process() or _is_training():
            print(f"badit: {one_line(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _is_first_process():
            print("\nbadit: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code or 0


def _is_first_process() -> bool:
    """Of several under a launcher, all of which meet the same bad input; the first tells of it."""
    return os.environ.get("RANK", "0") == "0"


def _is_training() -> bool:
    """Whether the processes are at work together, where one may meet what the others do not."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()

"""``badit harness RUN …``."""

from __future__ import annotations

import argparse

from badit.cli.quiet import quiet_loading


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "badit harness [-h] RUN [options of lm_eval …]"
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="what 'lm_eval run' takes, but for the model")
    parser.epilog = (
        "For example: badit harness RUN --tasks arc_easy,gsm8k --apply_chat_template --batch_size 8; tasks of your own "
        "by --tasks NAME --include_path FOLDER. It needs badit[eval]; docs/lm-eval.md says more."
    )


def execute(options: argparse.Namespace) -> None:
    from badit.harness import run_command_line

    quiet_loading()
    run_command_line(options.run, options.options)

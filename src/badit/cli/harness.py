"""``badit harness``."""

from typing import Annotated

from cyclopts import Parameter

from badit.cli.app import RunPath, app, load
from badit.runs.folder import RunFolder


@app.command
def harness(
    run: RunPath, /, *options: Annotated[str, Parameter(allow_leading_hyphen=True)]
) -> None:
    """Run lm-evaluation-harness on a run.

    For example: badit harness RUN --tasks arc_easy,gsm8k --apply_chat_template --batch_size 8

    This requires badit[eval]. See docs/lm-eval.md.

    Args:
        options: the options of 'lm_eval run', except the model.
    """
    RunFolder(run)  # before the slow import
    load("badit.integrations.lm_eval").run_command_line(run, list(options))

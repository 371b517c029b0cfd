"""``badit generate``."""

import json
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from badit.api import Run
from badit.cli.app import RunPath, Trust, app, load
from badit.support.errors import BaditError
from badit.support.files import lines_of, read_json


@app.command
def generate(  # noqa: PLR0913 (the command's options)
    run: RunPath,
    # Also for the prompt - (standard input).
    prompt: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    /,
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
        file: a file with one text per line, or a .jsonl with the key "input" in each line; prints
            JSON lines.
        task: name or number of a task of the run's data; the text is then an input, and is
            formatted as in the task's training prompts.
        raw: use the text unchanged as the prompt; also with --task, for methods that need the task
            of every row.
        max_new_tokens: maximum number of tokens of an answer.
    """
    if (prompt is None) == (file is None):
        raise BaditError("generate: give either a prompt, or --file FILE with one prompt per line")
    opened = Run(run, trust_remote_code=trust_remote_code)
    load("badit.evaluation.prompts")
    if file is None:
        text = prompt or ""
        if text == "-":
            # echo and editors add a line break.
            text = sys.stdin.read().removesuffix("\n")
        return opened.generate(text, task=task, raw=raw, max_new_tokens=max_new_tokens)
    texts = _inputs(Path(file))
    answers = opened.generate(
        texts, task=task, raw=raw, max_new_tokens=max_new_tokens, progress=True
    )
    lines = []
    for text, answer in zip(texts, answers, strict=True):
        lines.append(json.dumps({"input": text, "answer": answer}, ensure_ascii=False))
    return "\n".join(lines)


def _inputs(file: Path) -> list[str]:
    """Returns the texts of a file, one per line; blank lines are skipped."""
    texts = []
    for number, line in lines_of(file):
        if not line.strip():
            continue
        text = line.rstrip("\r\n")
        if file.suffix == ".jsonl":
            text = read_json(file, line, number).get("input")
        if not isinstance(text, str | int | float):
            raise BaditError(f"{file}: line {number}: input: must be a text or a number")
        texts.append(str(text))
    if not texts:
        raise BaditError(f"{file}: has no prompts; write one per line")
    return texts

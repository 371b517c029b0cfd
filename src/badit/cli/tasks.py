"""``badit tasks PATH``."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a folder in the SAPT or official layout, a .jsonl file, or 'builtin'")
    parser.add_argument("--format", default="auto", help="auto (default), sapt, superni, jsonl or builtin")


def execute(options: argparse.Namespace) -> None:
    from badit.data import load_tasks
    from badit.render import text_table

    tasks = load_tasks(options.path, format=options.format)
    rows = [
        [task.name, str(len(task.train)), str(len(task.validation)), str(len(task.test)), _shortened(task.definition)]
        for task in tasks
    ]
    print(text_table(["task", "train", "validation", "test", "definition"], rows, right={1, 2, 3}))
    print(f"\n{len(tasks)} tasks, all valid")


def _shortened(text: str, width: int = 60) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"

"""A reader under atheris, a fuzzer that mutates bytes and keeps those that reach code which none before them did.

    python -m fuzz.guided READER FOLDER -runs=N

FOLDER holds the seeds, in ``corpus``, and the files of the case at hand. Ends with a 0, or with what was let through.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["badit"]):
    from badit.adapters import tensor_shapes
    from badit.errors import BaditError

from fuzz.command import ends_well
from fuzz.test_tasks import LAYOUTS, write


def read_tasks(folder: Path, content: bytes) -> None:
    (folder / "tasks.jsonl").write_bytes(content)
    ends_well("tasks", str(folder / "tasks.jsonl"))


def read_superni(folder: Path, content: bytes) -> None:
    source = folder / "superni"
    if not source.exists():
        write(source, "superni")
    (source / next(iter(LAYOUTS["superni"]))).write_bytes(content)
    ends_well("tasks", str(source))


def read_recipe(folder: Path, content: bytes) -> None:
    (folder / "recipe.yaml").write_bytes(content)
    ends_well("train", str(folder / "recipe.yaml"), "--dry-run")


def read_results(folder: Path, content: bytes) -> None:
    (folder / "results.json").write_bytes(content)
    ends_well("table", str(folder))


def read_weights(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)
    with contextlib.suppress(BaditError):
        tensor_shapes(folder / "adapter_model.safetensors")


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "tasks": read_tasks,
    "superni": read_superni,
    "recipe": read_recipe,
    "results": read_results,
    "weights": read_weights,
}

if __name__ == "__main__":
    reader, folder = READERS[sys.argv[1]], Path(sys.argv[2])
    # libFuzzer's alarm is switched off for that of ends_well.
    atheris.Setup(
        [sys.argv[0], str(folder / "corpus"), "-timeout=0", *sys.argv[3:]], lambda content: reader(folder, content)
    )
    atheris.Fuzz()

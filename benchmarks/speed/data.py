#!/usr/bin/env python3
"""Reading and encoding up to 1 million instances: time and memory of a first and second start.

    python benchmarks/speed/data.py --output benchmarks/results/data.json

Synthetic tasks of 1,000 instances each in one .jsonl file, encoded for the built-in model. Every
size begins with an empty cache, and every start is a new process. Memory is the process's peak
resident size.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from badit.support.environment import environment
from badit.support.files import write_json

SIZES = (10_000, 100_000, 1_000_000)
PER_TASK = 1_000
WORDS = [
    f"{a}{b}"
    for a in ("river", "stone", "market", "summer", "letter", "garden")
    for b in ("", "s", "ing", "er")
]
START = """
import json, sys, time
began = time.perf_counter()
from badit.data import encode_tasks, mixture
from badit.data.readers import load_tasks
from badit.support.environment import peak_memory
from badit.models import load_tokenizer
tokenizer = load_tokenizer("smollm2-135m")
imported = time.perf_counter()
tasks = load_tasks(sys.argv[1])
read = time.perf_counter()
examples = encode_tasks(tokenizer, tasks, {}, mixture(tasks, 0))
tokens = sum(examples.lengths)
done = time.perf_counter()
seconds = {"imports": imported - began, "reading": read - imported}
seconds |= {"encoding": done - read, "all": done - began}
shown = {name: round(value, 2) for name, value in seconds.items()}
shown |= {"peak_memory_gib": peak_memory(), "tokens": tokens, "tasks": len(tasks)}
print(json.dumps(shown))
"""


def write_tasks(path: Path, count: int) -> None:
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            task = f"task{number // PER_TASK:04d}_words"
            words = rng.choices(WORDS, k=rng.randint(20, 60))
            row = {
                "task": task,
                "instruction": f"Name the word of rule {task} in the text.",
                "input": " ".join(words),
            }
            file.write(json.dumps({**row, "output": words[0]}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file of the results")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options = parser.parse_args()
    results = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "tasks.jsonl")
            write_tasks(path, size)
            linked = Path(folder, "cache")
            linked.mkdir()
            for entry in (
                Path(os.environ.get("BADIT_CACHE") or "~/.cache/badit").expanduser()
            ).glob("smollm2*"):
                (linked / entry.name).symlink_to(entry)
            starts = {}
            for start in ("first", "second"):
                environ = {**os.environ, "BADIT_CACHE": str(linked)}
                command = [sys.executable, "-c", START, str(path)]
                printed = subprocess.run(
                    command, env=environ, check=True, capture_output=True, text=True
                ).stdout
                starts[start] = json.loads(printed.splitlines()[-1])
            cache = sum(file.stat().st_size for file in (linked / "data").iterdir())
            results.append({"instances": size, **starts, "cache_gib": round(cache / 2**30, 3)})
            print(results[-1], flush=True)
            write_json(options.output, {"environment": environment(), "results": results})


if __name__ == "__main__":
    main()

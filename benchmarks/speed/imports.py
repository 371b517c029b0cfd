"""The time of ``import badit`` and ``badit --help``, each in a new process.

python benchmarks/speed/imports.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from measure import in_turns, keep, options

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "import badit": [sys.executable, "-c", "import badit"],
    "badit --help": [str(Path(sys.executable).with_name("badit")), "--help"],
}


def run(command: list[str]) -> Callable[[], object]:
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def main(arguments: argparse.Namespace) -> None:
    samples = in_turns(
        {name: run(command) for name, command in COMMANDS.items()}, rounds=arguments.rounds
    )
    keep("imports", {"seconds": samples})


if __name__ == "__main__":
    main(options(__doc__, rounds=9).parse_args())

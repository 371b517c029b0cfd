"""The option that lets a run's base model bring code of its own."""

from __future__ import annotations

import argparse


def add_trust(parser: argparse.ArgumentParser) -> None:
    """A run's folder may come from elsewhere, so what its recipe allows the user must allow, too."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the run's base model, which its recipe must ask for as well",
    )

"""The command line."""

from badit.cli.app import main

__all__ = ["main"]

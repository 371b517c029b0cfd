"""The command line. One file a verb; everything heavy is imported inside the verb that needs it."""

from badit.cli.main import main

__all__ = ["main"]

"""The command line: ``badit COMMAND …``, one module per command.

A command returns the text to print, or an exit code. Slow imports are inside the commands.
"""

from badit.cli.entry import main

__all__ = ["main"]

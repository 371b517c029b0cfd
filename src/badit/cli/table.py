"""``badit table``."""

from badit.api import table
from badit.cli.derived import derive

derive(table, lambda path, text, options: text, "badit.comparison.tables")

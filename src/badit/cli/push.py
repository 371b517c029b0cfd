"""``badit push``."""

from badit.api import Run
from badit.cli.derived import derive

derive(Run.push, lambda run, address, options: address, "badit.hub.upload")

"""Entry point of ``python -m badit``."""

import sys

from badit.cli import main

sys.exit(main())

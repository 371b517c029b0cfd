"""Entry point of ``python -m badit``."""

from badit.cli import main

raise SystemExit(main())

"""Entry point of ``python -m badit``."""

from badit.cli.app import main

raise SystemExit(main())

"""``badit push RUN ORG/NAME``."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder, or an export's")
    parser.add_argument("repository", metavar="ORG/NAME", help="the repository on the hub, made where there is none")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.epilog = "Uploads the adapter and a model card with its scores. Log in first: hf auth login."


def execute(options: argparse.Namespace) -> None:
    from badit.push import push_to_hub

    print(push_to_hub(options.run, options.repository, private=options.private))

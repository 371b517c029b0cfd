"""``badit push``: a run's adapter, or an export of it, to the Hugging Face hub, with its model card."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.card import CARD, Base, model_card
from badit.errors import BaditError, explained
from badit.export import RECORD
from badit.files import read_json
from badit.methods import AdapterMethod, build_method
from badit.models import HUB_ID
from badit.recipe import load_config
from badit.run import Run

_VISIBLE = re.compile(r"[^./\\\0][^/\\\0]*")  # the name of a file right in the folder, and no dot-file


def push_to_hub(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Uploads a run's adapter, or what ``badit export`` has made of it, and the card that goes with it.

    Only files that badit has written are uploaded, no others that lie in the folder and nothing that a link leads to.
    A card names neither folders nor users of this machine, nor does what is uploaded. The repository is made where
    there is none; in one that is there the files are replaced.

    Args:
        folder: a run's folder, or an export's, whose run must still be where it was.
        repository: org/name, or user/name.
        private: make a new repository private.

    Returns:
        The repository's address on the web.

    Raises:
        BaditError: no such run or export, a name that the hub does not take, no token, or the hub's refusal.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    if (folder / RECORD).is_file():
        record: dict[str, Any] | None = read_json(folder / RECORD)
        run = Run(str(record.get("run")))
        if not run.config_path.is_file():
            raise BaditError(f"{folder / RECORD}: run: is {str(run.path)!r:.120}, which is gone; its card needs it")
        source, names = folder, _exported_files(folder, record)
    else:
        record, run = None, Run.existing(folder)
        _refuse_without_adapter(run)
        source, names = run.adapter_path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    for path in (source / name for name in names):
        if path.is_symlink() or not path.is_file():
            raise BaditError(f"{path}: must be a file, and no link; make the folder again")
    with explained(f"{repository!r:.120}"):
        validate_repo_id(repository)
    if not HUB_ID.fullmatch(repository):
        raise BaditError(f"{repository!r:.120}: must be ORG/NAME or USER/NAME")
    if not get_token():
        raise BaditError("the hub wants to know who you are: run hf auth login, or set HF_TOKEN to a token of yours")

    recipe = load_config(run.config_path)
    base = Base.of(recipe)
    api = HfApi()
    with explained(repository, action="reached"):
        if base.licence is None and base.hub_id is not None:
            base = dataclasses.replace(base, licence=_licence(api, base.hub_id))
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        card = model_card(run, recipe, base, export=record, address=repository)
        operations = [CommitOperationAdd(CARD, card.encode())]
        for name in names:
            content: str | bytes = str(source / name)
            if name == CONFIG_NAME:
                config = {**read_json(source / name), "base_model_name_or_path": base.hub_id}
                content = json.dumps(config, indent=2).encode()
            operations.append(CommitOperationAdd(name, content))
        commit = api.create_commit(repository, operations, commit_message=f"Upload {source.name} with badit")
        return str(commit.repo_url)


def _exported_files(folder: Path, record: Mapping[str, Any]) -> list[str]:
    """The names of the files that an export's record lists, but for the card, which is written again."""
    names = record.get("files")
    if not isinstance(names, list) or not all(isinstance(name, str) and _VISIBLE.fullmatch(name) for name in names):
        raise BaditError(f"{folder / RECORD}: files: must be the names of the export's own files; export the run again")
    return [name for name in names if name != CARD]


def _refuse_without_adapter(run: Run) -> None:
    method = build_method(load_config(run.config_path).method)
    if not method.trains:
        raise BaditError(f"{run.path}: is a run of the base model as it is: there is nothing to push")
    if not isinstance(method, AdapterMethod):
        raise BaditError(
            f"{run.path}: {method.name} trains the base weights: badit export {run.path} --merged -o FOLDER, and push "
            "that"
        )
    if not run.adapter_path.is_dir():
        raise BaditError(f"{run.path}: has no adapter yet; the command that trains it goes on where it stopped")


def _licence(api: Any, model: str) -> str | None:
    """The base model's, from its page; None where it gives none."""
    data = api.model_info(model).card_data
    found = None if data is None else data.to_dict().get("license")
    return found if isinstance(found, str) else None

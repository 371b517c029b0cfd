"""``badit push``: a run's adapter, or an export of it, to the Hugging Face hub, with its model card."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.card import CARD, Base, licence, model_card
from badit.environment import status
from badit.errors import BaditError, explained
from badit.files import read_json, refuse_links
from badit.methods import AdapterMethod, build_method
from badit.models import HUB_ID
from badit.run import RECORD, Run

_VISIBLE = re.compile(r"[^./\\\0][^/\\\0]*")  # the name of a file directly in the folder that is not hidden


def push_to_hub(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Uploads the adapter of a run, or an export whose run still exists, with its card; see :meth:`badit.Run.push`.

    Only files that badit has written are uploaded, and no links. Nothing uploaded names folders or users of this
    machine. In an existing repository the files are replaced.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    source, record = Path(folder), None
    if (source / RECORD).is_file():
        refuse_links(source)
        record = read_json(source / RECORD)
        run = Run(source.resolve() / str(record.get("run")))
        names: Any = record.get("files")
        if not isinstance(names, list) or not all(isinstance(name, str) and _VISIBLE.fullmatch(name) for name in names):
            raise BaditError(f"{source / RECORD}: files: must be the names of the export's own files; export again")
        names = [name for name in names if name != CARD]  # which is written again
    else:
        run = Run(folder)
        method = build_method(run.recipe.method)
        if not method.trains:
            raise BaditError(f"{run.path}: is a run of the base model as it is: there is nothing to push")
        if not isinstance(method, AdapterMethod):
            fix = f"badit export {run.path} --merged -o FOLDER, and push that"
            raise BaditError(f"{run.path}: {method.name} trains the base weights: {fix}")
        if not run.adapter_path.is_dir():
            raise BaditError(f"{run.path}: has no adapter yet; continue its training with the same command")
        source, names = run.adapter_path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    for path in (source / name for name in names):
        if (path / RECORD).is_file():
            raise BaditError(f"{source}: has a LoRA for each task; push one of them: badit push {path} {repository}")
        if path.is_symlink() or not path.is_file():
            raise BaditError(f"{path}: must be a file, and no link; make the folder again")
    with explained(f"{repository!r:.120}"):
        validate_repo_id(repository)
    if not HUB_ID.fullmatch(repository):
        raise BaditError(f"{repository!r:.120}: must be ORG/NAME or USER/NAME")
    if not get_token():
        raise BaditError("the hub needs a token: run hf auth login, or set HF_TOKEN to one of yours")

    base = Base.of(run.recipe)
    api = HfApi()
    with status(f"uploading to {repository}"), explained(repository, action="reached"):
        if base.licence is None and base.hub_id is not None:
            base = base._replace(licence=licence(api.model_info(base.hub_id).card_data))
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        card = model_card(run, run.recipe, base, export=record, address=repository)
        operations = [CommitOperationAdd(CARD, card.encode())]
        for name in names:
            content: str | bytes = str(source / name)
            if name == CONFIG_NAME:
                config = {**read_json(source / name), "base_model_name_or_path": base.hub_id}
                content = json.dumps(config, indent=2).encode()
            operations.append(CommitOperationAdd(name, content))
        commit = api.create_commit(repository, operations, commit_message=f"Upload {source.name} with badit")
        return str(commit.repo_url)

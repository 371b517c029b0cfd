"""``badit push``: uploads adapters and exports with their cards to the Hugging Face hub."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.hub.card import CARD, base_licence, hub_id, model_card
from badit.models import HUB_ID
from badit.recipe.method import resolve_method
from badit.runs.folder import RECORD, RunFolder
from badit.support.console import status
from badit.support.errors import BaditError, explained
from badit.support.files import is_number, read_json
from badit.training.checkpoints import checksums

_VISIBLE = re.compile(r"[^./\\\0][^/\\\0]*")  # the name of a visible file directly in the folder


@dataclass
class _Upload:
    """The files to upload, apart from the card, and the run that they come from."""

    run: RunFolder
    folder: Path
    names: list[str]
    record: Mapping[str, Any] | None = None  # of an export


def push_to_hub(source: RunFolder, repository: str, *, private: bool) -> str:
    """Uploads a run's adapter, or an export whose run still exists, with its card.

    Only files that badit wrote are uploaded, and no links. The uploaded files name no folders or
    users of this machine. Files of an existing repository are replaced. See
    :meth:`badit.Run.push`.
    """
    if (source.path / RECORD).is_file():
        upload = _export_files(source.path)
    else:
        upload = _adapter_files(source)
    # Everything local is checked before the hub is asked.
    _refuse_other_files(upload, repository)
    if not HUB_ID.fullmatch(repository):
        raise BaditError(f"{repository!r:.120}: must be ORG/NAME or USER/NAME")
    if not get_token():
        raise BaditError("hub: a token is required; run hf auth login or set HF_TOKEN")

    api = HfApi()
    recipe = upload.run.recipe
    with status(f"uploading to {repository}"), explained(repository, action="reached"):
        licence = base_licence(recipe, online=True)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        files: dict[str, Any] = {name: str(upload.folder / name) for name in upload.names}
        card = model_card(upload.run, export=upload.record, address=repository, licence=licence)
        files[CARD] = card.encode()
        if CONFIG_NAME in files:
            # The base model may be a local folder.
            config = read_json(upload.folder / CONFIG_NAME)
            config["base_model_name_or_path"] = hub_id(recipe)
            files[CONFIG_NAME] = json.dumps(config, indent=2).encode()
        # One commit, so that the repository never has weights without their configuration.
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        message = f"Upload {upload.folder.name} with badit"
        commit = api.create_commit(repository, operations, commit_message=message)
        return str(commit.repo_url)


def refuse_other_weights(run: RunFolder, records: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises BaditError if an export is not of the run's present weights.

    ``records`` has the content of ``export.json`` for the folder of each export.
    """
    # The card describes the run, so the export must be of the run's weights.
    present = checksums(run.adapter_path, "*.safetensors")
    for export, record in records.items():
        if record.get("weights") != present:
            raise BaditError(
                f"{export}: was not exported from the present weights of {run.path}; "
                "export it again"
            )


def _export_files(folder: Path) -> _Upload:
    record = read_json(folder / RECORD)
    # The run's path in the record is relative to the export's folder.
    run = RunFolder(folder.resolve() / str(record.get("run")))
    refuse_other_weights(run, {folder: record})
    _refuse_damaged_numbers(folder / RECORD, record)
    names: Any = record.get("files")
    if not isinstance(names, list) or not all(
        isinstance(name, str) and _VISIBLE.fullmatch(name) for name in names
    ):
        raise BaditError(
            f"{folder / RECORD}: files: must be the names of the export's own files; export again"
        )
    names = [name for name in names if name != CARD]  # the card is written again
    return _Upload(run, folder, names, record)


def _refuse_damaged_numbers(path: Path, record: Mapping[str, Any]) -> None:
    """Raises BaditError if the card could not show the numbers of an export's record."""
    for name in ("rank", "exact_rank"):
        if not isinstance(record.get(name, 0), int | None):
            raise BaditError(f"{path}: {name}: must be a whole number; export again")
    error = record.get("relative_error", {"total": 0.0})
    if not isinstance(error, Mapping) or not is_number(error.get("total")):
        raise BaditError(f"{path}: relative_error: must be an object with a total; export again")


def _adapter_files(run: RunFolder) -> _Upload:
    method = resolve_method(run.recipe.method)
    if not method.trains:
        problem = "is a run of the unchanged base model; there is nothing to push"
        raise BaditError(f"{run.path}: {problem}")
    if method.config is None:
        fix = f"run badit export {shlex.quote(str(run.path))} --merged -o FOLDER and push FOLDER"
        raise BaditError(f"{run.path}: {method.name} trains the base weights; {fix}")
    if not run.adapter_path.is_dir():
        problem = "has no adapter yet; resume its training with the same command"
        raise BaditError(f"{run.path}: {problem}")
    return _Upload(run, run.adapter_path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME])


def _refuse_other_files(upload: _Upload, repository: str) -> None:
    """Raises BaditError for a link, a missing file, or the folder of an export of all tasks."""
    for path in (upload.folder / name for name in upload.names):
        if (path / RECORD).is_file():
            command = shlex.join(["badit", "push", str(path), repository])
            raise BaditError(
                f"{upload.folder}: has a LoRA for each task; push one of them: {command}"
            )
        if path.is_symlink() or not path.is_file():
            raise BaditError(f"{path}: must be a file and not a link; write the folder again")

"""``badit push``: a run's adapter, or an export of it, to the Hugging Face hub, with its model card."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from badit.errors import BaditError, one_line
from badit.files import read_json
from badit.models import HUB_ID
from badit.recipe import load_config
from badit.runs import RunFolder
from badit.serving.files import RECORD, SCORES
from badit.training.card import CARD, Base, model_card
from badit.training.method import AdapterMethod
from badit.training.methods import build_method

_MENDS = {
    401: "; the token is not valid (any more): run hf auth login",
    403: "; the token may not write there: take one with write access, or a name of your own",
}


def push_to_hub(folder: str | os.PathLike[str], repository: str, *, private: bool = False) -> str:
    """Uploads a run's adapter, or what ``badit export`` has made of it, and the card that goes with it.

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
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    source, run, record = _source(Path(folder))
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise BaditError(f"{repository!r:.120}: {one_line(str(error)):.200}") from None
    if not HUB_ID.fullmatch(repository):
        raise BaditError(f"{repository!r:.120}: must be ORG/NAME or USER/NAME")
    if not get_token():
        raise BaditError("the hub wants to know who you are: run hf auth login, or set HF_TOKEN to a token of yours")
    recipe = load_config(run.config)
    base = Base.of(recipe)
    api = HfApi()
    with _one_line_errors(repository):
        if base.licence is None and base.hub_id is not None:
            base = dataclasses.replace(base, licence=_licence(api, base.hub_id))
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        card = model_card(run, recipe, base, export=record, address=repository)
        operations = [CommitOperationAdd(CARD, card.encode())]
        for path in sorted(source.iterdir()):
            if path.name == CONFIG_NAME:
                config = {**read_json(path), "base_model_name_or_path": base.hub_id}
                operations.append(CommitOperationAdd(path.name, json.dumps(config, indent=2).encode()))
            elif path.is_file() and path.name not in (CARD, RECORD, SCORES):
                operations.append(CommitOperationAdd(path.name, str(path)))
        commit = api.create_commit(repository, operations, commit_message=f"Upload {source.name} with badit")
        return str(commit.repo_url)


def _source(folder: Path) -> tuple[Path, RunFolder, dict[str, Any] | None]:
    """What to upload, the run that it comes from, and an export's record."""
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD)
        run = RunFolder(str(record.get("run")))
        if not run.config.is_file():
            raise BaditError(f"{folder / RECORD}: run: is {str(run.path)!r:.120}, which is gone; its card needs it")
        return folder, run, record
    run = RunFolder.existing(folder)
    method = build_method(load_config(run.config).method)
    if not method.trains:
        raise BaditError(f"{folder}: is a run of the base model as it is: there is nothing to push")
    if not isinstance(method, AdapterMethod):
        raise BaditError(
            f"{folder}: {method.name} trains the base weights: badit export {folder} --merged -o FOLDER, and push that"
        )
    if not run.adapter.is_dir():
        raise BaditError(f"{folder}: has no adapter yet; the command that trains it goes on where it stopped")
    return run.adapter, run, None


def _licence(api: Any, model: str) -> str | None:
    """The base model's, from its page; None where it gives none."""
    data = api.model_info(model).card_data
    found = None if data is None else data.to_dict().get("license")
    return found if isinstance(found, str) else None


@contextmanager
def _one_line_errors(repository: str) -> Iterator[None]:
    """Turns the hub's refusals and a network's failures into a BaditError."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        mend = _MENDS.get(error.response.status_code, "")
        raise BaditError(f"{repository}: the hub refuses: {_first_line(error)}{mend}") from None
    except (OSError, httpx.HTTPError) as error:
        raise BaditError(f"{repository}: the hub cannot be reached ({_first_line(error)}); try again later") from None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else type(error).__name__)[:200].rstrip(".")

"""Model cards of adapters and exports, and ``badit push``, which uploads them to the Hugging Face hub.

Values from data or a recipe (task names, options) are plain text in a card: no links, markup or header fields. The
template, card.md.j2, passes them through ``text``, which is :func:`_text`.
"""

import html
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from badit.models.loading import BUILT_IN, BUILT_IN_HUB_ID, HUB_ID
from badit.recipe.method import resolve_method
from badit.recipe.schema import Recipe
from badit.runs.folder import RECORD, RunFolder
from badit.runs.scores import read_scores
from badit.support.console import one_line, status
from badit.support.errors import BaditError, explained
from badit.support.files import read_json, read_text, write_text
from badit.training.checkpoints import checksums

CARD = "README.md"
# Markdown markup within a line. The hub also makes links of addresses that begin with a scheme or www.
_MARKUP = re.compile(r"([\\`*_{}\[\]()|~:@$]|(?<=www)\.)", flags=re.IGNORECASE)
# Training options that do not change the result.
_WITHOUT_EFFECT = {"full_determinism", "gradient_checkpointing", "logging_steps",
                   "max_skipped_steps", "report_to", "save_steps"}  # fmt: skip
_VISIBLE = re.compile(r"[^./\\\0][^/\\\0]*")  # the name of a visible file directly in the folder


def hub_id(recipe: Recipe) -> str | None:
    """Returns the id of the recipe's base model on the hub; None for a local folder."""
    name = recipe.model.name
    if name == BUILT_IN:
        return BUILT_IN_HUB_ID
    return name if HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir() else None


def _licence(recipe: Recipe, *, online: bool = False) -> str | None:
    """Returns the base model's licence in the hub's notation, None if unknown; that of a hub model only ``online``."""
    from huggingface_hub import HfApi, ModelCard

    if recipe.model.name == BUILT_IN:
        return "apache-2.0"
    if base := hub_id(recipe):
        data = HfApi().model_info(base).card_data if online else None
    else:
        try:
            data = ModelCard(read_text(Path(recipe.model.name).expanduser() / CARD)).data
        except Exception:  # no card, or a damaged header
            data = None
    found = None if data is None else data.to_dict().get("license")
    return found if isinstance(found, str) else None


def write_run_card(run: RunFolder) -> None:
    """Writes the card into a run's ``adapter`` folder, if the run has an adapter."""
    if run.adapter_path.is_dir() and resolve_method(run.recipe.method).config is not None:
        write_text(run.adapter_path / CARD, model_card(run))


def model_card(
    run: RunFolder,
    *,
    export: Mapping[str, Any] | None = None,
    address: str | None = None,
    licence: str | None = None,
) -> str:
    """Returns the card of a run, or of its export with the record ``export``, as Markdown with the hub's header.

    ``address`` is the repository (org/name) to load it from (default: a placeholder). ``licence`` is that of the base
    model (default: what is known without a network).
    """
    from huggingface_hub import ModelCard, ModelCardData

    recipe, merged = run.recipe, export is not None and export.get("rank") is None
    base = hub_id(recipe)
    place = type(resolve_method(recipe.method).config).__module__.split(".")  # badit.tuner, peft, …
    header = ModelCardData(
        license=licence or _licence(recipe),
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=None if base is None else "finetune" if merged else "adapter",
        tags=["badit", "multi-task", *(["lora"] if export is not None and not merged else [])],
    )
    card = ModelCard.from_template(
        header,
        template_path=str(Path(__file__).with_name("card.md.j2")),
        text=_text,
        address=address,
        recipe=recipe,
        registers=".".join(place[:2]) if export is None and place[0] == "badit" else "",
        built_in=BUILT_IN if recipe.model.name == BUILT_IN else "",
        shown_base=_text(base or Path(recipe.model.name).name),
        export=export,
        merged=merged,
        scores=read_scores(run.scores_path) if run.scores_path.is_file() else None,
        training=_training(run, recipe),
    )
    return str(card) + "\n"


def _training(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    sources = [entry["path"] for entry in recipe.data.entries]
    training = recipe.training.model_dump(exclude=_WITHOUT_EFFECT, exclude_none=True)
    rows = {
        "data": ", ".join(
            "the built-in tasks" if path == "builtin" else _last_part(path) for path in sources
        ),
        "prompt": recipe.prompt.encoding,
        **{
            f"model.{key}": value
            for key in ("revision", "quantisation")
            if (value := getattr(recipe.model, key))
        },
        **pd.json_normalize({"method": recipe.method}).to_dict("records")[0],
        **{
            key: _last_part(value) if isinstance(value, str) else value
            for key, value in training.items()
        },
    }
    known = run.known_environment
    counts = {
        name: known.get("training", {}).get(name)
        for name in ("trainable_parameters", "steps", "tokens")
    }
    rows |= {name: f"{count:,}" for name, count in counts.items() if isinstance(count, int)}
    if isinstance(packages := known.get("packages"), Mapping):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return rows


def _last_part(path: str) -> str:
    """Returns the last part of a path; the other parts could name the user's folders."""
    return Path(os.path.expandvars(path)).name


def _text(value: Any) -> str:
    """Returns a value as one line of plain text, cut to 200 characters, with Markdown and HTML markup escaped."""
    shown = one_line(str(value))
    shown = shown if len(shown) <= 200 else shown[:199] + "…"
    return html.escape(_MARKUP.sub(r"\\\1", shown), quote=False)


def refuse_other_weights(run: RunFolder, records: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raises BaditError if an export, given with its ``export.json``, is not of the run's present weights."""
    own = checksums(run.adapter_path, "*.safetensors")
    for export, record in records.items():
        if record.get("weights", own) != own:  # earlier releases did not record them
            raise BaditError(
                f"{export}: was not exported from the present weights of {run.path}; export it again"
            )


def push_to_hub(source: RunFolder, repository: str, *, private: bool) -> str:
    """Uploads a run's adapter, or an export whose run still exists, with its card; see :meth:`badit.RunFolder.push`.

    Only files that badit wrote are uploaded, and no links. The uploaded files name no folders or users of this
    machine. Files of an existing repository are replaced.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    run, folder, record = source, source.path, None
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD)
        run = RunFolder(folder.resolve() / str(record.get("run")))
        refuse_other_weights(run, {folder: record})
        names: Any = record.get("files")
        if not isinstance(names, list) or not all(
            isinstance(name, str) and _VISIBLE.fullmatch(name) for name in names
        ):
            raise BaditError(
                f"{folder / RECORD}: files: must be the names of the export's own files; export again"
            )
        names = [name for name in names if name != CARD]  # the card is written again
    else:
        method = resolve_method(run.recipe.method)
        if not method.trains:
            raise BaditError(
                f"{run.path}: is a run of the unchanged base model; there is nothing to push"
            )
        if method.config is None:
            fix = (
                f"run badit export {shlex.quote(str(run.path))} --merged -o FOLDER and push FOLDER"
            )
            raise BaditError(f"{run.path}: {method.name} trains the base weights; {fix}")
        if not run.adapter_path.is_dir():
            raise BaditError(
                f"{run.path}: has no adapter yet; resume its training with the same command"
            )
        folder, names = run.adapter_path, [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
    for path in (folder / name for name in names):
        if (path / RECORD).is_file():
            command = shlex.join(["badit", "push", str(path), repository])
            raise BaditError(f"{folder}: has a LoRA for each task; push one of them: {command}")
        if path.is_symlink() or not path.is_file():
            raise BaditError(f"{path}: must be a file and not a link; write the folder again")
    if not HUB_ID.fullmatch(repository):
        raise BaditError(f"{repository!r:.120}: must be ORG/NAME or USER/NAME")
    if not get_token():
        raise BaditError("hub: a token is required; run hf auth login or set HF_TOKEN")

    api = HfApi()
    with status(f"uploading to {repository}"), explained(repository, action="reached"):
        licence = _licence(run.recipe, online=True)
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        files: dict[str, str | bytes] = {name: str(folder / name) for name in names}
        files[CARD] = model_card(run, export=record, address=repository, licence=licence).encode()
        if CONFIG_NAME in files:
            config = {
                **read_json(folder / CONFIG_NAME),
                "base_model_name_or_path": hub_id(run.recipe),
            }
            files[CONFIG_NAME] = json.dumps(config, indent=2).encode()
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(
            repository, operations, commit_message=f"Upload {folder.name} with badit"
        )
        return str(commit.repo_url)

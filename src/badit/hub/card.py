"""Model cards of adapters and exports.

Values from data or a recipe (task names, options) are plain text in a card: no links, markup or
header fields. The template, card.md.j2, passes them through ``text``, which is :func:`_text`.
"""

import html
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import HfApi, ModelCard, ModelCardData

from badit.models import BUILT_IN, BUILT_IN_HUB_ID, HUB_ID
from badit.presets import cites_paper, method_name
from badit.recipe.method import resolve_method
from badit.recipe.schema import Recipe, expand_source
from badit.runs.folder import RunFolder
from badit.runs.scores import read_scores
from badit.support.console import one_line
from badit.support.environment import how_to_install
from badit.support.errors import BaditError
from badit.support.files import read_text, write_text

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.j2")
# Markdown markup within a line. The hub also makes links of addresses that begin with a scheme or
# www.
_MARKUP = re.compile(r"([\\`*_{}\[\]()|~:@$]|(?<=www)\.)", flags=re.IGNORECASE)
# Training options that do not change the result.
_WITHOUT_EFFECT = {"full_determinism", "gradient_checkpointing", "logging_steps",
                   "max_skipped_steps", "report_to", "save_steps"}  # fmt: skip


def hub_id(recipe: Recipe) -> str | None:
    """Returns the id of the recipe's base model on the hub; None for a local folder."""
    name = recipe.model.name
    if name == BUILT_IN:
        return BUILT_IN_HUB_ID
    # transformers prefers a folder of this name to the hub.
    if HUB_ID.fullmatch(name) and not Path(name).expanduser().is_dir():
        return name
    return None


def base_licence(recipe: Recipe, *, online: bool = False) -> str | None:
    """Returns the base model's licence in the hub's notation, None if unknown.

    That of a model on the hub is known only ``online``.
    """
    if recipe.model.name == BUILT_IN:
        return "apache-2.0"  # of SmolLM2
    base = hub_id(recipe)
    metadata = None
    if base is None:
        with suppress(Exception):  # no card, or a damaged header
            metadata = ModelCard(read_text(Path(recipe.model.name).expanduser() / CARD)).data
    elif online:
        metadata = HfApi().model_info(base).card_data
    licence = metadata and metadata.get("license")
    # A card's header may have a list, or any other value.
    return licence if isinstance(licence, str) else None


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
    """Returns the card of a run or of its export, as Markdown with the hub's header.

    Args:
        run: the run.
        export: the record of the export, its ``export.json``.
        address: the repository (org/name) to load it from (default: a placeholder).
        licence: the licence of the base model (default: what is known without a network).
    """
    recipe = run.recipe
    metadata = _metadata(recipe, export, licence)
    # The import of badit.tuner or badit.baselines registers the method with PEFT.
    module = type(resolve_method(recipe.method).config).__module__
    needs_badit = export is None and module.startswith("badit.")
    title = method_name(recipe.method)
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        text=_text,
        address=address,
        install=how_to_install(),
        recipe=recipe,
        title=title,
        cites_paper=cites_paper(title),
        registers=needs_badit and ".".join(module.split(".")[:2]),
        built_in=recipe.model.name == BUILT_IN,
        shown_base=_text(hub_id(recipe) or Path(recipe.model.name).name),
        export=export,
        merged=metadata.library_name == "transformers",
        scores=run.scores_path.is_file() and read_scores(run.scores_path),
        training=_training(run, recipe),
        is_adopted=run.is_adopted,
    )
    return f"{card}\n"


def _metadata(
    recipe: Recipe, export: Mapping[str, Any] | None, licence: str | None
) -> ModelCardData:
    metadata: Any = ModelCardData(
        license=licence or base_licence(recipe),
        library_name="peft",
        pipeline_tag="text-generation",
        base_model=hub_id(recipe),
        tags=["badit", "multi-task"],
    )
    is_merged = export is not None and export.get("rank") is None
    if is_merged:
        metadata.library_name = "transformers"
    elif export is not None:
        metadata.tags.append("lora")
    if metadata.base_model:
        metadata.base_model_relation = "finetune" if is_merged else "adapter"
    return metadata


def _training(run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """Returns the rows of the card's table: data, prompt, options, counts and versions."""
    sources = [entry["path"] for entry in recipe.data.entries]
    names = ["the built-in tasks" if path == "builtin" else _last_part(path) for path in sources]
    rows = {"data": ", ".join(names), "prompt": recipe.prompt.encoding}
    model = recipe.model.model_dump(include={"revision", "quantisation"}, exclude_none=True)
    rows |= {f"model.{name}": value for name, value in model.items()}
    # Nested options get dotted names, such as method.regroup.every.
    rows |= pd.json_normalize({"method": recipe.method}).to_dict("records")[0]
    options = recipe.training.model_dump(exclude=_WITHOUT_EFFECT, exclude_none=True)
    for name, value in options.items():
        # It may be a path, such as that of a DeepSpeed configuration.
        if isinstance(value, str):
            value = _last_part(value)
        rows[name] = value

    environment = run.known_environment
    if run.is_adopted:  # the recipe's data and options are not those of the training
        unknown = {"data", "prompt", *recipe.training.model_dump()}
        of_adapter = {name: value for name, value in rows.items() if name not in unknown}
        return {"training": "by a script; its data and options are not recorded", **of_adapter}
    for name in ("trainable_parameters", "steps", "tokens"):
        # The environment is missing until a run is trained, and may be damaged.
        count = environment.get("training", {}).get(name)
        if isinstance(count, int):
            rows[name] = f"{count:,}"
    packages = environment.get("packages")
    if isinstance(packages, Mapping):
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items())
    return rows


def _last_part(path: str) -> str:
    """Returns the last part of a path; the other parts could name the user's folders."""
    with suppress(BaditError):  # a variable that is not set here
        path = expand_source(path)
    return Path(path).name


def _text(value: Any) -> str:
    """Returns a value as one line of plain text, with Markdown and HTML markup escaped.

    Lines longer than 200 characters are cut.
    """
    line = one_line(str(value))
    if len(line) > 200:
        line = f"{line[:199]}…"
    return html.escape(_MARKUP.sub(r"\\\1", line), quote=False)

"""The model card of an adapter or an export: what it is of, how it was trained, what it scores, how to load it.

What comes from data or a recipe (tasks' names, options) is text in a card and nothing else: no link, no markup, no
field of its header.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.errors import one_line
from badit.evaluation.results import read_scores
from badit.files import read_json, read_text, write_text
from badit.models import BUILT_IN, HUB_ID
from badit.recipe import Recipe, load_config
from badit.runs import RunFolder
from badit.training.method import AdapterMethod
from badit.training.methods import build_method

CARD = "README.md"
_PAPER = "https://arxiv.org/abs/2605.05676"
# What stands for more than itself within a line; the hub makes links of addresses that begin with a scheme or www.
_MARKUP = re.compile(r"([\\`*_{}\[\]()|~:@$]|(?<=www)\.)", flags=re.IGNORECASE)
# Of the training's options, those that do not bear on the result.
_ASIDE = {"deterministic", "gradient_checkpointing", "group_by_length", "log_every", "max_skipped_steps", "report_to",
          "save_every"}  # fmt: skip
_LONGEST = 200


@dataclass(frozen=True)
class Base:
    """A base model as a card names it.

    Attributes:
        hub_id: org/name; None for a folder of one's own.
        licence: as the hub abbreviates it; None where it is not known.
    """

    hub_id: str | None
    licence: str | None

    @classmethod
    def of(cls, recipe: Recipe) -> Base:
        """The recipe's, as far as that is known without a network."""
        name = recipe.model.name
        if name == BUILT_IN:
            return cls("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls(None, _licence_in(folder / CARD))
        return cls(name if HUB_ID.fullmatch(name) else None, None)


def write_run_card(run: RunFolder) -> None:
    """Writes the card into a run's ``adapter`` folder, where its method has left an adapter there."""
    recipe = load_config(run.config)
    if run.adapter.is_dir() and isinstance(build_method(recipe.method), AdapterMethod):
        write_text(run.adapter / CARD, model_card(run, recipe, Base.of(recipe)))


def model_card(
    run: RunFolder,
    recipe: Recipe,
    base: Base,
    *,
    export: Mapping[str, Any] | None = None,
    address: str | None = None,
) -> str:
    """A card as Markdown with the hub's header.

    Args:
        run: whose scores and environment it tells of.
        recipe: the run's.
        base: the run's base model.
        export: the record of an export of the run, if the card is that of one.
        address: org/name where it can be loaded from (default: a stand-in).
    """
    from huggingface_hub import ModelCard, ModelCardData

    method = str(recipe.method.get("name", "badit"))
    merged = export is not None and export.get("rank") is None
    header = ModelCardData(
        license=base.licence,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=base.hub_id,
        base_model_relation=None if base.hub_id is None else "finetune" if merged else "adapter",
        tags=["badit", "multi-task", *(["lora"] if export is not None and not merged else [])],
    )
    body = "\n".join(
        [
            # Not the folder's name: two runs of one recipe leave the same files.
            f"# {_text(address.rpartition('/')[2]) if address else f'{_named(method)} on {_shown_base(recipe, base)}'}",
            "",
            *_about(run, recipe, method, base, export, merged),
            "",
            "## How to load it",
            "",
            *_loading(recipe, method, base, export, merged, address),
            "",
            *_scores(run, recipe, method, export),
            "## Training",
            "",
            *_table(["", ""], _training(run, recipe)),
            "",
            "## Licence",
            "",
            "The base model's licence holds for its weights and for what is made from them"
            + (f": {_text(base.licence)}." if base.licence else "; see the base model's own page or folder."),
            "",
        ]
    )
    return str(ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}"))


def _about(
    run: RunFolder, recipe: Recipe, method: str, base: Base, export: Mapping[str, Any] | None, merged: bool
) -> Iterator[str]:
    what = "An adapter" if export is None else "A model" if merged else "A plain LoRA adapter"
    kind = f"of the method [BADIT]({_PAPER})" if method == "badit" else f"of the method {_named(method)}"
    yield f"{what} {kind} for {_shown_base(recipe, base)}, tuned on several tasks at once with badit."
    mixture = None if export is None else export.get("mixture")
    if mixture:
        yield f"BADIT mixes its experts anew for every prompt; here one mixture is fixed: {_text(str(mixture))}."


def _loading(
    recipe: Recipe,
    method: str,
    base: Base,
    export: Mapping[str, Any] | None,
    merged: bool,
    address: str | None,
) -> list[str]:
    place = address or "FOLDER"
    if merged:
        return _code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{place}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
        )
    registers: list[str] = []
    if export is None:
        module = "badit.tuner" if method == "badit" else "badit.baselines"
        registers = [f"import {module}  # tells PEFT of the method"]
    built_in = recipe.model.name == BUILT_IN
    source = BUILT_IN if built_in else base.hub_id or "BASE-MODEL"
    load = f'badit.load_base_model("{source}")' if built_in else f'AutoModelForCausalLM.from_pretrained("{source}")'
    return _code(
        *(["import badit"] if built_in else []),
        *registers,
        "from peft import PeftModel",
        *([] if built_in else ["from transformers import AutoModelForCausalLM"]),
        "",
        f"{'base, tokenizer' if built_in else 'base'} = {load}",
        f'model = PeftModel.from_pretrained(base, "{place}")',
    )


def _scores(run: RunFolder, recipe: Recipe, method: str, export: Mapping[str, Any] | None) -> Iterator[str]:
    if not run.scores.is_file():
        return
    scores = read_scores(run.scores)
    yield f"## Scores on the {recipe.evaluation.split} split"
    yield ""
    tasks = scores["tasks"]
    rows = [
        [_text(name), _score(of["rouge_l"]), _score(of["exact_match"]), str(of["instances"])]
        for name, of in tasks.items()
    ]
    total = str(sum(of["instances"] for of in tasks.values()))
    rows.append(["mean over tasks", _score(scores["rouge_l"]), _score(scores["exact_match"]), total])
    yield from _table(["task", "Rouge-L", "exact match", "instances"], rows)
    yield ""
    if export is not None and export.get("mixture"):
        yield "They are those of the run, whose mixture follows the prompt; the fixed one may score otherwise."
        yield ""


def _training(run: RunFolder, recipe: Recipe) -> Iterator[list[str]]:
    """Rows of the table of hyperparameters: the recipe's, and what the training took."""
    source = recipe.data.source
    # Of a path, which tells of its owner's folders, the last part.
    yield ["data", _text("the built-in tasks" if source == "builtin" else Path(source).name)]
    for name, value in {"prompt": recipe.prompt.encoding, **_flat(recipe.method, "method")}.items():
        yield [_text(name), _text(str(value))]
    for name, value in recipe.training.model_dump(exclude=_ASIDE, exclude_none=True).items():
        yield [_text(name), _text(str(value))]
    if run.environment.is_file():
        known = read_json(run.environment)
        took = known.get("training")
        for name in ("trainable_parameters", "steps", "tokens"):
            if isinstance(took, Mapping) and isinstance(took.get(name), int):
                yield [_text(name), f"{took[name]:,}"]
        packages = known.get("packages")
        if isinstance(packages, Mapping):
            yield ["packages", _text(", ".join(f"{name} {version}" for name, version in packages.items()))]


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}") if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return flat


def _named(method: str) -> str:
    return "BADIT" if method == "badit" else _text(method)


def _shown_base(recipe: Recipe, base: Base) -> str:
    return _text(base.hub_id or Path(recipe.model.name).name)


def _score(value: float) -> str:
    return f"{value:.1f}"


def _code(*lines: str) -> list[str]:
    return ["```python", *lines, "```"]


def _table(heads: Sequence[str], rows: Iterator[list[str]] | Sequence[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _text(value: str) -> str:
    """A value as text of a Markdown page: on one line, with its markup, of HTML too, escaped, and not without end."""
    shown = one_line(value)
    shown = shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"
    return html.escape(_MARKUP.sub(r"\\\1", shown), quote=False)


def _licence_in(card: Path) -> str | None:
    """The licence that a model's own card gives."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return None
    try:
        found = ModelCard(read_text(card)).data.to_dict().get("license")
    except Exception:  # whatever a header that is damaged, or not the hub's, brings about
        return None
    return found if isinstance(found, str) else None

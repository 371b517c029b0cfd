"""The model card of an adapter or an export: what it is of, how it was trained, what it scores, how to load it.

What comes from data or a recipe (tasks' names, options) is text in a card and nothing else: no link, no markup, no
field of its header.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from badit.errors import one_line
from badit.files import read_json, read_text, write_text
from badit.methods import AdapterMethod, build_method
from badit.models import BUILT_IN, HUB_ID
from badit.recipe import Recipe, load_config
from badit.results import read_scores
from badit.run import Run

CARD = "README.md"
# Jinja's, as ModelCard.from_template fills it in; all values are escaped before.
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

{{ what }} of the method {{ method }} for {{ base }}, tuned on several tasks at once with badit.
{%- if mixture %}
BADIT computes its mixture of experts for each prompt; here one mixture is fixed: {{ mixture }}.
{%- endif %}

## How to load it

```python
{{ code }}
```
{% if tasks %}
## Scores on the {{ split }} split

| task | Rouge-L | exact match | instances |
| --- | --- | --- | --- |
{%- for name, scores in tasks %}
| {{ name }} | {{ "%.1f"|format(scores.rouge_l) }} | {{ "%.1f"|format(scores.exact_match) }} | {{ scores.instances }} |
{%- endfor %}
{% if mixture %}
They are those of the run, whose mixture follows the prompt; the fixed one may score otherwise.
{% endif %}
{%- endif %}
## Training

|  |  |
| --- | --- |
{%- for name, value in training %}
| {{ name }} | {{ value }} |
{%- endfor %}

## Licence

The base model's licence holds for its weights and for what is made from them
{{- ": " + licence + "." if licence else "; see the base model's own page or folder." }}
"""
_PAPER = "https://arxiv.org/abs/2605.05676"
# What stands for more than itself within a line; the hub makes links of addresses that begin with a scheme or www.
_MARKUP = re.compile(r"([\\`*_{}\[\]()|~:@$]|(?<=www)\.)", flags=re.IGNORECASE)
# The training's options that do not bear on the result.
_WITHOUT_EFFECT = {"full_determinism", "gradient_checkpointing", "group_by_length", "logging_steps", "max_skipped_steps",
                   "report_to", "save_steps"}  # fmt: skip
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


def write_run_card(run: Run) -> None:
    """Writes the card into a run's ``adapter`` folder, where its method has left an adapter there."""
    recipe = load_config(run.config_path)
    if run.adapter_path.is_dir() and isinstance(build_method(recipe.method), AdapterMethod):
        write_text(run.adapter_path / CARD, model_card(run, recipe, Base.of(recipe)))


def model_card(
    run: Run,
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

    name = str(recipe.method.get("name", "badit"))
    method = "BADIT" if name == "badit" else _text(name)
    shown_base = _text(base.hub_id or Path(recipe.model.name).name)
    merged = export is not None and export.get("rank") is None
    scores = read_scores(run.scores_path) if run.scores_path.is_file() else None
    tasks = [(_text(task), entry) for task, entry in scores["tasks"].items()] if scores else []
    if scores:
        tasks.append(("mean over tasks", {**scores, "instances": sum(entry["instances"] for _, entry in tasks)}))
    header = ModelCardData(
        license=base.licence,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        base_model=base.hub_id,
        base_model_relation=None if base.hub_id is None else "finetune" if merged else "adapter",
        tags=["badit", "multi-task", *(["lora"] if export is not None and not merged else [])],
    )
    card = ModelCard.from_template(
        header,
        template_str=_TEMPLATE,
        # Not the folder's name: two runs of one recipe leave the same files.
        title=_text(address.rpartition("/")[2]) if address else f"{method} on {shown_base}",
        what="An adapter" if export is None else "A model" if merged else "A plain LoRA adapter",
        method=f"[BADIT]({_PAPER})" if name == "badit" else method,
        base=shown_base,
        mixture=_text(str(export["mixture"])) if export and export.get("mixture") else None,
        code=_loading(recipe, name, base, export, address or "FOLDER"),
        split=recipe.evaluation.split,
        tasks=tasks,
        training=[(_text(key), _text(str(value))) for key, value in _training(run, recipe)],
        licence=base.licence and _text(base.licence),
    )
    return str(card) + "\n"


def _loading(recipe: Recipe, method: str, base: Base, export: Mapping[str, Any] | None, place: str) -> str:
    """Python code that loads the adapter or model."""
    if export is not None and export.get("rank") is None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{place}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{place}")'
        )
    imports = ["from peft import PeftModel"]
    if export is None:
        imports.insert(0, f"import {'badit.tuner' if method == 'badit' else 'badit.baselines'}  # registers the method")
    if recipe.model.name == BUILT_IN:
        imports.insert(0, "import badit")
        load = f'base, tokenizer = badit.load_base_model("{BUILT_IN}")'
    else:
        imports.append("from transformers import AutoModelForCausalLM")
        load = f'base = AutoModelForCausalLM.from_pretrained("{base.hub_id or "BASE-MODEL"}")'
    return "\n".join([*imports, "", load, f'model = PeftModel.from_pretrained(base, "{place}")'])


def _training(run: Run, recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The recipe's hyperparameters, and what the training took."""
    source = recipe.data.source
    # Of a path, which tells of its owner's folders, the last part.
    yield "data", "the built-in tasks" if source == "builtin" else Path(source).name
    yield "prompt", recipe.prompt.encoding
    yield from _flat(recipe.method, "method")
    yield from recipe.training.model_dump(exclude=_WITHOUT_EFFECT, exclude_none=True).items()
    known = read_json(run.environment_path) if run.environment_path.is_file() else {}
    took, packages = known.get("training"), known.get("packages")
    for name in ("trainable_parameters", "steps", "tokens"):
        if isinstance(took, Mapping) and isinstance(took.get(name), int):
            yield name, f"{took[name]:,}"
    if isinstance(packages, Mapping):
        yield "packages", ", ".join(f"{name} {version}" for name, version in packages.items())


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}.{key}"
        yield from _flat(value, name) if isinstance(value, Mapping) else [(name, value)]


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
    except Exception:  # whatever a header that is damaged, or not the hub's, raises
        return None
    return found if isinstance(found, str) else None

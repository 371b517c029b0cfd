"""Renders sources as one HTML file that needs no network and no other file, and exports figures as SVG and PDF.

The template escapes all text, and the JSON blocks with the charts' data contain no "<". The page's content security
policy allows only the two scripts whose hashes it lists, and no network requests.
"""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import pandas as pd
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from badit import __version__
from badit.comparison.results import RESULTS
from badit.comparison.tables import method_table
from badit.data import own_input
from badit.metrics.answers import METRICS, Prediction, exact_match, rouge_l, score_text
from badit.recipe.yaml_text import to_yaml
from badit.report import chart_config, charts
from badit.report.figures import FIGURES, Figure
from badit.report.sources import Source, together
from badit.support.errors import explained
from badit.support.files import is_number, read_json, read_text, write_bytes
from badit.support.text import UNKNOWN, number

_TEMPLATES = Path(__file__).with_name("templates")
_VEGA_LITE = alt.SCHEMA_VERSION.rpartition(".")[0]  # such as v6.4
_NOT_IN_XML = re.compile(
    r"\\+(?:u00[01].|ufff[ef])|(?<!\\)\\[bf]"
)  # in JSON; vl-convert would abort the process


class Block(NamedTuple):
    """A part of a section, rendered by the template's macro named ``kind`` (figure, table, samples, details, note …).

    ``name`` is the element's id and the exported figure's file name. If several runs have the same figure, only the
    first has a ``caption``. ``file`` names the data's files, and ``source`` the label of the run if there are several.
    """

    kind: str
    title: str
    content: Any
    name: str = ""
    caption: str = ""
    width: str = "full"
    file: str = ""
    source: str = ""

    @property
    def specification(self) -> dict[str, Any]:
        """The chart's Vega-Lite specification without colours, which the page sets. Screen readers read its title."""
        content = json.loads(
            _NOT_IN_XML.sub("\ufffd", json.dumps(self.content.to_dict(validate=False)))
        )
        content |= {"autosize": {"type": "fit-x", "contains": "padding"}, "width": "container"}
        content["description"] = f"{self.title}. {self.caption}".strip()
        return {key: value for key, value in content.items() if key not in ("config", "$schema")}


# The command that measures what a run lacks in a section.
_COMMANDS: dict[str, str] = dict.fromkeys(
    ("gradients", "units", "geometry", "atlas"), "badit analyze"
)
_COMMANDS |= {"scores": "badit evaluate", "samples": "badit evaluate"}


def sections_of(sources: Sequence[Source]) -> dict[str, list[Block]]:
    """Returns the blocks of each section. The template has the sections' titles and texts."""
    shown = [together(sources), *sources]
    found = {
        "overview": [*_overview(sources)],
        "samples": [*_samples(sources)],
        "settings": [*_settings(sources)],
    }
    for figure in FIGURES:
        found.setdefault(figure.section, []).extend(_drawn(figure, shown))
    return {
        section: [*blocks, *_notes(section, sources, blocks)] for section, blocks in found.items()
    }


def render(title: str, sections: Mapping[str, Sequence[Block]]) -> str:
    """Returns the page's HTML."""
    scripts = [_library(), read_text(_TEMPLATES / "page.js")]
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    options: dict[str, Any] = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(
        loader=PackageLoader("badit.report"), undefined=StrictUndefined, **options
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return templates.get_template("page.html.j2").render(
        title=title,
        sections=sections,
        version=__version__,
        hashes=hashes,
        style=Markup(read_text(_TEMPLATES / "look.css") + read_text(_TEMPLATES / "page.css")),
        scripts=[Markup(script) for script in scripts],
        themes={"light": chart_config("light"), "dark": chart_config("dark")},
        short_names=charts.short_task_names,
    )


def export_figures(sections: Mapping[str, Sequence[Block]], folder: Path) -> None:
    """Writes NAME.svg and NAME.pdf for every figure, with the page's initial choices, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        **chart_config("light"),
        "font": "Helvetica, Arial, sans-serif",
        "background": "white",
    }
    widths = {"full": 520, "half": 340, "square": 400}  # in pixels of 1/72 inch
    for block in (
        block for blocks in sections.values() for block in blocks if block.kind == "figure"
    ):
        content = {**block.specification, "width": widths[block.width]}
        with explained(
            folder / block.name, action="drawn", any_error=True
        ):  # names such as "constructor"
            svg = vl_convert.vegalite_to_svg(
                content, vl_version=_VEGA_LITE, config=config, allowed_base_urls=[]
            )
        for suffix, data in ((".svg", svg.encode()), (".pdf", vl_convert.svg_to_pdf(svg))):
            write_bytes(folder / (block.name + suffix), data)


def _drawn(figure: Figure, sources: Sequence[Source]) -> Iterator[Block]:
    """Yields the figure of each source that has its table; figures of several sources share their colour scale."""
    frames = {
        i: source.frames[figure.table]
        for i, source in enumerate(sources)
        if figure.table in source.frames
    }
    drawn = [figure.draw(frame) for frame in frames.values()]
    charts.share_limits(drawn)
    caption = " ".join(str(figure.draw.__doc__).split())
    for (i, frame), content in zip(frames.items(), drawn, strict=True):
        if content is None:
            continue
        label = sources[i].label if len(sources) > 2 else ""
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:40]
        name = figure.draw.__name__.replace("_", "-") + (
            f"-{i}-{slug}".rstrip("-") if label else ""
        )
        kind = "table" if isinstance(content, pd.DataFrame) else "figure"
        width = "half" if len(frames) > 1 and kind == "figure" else figure.width
        yield Block(kind, figure.title, content, name, caption, width, frame.attrs["file"], label)
        caption = ""


def _notes(section: str, sources: Sequence[Source], blocks: Sequence[Block]) -> Iterator[Block]:
    """Yields, for each run without data for the section, a note with the command that measures it or the reason."""
    command = _COMMANDS.get(section, "")
    for run in sources:
        if section == "scores" and run.results and "methods" not in run.frames:
            reasons = [
                note
                for note in method_table(run.results).notes
                if note.startswith(("missing", "failed"))
            ]
            yield Block("note", "; ".join([f"{run.prefix}no run has finished", *reasons]), "")
        # Sources without a recipe are folders of `badit analyze --output`.
        own = [run, *(one for one in sources if not one.config and not one.results)]
        analysed = any(
            frame.attrs["file"].startswith("analysis/")
            for one in own
            for frame in one.frames.values()
        )
        measured = analysed or any(block.source in ("", run.label) for block in blocks)
        scored = run.scores is not None if section == "scores" else bool(blocks)
        lacking = {"badit analyze": not measured, "badit evaluate": bool(run.config) and not scored}
        if run.results is None and lacking.get(command):
            label = f"{run.label}: not" if len(sources) > 1 else "Not"
            text = f"{label} measured yet. Measure it, then write the report again:"
            yield Block("note", text, f"{command} {shlex.quote(str(run.folder))}")


def _overview(sources: Sequence[Source]) -> Iterator[Block]:
    facts = pd.DataFrame({source.label: _facts(source) for source in sources}, dtype=object).fillna(
        UNKNOWN
    )
    table = facts.reset_index(names="run", allow_duplicates=True)  # a source's label may be "run"
    files = {
        RESULTS if source.results else "scores.json, config.yaml, environment.json"
        for source in sources
    }
    if len(table):
        yield Block("table", "Summary", table, "facts", file=", ".join(sorted(files)))


def _facts(source: Source) -> dict[str, str]:
    if results := source.results:
        return {
            "methods": str(len(results.scored_methods)),
            "runs": str(len(results.scores[["method", "seed", "order"]].drop_duplicates())),
            "tasks": str(results.scores["task"].nunique()),
            "protocol": results.protocol,
            "reference": results.reference,
        }
    facts = {}
    if source.scores is not None:
        for metric, scores in source.scores.groupby("metric", sort=False):
            facts[METRICS[str(metric)].label] = score_text(scores["score"].mean(), metric)
        facts["tasks"] = str(source.scores["task"].nunique())
    values: dict[str, Any] = {}
    for name, section in (*source.environment.items(), *source.config.items()):
        if isinstance(section, Mapping):
            values |= {f"{name}.{key}": value for key, value in section.items()}
    for name in ("trainable_parameters", "steps"):
        if is_number(value := values.get(f"training.{name}")):
            facts[name.replace("_", " ")] = number(value, ".0f")
    if is_number(values.get("training.seconds")):
        facts["training time"] = f"{number(values['training.seconds'] / 60)} min"
    settings = [
        "model.name",
        "method.name",
        "method.num_experts",
        "method.r",
        "data.source",
        "training.learning_rate",
    ]
    return facts | {key: str(values[key]) for key in settings if values.get(key) is not None}


def _samples(sources: Sequence[Source]) -> Iterator[Block]:
    """Yields a few instances of each task that all models answered; a model is the first run of each method."""
    models: dict[str, Source] = {}
    for name, run in (member for source in sources for member in source.members):
        if name not in models and run.predictions:
            models[name] = run
    content = {}
    for task in dict.fromkeys(task for run in models.values() for task in run.predictions):
        answers = [
            (name, run.predictions[task]) for name, run in models.items() if task in run.predictions
        ]
        shared = [
            instance for instance in answers[0][1] if all(instance in own for _, own in answers)
        ]
        count = min(6 if len(answers) <= 3 else 3, len(shared))
        chosen = [shared[i * len(shared) // count] for i in range(count)]
        content[task] = [
            _sample([(name, own[instance]) for name, own in answers]) for instance in chosen
        ]
    if content:
        caption = "Questions are the instances' own inputs; long ones are cut at the start."
        yield Block("samples", "", content, caption=caption, file="predictions/")


def _sample(answers: Sequence[tuple[str, Prediction]]) -> dict[str, Any]:
    first = answers[0][1]
    shown = []
    for model, answer in answers:
        score = rouge_l(answer.prediction, answer.references)
        right = exact_match(answer.prediction, answer.references) > 0
        verdict = "right" if right else "partly right" if score >= 50 else "wrong"
        shown.append((model, answer.prediction, verdict, f"Rouge-L {number(score, '.0f')}"))
    references = [*dict.fromkeys(first.references)][:4]
    return {
        "question": own_input(first.prompt) or first.prompt,
        "references": references,
        "answers": shown,
    }


def _settings(sources: Sequence[Source]) -> Iterator[Block]:
    """Yields the recipe and environment of each run, and of the first run of each method of a comparison."""
    for source in sources:
        if source.config:
            text = to_yaml(source.config, sort_keys=False, width=100)
            yield Block("details", f"{source.prefix}Recipe", text, file="config.yaml")
        if source.environment:
            text = json.dumps(source.environment, indent=2, ensure_ascii=False)
            yield Block("details", f"{source.prefix}Environment", text, file="environment.json")
        cells: dict[str, Any] = {}
        for cell in read_json(source.folder / RESULTS)["cells"] if source.results else []:
            if cell["status"] == "done" and cell.get("selected", True):
                cells.setdefault(cell["method"], cell)
        for method, cell in cells.items():
            keys = ("learning_rate", "seed", "order", "config", "environment")
            shown = {key: value for key in keys if (value := cell.get(key)) not in (None, {})}
            with explained(
                source.folder / RESULTS, action="shown", any_error=True
            ):  # nested too deeply
                text = to_yaml(shown, sort_keys=False, width=100)
            yield Block("details", source.prefix + method, text, file=RESULTS)


@cache
def _library() -> str:
    """Returns Vega, Vega-Lite and Vega-Embed as one script."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", _VEGA_LITE)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")

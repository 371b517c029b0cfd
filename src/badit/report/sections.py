"""The sections of the page: an overview, the figures, sample predictions and settings."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from badit.analysis.verdict import Verdict, conflict_verdict, measured_in
from badit.comparison.results import RESULTS, Results
from badit.comparison.verdict import verdict
from badit.data import own_input
from badit.metrics.answers import METRICS, Prediction, exact_match, rouge_l, score_text
from badit.presets import method_name, saved_section
from badit.recipe.yaml_text import to_yaml
from badit.report.blocks import Block, figure_blocks, notes
from badit.report.figures import SECTIONS
from badit.report.shared_frames import together
from badit.report.sources import Source
from badit.support.console import one_line
from badit.support.errors import explained
from badit.support.files import is_number, read_json
from badit.support.text import UNKNOWN, number

_RUN_FILES = "scores.json, config.yaml, environment.json"
_SETTINGS = [
    "model.name",
    "method.num_experts",
    "method.r",
    "data.source",
    "training.learning_rate",
]
_CELL_KEYS = ["learning_rate", "seed", "order", "config", "environment"]
_MOST_REFERENCES = 4
_PARTLY_RIGHT = 50  # Rouge-L


def sections_of(sources: Sequence[Source]) -> dict[str, list[Block]]:
    """Returns the blocks of each section. The template has the sections' titles and texts."""
    sections = {
        "verdict": [*_verdicts(sources)],
        "overview": [*_overview(sources)],
        "samples": [*_samples(sources)],
        "settings": [*_settings(sources)],
    }
    # Figures of all sources together precede those of each source.
    shown = [together(sources), *sources]
    for section, figures in SECTIONS.items():
        sections[section] = [block for figure in figures for block in figure_blocks(figure, shown)]
    for section, blocks in sections.items():
        blocks += [*notes(section, sources, blocks)]
    return sections


def _verdicts(sources: Sequence[Source]) -> Iterator[Block]:
    """Yields what each comparison and each analysis shows, with the next command."""
    for source in sources:
        label = source.prefix.removesuffix(": ")
        if source.results and (sentences := verdict(source.results)):
            texts = [sentence.removeprefix("Verdict: ") for sentence in sentences]
            lines = [f"{text[:1].upper()}{text[1:]}." for text in texts]
            yield Block("verdict", "Methods", Verdict(lines), file=RESULTS, source=label)
        frame = source.frames.get("gradient_overall")
        if frame is None:
            continue
        measured = measured_in(source.folder, source.config)
        found = conflict_verdict(frame, source.frames.get("gradient_tasks"), measured)
        if found is not None:
            file = frame.attrs["file"]
            yield Block("verdict", "Conflicts between tasks", found, file=file, source=label)


def _overview(sources: Sequence[Source]) -> Iterator[Block]:
    facts = {source.label: _facts(source) for source in sources}
    columns = pd.DataFrame(facts, dtype=object).fillna(UNKNOWN)
    # A source's label may be "run" too.
    table = columns.reset_index(names="run", allow_duplicates=True)
    if len(table):
        files = sorted({RESULTS if source.results else _RUN_FILES for source in sources})
        yield Block("table", "Summary", table, "facts", file=", ".join(files))


def _facts(source: Source) -> dict[str, str]:
    if source.results:
        return _comparison_facts(source.results)
    facts = {}
    if source.scores is not None:
        for metric, scores in source.scores.groupby("metric", sort=False):
            facts[METRICS[str(metric)].label] = score_text(scores["score"].mean(), metric)
        facts["tasks"] = str(source.scores["task"].nunique())

    # A recipe's keys replace those of the environment.
    values: dict[str, Any] = {}
    for name, section in (*source.environment.items(), *source.config.items()):
        if isinstance(section, Mapping):
            values |= {f"{name}.{key}": value for key, value in section.items()}
    for name in ("trainable_parameters", "steps"):
        value = values.get(f"training.{name}")
        if is_number(value):
            facts[name.replace("_", " ")] = number(value, ".0f")
    seconds: Any = values.get("training.seconds")
    if is_number(seconds):
        facts["training time"] = f"{number(seconds / 60)} min"
    section = source.config.get("method")
    if isinstance(section, Mapping):
        facts["method"] = one_line(method_name(saved_section(section)))
    for key in _SETTINGS:
        if values.get(key) is not None:
            facts[key] = str(values[key])
    return facts


def _comparison_facts(results: Results) -> dict[str, str]:
    runs = results.scores[["method", "seed", "order"]].drop_duplicates()
    return {
        "methods": str(len(results.scored_methods)),
        "runs": str(len(runs)),
        "tasks": str(results.scores["task"].nunique()),
        "protocol": results.protocol,
        "reference": results.reference,
    }


def _samples(sources: Sequence[Source]) -> Iterator[Block]:
    """Yields a few instances of each task that all models answered.

    A model is the first run of each method.
    """
    models: dict[str, Source] = {}
    for source in sources:
        for name, run in source.members:
            if name not in models and run.predictions:
                models[name] = run
    content: dict[str, list[dict[str, Any]]] = {}
    for run in models.values():
        for task in run.predictions:
            if task not in content:
                content[task] = _samples_of_task(task, models)
    if content:
        caption = "Questions are the instances' own inputs; long ones are cut at the start."
        yield Block("samples", "", content, caption=caption, file="predictions/")


def _samples_of_task(task: str, models: Mapping[str, Source]) -> list[dict[str, Any]]:
    answers = {
        name: run.predictions[task] for name, run in models.items() if task in run.predictions
    }
    first = next(iter(answers.values()))
    # Answers can be compared only for instances that all models answered.
    shared = [
        instance for instance in first if all(instance in by_model for by_model in answers.values())
    ]
    # Many models make a sample long. The samples are spread over the task's instances.
    limit = 6 if len(answers) <= 3 else 3
    count = min(limit, len(shared))
    chosen = [shared[i * len(shared) // count] for i in range(count)]
    return [
        _sample({name: by_instance[instance] for name, by_instance in answers.items()})
        for instance in chosen
    ]


def _sample(answers: Mapping[str, Prediction]) -> dict[str, Any]:
    """Returns an instance's question, references and answers: model, text, verdict and score."""
    shown = []
    for model, answer in answers.items():
        score = rouge_l(answer.prediction, answer.references)
        verdict = "wrong"
        if exact_match(answer.prediction, answer.references) > 0:
            verdict = "right"
        elif score >= _PARTLY_RIGHT:
            verdict = "partly right"
        shown.append((model, answer.prediction, verdict, f"Rouge-L {number(score, '.0f')}"))
    first = next(iter(answers.values()))
    return {
        "question": own_input(first.prompt) or first.prompt,
        "references": [*dict.fromkeys(first.references)][:_MOST_REFERENCES],
        "answers": shown,
    }


def _settings(sources: Sequence[Source]) -> Iterator[Block]:
    """Yields the recipe and environment of each run, and of the first run of each method."""
    for source in sources:
        if source.config:
            recipe = to_yaml(source.config, sort_keys=False, width=100)
            yield Block("details", f"{source.prefix}Recipe", recipe, file="config.yaml")
        if source.environment:
            environment = json.dumps(source.environment, indent=2, ensure_ascii=False)
            title = f"{source.prefix}Environment"
            yield Block("details", title, environment, file="environment.json")
        if source.results:
            yield from _method_settings(source)


def _method_settings(source: Source) -> Iterator[Block]:
    path = source.folder / RESULTS
    first_cells: dict[str, dict[str, Any]] = {}
    for cell in read_json(path)["cells"]:
        if cell["status"] == "done" and cell.get("selected", True):
            first_cells.setdefault(cell["method"], cell)
    for method, cell in first_cells.items():
        settings = {key: cell[key] for key in _CELL_KEYS if cell.get(key) not in (None, {})}
        # The settings may be nested too deeply.
        with explained(path, action="shown", any_error=True):
            text = to_yaml(settings, sort_keys=False, width=100)
        yield Block("details", source.prefix + method, text, file=RESULTS)

"""Configuration and environment: what it would take to do it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from badit.evaluation.results import RESULTS
from badit.files import read_json
from badit.report.blocks import Block, Details, Note, Section
from badit.report.context import Report
from badit.report.sources import Source

_LEAD = "The resolved recipe of each run, and the machine and versions that it ran on."


def section(report: Report) -> Section:
    blocks: list[Block] = []
    for source in report.sources:
        name = f"{source.label}: " if report.several else ""
        if source.config:
            recipe = _as_yaml(source.config)
            blocks.append(Details(f"{name}Recipe", recipe, [report.origin(source, "config.yaml")]))
        if source.environment:
            text = json.dumps(source.environment, indent=2, ensure_ascii=False)
            blocks.append(Details(f"{name}Environment", text, [report.origin(source, "environment.json")]))
        for method, cell in _cells(source):
            parts = {key: cell.get(key) for key in ("learning_rate", "seed", "order", "config", "environment")}
            text = _as_yaml({key: value for key, value in parts.items() if value})
            blocks.append(Details(f"{name}{method}", text, [report.origin(source, RESULTS)]))
    return Section("settings", "Configuration and environment", _LEAD, blocks or [Note("Nothing is recorded.")])


def _cells(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of a comparison, the first run of each method that counts."""
    if source.results is None:
        return
    seen = set()
    for cell, raw in zip(source.results.cells, read_json(source.path / RESULTS)["cells"], strict=True):
        if cell.counts and cell.method not in seen:
            seen.add(cell.method)
            yield cell.method, raw


def _as_yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)

"""docs/integrations.md: its code runs, block after block, with a tiny model in the built-in one's place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"


# TRL switches gradient checkpointing on by default, under a name that transformers is about to change.
@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing.*` is deprecated:FutureWarning",
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:'pin_memory' argument is set as true:UserWarning",
)
def test_the_pages_code_runs(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("badit.models._built_in_folder", lambda: material / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    assert (tmp_path / "runs" / "chats" / "adapter" / "adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (tmp_path / "regroupings.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {2}

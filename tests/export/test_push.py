"""`badit push` against a hub that is none: what would be uploaded, and every refusal as one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError

import badit
from badit.card import write_run_card
from badit.cli import main
from badit.errors import BaditError
from badit.run import Run

# The hub's HTTP client, which differs between its releases.
http = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
ADDRESS = "https://hub.example/org/tuned"
BADIT = {"name": "badit", "num_experts": 4, "r": 2}


class Hub(HfApi):
    """The hub's client, whose calls arrive here."""

    private: bool | None = None
    files: dict[str, bytes]
    refusal: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool = False, exist_ok: bool = False, **other: Any) -> Any:
        assert exist_ok
        if Hub.refusal is not None:
            raise Hub.refusal
        Hub.private = private
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(
        self, repo_id: str, operations: list[CommitOperationAdd], *, commit_message: str, **o: Any
    ) -> Any:
        Hub.files = {}
        for operation in operations:
            with operation.as_file() as file:
                Hub.files[operation.path_in_repo] = file.read()
        return SimpleNamespace(repo_url=ADDRESS)

    def model_info(self, repo_id: str, **other: Any) -> Any:
        return SimpleNamespace(card_data=ModelCard("---\nlicense: llama3.2\n---\n").data)


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    Hub.private, Hub.files, Hub.refusal = None, {}, None
    return Hub


@pytest.fixture
def run(trained: Callable[..., Run]) -> Run:
    return trained(BADIT)


def test_a_run_and_its_export_are_uploaded_with_their_cards(
    run: Run, hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run_card(run)
    assert main(["push", str(run.path), "org/tuned", "--private"]) == 0
    assert capsys.readouterr().out.strip() == ADDRESS
    assert hub.private is True
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert hub.files["adapter_model.safetensors"] == (run.adapter_path / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "BADIT"
    assert b'PeftModel.from_pretrained(base, "org/tuned")' in hub.files["README.md"]
    here = str(tmp_path.parent).encode()  # where the run lies, too
    assert not any(here in content for content in hub.files.values()), "a path of this machine"

    badit.Run(run.path).export(tmp_path / "lora", progress=False)
    assert "## Training" in (tmp_path / "lora" / "README.md").read_text()
    assert badit.Run(tmp_path / "lora").push("org/tuned") == ADDRESS
    assert hub.private is False
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "gates.json"}
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "LORA"
    assert b"import badit" not in hub.files["README.md"]
    assert not any(here in content for content in hub.files.values())

    run.config_path.write_text(run.config_path.read_text().replace(run.trusted_recipe().model.name, "meta-llama/base"))
    badit.Run(run.path).push("org/tuned")
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("llama3.2", "meta-llama/base")
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "meta-llama/base"


def test_what_cannot_be_pushed_is_one_line(run: Run, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tuned", "a/b/c", "org/na--me", "../x", "org/" + "x" * 100):
        with pytest.raises(BaditError) as caught:
            badit.Run(run.path).push(name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    response = http.Response(401, request=http.Request("POST", "https://hub.example"))
    hub.refusal = HfHubHTTPError("401: Invalid\nlong text", response=response)
    with pytest.raises(BaditError, match=r"refuses: 401: Invalid; .* hf auth login"):
        badit.Run(run.path).push("org/tuned")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(BaditError, match="hf auth login, or set HF_TOKEN"):
        badit.Run(run.path).push("org/tuned")
    assert hub.files == {}


def test_only_the_files_that_badit_wrote_are_uploaded(run: Run, hub: type[Hub], tmp_path: Path) -> None:
    export = badit.Run(run.path).export(tmp_path / "lora", progress=False).folder
    for folder in (run.adapter_path, export):
        for name in (".env", "notes.txt"):
            (folder / name).write_text("secret")
        (folder / "link.txt").symlink_to("notes.txt")
    badit.Run(run.path).push("org/tuned")
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    badit.Run(export).push("org/tuned")
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors", "gates.json"}

    hub.files = {}
    record = json.loads((export / "export.json").read_text())
    for name in (".env", "../run/config.yaml", 5):
        (export / "export.json").write_text(json.dumps({**record, "files": [*record["files"], name]}))
        with pytest.raises(BaditError, match=r"export\.json: files: must be the names of the export's own files"):
            badit.Run(export).push("org/tuned")
    for name in ("link.txt", "missing.txt"):
        (export / "export.json").write_text(json.dumps({**record, "files": [*record["files"], name]}))
        with pytest.raises(BaditError, match=f"{name}: must be a file, and no link"):
            badit.Run(export).push("org/tuned")
    assert hub.files == {}


def test_a_run_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for name, message in (("base", "nothing to push"), ("full", "export .* --merged"), ("badit", "no adapter yet")):
        (tmp_path / "config.yaml").write_text(json.dumps({"method": {"name": name}}))
        with pytest.raises(BaditError, match=message):
            badit.Run(tmp_path).push("org/tuned")

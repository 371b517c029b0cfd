"""`badit push` with the real hub client and a local server: uploaded files and one-line errors."""

import base64
import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import badit
from badit.hub.card import write_run_card
from refusals import refuses
from studio.conftest import BADIT, served


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A local server that answers the client like the hub, with files in the commit request."""
    here = SimpleNamespace(private=None, files={}, status=200)

    async def answer(request):
        body, path = await request.body(), request.url.path
        content = {"id": "meta-llama/base", "cardData": {"license": "llama3.2"}}
        if request.method == "POST":
            assert request.headers["Authorization"] == "Bearer hf_token"
        if path == "/api/repos/create":
            here.private = json.loads(body).get("visibility") == "private"
            content = {"url": f"{here.address}/org/tuned", "id": "1"}
        elif path == "/api/validate-yaml":  # of the model card
            content = {"warnings": [], "errors": []}
        elif path == "/api/models/org/tuned/preupload/main":
            names = [file["path"] for file in json.loads(body)["files"]]
            content = {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
            }
        elif path == "/api/models/org/tuned/commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            values = [line["value"] for line in lines if line["key"] == "file"]
            here.files = {value["path"]: base64.b64decode(value["content"]) for value in values}
            content = {
                "commitUrl": f"{here.address}/org/tuned/commit/1",
                "commitOid": "1",
                "success": True,
            }
        return JSONResponse(content, here.status)

    with served(Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])) as port:
        here.address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield here


@pytest.fixture
def run(trained):
    return trained(BADIT)


def test_runs_and_exports_are_uploaded_with_model_cards(run, hub, tmp_path, command):
    write_run_card(run)
    assert command("push", run.path, "org/tuned", "--private").strip() == f"{hub.address}/org/tuned"
    assert hub.private is True
    assert hub.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert (
        hub.files["adapter_model.safetensors"]
        == (run.adapter_path / "adapter_model.safetensors").read_bytes()
    )
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "BADIT"
    assert b'PeftModel.from_pretrained(base, "org/tuned")' in hub.files["README.md"]
    here = str(tmp_path.parent).encode()  # also a parent of the run
    assert not any(here in content for content in hub.files.values()), (
        "contains a path of this machine"
    )

    badit.Run(run.path).export(tmp_path / "first", progress=False)
    badit.Run(run.path).export(
        tmp_path / "lora", gates=tmp_path / "first" / "gates.json", progress=False
    )
    assert here.decode() not in (tmp_path / "lora" / "export.json").read_text()
    assert "## Training" in (tmp_path / "lora" / "README.md").read_text()
    assert badit.Run(tmp_path / "lora").push("org/tuned") == f"{hub.address}/org/tuned"
    assert hub.private is False
    assert hub.files.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "gates.json",
    }
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "LORA"
    assert b"import badit" not in hub.files["README.md"]
    assert b"In this export the mixture is fixed: gates of gates.json." in hub.files["README.md"]
    assert not any(here in content for content in hub.files.values())
    badit.Run(run.path).export(tmp_path / "merged", merged=True, progress=False)
    badit.Run(tmp_path / "merged").push("org/tuned")
    assert "model.safetensors" in hub.files
    assert not any(here in content for content in hub.files.values())

    run.config_path.write_text(
        run.config_path.read_text().replace(run.trusted_recipe().model.name, "meta-llama/base")
    )
    badit.Run(run.path).push("org/tuned")
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("llama3.2", "meta-llama/base")
    assert (
        json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "meta-llama/base"
    )


def test_push_errors_are_one_line(run, hub, monkeypatch):
    push = badit.Run(run.path).push
    for name in ("tuned", "a/b/c", "org/na--me", "../x", "org/" + "x" * 100):
        assert name in refuses(".", push, name)
    for status, fix in (
        (401, "the token is invalid or expired"),
        (403, "the token has no access to this"),
    ):
        hub.status = status
        refuses(rf"^org/tuned: the hub refuses: .*{status}.*; {fix}", push, "org/tuned")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refuses(
        r"org/tuned: the hub cannot be reached \(.*Connection refused\); try again",
        push,
        "org/tuned",
    )
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refuses("hf auth login or set HF_TOKEN", push, "org/tuned")
    assert hub.files == {}


def test_only_files_written_by_badit_are_uploaded(run, hub, tmp_path):
    export = badit.Run(run.path).export(tmp_path / "lora", progress=False).folder
    for folder in (run.adapter_path, export):
        for name in (".env", "notes.txt"):
            (folder / name).write_text("secret")
        (folder / "link.txt").symlink_to("notes.txt")
    own = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    for folder, names in ((run.path, own), (export, own | {"gates.json"})):
        badit.Run(folder).push("org/tuned")
        assert hub.files.keys() == names

    hub.files = {}
    record = json.loads((export / "export.json").read_text())
    foreign = r"export\.json: files: must be the names of the export's own files"
    wrong = dict.fromkeys([".env", "../run/config.yaml", 5], foreign)
    wrong |= {
        name: f"{name}: must be a file and not a link" for name in ("link.txt", "missing.txt")
    }
    for name, message in wrong.items():
        (export / "export.json").write_text(
            json.dumps({**record, "files": [*record["files"], name]})
        )
        refuses(message, badit.Run(export).push, "org/tuned")
    assert hub.files == {}
    (export / "export.json").write_text(json.dumps({**record, "weights": {}}))
    refuses(
        "was not exported from the present weights of .*; export it again",
        badit.Run(export).push,
        "org/tuned",
    )


def test_export_of_all_tasks_is_pushed_one_task_at_a_time(run, hub, tmp_path):
    out = badit.Run(run.path).export(tmp_path / "all", all_tasks=True, progress=False).folder
    refuses(
        "has a LoRA for each task; push one of them: badit push .*all/cities org/x$",
        badit.Run(out).push,
        "org/x",
    )
    badit.Run(out / "cities").push("org/tuned")
    assert "adapter_model.safetensors" in hub.files


def test_run_without_an_adapter_is_refused(tmp_path):
    for name, message in (
        ("base", "nothing to push"),
        ("full", "export .* --merged"),
        ("badit", "no adapter yet"),
    ):
        (tmp_path / "config.yaml").write_text(json.dumps({"format": 5, "method": {"name": name}}))
        refuses(message, badit.Run(tmp_path).push, "org/tuned")

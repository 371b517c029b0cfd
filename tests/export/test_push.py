"""`badit push` with the real hub client and a local server: uploaded files and one-line errors."""

import base64
import json
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

import badit
from badit.hub.card import write_run_card
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from refusals import refuses
from studio.conftest import BADIT, served

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """A local server that answers the client like the hub.

    It keeps the files of the last commit and whether the repository is private.
    """
    hub = SimpleNamespace(private=None, files={}, status=200)

    async def base_model(request):
        content = {"id": "meta-llama/base", "cardData": {"license": "llama3.2"}}
        return JSONResponse(content, hub.status)

    async def create(request):
        assert request.headers["Authorization"] == "Bearer hf_token"
        hub.private = (await request.json()).get("visibility") == "private"
        return JSONResponse({"url": f"{hub.address}/org/tuned", "id": "1"}, hub.status)

    async def validate_card(request):
        return JSONResponse({"warnings": [], "errors": []})

    async def preupload(request):
        names = [file["path"] for file in (await request.json())["files"]]
        mode = {"uploadMode": "regular", "shouldIgnore": False}
        return JSONResponse({"files": [{"path": name, **mode} for name in names]})

    async def commit(request):
        assert request.headers["Authorization"] == "Bearer hf_token"
        lines = [json.loads(line) for line in (await request.body()).splitlines()]
        values = [line["value"] for line in lines if line["key"] == "file"]
        hub.files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        url = f"{hub.address}/org/tuned/commit/1"
        return JSONResponse({"commitUrl": url, "commitOid": "1", "success": True})

    routes = [
        Route("/api/models/meta-llama/base", base_model),
        Route("/api/repos/create", create, methods=["POST"]),
        Route("/api/validate-yaml", validate_card, methods=["POST"]),
        Route("/api/models/org/tuned/preupload/main", preupload, methods=["POST"]),
        Route("/api/models/org/tuned/commit/main", commit, methods=["POST"]),
    ]
    with served(Starlette(routes=routes)) as port:
        hub.address = f"http://127.0.0.1:{port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_token")
        yield hub


@pytest.fixture
def run(trained):
    return trained(BADIT)


def name_a_folder(files, tmp_path):
    """Returns whether some files contain the path of the test's folder or a run's."""
    return any(str(tmp_path.parent).encode() in content for content in files.values())


def test_an_adopted_adapter_is_pushed_without_options_of_its_training(trained, hub, tmp_path):
    adapter = trained(BADIT).adapter_path
    run = badit.adopt(adapter, output=tmp_path / "adopted", model={"dtype": "float32"})
    run.push("org/tuned")
    assert hub.files.keys() == ADAPTER_FILES
    card = hub.files["README.md"].decode()
    assert "data and options are not recorded" in card
    assert "method.num" in card
    assert "learning" not in card
    assert not any(str(tmp_path).encode() in content for content in hub.files.values())


def test_run_is_uploaded_with_its_card(run, hub, tmp_path, command):
    write_run_card(run)
    assert command("push", run.path, "org/tuned", "--private").strip() == f"{hub.address}/org/tuned"
    assert hub.private is True
    assert hub.files.keys() == ADAPTER_FILES
    weights = run.adapter_path / "adapter_model.safetensors"
    assert hub.files["adapter_model.safetensors"] == weights.read_bytes()
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "BADIT"
    assert b'PeftModel.from_pretrained(base, "org/tuned")' in hub.files["README.md"]
    assert not name_a_folder(hub.files, tmp_path)


def test_exports_are_uploaded_with_their_cards(run, hub, tmp_path):
    run.export(tmp_path / "first", progress=False)
    gates = tmp_path / "first" / "gates.json"
    lora = run.export(tmp_path / "lora", gates=gates, progress=False).folder
    written = {name: (lora / name).read_bytes() for name in ("export.json", "README.md")}
    assert b"## Training" in written["README.md"]
    assert not name_a_folder(written, tmp_path)
    assert badit.Run(lora).push("org/tuned") == f"{hub.address}/org/tuned"
    assert hub.private is False
    assert hub.files.keys() == ADAPTER_FILES | {"gates.json"}
    assert json.loads(hub.files["adapter_config.json"])["peft_type"] == "LORA"
    assert b"import badit" not in hub.files["README.md"]
    assert b"gates of gates.json" in hub.files["README.md"]
    assert not name_a_folder(hub.files, tmp_path)

    merged = run.export(tmp_path / "merged", merged=True, progress=False).folder
    badit.Run(merged).push("org/tuned")
    assert "model.safetensors" in hub.files
    assert not name_a_folder(hub.files, tmp_path)


def test_base_model_on_the_hub_is_named_with_its_licence(run, hub):
    config = run.config_path.read_text()
    run.config_path.write_text(config.replace(run.recipe.model.name, "meta-llama/base"))
    run.push("org/tuned")
    card = ModelCard(hub.files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("llama3.2", "meta-llama/base")
    adapter_config = json.loads(hub.files["adapter_config.json"])
    assert adapter_config["base_model_name_or_path"] == "meta-llama/base"


def test_push_errors_are_one_line(run, hub, monkeypatch):
    for name in ("tuned", "a/b/c", "org/na--me", "../x", "org/" + "x" * 100):
        assert name in refuses(".", run.push, name)
    for status, fix in (
        (401, "the token is invalid or expired"),
        (403, "the token has no access to this"),
    ):
        hub.status = status
        refuses(rf"^org/tuned: the hub refuses: .*{status}.*; {fix}", run.push, "org/tuned")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = r"org/tuned: the hub cannot be reached \(.*Connection refused\); try again"
    refuses(message, run.push, "org/tuned")
    monkeypatch.setattr("badit.hub.upload.get_token", lambda: None)
    refuses("hf auth login or set HF_TOKEN", run.push, "org/tuned")
    assert hub.files == {}


def test_only_files_written_by_badit_are_uploaded(run, hub, tmp_path):
    export = run.export(tmp_path / "lora", progress=False).folder
    for folder in (run.adapter_path, export):
        for name in (".env", "notes.txt"):
            (folder / name).write_text("secret")
        (folder / "link.txt").symlink_to("notes.txt")
    for folder, names in ((run.path, ADAPTER_FILES), (export, ADAPTER_FILES | {"gates.json"})):
        badit.Run(folder).push("org/tuned")
        assert hub.files.keys() == names

    hub.files = {}
    record = json.loads((export / "export.json").read_text())

    def refuses_changed(message, **changes):
        (export / "export.json").write_text(json.dumps({**record, **changes}))
        refuses(message, badit.Run(export).push, "org/tuned")

    for name in (".env", "../run/config.yaml", 5):
        message = r"export\.json: files: must be the names of the export's own files"
        refuses_changed(message, files=[*record["files"], name])
    for name in ("link.txt", "missing.txt"):
        message = f"{name}: must be a file and not a link"
        refuses_changed(message, files=[*record["files"], name])
    for name, value in (
        ("relative_error", "large"),
        ("relative_error", {"total": "0.1"}),
        ("relative_error", {}),
        ("rank", "[32](http://evil.example)"),
        ("exact_rank", [64]),
    ):
        refuses_changed(rf"export\.json: {name}: must be .*; export again", **{name: value})
    message = "was not exported from the present weights of .*; export it again"
    refuses_changed(message, weights={})
    assert hub.files == {}


def test_export_of_all_tasks_is_pushed_one_task_at_a_time(run, hub, tmp_path):
    folder = run.export(tmp_path / "all", all_tasks=True, progress=False).folder
    message = "has a LoRA for each task; push one of them: badit push .*all/cities org/x$"
    refuses(message, badit.Run(folder).push, "org/x")
    badit.Run(folder / "cities").push("org/tuned")
    assert "adapter_model.safetensors" in hub.files


def test_run_without_an_adapter_is_refused(tmp_path):
    for method, message in (
        ("base", "nothing to push"),
        ("full", "export .* --merged"),
        ("badit", "no adapter yet"),
    ):
        recipe = build_recipe({"method": {"name": method}})
        (tmp_path / "config.yaml").write_text(dump_recipe(recipe))
        refuses(message, badit.Run(tmp_path).push, "org/tuned")

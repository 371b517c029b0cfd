"""Base models: a local folder, a model on the Hugging Face hub, or the small built-in model."""

from badit.models.built_in import BUILT_IN, BUILT_IN_HUB_ID, built_in_path
from badit.models.devices import Dtype, device, fast_dtype, warn_of_slow_dtype
from badit.models.loading import (
    HUB_ID,
    load_base_model,
    load_skeleton,
    load_tokenizer,
    resolve_model,
)
from badit.models.quantisation import Quantisation

__all__ = [
    "BUILT_IN", "BUILT_IN_HUB_ID", "HUB_ID", "Dtype", "Quantisation", "built_in_path",
    "device", "fast_dtype",
    "load_base_model", "load_skeleton", "load_tokenizer", "resolve_model", "warn_of_slow_dtype",
]  # fmt: skip

"""Base weights in 8 and 4 bits."""

from importlib.util import find_spec
from typing import Any, Literal, get_args

from badit.support.errors import BaditError, refuse_unknown

Quantisation = Literal["bnb-8bit", "bnb-4bit", "torchao-int8"]


def quantisation_config(kind: Quantisation, dtype: Any) -> Any:
    """Returns transformers' quantisation config.

    Layers in 4 bits compute in ``dtype`` (``auto``: float32).
    """
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
    # NF4 is the 4-bit data type of QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype="float32" if dtype == "auto" else dtype,
    )

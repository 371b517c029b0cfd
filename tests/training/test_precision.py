"""What is printed, and chosen, on a processor that is slow in 16 bits; the slowdown is made up here."""

from importlib import import_module

import pytest
import torch

from badit.recipe import Recipe
from badit.train import base_model, fast_dtype, slowdown, warn_of_slow_dtype

FASTER = "takes 36 times as long as in float32; model.dtype=float32 is faster here"


@pytest.fixture
def processor(monkeypatch):
    """Makes this processor one that takes so many times as long in 16 bits."""
    module = import_module("badit.train")
    monkeypatch.setattr(module, "load_base_model", lambda *_, **options: (options["dtype"], None))
    monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))
    warn_of_slow_dtype.cache_clear()
    yield lambda ratio: monkeypatch.setattr(module, "slowdown", lambda dtype: ratio)
    warn_of_slow_dtype.cache_clear()


def test_the_slowdown_is_measured_once():
    slowdown.cache_clear()
    assert 0 < slowdown("bfloat16") < 1000
    assert slowdown("bfloat16") == slowdown("bfloat16")


@pytest.mark.parametrize(
    ("ratio", "dtype", "loaded", "warning"),
    [
        (36.4, "float16", "float16", FASTER),
        (36.4, "fast", "float32", ""),
        (0.6, "fast", "bfloat16", ""),
        (0.6, "bfloat16", "bfloat16", ""),
    ],
)
def test_a_recipes_model_is_loaded_in_its_dtype_with_one_warning(processor, capsys, ratio, dtype, loaded, warning):
    processor(ratio)
    for _ in range(2):
        assert base_model(Recipe.model_validate({"model": {"dtype": dtype}}))[0] == loaded
    warn_of_slow_dtype("bfloat16", torch.device("cuda"))
    assert fast_dtype(torch.device("cuda")) == "bfloat16"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(warning)
    assert all(warning in line for line in lines)

"""What is said, and chosen, on a processor that computes in 16 bits slowly; how slowly is a stand-in's word here."""

import pytest
import torch

from badit.training import plan, precision
from badit.training.precision import fast_dtype, settled_dtype, slowdown, warn_of_slow_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def processor(monkeypatch):
    """Makes this one that takes so many times as long in 16 bits."""
    warn_of_slow_dtype.cache_clear()
    yield lambda ratio: monkeypatch.setattr(precision, "slowdown", lambda dtype: ratio)
    warn_of_slow_dtype.cache_clear()


def test_the_slowdown_is_measured():
    slowdown.cache_clear()
    assert 0 < slowdown("bfloat16") < 1000
    assert slowdown("bfloat16") == slowdown("bfloat16"), "once a process"


@pytest.mark.parametrize(
    ("ratio", "device", "dtype"), [(0.6, CPU, "bfloat16"), (36.4, CPU, "float32"), (36.4, GPU, "bfloat16")]
)
def test_the_fast_dtype_is_the_narrow_one_unless_the_processor_is_slow_in_it(processor, ratio, device, dtype):
    processor(ratio)
    assert fast_dtype(device) == dtype
    assert settled_dtype("fast", device) == dtype
    assert [settled_dtype(one, device) for one in ("auto", "float16")] == ["auto", "float16"]


def test_a_slow_dtype_is_named_once_with_the_mend(processor, capsys):
    processor(36.4)
    warn_of_slow_dtype("bfloat16", CPU)
    warn_of_slow_dtype("bfloat16", CPU)
    said = capsys.readouterr().err
    assert said == (
        "badit: this processor has no instructions for bfloat16 and takes 36 times as long as in float32; "
        "model.dtype=float32 is faster here\n"
    )


@pytest.mark.parametrize(
    ("ratio", "dtype", "device"),
    [(0.6, "bfloat16", CPU), (36.4, "float32", CPU), (36.4, "auto", CPU), (36.4, "bfloat16", GPU)],
)
def test_what_is_not_slow_goes_without_a_word(processor, ratio, dtype, device, capsys):
    processor(ratio)
    warn_of_slow_dtype(dtype, device)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("dtype", "loaded", "said"), [("float16", "float16", "takes 36 times"), ("fast", "float32", "")]
)
def test_a_recipes_model_is_loaded_in_its_dtype(processor, monkeypatch, capsys, dtype, loaded, said):
    processor(36.4)
    monkeypatch.setattr(plan, "load_base_model", lambda *_, **options: (options["dtype"], None))
    monkeypatch.setattr(plan, "device", lambda: CPU)
    model, _ = plan.base_model(plan.Recipe.model_validate({"model": {"dtype": dtype}}))
    assert model == loaded
    assert said in (err := capsys.readouterr().err)
    assert bool(said) == bool(err)

"""What the benchmarks compare with computes the same thing, and the page of their results is made from these."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from badit import BaditConfig
from badit.tuner import BaditModel
from tuner.helpers import randomise


def script(name: str) -> Any:
    """A benchmark as a module. Their folder is not on the path, where it would hide packages of the tests."""
    spec = spec_from_file_location(name, Path(__file__).parents[1] / "benchmarks" / "speed" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_committed_results() -> None:
    table = script("table")
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.render(page) == page


@pytest.mark.parametrize("per_sequence", [False, True])
def test_the_usual_ways_compute_the_same_mixture(per_sequence: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    config = BaditConfig(num_experts=4, r=2, target_modules=["0", "2"], lora_dropout=0.0)
    model = BaditModel(base, config, "default")
    randomise(model)
    x_BTI = torch.randn(3, 5, 12)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(x_BTI).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    output, wide = model(x_BTI), gradients()
    script("loops").use_loops(model, per_sequence=per_sequence)
    torch.testing.assert_close(model(x_BTI), output, rtol=1e-4, atol=1e-5)
    usual = gradients()
    assert usual.keys() == wide.keys()
    for name, gradient in wide.items():  # sums of large terms: what cancels leaves their rounding
        torch.testing.assert_close(usual[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))

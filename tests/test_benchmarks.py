"""The baselines of the speed benchmarks compute the same result, and the results page is up to date."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from badit import BaditConfig
from badit.tuner import BaditModel
from training.trainers import PAPER
from tuner.helpers import gradients, randomise


def load_script(script):
    """Returns the globals of a benchmark script. Its folder on sys.path would shadow packages of the tests."""
    return runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "speed" / f"{script}.py"))


def test_results_page_is_up_to_date():
    table = load_script("table")
    page = table["PAGE"].read_text(encoding="utf-8")
    assert table["render"](page) == page


@pytest.mark.parametrize("per_sequence", [False, True])
def test_loop_implementations_match_outputs_and_gradients(per_sequence):
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
    config = BaditConfig(num_experts=4, r=2, target_modules=["0", "2"], lora_dropout=0.0, **PAPER)
    model = BaditModel(base, config, "default")
    randomise(model)
    x_BTI = torch.randn(3, 5, 12)

    def output_and_gradients():
        output = model(x_BTI)
        output.square().sum().backward()
        return output.detach(), gradients(model)

    output, wide = output_and_gradients()
    load_script("loops")["use_loops"](model, per_sequence=per_sequence)
    found, usual = output_and_gradients()
    torch.testing.assert_close(found, output, rtol=1e-4, atol=1e-5)
    assert usual.keys() == wide.keys()
    for name, gradient in wide.items():  # sums whose terms cancel keep the rounding errors
        torch.testing.assert_close(usual[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))

"""The angles between experts that a training without regrouping logs, held against angles taken one pair at a time."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import TrainerCallback

from badit.angles import AngleLog
from badit.baselines.mixture import HydraLoraConfig, LoraMoeConfig
from badit.files import read_jsonl
from badit.tuner import BaditConfig
from badit.tuner.layer import ExpertLinear
from training.trainers import make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file in  - :UserWarning")  # PEFT 0.19


class KeepGradients(TrainerCallback):
    """Every step's gradients of each layer's components, (N, I + O)."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = {m.name: m for m in kwargs["model"].modules() if isinstance(m, ExpertLinear)}
        self.steps.append(
            {
                f"{name}.default": torch.cat(
                    [layer.badit_A["default"].grad, layer.badit_B["default"].grad.T], dim=1
                ).clone()
                for name, layer in layers.items()
            }
        )


def naive_angles(steps: list[torch.Tensor], r: int) -> dict[str, float]:
    """The mean over pairs of the angle whose cosine is the mean over steps."""
    pairs: dict[bool, list[float]] = {True: [], False: []}
    for i in range(len(steps[0])):
        for j in range(i):
            cosine = fmean(float(torch.cosine_similarity(g[i], g[j], dim=0)) for g in steps)
            pairs[i // r == j // r].append(cosine)
    names = {True: "intra", False: "inter"}
    degrees = {f"{names[key]}_degrees": fmean(map(math.degrees, map(math.acos, pairs[key]))) for key in pairs}
    return degrees | {f"{names[key]}_abs_cos": fmean(map(abs, pairs[key])) for key in pairs}


@pytest.mark.parametrize(
    "config",
    [LoraMoeConfig(num_experts=3, r=2), BaditConfig(num_experts=3, r=2)],
    ids=lambda config: type(config).__name__,
)
def test_every_window_has_the_angles_of_its_mean_gradients(tiny_model: Any, tmp_path: Path, config: Any) -> None:
    kept = KeepGradients()
    log = tmp_path / "angles.jsonl"
    make_trainer(get_peft_model(tiny_model("llama"), config), tmp_path / "out", [kept, AngleLog(log, every=5)]).train()
    lines = list(read_jsonl(log))
    assert [(line["step"], line["window_steps"]) for line in lines[::2]] == [(5, 5), (10, 5), (12, 2)]
    for line in lines:
        window = kept.steps[line["step"] - line["window_steps"] : line["step"]]
        expected = naive_angles([step[line["module"]] for step in window], r=2)
        assert {key: line[key] for key in expected} == pytest.approx(expected, abs=0.05)


def test_experts_that_share_their_a_have_no_angles(tiny_model: Any, tmp_path: Path) -> None:
    log = AngleLog(tmp_path / "angles.jsonl", every=5)
    make_trainer(
        get_peft_model(tiny_model("llama"), HydraLoraConfig(num_experts=3, r=2)), tmp_path / "out", [log]
    ).train()
    assert not (tmp_path / "angles.jsonl").exists()

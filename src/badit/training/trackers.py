"""Experiment trackers: TensorBoard and Trackio, by the callbacks that HF's Trainer has for them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from badit.errors import BaditError
from badit.runs import is_main_process

#: Where TensorBoard's event files go, within a run's folder.
EVENTS = "tensorboard"


def refuse_missing(names: Sequence[str]) -> None:
    """Raises for trackers that are not installed.

    Raises:
        BaditError: the first of them, and how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise BaditError(
                f"training.report_to: {name} is not installed: pip install 'badit[trackers]', or leave it out"
            )


def tracker_callbacks(names: Sequence[str], folder: Path, step: int) -> list[Any]:
    """HF's callbacks for the trackers, on the process that logs; none on others.

    Args:
        names: of ``training.report_to``.
        folder: the run's.
        step: the optimizer steps that a resumed run has behind it; what an earlier process logged after them is
            hidden, since it is logged again.
    """
    if not is_main_process():
        return []
    return [_tensorboard(folder, step) if name == "tensorboard" else _trackio() for name in dict.fromkeys(names)]


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder / EVENTS), purge_step=step + 1 if step else None))


def _trackio() -> Any:
    from transformers.integrations.integration_utils import TrackioCallback

    return TrackioCallback()

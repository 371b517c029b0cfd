"""What of a training step makes the program wait for a GPU: two places, and none that would come with each layer.

Without a GPU the waits are counted where they would be: a value that Python reads off a tensor, a copy to the host, a
shape that depends on values.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import badit
from badit.regroup import RegroupCallback
from training.trainers import adapted, make_trainer

aten = torch.ops.aten
PACKAGE = str(Path(badit.__file__).parent)

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}

# The number of labels sets the size of the logits; and the optimizer must not step on what is not finite.
ANSWERS, FINITE = "trainer.py:answer_losses", "trainer.py:on_pre_optimizer_step"


def place() -> str | None:
    """The function of badit that waits; None where it is one of another library's, whoever called that."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(PACKAGE):
            return f"{Path(file).name}:{frame.f_code.co_name}"
        if any(f"/{library}/" in file for library in ("transformers", "accelerate", "peft")):
            return None
        frame = frame.f_back
    return None


class _Reads(TorchFunctionMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS and (where := place()):
            self._waits[where] += 1
        return func(*args, **(kwargs or {}))


class _Shapes(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (by_mask or func in SHAPED_BY_VALUES) and (where := place()):
            self._waits[where] += 1
        return func(*args, **(kwargs or {}))


class CountWaits(TrainerCallback):
    """Counts the waits of every step but the first, in which a batch is looked at for a warning."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.steps = 0
        self._modes: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > 0:
            self._modes = [_Reads(self.waits), _Shapes(self.waits)]
            for mode in self._modes:
                mode.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += bool(self._modes)
        while self._modes:
            self._modes.pop().__exit__(None, None, None)


@pytest.mark.parametrize(
    "options",
    [{}, {"router_input": "standardised", "top_k": 2}, {"routing": "token"}],
    ids=str,
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_waits_once_for_its_labels_and_once_before_the_optimizer(
    tiny_model: Callable[..., Any], tmp_path: Path, options: dict[str, Any], micro_batches: int
) -> None:
    count = CountWaits()
    callbacks = [RegroupCallback(every=100), count]
    trainer = make_trainer(
        adapted(tiny_model("llama"), **options),
        tmp_path,
        callbacks,
        gradient_accumulation_steps=micro_batches,
        logging_steps=100,
        save_strategy="no",
        max_steps=4,
    )
    trainer.train()
    assert count.steps == 3
    assert count.waits == {ANSWERS: 3 * micro_batches, FINITE: 3}


def test_every_kind_of_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", str(Path(__file__).parent))
    x = torch.arange(4.0)
    for wait in (
        lambda: x[0].item(),
        lambda: bool(x.sum() > 0),
        lambda: float(x.sum()),
        x.tolist,
        x.cpu,
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: torch.masked_select(x, x > 1),
        lambda: torch.equal(x, x),
        lambda: x.clone().index_put_((x > 1,), torch.tensor(0.0)),
    ):
        waits: Counter[str] = Counter()
        with _Reads(waits), _Shapes(waits):
            wait()
        assert waits, wait

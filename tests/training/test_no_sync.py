"""Where a training step makes the program wait for a GPU: two places, and none per layer.

Without a GPU the waits are counted where they would be: a value that Python reads from a tensor, a copy to the host, a
shape that depends on values.
"""

import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import badit
from badit.regroup import RegroupCallback
from training.trainers import adapted, make_trainer, on

aten = torch.ops.aten
PACKAGE = str(Path(badit.__file__).parent)
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"}
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
SHAPED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten.is_nonzero.default, aten.equal.default}
SHAPED_BY_VALUES |= {aten._unique2.default, aten.repeat_interleave.Tensor}
waits = Counter()


def place():
    """The function of badit that waits; None where it is one of another library's."""
    frame = sys._getframe(1)
    while not (file := frame.f_code.co_filename).startswith(PACKAGE):
        frame = frame.f_back
        if frame is None or any(f"/{library}/" in file for library in ("transformers", "accelerate", "peft")):
            return None
    return f"{Path(file).name}:{frame.f_code.co_name}"


class Reads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and (where := place()):
            waits[where] += 1
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in MASKED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if (by_mask or func in SHAPED_BY_VALUES) and (where := place()):
            waits[where] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"router_input": "standardised", "top_k": 2}, {"routing": "token"}], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_waits_for_its_labels_and_once_before_the_optimizer(tiny_model, tmp_path, options, micro_batches):
    modes, counted = ExitStack(), []
    waits.clear()

    def begin(state, keywords):
        if state.global_step > 0:  # the first batch is checked for a warning
            modes.enter_context(Reads())
            modes.enter_context(Shapes())
            counted.append(state.global_step)

    regrouping = [] if "top_k" in options else [RegroupCallback(every=100)]
    callbacks = [*regrouping, on("on_step_begin", begin), on("on_step_end", lambda *args: modes.close())]
    steps = {"max_steps": 4, "gradient_accumulation_steps": micro_batches, "logging_steps": 100}
    make_trainer(adapted(tiny_model("llama"), **options), tmp_path, callbacks, save_strategy="no", **steps).train()
    assert len(counted) == 3
    # The number of labels sets the size of the logits; the optimizer must not step on what is not finite.
    assert waits == {"trainer.py:answer_losses": 3 * micro_batches, "trainer.py:on_pre_optimizer_step": 3}

"""A training step synchronises with the GPU in two places, and in none per layer.

It counts, on the CPU, what would synchronise: reading a value, copying to the host, computing a
data-dependent shape.
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
from badit.data import AnswerCollator
from badit.training.regrouping import RegroupCallback
from badit.tuner import hooks_of
from training.trainers import adapted, examples, make_trainer, on
from tuner.helpers import CLUSTERS

aten = torch.ops.aten
PACKAGE = str(Path(badit.__file__).parent)
READS = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__contains__",
}
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
}
SHAPED_BY_VALUES |= {aten._unique2.default, aten.repeat_interleave.Tensor}
waits = Counter()


def calling_function():
    """Returns the badit function that synchronises, or None if it is another library's."""
    frame = sys._getframe(1)
    while not (file := frame.f_code.co_filename).startswith(PACKAGE):
        frame = frame.f_back
        if frame is None or any(
            f"/{library}/" in file for library in ("transformers", "accelerate", "peft")
        ):
            return None
    return f"{Path(file).name}:{frame.f_code.co_name}"


class Reads(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS and (where := calling_function()):
            waits[where] += 1
        return func(*args, **(kwargs or {}))


class Shapes(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in MASKED and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if (by_mask or func in SHAPED_BY_VALUES) and (where := calling_function()):
            waits[where] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, CLUSTERS, {"router_input": "standardised", "top_k": 2}, {"routing": "token"}]
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_step_syncs_once_per_micro_batch_and_once_before_optimizer(
    tiny_model, tmp_path, options, micro_batches
):
    modes, counted = ExitStack(), []
    waits.clear()

    def begin(state, keywords):
        if state.global_step > 0:  # a check of the first batch synchronises once more
            modes.enter_context(Reads())
            modes.enter_context(Shapes())
            counted.append(state.global_step)

    regrouping = [] if "top_k" in options else [RegroupCallback(every=100)]
    callbacks = [
        *regrouping,
        on("on_step_begin", begin),
        on("on_step_end", lambda *args: modes.close()),
    ]
    steps = {"max_steps": 4, "gradient_accumulation_steps": micro_batches, "logging_steps": 100}
    hooks_of(model := adapted(tiny_model("llama"), **options)).start_task(
        {"all": [AnswerCollator(0)(examples())]}
    )
    make_trainer(model, tmp_path, callbacks, save_strategy="no", **steps).train()
    assert len(counted) == 3
    # The number of labels determines the shape of the logits; the optimizer must skip steps that
    # are not finite.
    assert waits == {
        "answers.py:answer_logits": 3 * micro_batches,
        "trainer.py:on_pre_optimizer_step": 3,
    }

"""torch.compile, decoder layer by decoder layer: whole graphs, two for any depth; regrouping recompiles nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tuner.helpers import adapted, gradients, layers, padded, random_rows

# The compiler looks at it when it makes the second graph; nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# The first layer's input needs no gradient, the others' does: two graphs, however many layers there are.
GRAPHS, DEPTH = 2, 4


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def batch(seed: int = 0) -> dict[str, Any]:
    """Three padded rows of 12 positions with answers of 4."""
    ids, mask = padded(random_rows(12, 9, 7, seed=seed), side="left")
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "use_cache": False}


def compiled(model: Any) -> Any:
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", fullgraph=True)  # the graphs are what is looked at, not what becomes of them
    return model


def trained(model: nn.Module, micro_batches: int = 1) -> dict[str, torch.Tensor]:
    for seed in range(micro_batches):
        model(**batch(seed)).loss.backward()
    return gradients(model)


def regroup(model: nn.Module, seed: int) -> None:
    """What a regrouping does: other labels, a column of B rescaled, the sums of gates taken."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model):
        labels_N = layer.expert_of("default")
        labels_N.copy_(labels_N[torch.randperm(len(labels_N), generator=generator)])
        with torch.no_grad():
            layer.badit_B["default"][:, 0] *= 1.5
        layer.gate_sums.pop("default", None)


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [
        ({}, 1),
        ({}, 3),  # the second one adds to gradients and sums of gates: two graphs more, once
        ({"router_input": "standardised", "top_k": 2}, 1),
        ({"routing": "token", "gates": "softmax"}, 1),
    ],
    ids=str,
)
def test_a_regrouping_compiles_nothing_again(
    tiny_model: Callable[..., Any], options: dict[str, Any], micro_batches: int
) -> None:
    plain, model = (adapted(tiny_model("llama", num_hidden_layers=DEPTH), **options).train() for _ in range(2))
    before = trained(compiled(model), micro_batches)
    trained(plain, micro_batches)
    graphs = GRAPHS * min(micro_batches, 2)
    assert counters["stats"]["unique_graphs"] == graphs
    for seed in (1, 2):
        regroup(plain, seed)
        regroup(model, seed)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = trained(model, micro_batches)
        expected = trained(plain, micro_batches)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
        assert any(not torch.allclose(after[name], before[name], rtol=1e-2) for name in after)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for one, other in zip(layers(plain), layers(model), strict=True):
        torch.testing.assert_close(one.gate_sums["default"], other.gate_sums["default"])

"""torch.compile, decoder layer by decoder layer: whole graphs, two for any depth; regrouping recompiles nothing."""

import pytest
import torch
from torch._dynamo.utils import counters

from tuner.helpers import adapted, gradients, layers, padded, random_rows

# The compiler looks at it when it makes the second graph; nothing here does.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


def trained(model, micro_batches):
    """The gradients on batches of three padded rows of 12 positions with answers of 4."""
    for seed in range(micro_batches):
        ids, mask = padded(random_rows(12, 9, 7, seed=seed))
        labels = ids.masked_fill(torch.arange(12) < 8, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [
        ({}, 3),  # the second one adds to gradients and sums of gates: two graphs more, once
        ({"router_input": "standardised", "top_k": 2}, 1),
        ({"routing": "token", "gates": "softmax"}, 1),
    ],
    ids=str,
)
def test_a_regrouping_compiles_nothing_again(tiny_model, options, micro_batches):
    torch._dynamo.reset()
    counters.clear()
    plain, model = (adapted(tiny_model("llama", num_hidden_layers=4), **options).train() for _ in range(2))
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="eager", fullgraph=True)  # the graphs are what is looked at, not what becomes of them
    before = trained(model, micro_batches)
    trained(plain, micro_batches)
    # The first layer's input needs no gradient, the others' does: two graphs, however many layers there are.
    graphs = 2 * min(micro_batches, 2)
    assert counters["stats"]["unique_graphs"] == graphs
    for seed in (1, 2):
        for layer in (*layers(plain), *layers(model)):  # what a regrouping does
            layer.expert_of("default").copy_(layer.expert_of("default").roll(seed))
            layer.badit_B["default"].data[:, 0] *= 1.5
            layer.gate_sums.pop("default", None)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = trained(model, micro_batches)
        expected = trained(plain, micro_batches)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-6)
        assert any(not torch.allclose(after[name], before[name], rtol=1e-2) for name in after)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    torch.testing.assert_close(*([layer.gate_sums["default"] for layer in layers(each)] for each in (plain, model)))

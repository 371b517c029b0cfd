"""torch.compile of each decoder layer: full graphs, two for any depth, also after regrouping."""

import pytest
import torch
from torch._dynamo.utils import counters

from tuner.helpers import CHANGE, adapted, gradients, layers, padded, random_rows

# The compiler reads .grad when it builds the second graph; the tests do not.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def accumulated_gradients(model, micro_batches):
    """Returns the gradients accumulated over batches of three padded rows with answers of 4."""
    for seed in range(micro_batches):
        ids, mask = padded(random_rows(12, 9, 7, seed=seed))
        labels = ids.masked_fill(torch.arange(12) < 8, -100)
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    return gradients(model)


@pytest.mark.parametrize(
    ("options", "micro_batches"),
    [
        (
            {},
            3,
        ),  # the second one accumulates gradients and gate sums: two more graphs, compiled once
        ({"router_input": "standardised", "top_k": 2}, 1),
        ({"routing": "token", "gates": "softmax"}, 1),
        (CHANGE, 1),
    ],
    ids=str,
)
def test_regrouping_does_not_recompile_and_gradients_equal_eager(
    tiny_model, options, micro_batches
):
    torch._dynamo.reset()
    counters.clear()
    plain, model = (
        adapted(tiny_model("llama", num_hidden_layers=4), **options).train() for _ in range(2)
    )
    for layer in model.get_base_model().model.layers:
        # The test checks the graphs, not the generated code.
        layer.compile(backend="eager", fullgraph=True)
    before = accumulated_gradients(model, micro_batches)
    accumulated_gradients(plain, micro_batches)
    # The first layer's input requires no gradient, the others' inputs do: two graphs for any number
    # of layers.
    graphs = 2 * min(micro_batches, 2)
    assert counters["stats"]["unique_graphs"] == graphs
    for seed in (1, 2):
        for layer in (*layers(plain), *layers(model)):  # the changes that a regrouping makes
            layer.expert_of("default").copy_(layer.expert_of("default").roll(seed))
            layer.badit_B["default"].data[:, 0] *= 1.5
            layer.gate_sums.pop("default", None)
        with torch._dynamo.config.patch(error_on_recompile=True):
            after = accumulated_gradients(model, micro_batches)
        torch.testing.assert_close(
            after, accumulated_gradients(plain, micro_batches), rtol=1e-4, atol=1e-6
        )
        assert any(not torch.allclose(after[name], before[name], rtol=1e-2) for name in after)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    torch.testing.assert_close(
        *(
            [layer.gate_sums["default"] for layer in layers(adapted_model)]
            for adapted_model in (plain, model)
        )
    )

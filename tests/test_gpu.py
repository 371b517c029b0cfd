"""Results on the accelerator equal those on the CPU; without one, both are the CPU (make gpu)."""

import pytest
import torch

from badit.method import top_singular_triples
from badit.models import device, load_base_model
from badit.training.trainer import answer_losses
from steps import method_of
from tuner.helpers import CLUSTERS, adapted, gradients, padded, random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    # Of the compiler's own code.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def rows():
    ids, mask = padded(random_rows(12, 9, 7))
    labels = ids.masked_fill(torch.arange(12) < 8, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(model, place):
    inputs = {name: tensor.to(place) for name, tensor in rows().items()}
    losses_L, _, _ = answer_losses(model.to(place).train(), inputs)
    losses_L.mean().backward()
    return losses_L.detach().cpu(), {
        name: gradient.cpu() for name, gradient in gradients(model).items()
    }


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, CLUSTERS, {"gated": "change"}, {"routing": "token", "gates": "softmax"}],
    ids=str,
)
def test_losses_and_gradients_equal_those_on_the_cpu(tiny_model, family, options):
    expected = loss_and_gradients(adapted(tiny_model(family), **options), "cpu")
    actual = loss_and_gradients(adapted(tiny_model(family), **options), device())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_compiled_layers_equal_eager_ones(tiny_model):
    torch._dynamo.reset()
    expected = loss_and_gradients(adapted(tiny_model("llama"), **CLUSTERS), device())
    model = adapted(tiny_model("llama"), **CLUSTERS)
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True)
    actual = loss_and_gradients(model, device())
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("quantisation", [None, "bnb-4bit"])
def test_adapters_start_at_the_base_model_in_bfloat16_and_4_bits(material, quantisation):
    model, _ = load_base_model(
        material / "model", dtype="bfloat16", quantisation=quantisation, device=device()
    )
    inputs = {name: tensor.to(device()) for name, tensor in rows().items()}
    ids = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    # Before the first pass, which on a CPU would reorder 4-bit weights.
    adapter = method_of({"name": "badit", "gates": "mean_one"}).apply(model).eval()
    with torch.no_grad():
        with adapter.disable_adapter():
            expected = adapter(**ids).logits
        torch.testing.assert_close(adapter(**ids).logits, expected, rtol=0, atol=0)
    losses_L, _, _ = answer_losses(adapter.train(), inputs)
    losses_L.mean().backward()
    assert all(gradient.isfinite().all() for gradient in gradients(adapter).values())


def test_a_run_trains_scores_and_generates(trained):
    run = trained({"name": "badit", "num_experts": 4, "r": 2})
    assert len(run.evaluate(progress=False)) == 6
    assert len(run.generate(["land 1", "land 2"], max_new_tokens=4)) == 2


def test_singular_triples_equal_the_exact_ones():
    weight = torch.randn(300, 500, generator=torch.Generator().manual_seed(0)).to(device())
    triples = top_singular_triples(weight, 8, method="randomized")
    exact = torch.linalg.svdvals(weight)[:8]
    torch.testing.assert_close(triples[1], exact, rtol=1e-3, atol=0)

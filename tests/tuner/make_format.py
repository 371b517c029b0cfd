"""Writes adapters in the current format: ``PYTHONPATH=tests python -m tuner.make_format``.

Releases with this format must read them with the same result: ``computed.safetensors`` has the
expected output of the layers.
"""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from badit.tuner.config import FORMAT
from tuner.extending import add, batches_of, trained
from tuner.helpers import adapted, layers

FOLDER = Path(__file__).parent / "formats" / str(FORMAT)
_CLUSTERS = {"gates": "clusters", "router_input": "standardised", "num_clusters": 4}
_EMBEDDING = {**_CLUSTERS, "gated": "change", "key": "embedding"}


def _extended(model):
    model = trained(model, **_EMBEDDING)
    add(model, "third")
    return model


# All kinds of saved state: initial factors to subtract, a router input with running moments,
# centroids with codes, gates of the factors' change, codes and groups by gradients, a key of the
# whole model, and the experts of an added task.
ADAPTERS = {
    "bad": adapted,
    "standardised": partial(adapted, router_input="standardised", init_weights="lora"),
    "clusters": partial(adapted, **_CLUSTERS, init_weights="lora"),
    "change": partial(adapted, **_CLUSTERS, gated="change"),
    "codes": partial(trained, **_CLUSTERS, gated="change", codes="grouped-random"),
    "embedding": partial(trained, **_EMBEDDING, codes="grouped"),
    "extended": _extended,
}


@torch.no_grad()
def base_model():
    """Returns a model of one tiny layer, with the same weights in every process."""
    shape = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, **shape)).eval()
    for number, parameter in enumerate(model.parameters(), start=1):
        if parameter.ndim > 1:  # the norms stay 1
            values = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((number + 1.7 * values).sin().view_as(parameter))
    return model


@torch.no_grad()
def computed(model):
    """Returns what an adapter computes.

    These are the logits of a batch with prompts of three tasks. Without a key of the whole model,
    they are the delta weight (12 × 8) for two mixtures, and the gates of five inputs (5 × 3).
    """
    (layer,) = layers(model)
    if layer.badit_config["default"].key == "embedding":
        batches = batches_of("first", "second", "third", rows=4)
        return {task: model(**batch).logits for task, (batch,) in batches.items()}
    x = torch.arange(40, dtype=torch.float32).reshape(5, 8).sin()
    return {
        "delta": layer.get_delta_weight("default"),
        "delta_mixed": layer.get_delta_weight("default", torch.tensor([0.5, 1.0, 1.5])),
        "gates": layer.gates("default", x),
    }


if __name__ == "__main__":
    for name, adapter_of in ADAPTERS.items():
        folder = FOLDER / name
        torch.manual_seed(0)
        model = adapter_of(base_model())
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()
        tensors = {key: tensor.contiguous() for key, tensor in computed(model).items()}
        save_file(tensors, folder / "computed.safetensors")

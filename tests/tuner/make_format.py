"""Writes adapters in the current format: ``PYTHONPATH=tests python -m tuner.make_format``.

Releases with this format must read them with the same result: ``computed.safetensors`` has the
expected output of the layers.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from badit.tuner.config import FORMAT
from tuner.helpers import adapted, layers

FOLDER = Path(__file__).parent / "formats" / str(FORMAT)
_CLUSTERS = {"gates": "clusters", "router_input": "standardised", "num_clusters": 4}
# All kinds of saved state: initial factors to subtract, a router input with running moments,
# centroids with codes, and gates of the factors' change.
OPTIONS = {
    "bad": {},
    "standardised": {"router_input": "standardised", "init_weights": "lora"},
    "clusters": {**_CLUSTERS, "init_weights": "lora"},
    "change": {**_CLUSTERS, "gated": "change"},
}


def base_model():
    """Returns a model of one tiny layer.

    Its weights differ in every process, and the results do not depend on them.
    """
    shape = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)).eval()


@torch.no_grad()
def computed(model):
    """Returns the delta weight (12 × 8) for two mixtures, and the gates of five inputs (5 × 3)."""
    (layer,) = layers(model)
    x = torch.arange(40, dtype=torch.float32).reshape(5, 8).sin()
    return {
        "delta": layer.get_delta_weight("default"),
        "delta_mixed": layer.get_delta_weight("default", torch.tensor([0.5, 1.0, 1.5])),
        "gates": layer.gates("default", x),
    }


if __name__ == "__main__":
    for name, options in OPTIONS.items():
        folder = FOLDER / name
        torch.manual_seed(0)
        model = adapted(base_model(), **options)
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()
        tensors = {key: tensor.contiguous() for key, tensor in computed(model).items()}
        save_file(tensors, folder / "computed.safetensors")

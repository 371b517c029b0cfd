"""Writes the adapter that holds the present format: ``PYTHONPATH=tests python -m tuner.make_format``, once a format.

Later releases must read it as it is meant: the file next to the adapter's has what its layers then compute.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from badit.tuner.config import FORMAT
from tuner.helpers import adapted, layers

FOLDER = Path(__file__).parent / "formats"
# Both kinds of saved state: initial factors to subtract, and a router input with its running moments.
OPTIONS = {"bad": {}, "standardised": {"router_input": "standardised", "init_weights": "lora"}}


def base_model():
    """A model of one tiny layer; its weights are others in every process, and nothing here depends on them."""
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)).eval()


@torch.no_grad()
def computed(model):
    """What the adapter adds to the weight under two mixtures (each 12 × 8), and its gates for five inputs (5 × 3)."""
    (layer,) = layers(model)
    x = torch.arange(40, dtype=torch.float32).reshape(5, 8).sin()
    return {
        "delta": layer.get_delta_weight("default"),
        "delta_mixed": layer.get_delta_weight("default", torch.tensor([0.5, 1.0, 1.5])),
        "gates": layer.gates("default", x),
    }


if __name__ == "__main__":
    for name, options in OPTIONS.items():
        folder = FOLDER / str(FORMAT) / name
        torch.manual_seed(0)
        model = adapted(base_model(), **options)
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink()
        save_file({key: value.contiguous() for key, value in computed(model).items()}, folder / "computed.safetensors")

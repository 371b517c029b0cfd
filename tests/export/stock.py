"""Loads folders with transformers and PEFT only, and saves their logits.

Arguments: token ids [[…]] and the folders by name, both as JSON, and the output file for the logits
by name.
"""

import json
import sys
from pathlib import Path

sys.modules["badit"] = None  # makes importing badit fail
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

logits, tokens = {}, torch.tensor(json.loads(sys.argv[1]))
for name, folder in json.loads(sys.argv[2]).items():
    if (Path(folder) / "adapter_config.json").is_file():  # it names the base model
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits[name] = model.eval()(input_ids=tokens).logits
save_file(logits, sys.argv[3])

"""Runs with transformers and PEFT alone: loads each folder and keeps its logits. Arguments: a JSON file of jobs.

A job is {"base": FOLDER, "adapter": FOLDER or null, "tokens": [[…]], "logits": FILE}.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class NoBadit(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == "badit":
            raise AssertionError("badit is not to be imported here")


sys.meta_path.insert(0, NoBadit())
import torch  # noqa: E402
from peft import AutoPeftModelForCausalLM  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

for job in json.loads(Path(sys.argv[1]).read_text()):
    if job["adapter"]:  # its configuration names the base model
        model = AutoPeftModelForCausalLM.from_pretrained(job["adapter"], dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32)
        AutoTokenizer.from_pretrained(job["base"])
    with torch.no_grad():
        save_file({"logits": model.eval()(input_ids=torch.tensor(job["tokens"])).logits}, job["logits"])

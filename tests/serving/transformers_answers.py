"""Greedy answers of transformers and PEFT in float32, without badit. Argument: a job (JSON file).

A job is {"model": FOLDER of a LoRA or a model, or a hub id, "prompts": [[token, …], …], "tokens":
N, "answers": FILE}. The answers file also has each new token's margin: the largest logit minus the
second largest.
"""

import json
import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text())
is_adapter = (Path(job["model"]) / "adapter_config.json").is_file()
loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
model = loader.from_pretrained(job["model"], dtype=torch.float32).eval()
model.generation_config.update(do_sample=False, max_new_tokens=job["tokens"], pad_token_id=0)
ends = torch.tensor(model.generation_config.eos_token_id).flatten()
answers, margins = [], []
for start in range(0, len(job["prompts"]), 8):
    prompts = job["prompts"][start : start + 8]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=ids, attention_mask=mask, output_scores=True, return_dict_in_generate=True
    )
    for row, tokens in enumerate(out.sequences[:, width:]):
        ended = torch.isin(tokens, ends).tolist()
        length = ended.index(True) + 1 if any(ended) else len(tokens)
        answers.append(tokens[:length].tolist())
        best = [scores[row].topk(2).values for scores in out.scores[:length]]
        margins.append([round(float(top - second), 5) for top, second in best])
assert "badit" not in sys.modules
Path(job["answers"]).write_text(json.dumps({"answers": answers, "margins": margins}))

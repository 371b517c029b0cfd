"""A tiny model, two tasks and a recipe that trains in a second, for tests and golden.py."""

import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from badit.metrics.answers import mean_scores
from data.examples import CHATML, make_tokenizer


def write_tasks(path):
    """Writes two tasks of 12 training and 4 test instances, with inputs of several lengths."""
    lines = [
        {
            "task": task,
            "instruction": f"Name the {verb}.",
            "input": f"land {i} " * (1 + i % 4),
            "output": f"{verb} {i}",
        }
        | {"split": "test" if i >= 12 else "train"}
        for task, verb in (("cities", "capital"), ("rivers", "river"))
        for i in range(16)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_material(folder, **config):
    """Writes ``model`` and ``tasks.jsonl`` into a folder."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ends = {"max_position_embeddings": 128, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), **sizes | ends | config)
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_tasks(folder / "tasks.jsonl")


def make_recipe(model, tasks, output):
    """Returns a recipe for 24 training instances in batches of 4: twelve steps in two epochs."""
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01}
    return {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"source": str(tasks)},
        "method": {
            "name": "badit",
            "num_experts": 4,
            "r": 2,
            "lora_dropout": 0.1,
            "regroup": {"every": 3},
        },
        "training": {**training, "logging_steps": 1, "save_steps": 5},
        "evaluation": {"batch_size": 4, "max_new_tokens": 4},
        "output": str(output),
    }


def results_cell(method, seed, instances, **fields):
    """Returns a finished cell of results.json with scores by task, metric and instance."""
    done = {
        "order": None,
        "learning_rate": None if seed is None else 5e-4,
        "status": "done",
        "error": None,
    }
    scores = {"scores": mean_scores(instances), "instances": instances, "selected": True}
    return {"method": method, "seed": seed, **done, **scores, **fields}


def comparison(*cells, methods, protocol="mixed"):
    return {
        "format": 1,
        "protocol": protocol,
        "reference": "lora",
        "methods": methods,
        "cells": list(cells),
    }


def write_results(folder, content):
    path = folder / "results.json"
    path.write_text(json.dumps(content))
    return path

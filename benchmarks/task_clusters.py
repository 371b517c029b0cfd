"""Measures whether prompts find their task by the nearest centroid, as `badit extend` assigns them.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/task_clusters.py

The 15 SuperNI tasks with SmolLM2's embeddings, in several draws of the data: 64 training prompts
per task for the centroids and 60 held-out training prompts, with the definition of the task and
without. Needs no training. Writes results/task-clusters.json and prints the means.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import badit
from badit.data.encoding import encode_prompts
from badit.data.prompts import build_prompt
from badit.method.abilities import prompt_keys, vocabulary_moments
from badit.method.extension import confused_shares, key_spread
from badit.method.routing import prompt_centroids
from badit.support.environment import environment
from badit.support.files import write_json
from badit.training.loading import load_base

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "task-clusters.json"
RECIPE = HERE.parent / "recipes" / "evidence-cpu.yaml"
TRAIN, HELD_OUT = 64, 60
DRAWS = range(3)
THRESHOLDS = (0.93, 0.95)  # of extend.coverage: the former default and the present one
OWN_SHARE = 0.8  # of a task's prompts, as in tuner/additions.py


def main() -> None:
    results = {}
    for definitions in (True, False):
        for clusters in (1, 2):
            name = f"{'with' if definitions else 'without'} definitions, {clusters} per task"
            draws = [measured(keys_of(seed, definitions), clusters) for seed in DRAWS]
            results[name] = {key: [draw[key] for draw in draws] for key in draws[0]}
            means = {key: round(float(np.mean(of_key)), 4) for key, of_key in results[name].items()}
            print(name, means, flush=True)
    content = {"train": TRAIN, "held out": HELD_OUT, "draws": len(DRAWS), "results": results}
    write_json(RESULTS, {**content, "environment": environment()})


def keys_of(seed: int, definitions: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the keys (S, E) of training and of held-out prompts, by task."""
    sizes = {"train_per_task": TRAIN, "validation_per_task": HELD_OUT, "seed": seed}
    recipe = badit.load_recipe(RECIPE, [f"data.{key}={value}" for key, value in sizes.items()])
    model, tokenizer = load_base(recipe)
    base: Any = model
    embedding = base.get_input_embeddings().weight.detach().float()
    moments = vocabulary_moments([embedding])
    keys = {}
    for task in badit.plan(recipe).tasks:
        if not definitions:
            task = task.model_copy(update={"definition": ""})
        keys[task.name] = tuple(
            prompt_keys(mean_embeddings(recipe, tokenizer, embedding, task, instances), *moments)
            for instances in (task.train, task.validation)
        )
    return keys


def mean_embeddings(
    recipe: Any, tokenizer: Any, embedding: Tensor, task: Any, instances: Any
) -> Tensor:
    """Returns the mean embeddings (S, E) of the prompts of a task's instances."""
    prompts = encode_prompts(
        tokenizer,
        [build_prompt(task, instance) for instance in instances],
        max_source_tokens=recipe.prompt.max_source_tokens,
    )
    return torch.stack([embedding[torch.tensor(ids)].mean(dim=0) for ids in prompts])


def measured(keys: Mapping[str, tuple[Tensor, Tensor]], clusters: int) -> dict[str, Any]:
    """Returns the shares of held-out prompts, and the cosines that the threshold separates."""
    centroids = {
        task: prompt_centroids(train_SE, clusters).double() for task, (train_SE, _) in keys.items()
    }
    found, among_two = [], []
    for number, (_, held_out_SE) in enumerate(keys.values()):
        cosine_ST = torch.stack(
            [(held_out_SE.double() @ own_CE.T).amax(dim=1) for own_CE in centroids.values()], dim=1
        )
        nearest_S2 = cosine_ST.topk(2, dim=1).indices
        found.append(nearest_S2[:, 0] == number)
        among_two.append((nearest_S2 == number).any(dim=1))
    taken, estimated = taken_shares(keys, centroids)
    own, other = covering_cosines(keys, centroids)
    covered = {
        f"pairs of tasks above {threshold}": sum(cosine > threshold for cosine in other)
        for threshold in THRESHOLDS
    }
    return {
        "found": float(torch.cat(found).double().mean()),
        "own task among the nearest two": float(torch.cat(among_two).double().mean()),
        "taken by one task, at most": max(taken),
        "correlation of the estimate": float(np.corrcoef(taken, estimated)[0, 1]),
        "taken / estimated": float(np.sum(taken) / np.sum(estimated)),
        "own cosine, lowest": min(own),
        "cosine to another task, highest": max(other),
        **covered,
    }


def taken_shares(
    keys: Mapping[str, tuple[Tensor, Tensor]], centroids: Mapping[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Returns, by pair of tasks, the share of one's held-out prompts that the other one takes.

    The first list has the measured shares, the second those that `badit extend` estimates.
    """
    taken, estimated = [], []
    for task, (train_SE, held_out_SE) in keys.items():
        own_CE = centroids[task]
        cluster_S = (train_SE.double() @ own_CE.T).argmax(dim=1)
        means_CE, spread_CKE = key_spread(train_SE, cluster_S, len(own_CE))
        weight_C = torch.bincount(cluster_S, minlength=len(own_CE)).double() / len(train_SE)
        own_S = (held_out_SE.double() @ own_CE.T).amax(dim=1)
        for other, other_DE in centroids.items():
            if other == task:
                continue
            other_S = (held_out_SE.double() @ other_DE.T).amax(dim=1)
            taken.append(float((other_S > own_S).double().mean()))
            share_CD = confused_shares(means_CE, spread_CKE, own_CE, other_DE)
            estimated.append(float(weight_C @ share_CD.amax(dim=1)))
    return taken, estimated


def covering_cosines(
    keys: Mapping[str, tuple[Tensor, Tensor]], centroids: Mapping[str, Tensor]
) -> tuple[list[float], list[float]]:
    """Returns the cosines that 80 % of a task's held-out prompts exceed, to its own centroids and
    to those of other tasks.

    One number per task, and one per pair of tasks.
    """
    own, other = [], []
    for task, (_, held_out_SE) in keys.items():
        for name, centroids_CE in centroids.items():
            cosine_S = (held_out_SE.double() @ centroids_CE.T).amax(dim=1)
            exceeded = float(cosine_S.quantile(1 - OWN_SHARE))
            (own if name == task else other).append(exceeded)
    return own, other


if __name__ == "__main__":
    main()

"""Measures how many prompts per cluster the search of a layer's clusters needs.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/cluster_prompts.py

Clusters are found on 8 to 32 prompts per cluster, as before a training with default options, for
the 15 SuperNI tasks and all layers of SmolLM2-135M, in several draws of the data. Two numbers are
measured on held-out training prompts, as means over the layers: the cosine to the nearest centroid,
which the search maximises, and the share of prompts whose task is the most frequent one in their
cluster. Needs no training. Writes results/cluster-prompts.json and prints the means.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import badit
from badit.data import AnswerCollator
from badit.data.examples import batches_by_task
from badit.method.routing import batch_moments, nearest_clusters, prompt_centroids, standardised
from badit.support.environment import environment
from badit.support.files import write_json
from badit.training.encoding import encoded
from badit.training.loading import load_base
from badit.training.methods import training_method
from badit.tuner import hooks_of

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cluster-prompts.json"
RECIPE = HERE.parent / "recipes" / "evidence-cpu.yaml"
CLUSTERS = 16
PER_CLUSTER = (8, 12, 16, 24, 32)
HELD_OUT = 20  # per task
DRAWS = range(2)

Means = list[list[Tensor]]  # by layer and task, x̄ (S, I)


def main() -> None:
    draws = [measured(*means_of(seed)) for seed in DRAWS]
    results = {per_cluster: [draw[per_cluster] for draw in draws] for per_cluster in PER_CLUSTER}
    for per_cluster, of_draws in results.items():
        averages = {key: round(fmean(draw[key] for draw in of_draws), 4) for key in of_draws[0]}
        print(per_cluster, averages, flush=True)
    content = {"clusters": CLUSTERS, "held out per task": HELD_OUT, "draws": len(DRAWS)}
    write_json(RESULTS, {**content, "results": results, "environment": environment()})


def means_of(seed: int) -> tuple[Means, Means]:
    """Returns the means of each layer's input over training prompts and held-out prompts."""
    tasks = 15
    sizes = {
        "train_per_task": max(PER_CLUSTER) * CLUSTERS // tasks,
        "validation_per_task": HELD_OUT,
        "seed": seed,
    }
    recipe = badit.load_recipe(
        RECIPE, [f"data.{key}={value}" for key, value in sizes.items()] + ["method.name=badit"]
    )
    run = badit.plan(recipe)
    base, tokenizer = load_base(recipe)
    model = training_method(run.method).apply(base, [task.name for task in run.tasks])
    training, held_out = (
        [(task, instance) for task in run.tasks for instance in of_split(task)]
        for of_split in (lambda task: task.train, lambda task: task.validation)
    )
    return _means(model, recipe, tokenizer, training), _means(model, recipe, tokenizer, held_out)


def _means(model: Any, recipe: Any, tokenizer: Any, pairs: Sequence[tuple[Any, Any]]) -> Means:
    examples = encoded(tokenizer, recipe, pairs, None)
    batches = batches_by_task(examples, AnswerCollator(tokenizer.pad_token_id, with_tasks=True), 4)
    hooks: Any = hooks_of(model)
    by_task = []
    for of_task in batches.values():
        with torch.no_grad():
            sample = hooks._sample({"all": of_task}, len(pairs))
        by_task.append([torch.cat(of_layer) for of_layer in sample.means.values()])
    return [list(of_layer) for of_layer in zip(*by_task, strict=True)]


def measured(training: Means, held_out: Means) -> dict[int, dict[str, float]]:
    """Returns both numbers for each number of prompts per cluster."""
    results = {}
    for per_cluster in PER_CLUSTER:
        cosines, shares = [], []
        for of_training, of_held_out in zip(training, held_out, strict=True):
            per_task = per_cluster * CLUSTERS // len(of_training)
            found_SI = torch.cat([means_SI[:per_task] for means_SI in of_training])
            moments_2I = batch_moments(found_SI)
            centroids_CI = prompt_centroids(standardised(found_SI, moments_2I), CLUSTERS)
            x_SI = standardised(torch.cat(of_held_out), moments_2I).float()
            cluster_S = nearest_clusters(x_SI, centroids_CI)
            cosine_S = torch.cosine_similarity(x_SI, centroids_CI[cluster_S], dim=1)
            cosines.append(float(cosine_S.mean()))
            shares.append(_share_of_first_task(cluster_S, [len(one) for one in of_held_out]))
        results[per_cluster] = {"cosine": fmean(cosines), "first task": fmean(shares)}
    return results


def _share_of_first_task(cluster_S: Tensor, sizes: Sequence[int]) -> float:
    task_S = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    counts_CT = torch.zeros(CLUSTERS, len(sizes))
    counts_CT.index_put_((cluster_S, task_S), torch.ones(len(task_S)), accumulate=True)
    return float(counts_CT.amax(dim=1).sum() / len(task_S))


if __name__ == "__main__":
    main()

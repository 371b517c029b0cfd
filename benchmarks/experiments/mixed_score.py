#!/usr/bin/env python3
"""mixed_score.py RESULTS [REFERENCE]: paired differences in NLL and in the mixed score, by method.

The mixed score of a task with closed labels is its expected exact match, 100 · p(reference): the
probability that sampling gives the first reference. p is exp(−NLL · tokens of the reference, with
the end of the answer). On other tasks it is Rouge-L. Scores are means over the tasks. The intervals
are paired 95 % t intervals over the seeds, for these test instances.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/mixed_score.py benchmarks/results/evidence-seeds-cpu/results.json
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cell_losses import difference_columns

from badit.api import plan
from badit.models import load_tokenizer
from badit.support.files import read_json
from badit.training.encoding import encoded
from badit.tuner.prompt import IGNORED_LABEL

#: Tasks whose answer is one of a few labels.
CLOSED = ("task073", "task363", "task875", "task1687")
SCORES = ("NLL", "mixed score", "Rouge-L", "Rouge-L of the open tasks")


def answer_tokens(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the number of answer tokens of each test instance, by task."""
    values = {name: config[name] for name in ("model", "data", "prompt")}
    run = plan({**values, "method": {"name": "base"}})
    tokenizer = load_tokenizer(run.recipe.model.name)
    counts = {}
    for task in run.tasks:
        examples = encoded(tokenizer, run.recipe, [(task, item) for item in task.test], None)
        labels = [np.asarray(example["labels"]) for example in examples]
        counts[task.name] = np.array([(of_one != IGNORED_LABEL).sum() for of_one in labels])
    return counts


def scores_of(cell: Mapping[str, Any], tokens: Mapping[str, np.ndarray]) -> list[float]:
    """Returns a run's values of :data:`SCORES`."""
    nll, mixed, rouge, open_rouge = [], [], [], []
    for task, metrics in cell["instances"].items():
        nll_P = np.array(metrics["nll"])
        rouge_P = np.array(metrics["rouge_l"])
        nll.append(nll_P.mean())
        rouge.append(rouge_P.mean())
        if task.startswith(CLOSED):
            mixed.append(100 * np.exp(-nll_P * tokens[task]).mean())
        else:
            mixed.append(rouge_P.mean())
            open_rouge.append(rouge_P.mean())
    return [float(np.mean(values)) for values in (nll, mixed, rouge, open_rouge)]


def main() -> None:
    path = Path(sys.argv[1])
    content = read_json(path)
    reference = sys.argv[2] if len(sys.argv) > 2 else content["reference"]
    # Unfinished comparisons have cells without scores.
    cells = [cell for cell in content["cells"] if cell["selected"] and cell["instances"]]
    # The number of test instances and their answers do not depend on the seed.
    tokens = answer_tokens(cells[0]["config"])
    runs: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        runs.setdefault(cell["method"], {})[cell["seed"]] = scores_of(cell, tokens)

    for index, score in enumerate(SCORES):
        print(f"\n| method | {score} | minus {reference}, by seed | mean | 95 % interval |")
        print("|---|---:|---|---:|---|")
        for method, by_seed in runs.items():
            mean = np.mean([values[index] for values in by_seed.values()])
            shared = sorted(by_seed.keys() & runs[reference].keys())
            differences = [by_seed[s][index] - runs[reference][s][index] for s in shared]
            columns = difference_columns([] if method == reference else differences)
            print(f"| {' | '.join([method, f'{mean:.4f}', *columns])} |")


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""mixed_score.py RESULTS [REFERENCE]: paired differences in NLL and in the mixed score, by method.

The mixed score of a task with closed labels is its expected exact match, 100 · p(reference): the
probability that sampling gives the first reference. p is exp(−NLL · tokens of the reference, with
the end of the answer). On other tasks it is Rouge-L. Scores are means over the tasks. The intervals
are paired 95 % t intervals over the seeds, for these test instances. The scores of every run are
written to scores.json, next to RESULTS.

    export BADIT_SUPERNI=/path/to/superni
    python benchmarks/experiments/mixed_score.py benchmarks/results/evidence-seeds-cpu/results.json
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cell_losses import difference_columns

from badit.api import plan
from badit.models import load_tokenizer
from badit.support.files import read_json, write_json
from badit.training.encoding import encoded
from badit.tuner.prompt import IGNORED_LABEL

NOISE = Path(__file__).parents[1] / "noise.py"
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


def scores_of(cell: Mapping[str, Any], tokens: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Returns a run's :data:`SCORES`."""
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
    values = (nll, mixed, rouge, open_rouge)
    return {score: round(float(np.mean(of)), 5) for score, of in zip(SCORES, values, strict=True)}


def scores_by_method(content: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the scores of the complete runs of a comparison, by method and seed."""
    cells = [cell for cell in content["cells"] if cell["selected"] and cell["instances"]]
    # The number of test instances and their answers do not depend on the seed.
    tokens = answer_tokens(cells[0]["config"])
    runs: dict[str, dict[str, dict[str, float]]] = {}
    for cell in cells:
        runs.setdefault(cell["method"], {})[str(cell["seed"])] = scores_of(cell, tokens)
    return runs


def main() -> None:
    path = Path(sys.argv[1])
    content = read_json(path)
    reference = sys.argv[2] if len(sys.argv) > 2 else content["reference"]
    runs = scores_by_method(content)
    write_json(path.with_name("scores.json"), runs)
    differences = runpy.run_path(str(NOISE))["score_differences"]

    for score in SCORES:
        print(f"\n| method | {score} | minus {reference}, by seed | mean | 95 % interval |")
        print("|---|---:|---|---:|---|")
        for method, by_seed in runs.items():
            mean = np.mean([values[score] for values in by_seed.values()])
            pairs = [] if method == reference else differences(runs, method, reference, score)
            print(f"| {' | '.join([method, f'{mean:.4f}', *difference_columns(pairs)])} |")


if __name__ == "__main__":
    main()

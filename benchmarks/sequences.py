"""Numbers of stage D that `badit table` does not print.

    python benchmarks/sequences.py

Differences by order, the final NLL, and forward transfer against LoRA trained on single tasks with
the same seed, for every method. Question and rule: benchmarks/experiments/harness-d.md
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd

from badit.comparison.results import RESULTS, SINGLE_TASK, Results, load_results, paired_differences
from badit.metrics.statistics import paired_bootstrap
from badit.support.files import read_json

FOLDER = Path(__file__).parent / "results" / "evidence-sequence-cpu"
SECOND_FOLDER = FOLDER.with_name("evidence-sequence-processor")  # LoRA's on another machine
SECOND_LORA = "lora, second machine"


def main() -> None:
    results = load_results(FOLDER)
    second = load_results(SECOND_FOLDER).instances.assign(method=SECOND_LORA)
    results = replace(results, instances=pd.concat([results.instances, second]))
    sequences = [name for name in results.methods if not name.endswith(SINGLE_TASK)]
    for reference in ("lora", "badit", SECOND_LORA):
        for method in sequences:
            if method != reference:
                print(differences(replace(results, reference=reference), method))

    cells = [
        cell
        for cell in read_json(FOLDER / RESULTS)["cells"]
        if cell["selected"] and cell["status"] == "done"
    ]
    single_tasks = {
        cell["seed"]: cell["scores"]["tasks"]
        for cell in cells
        if cell["method"] == "lora" + SINGLE_TASK
    }
    for method in sequences:
        of_method = [cell for cell in cells if cell["method"] == method]
        losses = [cell["scores"]["nll"] for cell in of_method]
        transfers = [forward_transfer(cell, single_tasks[cell["seed"]]) for cell in of_method]
        loss = f"NLL {mean(losses):.3f} ± {stdev(losses):.3f}"
        transfer = f"forward transfer {mean(transfers):+.1f} ± {stdev(transfers):.1f}"
        print(f"{method}: {loss}, {transfer} over {len(of_method)} runs")


def differences(results: Results, method: str) -> str:
    """Returns a method's differences to the reference: in both orders together, and in each."""
    lines = [f"{method} − {results.reference}:"]
    for order in (None, *results.instances["order"].dropna().unique()):
        instances = results.instances
        if order is not None:
            instances = instances[instances["order"] == order]
        for metric in ("rouge_l", "nll"):
            pairs = paired_differences(replace(results, instances=instances), method, metric)
            found = paired_bootstrap(pairs)
            interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            place = f"{order or 'both orders'}, {metric}"
            lines.append(f"    {place}: {interval} over {found.runs} runs")
    return "\n".join(lines)


def forward_transfer(cell: dict[str, Any], single_tasks: dict[str, Any]) -> float:
    """Returns the mean gain in Rouge-L of each task, when trained, over a model of its own."""
    gains = [
        cell["matrix"][i][i] - single_tasks[task]["rouge_l"] for i, task in enumerate(cell["tasks"])
    ]
    return mean(gains)


if __name__ == "__main__":
    main()

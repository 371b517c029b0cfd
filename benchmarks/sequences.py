"""Numbers of stage D that `badit table` lacks: differences by order, final NLL, forward transfer.

    python benchmarks/sequences.py

Forward transfer is measured against LoRA trained on single tasks with the same seed, for every
method. Question and rule: docs/experiments/harness-d.md
"""

from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pandas as pd

from badit.comparison.results import SINGLE_TASK, load_results, paired_differences
from badit.metrics.statistics import paired_bootstrap
from badit.support.files import read_json

FOLDER = Path(__file__).parent / "results" / "evidence-sequence-cpu"
SECOND = FOLDER.with_name("evidence-sequence-processor")  # LoRA's sequences on another machine
AGAIN = "lora, second machine"


def main() -> None:
    results, again = load_results(FOLDER), load_results(SECOND).instances.assign(method=AGAIN)
    results = replace(results, instances=pd.concat([results.instances, again]))
    sequences = [name for name in results.methods if not name.endswith(SINGLE_TASK)]
    pairs = [
        (name, other) for other in ("lora", "badit", AGAIN) for name in sequences if name != other
    ]
    for method, reference in pairs:
        text = f"{method} − {reference}:"
        for order in (None, *results.instances["order"].dropna().unique()):
            own = (
                results.instances
                if order is None
                else results.instances[results.instances["order"] == order]
            )
            for metric in ("rouge_l", "nll"):
                found = paired_bootstrap(
                    paired_differences(
                        replace(results, instances=own, reference=reference), method, metric
                    )
                )
                interval = f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
                text += (
                    f"\n    {order or 'both orders'}, {metric}: {interval} over {found.runs} runs"
                )
        print(text)
    done = [
        cell
        for cell in read_json(FOLDER / "results.json")["cells"]
        if cell["selected"] and cell["status"] == "done"
    ]
    alone = {
        cell["seed"]: cell["scores"]["tasks"]
        for cell in done
        if cell["method"] == "lora" + SINGLE_TASK
    }
    for method in sequences:
        cells = [cell for cell in done if cell["method"] == method]
        nll = [cell["scores"]["nll"] for cell in cells]
        forward = []
        for cell in cells:
            own = [alone[cell["seed"]][task]["rouge_l"] for task in cell["tasks"]]
            forward.append(mean(cell["matrix"][j][j] - score for j, score in enumerate(own)))
        spread = f"NLL {mean(nll):.3f} ± {stdev(nll):.3f}, "
        spread += f"forward transfer {mean(forward):+.1f} ± {stdev(forward):.1f}"
        print(f"{method}: {spread} over {len(cells)} runs")


if __name__ == "__main__":
    main()

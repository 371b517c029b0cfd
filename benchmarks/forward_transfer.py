"""Forward transfer of every method of stage D, against LoRA trained on single tasks with the same seed.

    python benchmarks/forward_transfer.py

`badit table` has it for the methods in `compare.single_task` only, against their own single-task models.
"""

import statistics
from pathlib import Path

from badit.files import read_json
from badit.results import SINGLE_TASK

FILE = Path(__file__).parent / "results" / "evidence-sequence-cpu" / "results.json"


def main() -> None:
    done = [cell for cell in read_json(FILE)["cells"] if cell["selected"] and cell["status"] == "done"]
    alone = {cell["seed"]: cell["scores"]["tasks"] for cell in done if cell["method"] == "lora" + SINGLE_TASK}
    found: dict[str, list[float]] = {}
    for cell in done:
        if cell.get("matrix"):
            own = [alone[cell["seed"]][task]["rouge_l"] for task in cell["tasks"]]
            forward = statistics.mean(cell["matrix"][j][j] - score for j, score in enumerate(own))
            found.setdefault(cell["method"], []).append(forward)
    for method, values in sorted(found.items(), key=lambda item: -statistics.mean(item[1])):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        print(f"{method}: {statistics.mean(values):+.1f}{spread} ({len(values)} runs)")


if __name__ == "__main__":
    main()

"""Write the tables of docs/performance.md from the JSON files under benchmarks/results/speed.

python benchmarks/speed/table.py
"""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from badit.support.files import read_json, write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "performance.md"
# An option that no longer exists. The committed results still have it.
_REMOVED = "badit folded"
_COMPONENT_LENGTH = "20000"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


Format = Callable[[float], str]


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _near_times(value: float) -> str:
    return f"{value:.3f} ×"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _ratio(values: list[float], others: list[float]) -> float:
    """Returns the median of the ratios within a round."""
    return median([a / b for a, b in zip(values, others, strict=True)])


def _at_most(what: str, against: str, value: float, limit: float, form: Format) -> list[str]:
    """Returns a row: the measurement, its baseline, the target, and whether it is met."""
    met = "yes" if value <= limit else "**no**"
    return [what, against, form(value), f"≤ {form(limit)}", met]


def _at_least(what: str, against: str, value: float, limit: float, form: Format) -> list[str]:
    met = "yes" if value >= limit else "**no**"
    return [what, against, form(value), f"≥ {form(limit)}", met]


def targets() -> list[list[str]]:
    rows = []
    for dtype, step in _by_dtype(_read("training_step")):
        rows += _step_targets(dtype, step)
    for dtype, optimizer in _by_dtype(_read("optimizer")):
        share = optimizer["share of a training step"]["median"]
        name = f"orthogonal updates, {dtype}"
        rows.append(_at_most(name, "AdamW, share of a step", share, 0.03, _percent))
    rows += [*_method_targets(), *_run_targets()]
    for dtype, decoding in _by_dtype(_read("decoding")):
        speed = decoding["1 prompts at a time"]["speed to the base model's"]
        for name, adapter, limit in (
            ("tokens per second", "badit", 0.95),
            ("merged", "merged", 1.0),
        ):
            what = f"decoding, {name}, {dtype}"
            ratio = speed[adapter]["median"]
            rows.append(_at_least(what, "base model", ratio, limit, _near_times))
    seconds = _read("imports")["seconds"]
    rows += [
        _at_most("`import badit`", "–", median(seconds["import badit"]), 0.3, _seconds),
        _at_most("`badit --help`", "–", median(seconds["badit --help"]), 0.5, _seconds),
    ]
    return rows


def _step_targets(dtype: str, step: dict[str, Any]) -> list[list[str]]:
    peft = "PEFT LoRA, r 32"
    seconds = step["ratio to lora"]["badit"]["median"]
    memory = step["peak ratio to lora"]["badit"]
    rows = [
        _at_most(f"training step, {dtype}", peft, seconds, 1.03, _times),
        _at_most(f"peak memory, {dtype}", peft, memory, 1.05, _times),
    ]
    for peer in ("experts in a loop", "experts per sequence"):
        speed = step["ratio to badit"][peer]["median"]
        rows.append(_at_least(f"speed of a step, {dtype}", peer, speed, 1.5, _times))
    return rows


def _method_targets() -> list[list[str]]:
    regrouping, svd = _read("regrouping"), _read("decomposition")
    share = regrouping["share of training"]
    (layer,) = [
        seconds for name, seconds in regrouping["one layer"].items() if name.startswith("one layer")
    ]
    speed = svd["exact / randomised"]["median"]
    start = median(svd["initialisation seconds"])
    exact = "torch's exact SVD"
    return [
        _at_most("DOG, every 20 steps", "run time", share, 0.005, _percent),
        _at_most("DOG of one layer, N 128, D 20,000", "–", layer, 0.05, _seconds),
        _at_least("speed of the SVD, 4096 × 14336, N 32", exact, speed, 20, _times),
        _at_most("initialisation on SmolLM2, 30 layers", "–", start, 2.0, _seconds),
    ]


def _run_targets() -> list[list[str]]:
    speeds = _read("end_to_end")["tokens per second"]
    training = min(
        _ratio(speeds["badit, BADIT"], speeds[name]) for name in speeds if name.startswith("TRL")
    )
    scoring = _read("evaluation")["speed to the plain loop's"]["median"]
    trl = "TRL SFTTrainer + LoRA, faster attention"
    loop = "generate in file order"
    return [
        _at_least("training, tokens per second", trl, training, 1.5, _times),
        _at_least("scoring, answers per second", loop, scoring, 2.0, _times),
    ]


def _by_dtype(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the results of each dtype. Processors with slow bfloat16 measure float32 only."""
    return [(dtype, result[dtype]) for dtype in ("bfloat16", "float32") if dtype in result]


def steps() -> list[list[str]]:
    """Returns seconds of a step by adapter, also as a multiple of the floor, and peak memory."""
    rows = []
    for dtype, step in _by_dtype(_read("training_step")):
        floor = step["floor seconds"]
        rows.append([dtype, "floor: the base model's products", f"{floor:.2f}", "1.00", ""])
        for name, values in step["seconds"].items():
            if name == _REMOVED:
                continue
            seconds = median(values)
            gib = step["peak bytes"][name] / 2**30
            rows.append([dtype, name, f"{seconds:.2f}", f"{seconds / floor:.2f}", f"{gib:.2f}"])
    return rows


def dog() -> list[list[str]]:
    """Returns milliseconds of one layer's Gram and grouping, for the longest components."""
    layer = _read("regrouping")["one layer"]
    rows = []
    for point, values in layer["gram seconds"].items():
        components, size = (number.split()[1] for number in point.split(", "))
        if size != _COMPONENT_LENGTH:
            continue
        gram = 1000 * median(values)
        grouping = 1000 * median(layer["grouping seconds"][f"N {components}"])
        rows.append([components, size, f"{gram:.2f}", f"{grouping:.1f}"])
    return rows


TABLES: dict[str, tuple[list[str], Callable[[], list[list[str]]]]] = {
    "targets": (["what", "against", "measured", "target", "met"], targets),
    "steps": (["dtype", "adapter", "s", "× floor", "peak GiB"], steps),
    "dog": (["N", "D", "Gram, every step, ms", "grouping, every 20 steps, ms"], dog),
}


def render(page: str) -> str:
    """Returns the page with every table regenerated."""

    def block(match: re.Match[str]) -> str:
        header, rows = TABLES[match[2]]
        lines = [header, ["---"] * len(header), *rows()]
        return match[1] + "".join("| " + " | ".join(line) + " |\n" for line in lines) + match[3]

    return _BLOCK.sub(block, page)


def _read(name: str) -> dict[str, Any]:
    return read_json(RESULTS / f"{name}.json")


if __name__ == "__main__":
    write_text(PAGE, render(PAGE.read_text(encoding="utf-8")))

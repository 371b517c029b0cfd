"""Write the tables of docs/performance.md from the JSON files under benchmarks/results/speed.

python benchmarks/speed/table.py
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from badit.support.files import read_json, write_text

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
PAGE = ROOT / "docs" / "performance.md"
# Kinds of operations in the results: their column headings.
_KINDS = {
    "matrix products": "matrix products",
    "attention": "attention",
    "element by element": "elementwise",
    "copies and casts": "copies and casts",
    "optimizer": "optimizer",
    "the rest": "other",
}
# An option that no longer exists. The committed results still have it.
_REMOVED = "badit folded"
_BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


class Row(NamedTuple):
    """One target: the measurement, its baseline, and whether the target is met."""

    what: str
    against: str
    value: float
    target: float
    at_least: bool
    form: Callable[[float], str]

    def cells(self) -> list[str]:
        met = self.value >= self.target if self.at_least else self.value <= self.target
        sign = "≥" if self.at_least else "≤"
        return [
            self.what,
            self.against,
            self.form(self.value),
            f"{sign} {self.form(self.target)}",
            "yes" if met else "**no**",
        ]


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _near_times(value: float) -> str:
    return f"{value:.3f} ×"


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _median(values: list[float]) -> float:
    return statistics.median(values)


def _ratio(values: list[float], others: list[float]) -> float:
    """Returns the median of the ratios within a round."""
    return _median([a / b for a, b in zip(values, others, strict=True)])


def targets() -> list[Row]:
    step, regrouping, svd = _read("training_step"), _read("regrouping"), _read("decomposition")
    rows = []
    for dtype, one in _by_dtype(step):
        lora, badit = one["ratio to lora"], one["ratio to badit"]
        rows += [
            Row(
                f"training step, {dtype}",
                "PEFT LoRA, r 32",
                lora["badit"]["median"],
                1.03,
                False,
                _times,
            ),
            Row(
                f"peak memory, {dtype}",
                "PEFT LoRA, r 32",
                one["peak ratio to lora"]["badit"],
                1.05,
                False,
                _times,
            ),
        ]
        for peer in ("experts in a loop", "experts per sequence"):
            rows.append(
                Row(f"speed of a step, {dtype}", peer, badit[peer]["median"], 1.5, True, _times)
            )
    for dtype, one in _by_dtype(_read("optimizer")):
        share = one["share of a training step"]["median"]
        rows.append(
            Row(
                f"orthogonal updates, {dtype}",
                "AdamW, share of a step",
                share,
                0.03,
                False,
                _percent,
            )
        )
    layer = regrouping["one layer"]
    one_layer = next(value for key, value in layer.items() if key.startswith("one layer"))
    end, scored, imported = _read("end_to_end"), _read("evaluation"), _read("imports")
    return [
        *rows,
        Row(
            "DOG, every 20 steps",
            "run time",
            regrouping["share of training"],
            0.005,
            False,
            _percent,
        ),
        Row("DOG of one layer, N 128, D 20,000", "–", one_layer, 0.05, False, _seconds),
        Row(
            "speed of the SVD, 4096 × 14336, N 32",
            "torch's exact SVD",
            svd["exact / randomised"]["median"],
            20,
            True,
            _times,
        ),
        Row(
            "initialisation on SmolLM2, 30 layers",
            "–",
            _median(svd["initialisation seconds"]),
            2.0,
            False,
            _seconds,
        ),
        Row(
            "training, tokens per second",
            "TRL SFTTrainer + LoRA, faster attention",
            _over_the_best_of_trl(end["tokens per second"]),
            1.5,
            True,
            _times,
        ),
        Row(
            "scoring, answers per second",
            "generate in file order",
            scored["speed to the plain loop's"]["median"],
            2.0,
            True,
            _times,
        ),
        *_decoding(),
        Row(
            "`import badit`",
            "–",
            _median(imported["seconds"]["import badit"]),
            0.3,
            False,
            _seconds,
        ),
        Row(
            "`badit --help`",
            "–",
            _median(imported["seconds"]["badit --help"]),
            0.5,
            False,
            _seconds,
        ),
    ]


def _decoding() -> list[Row]:
    rows = []
    for dtype, one in _by_dtype(_read("decoding")):
        speed = one["1 prompts at a time"]["speed to the base model's"]
        rows += [
            Row(
                f"decoding, {what}, {dtype}",
                "base model",
                speed[name]["median"],
                target,
                True,
                _near_times,
            )
            for what, name, target in (
                ("tokens per second", "badit", 0.95),
                ("merged", "merged", 1.0),
            )
        ]
    return rows


def _by_dtype(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns the results of each dtype. Processors with slow bfloat16 measure float32 only."""
    return [(dtype, result[dtype]) for dtype in ("bfloat16", "float32") if dtype in result]


def _over_the_best_of_trl(speeds: dict[str, list[float]]) -> float:
    ours = speeds["badit, BADIT"]
    theirs = [values for name, values in speeds.items() if name.startswith("TRL")]
    return min(_ratio(ours, values) for values in theirs)


def steps() -> list[list[str]]:
    """Returns seconds of a step by adapter, also as a multiple of the floor, and peak memory."""
    rows = []
    for dtype, one in _by_dtype(_read("training_step")):
        floor = one["floor seconds"]
        rows.append([dtype, "floor: the base model's products", f"{floor:.2f}", "1.00", ""])
        for name, values in one["seconds"].items():
            if name == _REMOVED:
                continue
            gib = one["peak bytes"][name] / 2**30
            rows.append(
                [
                    dtype,
                    name,
                    f"{_median(values):.2f}",
                    f"{_median(values) / floor:.2f}",
                    f"{gib:.2f}",
                ]
            )
    return rows


def growth() -> list[list[str]]:
    """Returns seconds and memory of a step by the varied quantity, for BADIT and its baseline."""
    scaling = _read("scaling")
    rows = []
    for quantity in ("experts", "tokens", "rows", "tasks"):
        seconds, peaks = scaling[quantity]["seconds"], scaling[quantity].get("peak bytes", {})
        baseline = "mtl-lora" if quantity == "tasks" else "lora"
        for value in (
            point.removeprefix("badit, ") for point in seconds if point.startswith("badit, ")
        ):
            pair = (f"badit, {value}", f"{baseline}, {value}")
            ours, theirs = (seconds[point] for point in pair)
            times = [
                f"{_median(ours):.2f}",
                f"{_median(theirs):.2f}",
                baseline,
                f"{_ratio(ours, theirs):.2f}",
            ]
            gib = [f"{peaks[point] / 2**30:.2f}" if point in peaks else "" for point in pair]
            rows.append([quantity, value, *times, *gib])
    return rows


def profiles() -> list[list[str]]:
    """Returns milliseconds of a step, and of a decoded token, by kind of operation."""
    rows = []
    for dtype, one in _by_dtype(_read("step_profile")):
        for what, key, count in (
            ("step", "seconds of a step", 1),
            ("token", "seconds of 64 tokens", 64),
        ):
            for name, kinds in one[key].items():
                if name == _REMOVED:
                    continue
                values = [1000 * kinds[kind] / count for kind in _KINDS]
                digits = 0 if count == 1 else 2
                rows.append(
                    [f"{what}, {dtype}", name, *(f"{value:.{digits}f}" for value in values)]
                )
    return rows


def dog() -> list[list[str]]:
    """Returns milliseconds of one layer's Gram and grouping."""
    layer = _read("regrouping")["one layer"]
    rows = []
    for point, values in layer["gram seconds"].items():
        components, size = (part.split()[1] for part in point.split(", "))
        grouping = _median(layer["grouping seconds"][f"N {components}"])
        rows.append([components, size, f"{1000 * _median(values):.2f}", f"{1000 * grouping:.1f}"])
    return rows


def exponents() -> list[list[str]]:
    """Returns exponents of power laws fitted to the points of the table above."""
    return [
        [what, f"{value:.2f}"]
        for what, value in _read("regrouping")["one layer"]["exponents"].items()
    ]


TABLES: dict[str, tuple[list[str], Callable[[], list[list[str]]]]] = {
    "targets": (
        ["what", "against", "measured", "target", "met"],
        lambda: [row.cells() for row in targets()],
    ),
    "steps": (["dtype", "adapter", "s", "× floor", "peak GiB"], steps),
    "growth": (
        [
            "varied",
            "value",
            "BADIT, s",
            "baseline, s",
            "baseline",
            "ratio",
            "BADIT, GiB",
            "baseline, GiB",
        ],
        growth,
    ),
    "profile": (["ms per", "adapter", *_KINDS.values()], profiles),
    "dog": (["N", "D", "Gram, every step, ms", "grouping, every 20 steps, ms"], dog),
    "exponents": (["time grows as", "exponent"], exponents),
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

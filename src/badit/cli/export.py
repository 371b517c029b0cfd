"""``badit export RUN -o FOLDER``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from badit.cli.quiet import quiet_loading


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's folder")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--task", help="fix the gates to this task's mean (default: the mean over the run's tasks)")
    choice.add_argument("--gates", metavar="FILE", help="fix the gates to a file's, such as an export's gates.json")
    parser.add_argument("--rank", type=int, help="compress to this rank (default: what it takes without an error)")
    parser.add_argument("--merged", action="store_true", help="write a whole model instead of an adapter")
    parser.add_argument("--score", action="store_true", help="score the export beside the run, into its scores.json")
    parser.add_argument("-o", "--output", required=True, help="the folder to write")
    parser.epilog = "What is written needs no badit: docs/serving.md has the commands for PEFT, vLLM and llama.cpp."


def execute(options: argparse.Namespace) -> None:
    from badit.models import resolve_model
    from badit.runs import RunFolder
    from badit.serving.export import export

    quiet_loading()
    exported = export(
        options.run,
        options.output,
        task=options.task,
        gates=options.gates,
        rank=options.rank,
        merged=options.merged,
    )
    base = resolve_model(RunFolder.existing(options.run).recipe().model.name)
    print("\n".join(f"{name:10} {value}" for name, value in _described(exported, base).items()))
    if options.score:
        from badit.serving.score import score_export

        print("\n" + cost_table(score_export(options.run, exported)))
        print(f"\nScores: {Path(options.output) / 'scores.json'}")


def _described(exported: Any, base: str) -> dict[str, str]:
    folder = shlex.quote(str(exported.folder))
    mixture = exported.mixture or "none to choose: the run does the same for every prompt"
    if exported.merged:
        serve = f"vllm serve {folder}"
        return {"mixture": mixture, "model": folder, "vLLM": serve, "llama.cpp": f"convert_hf_to_gguf.py {folder}"}
    name = shlex.quote(exported.folder.resolve().name)
    return {
        "mixture": mixture,
        "rank": _rank(exported),
        "adapter": folder,
        "vLLM": f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {exported.max_lora_rank} "
        f"--lora-modules {name}={folder}",
        "llama.cpp": f"convert_lora_to_gguf.py {folder} --base {shlex.quote(base)}",
    }


def _rank(exported: Any) -> str:
    if not exported.errors:
        return f"{exported.rank}, equal to the fixed mixture"
    worst = max(exported.errors, key=exported.errors.__getitem__)
    return (
        f"{exported.rank} of {exported.exact_rank}: relative error {exported.total_error:.2g} in all (Frobenius), "
        f"at most {exported.errors[worst]:.2g} ({worst})"
    )


def cost_table(scores: Mapping[str, Any]) -> str:
    """Rouge-L by task, routed and frozen."""
    entries = {**scores["tasks"], **({"mean over tasks": scores["mean"]} if len(scores["tasks"]) > 1 else {})}
    rows = [
        [name, f"{e['routed']:.1f}", f"{e['frozen']:.1f}", f"{e['difference']:+.1f}"] for name, e in entries.items()
    ]
    from badit.render import text_table

    return text_table(["task", "Rouge-L routed", "frozen", "difference"], rows, right={1, 2, 3})

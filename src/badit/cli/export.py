"""``badit export``."""

import shlex
from pathlib import Path
from typing import Any

from badit.api import Run
from badit.cli.derived import derive
from badit.support.files import read_json


def _shown(run: Run, exported: Any, options: dict[str, Any]) -> str:
    """Returns the export's facts, commands that serve and ask it, and its scores, if measured."""
    from badit.export.exporting import SCORES
    from badit.export.requests import example_request, served_name
    from badit.export.scoring import cost_table
    from badit.runs.resolved import open_run

    no_gates = "none: the run has no gates that depend on the prompt"
    facts = {"mixture": exported.record["mixture"] or no_gates}
    # Whole paths, so that the commands work in any folder.
    folder = shlex.quote(str(exported.folder.resolve()))
    # A merged model has no rank.
    if exported.rank is None:
        facts["model"] = folder
        name = shlex.quote(served_name(exported))
        facts["vLLM"] = f"vllm serve {folder} --served-model-name {name}"
        facts["llama.cpp"] = f"convert_hf_to_gguf.py {folder}"
    else:
        facts |= _facts_of_adapter(run, exported)
    facts["request"] = example_request(open_run(run), exported)
    text = "\n".join(f"{name:10} {value}" for name, value in facts.items())
    path = exported.folder / SCORES
    if not path.is_file():
        return text
    return f"{text}\n\n{cost_table(read_json(path))}\n\nScores: {path}"


def _facts_of_adapter(run: Run, exported: Any) -> dict[str, str]:
    from badit.export.requests import served_name
    from badit.hub.card import hub_id
    from badit.models import resolve_model

    recipe = run.recipe
    base = resolve_model(recipe.model.name)
    if Path(base).is_dir():
        base = str(Path(base).resolve())
    vllm = ["vllm", "serve", base]
    if recipe.model.revision:
        vllm += ["--revision", recipe.model.revision]
    vllm += ["--enable-lora", "--max-lora-rank", str(exported.max_lora_rank), "--lora-modules"]
    for lora in exported.tasks.values() or [exported]:
        vllm.append(f"{served_name(lora)}={lora.folder.resolve()}")
    folder = shlex.quote(str(exported.folder.resolve()))
    adapter = f"{folder}/TASK" if exported.tasks else folder
    convert = f"convert_lora_to_gguf.py {adapter}"
    # The converter looks the base model up on the hub, unless --base is given.
    if not hub_id(recipe):
        convert += f" --base {shlex.quote(base)}"
    return {
        "rank": _rank(exported),
        "adapter": adapter,
        "vLLM": shlex.join(vllm),
        "llama.cpp": convert,
    }


def _rank(exported: Any) -> str:
    error = exported.record.get("relative_error")
    if error is None:
        return f"{exported.rank}, exact"
    module, worst = max(error["modules"].items(), key=lambda item: item[1])
    rank = f"{exported.rank} of {exported.record['exact_rank']}"
    overall = f"relative error {error['total']:.2g} overall (Frobenius norm)"
    return f"{rank}: {overall}, at most {worst:.2g} per module ({module})"


derive(Run.export, _shown, "badit.export.exporting")

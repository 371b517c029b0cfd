"""``badit export``: a run as a plain LoRA adapter or a merged model, and what its fixed mixture costs in Rouge-L."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel

from badit.analysis.gates import adapted_layers
from badit.data import Task
from badit.errors import BaditError, nearest
from badit.evaluate import load_run
from badit.files import write_text
from badit.method import compress
from badit.recipe import Recipe
from badit.runs import RunFolder
from badit.serving.factors import Factors, lora_factors, mixture_factors
from badit.serving.files import merge, new_folder, refuse_foreign, write_adapter, write_gates, write_merged
from badit.serving.mixture import Mixture, mean_mixture, read_mixture
from badit.training.card import CARD, Base, model_card
from badit.training.method import AdapterMethod
from badit.training.methods import build_method
from badit.training.plan import base_model, make_plan
from badit.tuner import hooks_of

#: The ranks that vLLM makes room for (``--max-lora-rank``); an adapter takes the next one up.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclasses.dataclass(frozen=True)
class Export:
    """What has been written.

    Attributes:
        folder: where.
        mixture: the gates that took the router's place, in words; None where the run has no gates that vary.
        task: the task whose mixture it is.
        rank: of the adapter; None for a merged model.
        exact_rank: what it takes without an error.
        errors: by module, ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius) of the adapter's part ΔW; empty where nothing is lost.
        total_error: the same over all modules together.
    """

    folder: Path
    mixture: str | None
    task: str | None
    rank: int | None
    exact_rank: int | None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    total_error: float = 0.0

    @property
    def merged(self) -> bool:
        return self.rank is None

    @property
    def max_lora_rank(self) -> int | None:
        """What vLLM's ``--max-lora-rank`` must be."""
        return None if self.rank is None else next(known for known in VLLM_RANKS if known >= self.rank)


def export(
    run: str | Path,
    output: str | Path,
    *,
    task: str | None = None,
    gates: str | Path | None = None,
    rank: int | None = None,
    merged: bool = False,
    progress: bool = True,
) -> Export:
    """Writes a run's adapter as a plain LoRA, or its model with the adapter merged, for use without badit.

    Gates that follow the prompt become fixed: ``task``'s mean gates, those of the file ``gates``, or the mean over the
    run's tasks. The LoRA then equals the mixture exactly, at the rank that this takes, unless ``rank`` is smaller or it
    takes more than 512, the most that vLLM serves.

    Args:
        run: a run's folder.
        output: the folder to write, which must be new, empty or an earlier export.
        task: one of the run's tasks.
        gates: a JSON file with a list of gates for every adapted module.
        rank: compress to this rank (SVD), at most 512.
        merged: write a whole model instead of an adapter.
        progress: show a bar on stderr while gates are measured.

    Raises:
        BaditError: no such run, one that has diverged, options that do not go with its method, or a folder that holds
            something else.
    """
    folder = RunFolder.existing(run)
    recipe = folder.recipe()
    method = build_method(recipe.method)
    output = Path(output)
    refuse_foreign(output)
    if task is not None and gates is not None:
        raise BaditError("give either a task or a file of gates, not both")
    if rank is not None and merged:
        raise BaditError("--rank: a merged weight has no rank; leave it out, or leave --merged out")
    if rank is not None and not 1 <= rank <= VLLM_RANKS[-1]:
        raise BaditError(f"--rank: must be between 1 and {VLLM_RANKS[-1]}, not {rank}")
    if not method.trains:
        raise BaditError(f"{folder.path}: is a run of the base model as it is: there is nothing to export")
    if not isinstance(method, AdapterMethod) and not merged:
        raise BaditError(f"{folder.path}: {method.name} trains the base weights, which is no LoRA; export it --merged")
    varies = _has_mixture(method)
    if not varies:
        _refuse_choice(method.name, task, gates)
    tasks = _chosen(recipe, task) if varies else []
    loaded, tokenizer = load_run(folder, recipe)
    model: Any = loaded  # a PeftModel, but of methods that train the base weights
    factors, mixture = None, None
    if isinstance(method, AdapterMethod) and isinstance(method.config, LoraConfig):
        if not merged:
            factors = lora_factors(model, lambda: method.apply(base_model(recipe)[0]))
    elif isinstance(method, AdapterMethod):
        mixture = _mixture(model, tokenizer, recipe, tasks, task, gates, progress) if varies else None
        factors = mixture_factors(model, mixture, task)
    for name, pair in (factors or {}).items():
        if not all(factor.isfinite().all() for factor in pair):
            raise BaditError(f"{folder.path}: {name} holds NaN or infinite values: its training has diverged")
    done = Export(output, None if mixture is None else mixture.source, task, None, None)
    if not merged:
        assert factors is not None
        factors, done = _of_rank(factors, rank, done)
    record = {"run": str(folder.path), "method": method.name, "base_model": recipe.model.name, **_summary(done)}
    with new_folder(output, record) as partial:
        if merged:
            write_merged(partial, _merged(model, factors), tokenizer)
        else:
            assert factors is not None
            write_adapter(partial, factors, model.unload(), recipe.model)
        if mixture is not None:
            write_gates(partial, mixture.gates)
        write_text(partial / CARD, model_card(folder, recipe, Base.of(recipe), export=record))
    return done


def _has_mixture(method: Any) -> bool:
    """Whether its gates vary, so that an export must choose some."""
    config = getattr(method, "config", None)
    return config is not None and not isinstance(config, LoraConfig) and not config.has_fixed_gates


def _refuse_choice(method: str, task: str | None, gates: Any) -> None:
    for option, value in (("--task", task), ("--gates", gates)):
        if value is not None:
            raise BaditError(f"{option}: {method} does the same for every prompt, so there is none to choose")


def _chosen(recipe: Recipe, task: str | None) -> list[Task]:
    tasks = make_plan(recipe).tasks
    if task is None:
        return tasks
    names = [known.name for known in tasks]
    if task not in names:
        raise BaditError(f"--task: the run has no task {task}{nearest(task, names)}; known: {', '.join(names)}")
    return [known for known in tasks if known.name == task]


def _mixture(
    model: PeftModel,
    tokenizer: Any,
    recipe: Recipe,
    chosen: Sequence[Task],
    task: str | None,
    gates: Any,
    progress: bool,
) -> Mixture:
    if task is None and hooks_of(model).needs_tasks:
        raise BaditError("the method learns a matrix apart for every task: choose one with --task")
    if gates is not None:
        return read_mixture(Path(gates), adapted_layers(model))
    return mean_mixture(model, tokenizer, recipe, chosen, named=task is not None, progress=progress)


def _of_rank(factors: Factors, rank: int | None, done: Export) -> tuple[Factors, Export]:
    """The factors at the rank asked for, or at the largest that can be served, and what that loses."""
    exact_rank = len(next(iter(factors.values()))[0])
    rank = min(rank or exact_rank, exact_rank, VLLM_RANKS[-1])
    done = dataclasses.replace(done, rank=rank, exact_rank=exact_rank)
    if rank == exact_rank:
        return factors, done
    smaller, errors, total = _compressed(factors, rank)
    return smaller, dataclasses.replace(done, errors=errors, total_error=total)


def _merged(model: Any, factors: Factors | None) -> Any:
    if factors is not None:
        model = model.unload()
        merge(model, factors)
        return model
    try:
        return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model
    except ValueError as error:  # NaN in a merged weight
        raise BaditError(f"the adapter cannot be merged ({error})") from None


def _summary(done: Export) -> dict[str, Any]:
    summary: dict[str, Any] = {"mixture": done.mixture, "task": done.task}
    if not done.merged:
        summary |= {"rank": done.rank, "exact_rank": done.exact_rank}
    if done.errors:
        summary["relative_error"] = {"total": done.total_error, "modules": dict(done.errors)}
    return summary


def _compressed(factors: Factors, rank: int) -> tuple[Factors, dict[str, float], float]:
    smaller = {name: compress(*pair, rank) for name, pair in factors.items()}
    errors = {name: found.lost / found.norm if found.norm else 0.0 for name, found in smaller.items()}
    lost, norm = (math.hypot(*values) for values in zip(*((f.lost, f.norm) for f in smaller.values()), strict=True))
    return {name: (found.a_PI, found.b_OP) for name, found in smaller.items()}, errors, lost / norm if norm else 0.0

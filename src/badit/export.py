"""``badit export``: a run as a plain LoRA adapter or a merged model, and what its fixed mixture costs in Rouge-L.

An export's folder has what PEFT or transformers loads without badit, the model card ``README.md``, ``export.json`` (the
run, the choices, the error and the files), ``gates.json`` (the fixed mixture, by adapted module a list with a gate for
each expert, as they multiply) and ``scores.json`` (what freezing costs, once it has been measured).

Shape suffixes: O/I = out/in features, P = rank, N = components, K = experts.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.analysis.gates import adapted_layers, mean_component_gates
from badit.card import CARD, Base, model_card
from badit.data import AnswerCollator, Task, batches_by_task
from badit.errors import BaditError, explained, nearest
from badit.evaluate import evaluate, load_run, score_model
from badit.files import read_json, refuse_links, remove, replace_folder, write_json, write_text
from badit.method import compress
from badit.methods import build_method
from badit.models import device, load_base_model
from badit.recipe import Recipe
from badit.results import read_scores
from badit.run import RECORD, Run
from badit.train import base_model, encoded, make_plan, model_dtype, pad_id
from badit.tuner import hooks_of
from badit.tuner.config import is_number

#: The ranks of vLLM's ``--max-lora-rank``; an adapter takes the next one up.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: By the module's name in the base model, A (P, I) and B (O, P) with W + B A the adapted weight: float32, on the CPU.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
#: By the module's name, a gate for each of its K experts, as they multiply.
Gates = Mapping[str, Sequence[float]]

SCORES = "scores.json"
GATES = "gates.json"
# Gates of prompts of one task are close together: this many training prompts settle the mean.
_PROMPTS_PER_TASK = 32
_BATCH_SIZE = 8
# These start from a part of the base weight, W − s·B0 A0, which PEFT subtracts again whenever one is loaded.
_CHANGES_BASE = ("pissa", "olora")
_MORE_THAN_LORA = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


@dataclasses.dataclass(frozen=True)
class Export:
    """What has been written.

    Attributes:
        folder: where.
        mixture: the gates that replaced the router, in words; None if the run has no gates that vary.
        task: the task whose mixture it is.
        rank: of the adapter; None for a merged model.
        exact_rank: the rank without an error; None for a merged model.
        errors: by module, ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius) of the adapter's part ΔW; empty if nothing is lost.
        total_error: the same over all modules together.
    """

    folder: Path
    mixture: str | None
    task: str | None
    rank: int | None = None
    exact_rank: int | None = None
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
    """Writes a run's adapter as a plain LoRA, or a merged model, as :meth:`badit.Run.export` describes it.

    ``output`` must be new, empty or an earlier export. The LoRA equals the fixed mixture exactly, unless ``rank`` is
    smaller than that takes (SVD), or it takes more than 512, the most that vLLM serves.
    """
    folder = Run(run)
    recipe = folder.trusted_recipe()
    method = build_method(recipe.method)
    config: Any = getattr(method, "config", None)  # PEFT's, of a method that trains an adapter
    is_lora = isinstance(config, LoraConfig)
    mixes = config is not None and not is_lora and not config.has_fixed_gates
    output = Path(output)
    _refuse_other_files(output)
    same = f"{method.name} does the same for every prompt, so there is none to choose"
    servable = rank is None or 1 <= rank <= VLLM_RANKS[-1]
    untold = task is None and mixes and method.needs_tasks
    problems = {
        "give either a task or a file of gates, not both": task is not None and gates is not None,
        "--rank: a merged weight has no rank; leave it out, or leave --merged out": rank is not None and merged,
        f"--rank: must be between 1 and {VLLM_RANKS[-1]}, not {rank}": not servable,
        f"{folder.path}: is a run of the base model as it is: there is nothing to export": not method.trains,
        f"{folder.path}: {method.name} trains the base weights; export it --merged": config is None and not merged,
        f"--task: {same}": task is not None and not mixes,
        f"--gates: {same}": gates is not None and not mixes,
        f"{method.name} learns each task separately: choose one with --task": untold,
    }
    for problem, found in problems.items():
        if found:
            raise BaditError(problem)
    tasks = {known.name: known for known in make_plan(recipe).tasks} if mixes else {}
    if task is not None and task not in tasks:
        raise BaditError(f"--task: the run has no task {task}{nearest(task, tasks)}; known: {', '.join(tasks)}")

    loaded, tokenizer = load_run(folder, recipe)
    model: Any = loaded  # a PeftModel, except for methods that train the base weights
    mixture: str | None = None
    fixed: Gates | None = None
    if gates is not None:
        mixture, fixed = f"gates of {Path(gates).name}", _read_gates(Path(gates), model)
    elif mixes:
        chosen = list(tasks.values()) if task is None else [tasks[task]]
        mixture, fixed = _mean_gates(model, tokenizer, recipe, chosen, task, progress)

    factors: Factors = {}  # none if PEFT itself merges, or if the base weights were trained
    if config is not None and not is_lora:
        factors = mixture_factors(model, fixed, task)
    elif not merged:
        changed = getattr(config, "init_lora_weights", None) in _CHANGES_BASE
        factors = _lora_factors(model, method.apply(base_model(recipe)[0]) if changed else None)
    for name, pair in factors.items():
        if not all(factor.isfinite().all() for factor in pair):
            raise BaditError(f"{folder.path}: {name} holds NaN or infinite values: its training has diverged")

    done = Export(output, mixture, task)
    # Relative to the export, so that it names no folder of its owner's, and both can be moved together.
    path = os.path.relpath(folder.path.resolve(), output.resolve())
    record: dict[str, Any] = {"run": path, "method": method.name, "mixture": mixture, "task": task}
    if not merged:
        exact_rank = len(next(iter(factors.values()))[0])
        rank = min(rank or exact_rank, exact_rank, VLLM_RANKS[-1])
        record |= {"rank": rank, "exact_rank": exact_rank}
        errors, total = {}, 0.0
        if rank < exact_rank:
            closest = {name: compress(*pair, rank) for name, pair in factors.items()}
            factors = {name: (each.a_PI, each.b_OP) for name, each in closest.items()}
            errors = {name: each.lost / each.norm if each.norm else 0.0 for name, each in closest.items()}
            norm = math.hypot(*(each.norm for each in closest.values()))
            total = math.hypot(*(each.lost for each in closest.values())) / norm if norm else 0.0
            record["relative_error"] = {"total": total, "modules": errors}
        done = Export(output, mixture, task, rank, exact_rank, errors, total)
    partial = output.with_name(output.name + ".partial")
    try:
        with explained(output, action="written"):
            remove(partial)
            partial.mkdir(parents=True)
            if not merged:
                write_adapter(partial, factors, model.unload(), recipe.model.name, recipe.model.revision)
            else:
                if factors:
                    merge(model := model.unload(), factors)
                elif isinstance(model, PeftModel):
                    with explained("the adapter", action="merged", any_error=True):  # NaN in a merged weight
                        model = model.merge_and_unload(safe_merge=True)
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)
            if fixed is not None:
                write_json(partial / GATES, fixed)
            write_text(partial / CARD, model_card(folder, recipe, Base.of(recipe), export=record))
            write_json(partial / RECORD, {**record, "files": sorted(path.name for path in partial.iterdir())})
            replace_folder(partial, output)
    finally:
        remove(partial)
    return done


def score_export(run: str | Path, exported: Export, *, progress: bool = True) -> dict[str, Any]:
    """Scores an export as other tools load it, and writes and returns its ``scores.json``.

    It has Rouge-L ``routed`` (the run's), ``frozen`` and their ``difference`` for each of ``tasks``, and the ``mean``
    of the three. A mixture of one task is scored on that task only.
    """
    folder = Run(run)
    recipe = folder.trusted_recipe()
    split = recipe.evaluation.split
    routed = read_scores(folder.scores_path) if folder.scores_path.is_file() else evaluate(run, progress=progress)
    tasks = [task for task in make_plan(recipe).tasks if exported.task in (None, task.name)]
    if exported.merged:
        model, tokenizer = load_base_model(exported.folder, dtype=model_dtype(recipe), device=device())
    else:
        base, tokenizer = base_model(recipe)
        with explained(exported.folder, action="loaded", any_error=True):
            model = PeftModel.from_pretrained(base, str(exported.folder)).eval()
    frozen, _ = score_model(model, tokenizer, recipe, tasks, split, progress=progress)
    by_task = {}
    for name, scores in frozen["tasks"].items():
        before, after = routed["tasks"][name]["rouge_l"], scores["rouge_l"]
        by_task[name] = {"routed": before, "frozen": after, "difference": after - before}
    mean = {key: fmean(entry[key] for entry in by_task.values()) for key in ("routed", "frozen", "difference")}
    result = {"metric": "rouge_l", "split": split, "mixture": exported.mixture, "tasks": by_task, "mean": mean}
    write_json(exported.folder / SCORES, result)
    return result


def _refuse_other_files(folder: Path) -> None:
    """Raises BaditError unless the folder does not exist, is empty, or is an earlier export with nothing added."""
    if folder.exists() and not folder.is_dir():
        raise BaditError(f"{folder}: is a file; choose another folder with -o")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BaditError(f"{folder}: has the current folder in it, and is replaced as a whole; choose another with -o")
    own: list[Any] = []
    if (folder / RECORD).is_file():
        refuse_links(folder)
        files = read_json(folder / RECORD).get("files")
        own = [RECORD, SCORES, *files] if isinstance(files, list) else []
    if others := [path.name for path in folder.glob("*") if path.name not in own]:
        raise BaditError(f"{folder}: holds {min(others)}, which is of no export; choose another folder with -o")


def _mean_gates(
    model: PeftModel, tokenizer: Any, recipe: Recipe, tasks: Sequence[Task], task: str | None, progress: bool
) -> tuple[str, Gates]:
    """The mean over the first training prompts of ``tasks``, with equal weight per task; and a description of it."""
    prompts = [(each, each.train[:_PROMPTS_PER_TASK]) for each in tasks if each.train]
    if not prompts:
        raise BaditError(f"task {task}: has no training prompts to take mean gates from; give --gates FILE")
    examples = encoded(tokenizer, recipe, [(each, instance) for each, some in prompts for instance in some])
    batches = batches_by_task(examples, AnswerCollator(pad_id(tokenizer), with_tasks=True), _BATCH_SIZE)
    by_task = mean_component_gates(model, batches, progress=progress)
    gates = {
        one.layer.name: torch.stack(of_tasks).mean(dim=0)[one.first_components_K].tolist()
        for one, *of_tasks in zip(adapted_layers(model), *by_task.values(), strict=True)
    }
    of_what = f"of {len(prompts)} tasks, and over these," if task is None else f"of task {task}"
    return f"mean gates {of_what} on {len(examples)} training prompts", gates


def _read_gates(path: Path, model: PeftModel) -> Gates:
    """A file's gates: one for every expert of every adapted module and nothing else."""
    if (path.parent / RECORD).is_file():
        refuse_links(path.parent)  # an export, which may come from elsewhere
    content = read_json(path)
    experts = {one.layer.name: len(one.first_components_K) for one in adapted_layers(model)}
    for name in (*content, *experts):
        gates, number = content.get(name), experts.get(name)
        if number is None:
            raise BaditError(f"{path}: {name}: the run adapts no such module{nearest(name, experts)}")
        if not isinstance(gates, list) or len(gates) != number or not all(map(is_number, gates)):
            raise BaditError(f"{path}: {name}: must be a list of {number} numbers, one gate for each expert")
    return content


def mixture_factors(model: PeftModel, gates: Gates | None, task: str | None = None) -> Factors:
    """The factors of the active adapter's experts with fixed ``gates`` (None: the method's own), for ``task``."""
    factors = {}
    with hooks_of(model).rows_of(None if task is None else [task]):
        for one in adapted_layers(model):
            gates_N = None
            if gates is not None:  # every component has its expert's gate
                gates_N = torch.tensor(gates[one.layer.name], dtype=torch.float32)[one.expert_of_N.cpu()]
            a_PI, b_OP = one.layer.frozen_factors(one.adapter, gates_N)
            factors[one.layer.name] = (a_PI.cpu(), b_OP.cpu())
    return factors


def _lora_factors(model: PeftModel, initial: PeftModel | None) -> Factors:
    """The factors of an adapter of PEFT's LoRA family; ``initial`` is that of PiSSA or OLoRA before training."""
    config: Any = model.peft_config["default"]
    extra = [name for name in _MORE_THAN_LORA if getattr(config, name)] + ["bias"] * (config.bias != "none")
    if extra:
        raise BaditError(f"method.{extra[0]}: makes the adapter more than a plain LoRA; export the model: --merged")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva", *_CHANGES_BASE):
        raise BaditError(
            f"method.init_lora_weights: {config.init_lora_weights} has changed the base weight in a way that cannot be "
            "separated from the adapter; export the model: --merged"
        )
    factors = _scaled_lora(model)
    if initial is not None:
        before = _scaled_lora(initial)
        factors = {
            name: (torch.cat([a_PI, before[name][0]]), torch.cat([b_OP, -before[name][1]], dim=1))
            for name, (a_PI, b_OP) in factors.items()
        }
    # Zeros pad smaller ranks: servers read one rank and one alpha for all modules.
    rank = max(len(a_PI) for a_PI, _ in factors.values())
    return {
        name: (F.pad(a_PI, (0, 0, 0, rank - len(a_PI))), F.pad(b_OP, (0, rank - len(a_PI))))
        for name, (a_PI, b_OP) in factors.items()
    }


def _scaled_lora(model: PeftModel) -> Factors:
    """The A's and B's of PEFT's LoRA layers, with the scaling in B."""
    factors = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            if "default" not in layer.lora_A:
                raise BaditError(f"{name} is an embedding, which takes no plain LoRA; export the model: --merged")
            parts: Any = layer.lora_A["default"], layer.lora_B["default"]
            a_PI, b_OP = (part.weight.detach().to("cpu", torch.float32) for part in parts)
            factors[name] = (a_PI, b_OP * layer.scaling["default"])
    return factors


def write_adapter(folder: Path, factors: Factors, base: nn.Module, name: str, revision: str | None = None) -> None:
    """A plain LoRA as every PEFT since 0.5 loads it: one rank, alpha = rank, nothing but A's and B's.

    The configuration has only the fields of a plain LoRA: servers refuse some later ones, and older versions warn.
    ``name`` and ``revision`` are those of the base model, and ``factors`` all have one rank.
    """
    rank = len(next(iter(factors.values()))[0])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "revision": revision}
    config |= {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0}  # a scaling of 1: B has it
    config |= {"target_modules": target_modules(base, factors), "bias": "none", "modules_to_save": None}
    config |= {"fan_in_fan_out": any(isinstance(base.get_submodule(module), Conv1D) for module in factors)}
    config |= {"use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    tensors = {}
    for module, (a_PI, b_OP) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a_PI.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b_OP.contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)


def target_modules(base: nn.Module, factors: Factors) -> list[str]:
    """The modules' last names, if these mean the same modules; else their whole names."""
    last_names = {name.rpartition(".")[2] for name in factors}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if meant == factors.keys() else factors)


@torch.no_grad()
def merge(base: nn.Module, factors: Factors) -> None:
    """Adds B A to every weight, in float32, rounded once to the weight's own type."""
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for name, (a_PI, b_OP) in factors.items():
        layer: Any = base.get_submodule(name)
        if owners[id(layer.weight)] > 1:
            raise BaditError(f"{name}: shares its weight with another module, so nothing can be merged into it alone")
        delta_OI = (b_OP @ a_PI).to(layer.weight.device)
        layer.weight.copy_(layer.weight.float() + (delta_OI.T if isinstance(layer, Conv1D) else delta_OI))

"""``badit export``: a run as a plain LoRA adapter or a merged model, and what its fixed mixture costs in Rouge-L.

What is written is used without badit:

    adapter_config.json         PEFT's configuration of a plain LoRA; a merged model has its config.json instead
    adapter_model.safetensors   the factors; a merged model has its weights and tokenizer instead
    README.md                   the model card
    gates.json                  the fixed mixture, where there is one
    export.json                 the run, the choices, the error and the files; marks the folder as an export
    scores.json                 what freezing costs, once it has been measured

Gates that follow the prompt are replaced by fixed ones: the mean over a task's prompts, the mean over tasks, or those
of a JSON file, by adapted module a list with a gate for each expert, as they multiply:
``{"model.layers.0.mlp.gate_proj": [1.02, 0.97, …], …}``. An export leaves its own as ``gates.json``.

Shape suffixes: O/I = out/in features, P = rank, N = components, K = experts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from badit.files import read_json, remove, replace_folder, write_json, write_text
from badit.method import compress
from badit.methods import build_method
from badit.models import load_base_model
from badit.recipe import Recipe
from badit.results import read_scores
from badit.run import Run
from badit.train import base_model, device, encoded, make_plan, model_dtype, pad_id
from badit.tuner import hooks_of
from badit.tuner.config import is_number

#: The ranks that vLLM makes room for (``--max-lora-rank``); an adapter takes the next one up.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: By the module's name in the base model, A (P, I) and B (O, P) with W + B A the adapted weight: float32, on the CPU.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
#: By the module's name, a gate for each of its K experts, as they multiply.
Gates = Mapping[str, Sequence[float]]

RECORD = "export.json"
SCORES = "scores.json"
GATES = "gates.json"
# Gates of prompts of one task are close together: this many training prompts settle the mean.
_PROMPTS_PER_TASK = 32
_BATCH_SIZE = 8
# These start from a part of the base weight, W − s·B0 A0, which PEFT subtracts again whenever one is loaded.
_CHANGES_BASE = ("pissa", "olora")


@dataclasses.dataclass(frozen=True)
class Export:
    """What has been written.

    Attributes:
        folder: where.
        mixture: the gates that took the router's place, in words; None where the run has no gates that vary.
        task: the task whose mixture it is.
        rank: of the adapter; None for a merged model.
        exact_rank: what it takes without an error; None for a merged model.
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
    folder = Run.existing(run)
    recipe = folder.trusted_recipe()
    method = build_method(recipe.method)
    config: Any = getattr(method, "config", None)  # PEFT's, of a method that trains an adapter
    is_lora = isinstance(config, LoraConfig)
    mixes = config is not None and not is_lora and not config.has_fixed_gates
    output = Path(output)
    _refuse_other_files(output)
    if task is not None and gates is not None:
        raise BaditError("give either a task or a file of gates, not both")
    if rank is not None and merged:
        raise BaditError("--rank: a merged weight has no rank; leave it out, or leave --merged out")
    if rank is not None and not 1 <= rank <= VLLM_RANKS[-1]:
        raise BaditError(f"--rank: must be between 1 and {VLLM_RANKS[-1]}, not {rank}")
    if not method.trains:
        raise BaditError(f"{folder.path}: is a run of the base model as it is: there is nothing to export")
    if config is None and not merged:
        raise BaditError(f"{folder.path}: {method.name} trains the base weights, which is no LoRA; export it --merged")
    for option, value in (("--task", task), ("--gates", gates)):
        if value is not None and not mixes:
            raise BaditError(f"{option}: {method.name} does the same for every prompt, so there is none to choose")
    if task is None and mixes and method.needs_tasks:
        raise BaditError(f"{method.name} learns something of its own for each task: choose one with --task")
    tasks = {known.name: known for known in make_plan(recipe).tasks} if mixes else {}
    if task is not None and task not in tasks:
        raise BaditError(f"--task: the run has no task {task}{nearest(task, tasks)}; known: {', '.join(tasks)}")
    chosen = list(tasks.values()) if task is None else [tasks[task]]

    loaded, tokenizer = load_run(folder, recipe)
    model: Any = loaded  # a PeftModel, but of methods that train the base weights
    mixture: str | None = None
    fixed: Gates | None = None
    if gates is not None:
        mixture, fixed = f"gates of {gates}", _read_gates(Path(gates), model)
    elif mixes:
        mixture, fixed = _mean_gates(model, tokenizer, recipe, chosen, task, progress)

    factors: Factors = {}  # none where PEFT itself merges, or where the base weights were trained
    if config is not None and not is_lora:
        factors = mixture_factors(model, fixed, task)
    elif not merged:
        factors = _lora_factors(model, lambda: method.apply(base_model(recipe)[0]))
    for name, pair in factors.items():
        if not all(factor.isfinite().all() for factor in pair):
            raise BaditError(f"{folder.path}: {name} holds NaN or infinite values: its training has diverged")

    done = Export(output, mixture, task, None, None)
    record = {"run": str(folder.path), "method": method.name, "base_model": recipe.model.name}
    record |= {"mixture": mixture, "task": task}
    if not merged:
        exact_rank = len(next(iter(factors.values()))[0])
        rank = min(rank or exact_rank, exact_rank, VLLM_RANKS[-1])
        errors, total = {}, 0.0
        if rank < exact_rank:
            factors, errors, total = _compressed(factors, rank)
        done = dataclasses.replace(done, rank=rank, exact_rank=exact_rank, errors=errors, total_error=total)
        record |= {"rank": rank, "exact_rank": exact_rank}
        record |= {"relative_error": {"total": total, "modules": errors}} if errors else {}
    with _new_folder(output, record) as partial:
        if merged:
            _merged(model, factors).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        else:
            write_adapter(partial, factors, model.unload(), recipe.model.name, recipe.model.revision)
        if fixed is not None:  # a line for each module
            lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(list(of))}" for name, of in fixed.items())
            write_text(partial / GATES, "{\n" + lines + "\n}\n")
        write_text(partial / CARD, model_card(folder, recipe, Base.of(recipe), export=record))
    return done


def score_export(run: str | Path, exported: Export, *, progress: bool = True) -> dict[str, Any]:
    """Scores an export as other tools load it, next to its run, and writes ``scores.json`` into its folder.

    The run's scores are those in its folder, or are made. A mixture of one task is scored on that task alone.

    Returns:
        ``tasks``: by name, Rouge-L ``routed``, ``frozen`` and their ``difference``; and the three ``mean``s.

    Raises:
        BaditError: no such run, or an export that cannot be loaded.
    """
    folder = Run.existing(run)
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


# ── the fixed mixture ──


def _mean_gates(
    model: PeftModel, tokenizer: Any, recipe: Recipe, tasks: Sequence[Task], task: str | None, progress: bool
) -> tuple[str, Gates]:
    """The mean over the first training prompts of each of ``tasks``, every task weighing the same; and it in words."""
    prompts = [(each, each.train[:_PROMPTS_PER_TASK]) for each in tasks if each.train]
    if not prompts:
        raise BaditError(f"task {task}: has no training prompts to take mean gates from; give --gates FILE")
    examples = [encoded(tokenizer, recipe, each, instance) for each, instances in prompts for instance in instances]
    batches = batches_by_task(examples, AnswerCollator(pad_id(tokenizer), with_tasks=True), _BATCH_SIZE)
    by_task = mean_component_gates(model, batches, progress=progress)
    gates = {
        one.layer.name: torch.stack(of_tasks).mean(dim=0)[one.first_components_K].tolist()
        for one, *of_tasks in zip(adapted_layers(model), *by_task.values(), strict=True)
    }
    of_what = f"of {len(prompts)} tasks, and over these," if task is None else f"of task {task}"
    return f"mean gates {of_what} on {len(examples)} training prompts", gates


def _read_gates(path: Path, model: PeftModel) -> Gates:
    """A file's gates.

    Raises:
        BaditError: no such file, or not a gate for every expert of every adapted module and nothing else.
    """
    content = read_json(path)
    experts = {one.layer.name: len(one.first_components_K) for one in adapted_layers(model)}
    for name in content:
        if name not in experts:
            raise BaditError(f"{path}: {name}: the run adapts no such module{nearest(name, experts)}")
    for name, number in experts.items():
        if name not in content:
            raise BaditError(f"{path}: {name}: is missing; give it a list of {number} gates")
        gates = content[name]
        if not isinstance(gates, list) or len(gates) != number or not all(map(is_number, gates)):
            raise BaditError(f"{path}: {name}: must be a list of {number} numbers, one gate for each expert")
    return content


# ── the factors ──


def mixture_factors(model: PeftModel, gates: Gates | None, task: str | None = None) -> Factors:
    """The factors of the active adapter's experts.

    Args:
        gates: the fixed gates; None where the method's own are fixed.
        task: for methods that learn something of its own for each task, whose.
    """
    factors = {}
    with hooks_of(model).rows_of(None if task is None else [task]):
        for one in adapted_layers(model):
            gates_N = None
            if gates is not None:  # every component has its expert's gate
                gates_N = torch.tensor(gates[one.layer.name], dtype=torch.float32)[one.expert_of_N.cpu()]
            a_PI, b_OP = one.layer.frozen_factors(one.adapter, gates_N)
            factors[one.layer.name] = (a_PI.cpu(), b_OP.cpu())
    return factors


def _lora_factors(model: PeftModel, initial_model: Callable[[], PeftModel]) -> Factors:
    """The factors of an adapter of PEFT's LoRA family.

    Args:
        model: the base model with the trained adapter.
        initial_model: makes the base model with the adapter as it was before training; called for PiSSA and OLoRA.

    Raises:
        BaditError: the adapter is more than a LoRA.
    """
    config: Any = model.peft_config["default"]
    fields = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")
    extra = [name for name in fields if getattr(config, name)] + ["bias"] * (config.bias != "none")
    if extra:
        raise BaditError(f"method.{extra[0]}: makes the adapter more than a plain LoRA; export the model: --merged")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva", *_CHANGES_BASE):
        raise BaditError(
            f"method.init_lora_weights: {config.init_lora_weights} has changed the base weight in a way that cannot be "
            "told from the adapter; export the model: --merged"
        )
    factors = _scaled_lora(model)
    if config.init_lora_weights in _CHANGES_BASE:
        initial = _scaled_lora(initial_model())
        factors = {
            name: (torch.cat([a_PI, initial[name][0]]), torch.cat([b_OP, -initial[name][1]], dim=1))
            for name, (a_PI, b_OP) in factors.items()
        }
    # Zeros fill up those of a smaller rank: one rank and one alpha for all modules is what every server reads.
    rank = max(len(a_PI) for a_PI, _ in factors.values())
    return {
        name: (F.pad(a_PI, (0, 0, 0, rank - len(a_PI))), F.pad(b_OP, (0, rank - len(a_PI))))
        for name, (a_PI, b_OP) in factors.items()
    }


def _scaled_lora(model: PeftModel) -> Factors:
    """The A's and B's of PEFT's LoRA layers, with the scaling in B."""
    factors = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise BaditError(f"{name} is an embedding, which takes no plain LoRA; export the model: --merged")
        parts: Any = layer.lora_A["default"], layer.lora_B["default"]
        a_PI, b_OP = (part.weight.detach().to("cpu", torch.float32) for part in parts)
        factors[name] = (a_PI, b_OP * layer.scaling["default"])
    return factors


def _compressed(factors: Factors, rank: int) -> tuple[Factors, dict[str, float], float]:
    """The closest factors of a smaller rank, by module their relative error, and that of all modules together."""
    found = {name: compress(*pair, rank) for name, pair in factors.items()}
    errors = {name: each.lost / each.norm if each.norm else 0.0 for name, each in found.items()}
    lost, norm = (math.hypot(*values) for values in zip(*((f.lost, f.norm) for f in found.values()), strict=True))
    return {name: (each.a_PI, each.b_OP) for name, each in found.items()}, errors, lost / norm if norm else 0.0


# ── the folder ──


def _refuse_other_files(folder: Path) -> None:
    """Raises BaditError unless the folder is not there, empty, or an earlier export with nothing added to it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BaditError(f"{folder}: is a file; choose another folder with -o")
    own = []
    if (folder / RECORD).is_file():
        files = read_json(folder / RECORD).get("files")
        own = [RECORD, SCORES, *(files if isinstance(files, list) else [])]
    others = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if others:
        raise BaditError(f"{folder}: holds {others[0]}, which is of no export; choose another folder with -o")


@contextmanager
def _new_folder(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` once all is written, with ``record`` in it.

    Raises:
        BaditError: it cannot be written.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        with explained(folder, action="written"):
            remove(partial)
            partial.mkdir(parents=True)
            yield partial
            write_json(partial / RECORD, {**record, "files": sorted(path.name for path in partial.iterdir())})
            replace_folder(partial, folder)
    finally:
        remove(partial)


def write_adapter(folder: Path, factors: Factors, base: nn.Module, name: str, revision: str | None = None) -> None:
    """A plain LoRA as every PEFT since 0.5 loads it: one rank, alpha = rank, nothing but A's and B's.

    The configuration names only what a plain LoRA must say. Fields of later methods are left out, as servers refuse
    some of them and older versions warn of those that they do not know.

    Args:
        folder: an existing folder.
        factors: all of one rank.
        base: the base model, without an adapter.
        name: the base model's, as it is loaded by, at its ``revision``.
    """
    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1: B has it
        "lora_dropout": 0.0,
        "target_modules": target_modules(base, factors),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(base.get_submodule(module), Conv1D) for module in factors),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for module, (a_PI, b_OP) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a_PI.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b_OP.contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)


def target_modules(base: nn.Module, factors: Factors) -> list[str]:
    """The modules' last names, where these mean the same modules; else their whole names."""
    last_names = {name.rpartition(".")[2] for name in factors}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if meant == factors.keys() else factors)


def _merged(model: Any, factors: Factors) -> Any:
    """The base model with the factors added, or with what PEFT merges or training has changed."""
    if factors:
        model = model.unload()
        merge(model, factors)
        return model
    with explained("the adapter", action="merged", any_error=True):  # NaN in a merged weight
        return model.merge_and_unload(safe_merge=True) if isinstance(model, PeftModel) else model


@torch.no_grad()
def merge(base: nn.Module, factors: Factors) -> None:
    """Adds B A to every weight, in float32, rounded once to the weight's own type.

    Raises:
        BaditError: a weight that another module uses, too, which must not change for it.
    """
    owners = Counter(id(parameter) for _, parameter in base.named_parameters(remove_duplicate=False))
    for name, (a_PI, b_OP) in factors.items():
        layer: Any = base.get_submodule(name)
        if owners[id(layer.weight)] > 1:
            raise BaditError(f"{name}: shares its weight with another module, so nothing can be merged into it alone")
        delta_OI = (b_OP @ a_PI).to(layer.weight.device)
        layer.weight.copy_(layer.weight.float() + (delta_OI.T if isinstance(layer, Conv1D) else delta_OI))

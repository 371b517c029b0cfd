"""``badit export``: writes a run as a plain LoRA adapter or a merged model, and scores it in Rouge-L.

An export's folder contains the files that PEFT or transformers loads without badit, the model card ``README.md``,
``export.json`` (the run, the SHA-256 of its weights, the options, the error and the files), ``gates.json`` (the fixed
gates: for each module, one per expert) and ``scores.json`` (the Rouge-L of run and export, if it was scored).

Shape suffixes: O/I = out/in features, P = rank, N = components, K = experts.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from badit.analysis.gates import (
    GATES_FILE,
    PROMPTS_PER_TASK,
    Gates,
    adapted_layers,
    read_gates,
    task_gates,
)
from badit.data.prompts import end_of_turn_id
from badit.data.tasks import Task, resolve_names
from badit.evaluation.scoring import evaluate, score_model
from badit.hub.card import CARD, hub_id, model_card
from badit.method.decomposition import compress
from badit.models import device, load_base_model, resolve_model
from badit.recipe.schema import Recipe
from badit.runs.folder import RECORD, AnyPath, RunFolder
from badit.runs.scores import read_scores
from badit.support.console import status
from badit.support.errors import BaditError, explained, refuse_unknown
from badit.support.files import (
    OWNER,
    exclusive,
    read_json,
    refuse_links,
    remove,
    replace_folder,
    write_json,
    write_text,
)
from badit.support.text import counted, text_table
from badit.training.checkpoints import checksums
from badit.training.fit import (
    base_model,
    changed_inputs,
    load_run,
    make_plan,
    model_dtype,
    task_fingerprints,
)
from badit.training.methods import build_method
from badit.tuner import ExpertConfig, hooks_of
from badit.tuner.targets import FusedExpert, base_layer, short_module_names

#: The values of vLLM's ``--max-lora-rank``. An adapter needs the smallest one that is not below its rank.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: By module name in the base model, A (P, I) and B (O, P): float32, on the CPU. The adapted weight is W + B A.
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]

SCORES = "scores.json"
NOT_A_LORA = "makes the adapter more than a plain LoRA"
_MORE_THAN_LORA = """use_dora lora_bias modules_to_save trainable_token_indices target_parameters use_bdlora use_qalora
    alora_invocation_tokens arrow_config kasa_config layer_replication bias"""
# These change the base weight to W − s·B0 A0. PEFT repeats this change whenever such an adapter is loaded.
_CHANGES_BASE = ("pissa", "olora")
KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "orthogonal",
)  # the change of other initialisations is not known


@dataclass(frozen=True)
class Export:
    """A written export."""

    folder: Path
    #: The content of its ``export.json`` without the list of files. For a compressed LoRA, ``relative_error`` has
    #: ‖ΔW − ΔW'‖ / ‖ΔW‖ (Frobenius norm) of the adapter's update ΔW by ``modules``, and of all together in ``total``.
    record: Mapping[str, Any]
    #: For an export of all tasks, the export of each task. The record then has the ranks and errors of the worst one.
    tasks: Mapping[str, "Export"] = field(default_factory=dict)

    @property
    def rank(self) -> int | None:
        """The rank of the adapter; None for a merged model."""
        return self.record.get("rank")

    @property
    def max_lora_rank(self) -> int | None:
        """The value for vLLM's ``--max-lora-rank``; None for a merged model."""
        return (
            None if self.rank is None else next(known for known in VLLM_RANKS if known >= self.rank)
        )


def export(
    run: RunFolder,
    output: AnyPath,
    *,
    task: str | None = None,
    all_tasks: bool = False,
    gates: AnyPath | None = None,
    rank: int | None = None,
    merged: bool = False,
    progress: bool = True,
) -> Export:
    """Writes a run's adapter as a plain LoRA or a merged model; see :meth:`badit.RunFolder.export`.

    ``output`` must be new, empty or an earlier export. The LoRA equals the adapter with fixed gates exactly, unless
    ``rank`` is below the exact rank or the exact rank is above 512, vLLM's maximum. It is then compressed by SVD.
    """
    recipe = run.trusted_recipe()
    method = build_method(recipe.method)
    config = method.config  # a PEFT config, if the method trains an adapter
    has_experts = isinstance(config, ExpertConfig)
    mixes = has_experts and not config.has_fixed_gates
    output = Path(output)
    _refuse_other_files(output)
    chosen = sum((task is not None, all_tasks, gates is not None))
    servable = rank is None or 1 <= rank <= VLLM_RANKS[-1]
    untold = task is None and not all_tasks and mixes and method.needs_tasks
    quantised = merged and recipe.model.quantisation is not None
    problems = {
        "give only one of --task, --all-tasks and --gates": chosen > 1,
        "--merged: writes a model without a rank; remove --all-tasks and --rank": merged
        and (all_tasks or rank),
        f"--rank: must be between 1 and {VLLM_RANKS[-1]}, not {rank}": not servable,
        f"{run.path}: is a run of the unchanged base model; there is nothing to export": not method.trains,
        f"{run.path}: {method.name} trains the base weights; export it with --merged": config
        is None
        and not merged,
        "--merged: the base weights are quantised, and rounding would lose the adapter; remove --merged": quantised,
        f"--task, --all-tasks, --gates: {method.name} has no gates that vary; remove these options": chosen
        and not mixes,
        f"{method.name} learns each task separately: choose one with --task": untold,
    }
    problems |= {
        f"method.{name}: {NOT_A_LORA}; export with --merged": not merged
        for name in beyond_lora(config)
    }
    if found := [problem for problem, holds in problems.items() if holds]:
        raise BaditError(found[0])
    tasks = (
        {known.name: known for known in make_plan(recipe).tasks} if mixes and gates is None else {}
    )
    trained = [name for name in tasks if tasks[name].train]
    if task is not None:
        (task,) = resolve_names([task], tasks, field="--task")
        if task not in trained:
            raise BaditError(
                f"task {task}: has no training prompts for mean gates; use --gates FILE"
            )
    if getattr(config, "gates", None) == "clusters" and not chosen and len(trained) > 1:
        fix = "use --all-tasks, for a LoRA per task, or --task"
        raise BaditError(
            f"{run.path}: with clusters of prompts, the mean gates of several tasks fit no prompt; {fix}"
        )

    model, tokenizer = load_run(
        run, recipe
    )  # a PeftModel, except for methods that train the base weights
    mixtures: Mapping[str | None, tuple[str | None, Gates | None]] = {task: (None, None)}
    if gates is not None:
        mixtures = {None: (f"gates of {Path(gates).name}", read_gates(Path(gates), model))}
    elif mixes:
        groups = (
            {name: [name] for name in trained} if all_tasks else {task: [task] if task else trained}
        )
        mixtures = _mean_gates(run, model, tokenizer, tasks, groups, progress)

    common = {"method": method.name, "weights": checksums(run.adapter_path, "*.safetensors")}
    base = hub_id(recipe) or str(Path(recipe.model.name).expanduser().resolve())
    exported: dict[str, Export] = {}
    unfinished = output.with_name(f".{output.name}.badit.partial")  # no user's folder has this name
    with status("exporting"), explained(output, action="written"), exclusive(output):
        try:
            remove(unfinished)
            for of_task, (mixture, fixed) in mixtures.items():
                below = str(of_task) if all_tasks else ""
                place = unfinished / below
                place.mkdir(parents=True)
                # Empty if PEFT merges or the base weights were trained.
                factors = mixture_factors(model, fixed, of_task) if has_experts else {}
                facts: dict[str, Any] = {}
                if merged:
                    model = _merged(model, factors)
                    model.save_pretrained(place)
                    # Several templates would be files in a subfolder.
                    tokenizer.save_pretrained(
                        place, save_jinja_files=not isinstance(tokenizer.chat_template, dict)
                    )
                else:
                    factors, facts = _compressed(
                        factors or _lora_factors(model, recipe, method), rank
                    )
                    write_adapter(
                        place, factors, model.get_base_model(), base, recipe.model.revision
                    )
                if fixed is not None:
                    write_json(place / GATES_FILE, fixed)
                # A relative path names none of the user's folders, and both folders can be moved together.
                origin = os.path.relpath(run.path.resolve(), (output / below).resolve())
                record = {"run": origin, **common, "mixture": mixture, "task": of_task, **facts}
                exported[below] = done = Export(output / below, record)
                write_text(place / CARD, model_card(run, export=done.record))
                _write_record(place, done.record)
            done = max(
                exported.values(),
                key=lambda each: each.record.get("relative_error", {"total": 0})["total"],
            )
            if all_tasks:
                origin = os.path.relpath(run.path.resolve(), output.resolve())
                mixture = f"mean gates of each of {len(exported)} tasks"
                done = Export(
                    output,
                    {**done.record, "run": origin, "mixture": mixture, "task": None},
                    exported,
                )
                _write_record(unfinished, done.record)
            replace_folder(unfinished, output)
        finally:
            remove(unfinished)
    return done


def _compressed(factors: Factors, rank: int | None) -> tuple[Factors, dict[str, Any]]:
    """Returns the factors with at most this rank (default: the exact rank), and the ranks and errors of the export."""
    exact_rank = len(next(iter(factors.values()))[0])
    rank = min(rank or exact_rank, exact_rank, VLLM_RANKS[-1])
    if rank == exact_rank:
        return factors, {"rank": rank, "exact_rank": exact_rank}
    closest = {name: compress(*pair, rank) for name, pair in factors.items()}
    errors = {name: lost / norm if norm else 0.0 for name, (_, _, lost, norm) in closest.items()}
    norm = math.hypot(*(norm for _, _, _, norm in closest.values()))
    total = math.hypot(*(lost for _, _, lost, _ in closest.values())) / norm if norm else 0.0
    smaller = {name: (a_PI, b_OP) for name, (a_PI, b_OP, _, _) in closest.items()}
    return smaller, {
        "rank": rank,
        "exact_rank": exact_rank,
        "relative_error": {"total": total, "modules": errors},
    }


def score_export(
    run: RunFolder, done: Export, *, engine: str = "transformers", progress: bool = True
) -> dict[str, Any]:
    """Loads an export as other tools do, scores it, writes its ``scores.json`` and returns the content.

    ``tasks`` has for each task the Rouge-L of the run (``routed``), the export (``frozen``) and their ``difference``;
    ``mean`` has the means. One task's export is scored on that task only; for all tasks, each task uses its adapter.
    """
    refuse_unknown("engine", engine, ["transformers", "vllm"])
    recipe = run.trusted_recipe()
    split, known = recipe.evaluation.split, make_plan(recipe).tasks
    # The run's scores may be those of other instances.
    if not run.scores_path.is_file() or changed_inputs(run, task_fingerprints(known)):
        evaluate(run, progress=progress)
    routed = read_scores(run.scores_path)["tasks"]
    vllm = _vllm(done, recipe) if engine == "vllm" else None
    by_task: dict[str, dict[str, float]] = {}
    for part in done.tasks.values() or [done]:
        tasks = [task for task in known if part.record["task"] in (None, task.name)]
        model: Any = None  # frees the previous model
        answer = None
        if vllm is not None:
            tokenizer, answer = vllm[0], partial(vllm[1], part)
        elif part.rank is None:
            options: Any = {"trust_remote_code": run.trust_remote_code, "device": device()}
            model, tokenizer = load_base_model(part.folder, dtype=model_dtype(recipe), **options)
        else:
            model, tokenizer = base_model(recipe)
            model = PeftModel.from_pretrained(model, str(part.folder)).eval()
        frozen, _ = score_model(
            model, tokenizer, recipe, tasks, split, progress=progress, answer=answer
        )
        for name, scores in frozen["tasks"].items():
            before, after = routed[name]["rouge_l"], scores["rouge_l"]
            by_task[name] = {"routed": before, "frozen": after, "difference": after - before}
    result: dict[str, Any] = {}
    for part in (*done.tasks.values(), done):
        of_part = {
            name: scores for name, scores in by_task.items() if part.record["task"] in (None, name)
        }
        mean = {
            key: fmean(scores[key] for scores in of_part.values())
            for key in ("routed", "frozen", "difference")
        }
        result = {
            "metric": "rouge_l",
            "split": split,
            "engine": engine,
            "mixture": part.record["mixture"],
        }
        result |= {"tasks": of_part, "mean": mean}
        write_json(part.folder / SCORES, result)
    return result


def _vllm(
    exported: Export, recipe: Recipe
) -> tuple[Any, Callable[[Export, list[list[int]]], list[str]]]:
    """Starts vLLM; returns its tokenizer and a function that answers prompts (token ids) with a part of the export."""
    if recipe.model.quantisation is not None:
        raise BaditError("engine: vllm does not support model.quantisation; use transformers")
    base, revision, lora = str(exported.folder), None, {}
    if exported.rank is not None:
        base, revision = resolve_model(recipe.model.name), recipe.model.revision
        lora = {"enable_lora": True, "max_lora_rank": exported.max_lora_rank}
    with explained(
        "engine: vllm",
        action="started",
        fix="install vLLM here, or use transformers",
        any_error=True,
    ):
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports] (it requires its own torch)
        from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

        # On a CPU, compilation takes longer than it saves.
        vllm = LLM(
            base,
            dtype=model_dtype(recipe),
            revision=revision,
            enforce_eager=device().type == "cpu",
            **lora,
        )
    tokenizer, numbers = vllm.get_tokenizer(), count(1)
    end = end_of_turn_id(tokenizer, recipe.prompt.chat_template)
    settings = SamplingParams(
        temperature=0.0, max_tokens=recipe.evaluation.max_new_tokens, stop_token_ids=[end]
    )

    def answers(part: Export, prompts: list[list[int]]) -> list[str]:
        number = next(numbers)
        request = (
            None
            if part.rank is None
            else LoRARequest(str(number), number, str(part.folder.resolve()))
        )
        with explained("vLLM", action="used", any_error=True):
            found = vllm.generate(
                [{"prompt_token_ids": ids} for ids in prompts], settings, lora_request=request
            )
        return [each.outputs[0].text.strip() for each in found]

    return tokenizer, answers


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_json(folder / RECORD, {**record, "files": sorted(path.name for path in folder.iterdir())})


def _refuse_other_files(folder: Path) -> None:
    """Raises BaditError unless the folder is missing, empty or an earlier export without other files."""
    if folder.exists() and not folder.is_dir():
        raise BaditError(f"{folder}: is a file; choose another folder with -o")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise BaditError(
            f"{folder}: contains the current folder and would be replaced; choose another folder with -o"
        )
    own: list[Any] = [OWNER, f"{OWNER}.partial"]  # left by a killed process
    if (folder / RECORD).is_file():
        refuse_links(folder)
        files = read_json(folder / RECORD).get("files")
        own += [RECORD, SCORES, *files] if isinstance(files, list) else []
    for path in sorted(folder.glob("*")):
        if path.name not in own:
            raise BaditError(
                f"{folder}: holds {path.name}, which badit did not write; choose another folder with -o"
            )
        if path.is_dir():
            _refuse_other_files(path)


def _mean_gates(
    run: RunFolder,
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Task],
    groups: Mapping[Any, list[str]],
    progress: bool,
) -> dict[str | None, tuple[str, Gates]]:
    """Returns a description and the mean gates of training prompts by task (None: of all, equally weighted)."""
    names = list(chain(*groups.values()))
    measured = task_gates(run, model, tokenizer, run.recipe, tasks, names)
    by_task = dict(
        tqdm(measured, desc="Gates", unit="task", total=len(names), disable=not progress)
    )
    found: dict[str | None, tuple[str, Gates]] = {}
    for task, group in groups.items():
        number = sum(len(tasks[name].train[:PROMPTS_PER_TASK]) for name in group)
        of_what = (
            f"of {counted(len(group), 'task')}, averaged over tasks,"
            if task is None
            else f"of task {task}"
        )
        each = [by_task[name] for name in group]
        mean = {
            module: torch.tensor([gates[module] for gates in each]).mean(dim=0).tolist()
            for module in each[0]
        }
        found[task] = (f"mean gates {of_what} on {number} training prompts", mean)
    return found


def beyond_lora(config: Any) -> list[str]:
    """Returns the options of an adapter's configuration that a plain LoRA cannot represent."""
    names = (
        ["modules_to_save", "bias"] if isinstance(config, ExpertConfig) else _MORE_THAN_LORA.split()
    )
    found = [name for name in names if getattr(config, name, None) not in (None, False, [], "none")]
    initial = getattr(config, "init_lora_weights", True)
    return found if initial in (*KEEPS_BASE, *_CHANGES_BASE) else [*found, "init_lora_weights"]


def mixture_factors(model: PeftModel, gates: Gates | None, task: str | None = None) -> Factors:
    """Returns the active adapter's factors with fixed ``gates`` (None: the method's own) for ``task``."""
    factors = {}
    with hooks_of(model).rows_of(None if task is None else [task]):
        for one in adapted_layers(model):
            gates_K = (
                None if gates is None else torch.tensor(gates[one.layer.name], dtype=torch.float32)
            )
            a_PI, b_OP = one.layer.frozen_factors(one.adapter, gates_K)
            factors[one.layer.name] = (a_PI.cpu(), b_OP.cpu())
    return factors


def _lora_factors(model: PeftModel, recipe: Recipe, method: Any) -> Factors:
    """Returns the factors of a PEFT LoRA adapter, minus those of the untrained adapter of PiSSA or OLoRA."""
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    adapters = {1: model}
    if method.config.init_lora_weights in _CHANGES_BASE:
        adapters[-1] = method.apply(base_model(recipe)[0])
    for sign, adapted in adapters.items():
        for name, layer in adapted.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                if "default" not in layer.lora_A:
                    raise BaditError(
                        f"{name}: is an embedding, which a plain LoRA cannot adapt; export with --merged"
                    )
                linear: Any = layer.lora_A["default"], layer.lora_B["default"]
                a_PI, b_OP = (part.weight.detach().to("cpu", torch.float32) for part in linear)
                b_OP = sign * b_OP * layer.scaling["default"]
                before_PI, before_OP = factors.get(name, (a_PI[:0], b_OP[:, :0]))
                factors[name] = torch.cat([before_PI, a_PI]), torch.cat([before_OP, b_OP], dim=1)
    rank = max(len(a_PI) for a_PI, _ in factors.values())
    for name, (
        a_PI,
        b_OP,
    ) in factors.items():  # zero padding: servers read one rank and one alpha for all modules
        missing = rank - len(a_PI)
        factors[name] = F.pad(a_PI, (0, 0, 0, missing)), F.pad(b_OP, (0, missing))
    return factors


def write_adapter(
    folder: Path, factors: Factors, base: nn.Module, name: str, revision: str | None = None
) -> None:
    """Writes a LoRA with one rank and alpha = rank, and without PEFT's newer fields that servers refuse.

    ``base`` may have adapters; ``name`` and ``revision`` identify it. All ``factors`` must have the same rank.
    """
    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
    }
    config |= {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
    }  # scaling 1, because B contains the scaling
    layers = {
        module: getattr(layer := base_layer(base, module), "base_layer", layer)
        for module in factors
    }
    modules = [module for module, layer in layers.items() if not isinstance(layer, FusedExpert)]
    config |= {
        "target_modules": short_module_names(base, modules),
        "bias": "none",
        "modules_to_save": None,
    }
    config |= {"fan_in_fan_out": any(isinstance(layer, Conv1D) for layer in layers.values())}
    config |= {
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    pairs: dict[
        str, list[tuple[torch.Tensor, torch.Tensor]]
    ] = {}  # by module; a fused weight has several pairs
    for name, pair in factors.items():
        pairs.setdefault(name if name in modules else name.rpartition(".")[0], []).append(pair)
    if fused := pairs.keys() - modules:
        config["target_parameters"] = sorted({".".join(name.split(".")[-2:]) for name in fused})
    tensors: dict[str, torch.Tensor] = {}
    for name, of_name in reversed(pairs.items()):
        place = f"base_model.model.{name.rpartition('.')[0] if name in fused else name}"
        while (
            f"{place}.lora_A.weight" in tensors
        ):  # PEFT wraps a module once per fused weight, the last one outermost
            place += ".base_layer"
        tensors[f"{place}.lora_A.weight"] = torch.cat([a_PI for a_PI, _ in of_name])
        tensors[f"{place}.lora_B.weight"] = torch.stack(
            [b_OP for _, b_OP in of_name], dim=-1
        ).flatten(1)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)


def _merged(model: Any, factors: Factors) -> Any:
    """Returns the model without its adapter, which is added to the base weights; without ``factors``, PEFT adds it."""
    if isinstance(model, PeftModel) and not factors:
        modules = model.get_base_model().named_modules()
        adapted = {
            name: one.get_base_layer() for name, one in modules if isinstance(one, BaseTunerLayer)
        }
        _refuse_shared(model, adapted)
        with explained("the adapter", action="merged", any_error=True):  # NaN in a merged weight
            return model.merge_and_unload(safe_merge=True)
    base = model.unload() if factors else model
    merge(base, factors)
    heads = base.get_output_embeddings(), base.get_input_embeddings()
    if (
        heads[0] is not None and heads[0].weight is not heads[1].weight
    ):  # modules_to_save may have trained one of them
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    return base


@torch.no_grad()
def merge(base: nn.Module, factors: Factors) -> None:
    """Adds B A to every weight in float32 and rounds once to the weight's dtype."""
    layers = {name: base_layer(base, name) for name in factors}
    _refuse_shared(base, layers)
    for (a_PI, b_OP), layer in zip(factors.values(), layers.values(), strict=True):
        delta_OI = (b_OP @ a_PI).to(layer.weight.device)
        layer.weight.copy_(
            layer.weight.float() + (delta_OI.T if isinstance(layer, Conv1D) else delta_OI)
        )


def _refuse_shared(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raises BaditError if one of the layers shares its weight, such as tied embeddings: both would be changed."""
    owners = Counter(
        id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    for name, layer in layers.items():
        if owners[id(getattr(layer, "weight", None))] > 1:
            raise BaditError(
                f"{name}: shares its weight with another module; export without --merged"
            )


def cost_table(scores: dict[str, Any]) -> str:
    """Returns a table of Rouge-L per task, of a run with routing and of its export with fixed gates."""
    entries = scores["tasks"] | (
        {"mean over tasks": scores["mean"]} if len(scores["tasks"]) > 1 else {}
    )
    forms = {"routed": ".1f", "frozen": ".1f", "difference": "+.1f"}
    rows = [
        [name, *(f"{entry[key]:{form}}" for key, form in forms.items())]
        for name, entry in entries.items()
    ]
    return text_table(["task", "Rouge-L routed", "frozen", "difference"], rows)

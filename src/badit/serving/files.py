"""What an export's folder holds, and writing it whole or not at all.

adapter_config.json         PEFT's configuration of a plain LoRA; a merged model has its config.json instead
adapter_model.safetensors   the factors; a merged model has its weights and tokenizer instead
README.md                   the model card
gates.json                  the fixed mixture, where there is one
export.json                 from what, by what choice, and with what error; marks the folder as an export
scores.json                 what freezing costs, once it has been measured
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from badit.errors import BaditError
from badit.files import read_json, replace_folder, write_json
from badit.recipe import ModelSection
from badit.serving.factors import Factors

RECORD = "export.json"
SCORES = "scores.json"
GATES = "gates.json"


def refuse_foreign(folder: Path) -> None:
    """Raises BaditError unless the folder is not there, empty, or an earlier export with nothing added to it."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BaditError(f"{folder}: is a file; choose another folder with -o")
    own = []
    if (folder / RECORD).is_file():
        files = read_json(folder / RECORD).get("files")
        own = [RECORD, SCORES, *(files if isinstance(files, list) else [])]
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in own)
    if foreign:
        raise BaditError(f"{folder}: holds {foreign[0]}, which is of no export; choose another folder with -o")


@contextmanager
def new_folder(folder: Path, record: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``folder`` once all is written, with ``record`` beside it.

    Raises:
        BaditError: something else is there, or it cannot be written.
    """
    refuse_foreign(folder)
    partial = folder.with_name(folder.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        write_json(partial / RECORD, {**record, "files": sorted(path.name for path in partial.iterdir())})
        replace_folder(partial, folder)
    except OSError as error:
        raise BaditError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_adapter(folder: Path, factors: Factors, base: nn.Module, section: ModelSection) -> None:
    """A plain LoRA as every PEFT since 0.5 loads it: one rank, alpha = rank, nothing but A's and B's.

    The configuration names only what a plain LoRA must say. Fields of later methods are left out, as servers refuse
    some of them and older versions warn of those that they do not know.
    """
    rank = len(next(iter(factors.values()))[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": section.name,
        "revision": section.revision,
        "r": rank,
        "lora_alpha": rank,  # a scaling of 1: B has it
        "lora_dropout": 0.0,
        "target_modules": target_modules(base, factors),
        "bias": "none",
        "fan_in_fan_out": any(isinstance(base.get_submodule(name), Conv1D) for name in factors),
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors = {}
    for name, (a_PI, b_OP) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_PI.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OP.contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, config)


def target_modules(base: nn.Module, factors: Factors) -> list[str]:
    """The modules' last names, where these mean the same modules; else their whole names."""
    last_names = {name.rpartition(".")[2] for name in factors}
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in last_names}
    return sorted(last_names if meant == factors.keys() else factors)


@torch.no_grad()
def merge(base: nn.Module, factors: Factors) -> None:
    """Adds B A to every weight, in float32, rounded once to the weight's own type.

    Raises:
        BaditError: a weight that another module uses, too, which must not change for it.
    """
    owners: dict[int, int] = {}
    for _, parameter in base.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, (a_PI, b_OP) in factors.items():
        layer: Any = base.get_submodule(name)
        if owners[id(layer.weight)] > 1:
            raise BaditError(f"{name}: shares its weight with another module, so nothing can be merged into it alone")
        delta_OI = (b_OP @ a_PI).to(layer.weight.device)
        delta = delta_OI.T if isinstance(layer, Conv1D) else delta_OI
        layer.weight.copy_(layer.weight.float() + delta)


def write_merged(folder: Path, model: Any, tokenizer: Any) -> None:
    """A model's folder as transformers saves it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_gates(folder: Path, gates: Mapping[str, Any]) -> None:
    """One line a module."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(list(values))}" for name, values in gates.items())
    (folder / GATES).write_text("{\n" + lines + "\n}\n", encoding="utf-8")

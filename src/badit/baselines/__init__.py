"""The baselines that add adapters, each by the name that a recipe gives it.

    method: {name: loramoe, num_experts: 8, r: 4}

A baseline is a PEFT configuration, whose fields are its options. Importing this package imports all of its modules,
which register theirs here and with PEFT, so that ``PeftModel.from_pretrained`` knows them.

LoRA and its relatives are PEFT's own: a name here is a ``LoraConfig`` with one field settled.

* lora (Hu et al. 2021, arXiv 2106.09685): y = W x + s·B A x, A kaiming(√5), B zero, s = lora_alpha / r.
* pissa (Meng et al. 2024, arXiv 2404.02948): A and B start as the r leading singular triples, W ← W − s·B A. The SVD is
  exact: loading an adapter repeats it. PEFT's ``pissa_niter_N`` is random, so that loading would find another model.
* olora (Büyükakyüz 2024, arXiv 2406.01775): the same with W = QR, B = Q[:, :r], A = R[:r].
* dora (Liu et al. 2024, arXiv 2402.09353): LoRA on the weight's direction, next to a trained magnitude per row.
* rslora (Kalajdzievski 2023, arXiv 2312.03732): LoRA with s = lora_alpha / √r.

pissa and olora change the base weight, until the adapter is unloaded and after: PEFT keeps no copy of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from peft import LoraConfig, PeftConfig

from badit.tuner.model import ExpertModel, register

Config = TypeVar("Config", bound=PeftConfig)


class Baseline(NamedTuple):
    """A method's configuration, whose fields are its options, and those of them that the name settles."""

    config_cls: type[Any]
    settled: Mapping[str, Any] = {}


BASELINES = {
    "lora": Baseline(LoraConfig),
    "pissa": Baseline(LoraConfig, {"init_lora_weights": "pissa"}),
    "olora": Baseline(LoraConfig, {"init_lora_weights": "olora"}),
    "dora": Baseline(LoraConfig, {"use_dora": True}),
    "rslora": Baseline(LoraConfig, {"use_rslora": True}),
}


def baseline(name: str, model_cls: type[ExpertModel]) -> Callable[[type[Config]], type[Config]]:
    """Registers a configuration class under a recipe's ``name``, and with PEFT under its ``method``."""

    def enter(config_cls: type[Config]) -> type[Config]:
        register(config_cls, model_cls)
        BASELINES[name] = Baseline(config_cls)
        return config_cls

    return enter


for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

"""The baselines that add adapters, by their names in recipes.

    method: {name: loramoe, num_experts: 8, r: 4}

A baseline is a PEFT configuration; its fields are the method's options. Importing this package
imports all of its modules, which register their baselines here and with PEFT, so that
``PeftModel.from_pretrained`` can load them.

LoRA and its variants are PEFT's own: a name here is a ``LoraConfig`` with at most one fixed field.

* lora (Hu et al. 2021, arXiv 2106.09685): y = W x + s·B A x, A kaiming(√5), B zero, s = lora_alpha
  / r.
* pissa (Meng et al. 2024, arXiv 2404.02948): A and B are initialised from r leading singular
  triples; W ← W − s·B A. The SVD is exact, because loading repeats it: with PEFT's random
  ``pissa_niter_N``, the loaded model would differ.
* olora (Büyükakyüz 2024, arXiv 2406.01775): like pissa with W = QR, B = Q[:, :r], A = R[:r].
* dora (Liu et al. 2024, arXiv 2402.09353): LoRA on the weight's direction, and a trained magnitude
  per row.
* rslora (Kalajdzievski 2023, arXiv 2312.03732): LoRA with s = lora_alpha / √r.

pissa and olora change the base weight permanently: PEFT does not restore it when the adapter is
unloaded.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from peft import LoraConfig, PeftConfig

from badit.tuner.model import ExpertModel, register

Config = TypeVar("Config", bound=PeftConfig)


class Baseline(NamedTuple):
    """A method's configuration class, and the fields that the method's name fixes."""

    config_cls: type[Any]
    fixed: Mapping[str, Any] = {}


BASELINES = {
    "lora": Baseline(LoraConfig),
    "pissa": Baseline(LoraConfig, {"init_lora_weights": "pissa"}),
    "olora": Baseline(LoraConfig, {"init_lora_weights": "olora"}),
    "dora": Baseline(LoraConfig, {"use_dora": True}),
    "rslora": Baseline(LoraConfig, {"use_rslora": True}),
}


def baseline(name: str, model_cls: type[ExpertModel]) -> Callable[[type[Config]], type[Config]]:
    """Returns a decorator that registers a configuration as ``name`` for recipes and with PEFT."""

    def enter(config_cls: type[Config]) -> type[Config]:
        register(config_cls, model_cls)
        BASELINES[name] = Baseline(config_cls)
        return config_cls

    return enter


# At the end, because the modules import `baseline` from this package.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

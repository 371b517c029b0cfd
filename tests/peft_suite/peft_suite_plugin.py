"""A pytest plugin that runs the tests of PEFT's source distribution on BaditConfig.

Its tests are parametrised by method and by model. Here the methods become BADIT's configurations,
and the models, which are on a hub, small random ones in a local folder; tests without such a
parameter are of other methods and left out. ``listed.yaml`` names the tests that must fail, each
with its reason; one that passes fails the run.
"""

import importlib.util
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from badit.tuner import BaditConfig
from badit.tuner.layer import ExpertLinear

if importlib.util.find_spec("diffusers") is None:
    # PEFT's tests ask of every model whether it is one of these; none here is.
    _stand_in = types.ModuleType("diffusers")
    _stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = _stand_in

_COMMON = {
    "vocab_size": 100,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SIZES = {**_COMMON, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {
    **_SIZES,
    "intermediate_size": 24,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
_OPT = {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64}
_GPT2 = {**_COMMON, "n_embd": 16, "n_inner": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
_MODELS = {
    "tiny-random-OPTForCausalLM": lambda: transformers.OPTConfig(**_OPT),
    "tiny-random-GPT2LMHeadModel": lambda: transformers.GPT2Config(**_GPT2),
    "tiny-random-LlamaForCausalLM": lambda: transformers.LlamaConfig(**_DECODER),
    "tiny-dummy-qwen2": lambda: transformers.Qwen2Config(**_DECODER),
    "tiny-random-Gemma3ForCausalLM": lambda: transformers.Gemma3TextConfig(
        **_DECODER, head_dim=8, sliding_window=16
    ),
}
_SMALL = {"num_experts": 2, "r": 1, "lora_alpha": 2}
_CASES = [
    ("linear", "MLP", {"target_modules": "lin0"}),
    ("linear in a list", "MLP", {"target_modules": ["lin0"]}),
    ("two linears", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("modules to save", "MLP", {"target_modules": ["lin1"], "modules_to_save": ["lin0"]}),
    ("dropout", "MLP", {"target_modules": ["lin0"], "lora_dropout": 0.1}),
    ("by token", "MLP", {"target_modules": ["lin0"], "routing": "token"}),
    ("standardised", "MLP", {"target_modules": ["lin0"], "router_input": "standardised"}),
    ("transformers' Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "num_experts": 1}),
]
_TASK_TYPES = {
    "test_seq_classifier": "SEQ_CLS",
    "test_feature_extraction_models": "FEATURE_EXTRACTION",
}
_LISTED = yaml.safe_load((Path(__file__).parent / "listed.yaml").read_text()) or {}
_matched = set()


@dataclass
class _SmallConfig(BaditConfig):
    """For tests that give no options; BADIT's own 32 components do not fit a weight of 20 × 10."""

    num_experts: int = 2
    r: int = 1
    lora_alpha: float = 2


_own_post_init, _own_initialise = BaditConfig.__post_init__, ExpertLinear.initialise


def _post_init(self):
    """PEFT's tests pass ``init_weights=False``, so that an adapter changes the output at once."""
    self.gates = self.gates or "mean_one"  # they find no clusters of prompts
    if self.init_weights is False:
        self.init_weights, self._changes_output = BaditConfig.init_weights, True
    _own_post_init(self)


def _initialise(self, adapter_name):
    _own_initialise(self, adapter_name)
    if getattr(self.badit_config[adapter_name], "_changes_output", False):
        with torch.no_grad():
            for factors in (self.badit_A, self.badit_B):
                factors[adapter_name] += 0.1 * torch.randn_like(factors[adapter_name])


BaditConfig.__post_init__ = _post_init
ExpertLinear.initialise = _initialise


def _local_models(task):
    """A folder for each model; a classifier's has a head, which loading would draw again."""
    auto_class = getattr(
        transformers, f"AutoModelFor{'SequenceClassification' if task == 'SEQ_CLS' else 'CausalLM'}"
    )
    folder = Path(os.environ["PEFT_SUITE_MODELS"]) / auto_class.__name__
    for name, config in _MODELS.items():
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(0)
            auto_class.from_config(config()).save_pretrained(folder / name)
    return [pytest.param(str(folder / name), id=name) for name in _MODELS]


def _parameters(argnames, module):
    """The replacement of PEFT's parameters of these names in a module, or None."""
    names = argnames.replace(" ", "")
    if names == "test_name,model_id,config_cls,config_kwargs":
        return [
            (name, model, BaditConfig, {**_SMALL, **options}) for name, model, options in _CASES
        ]
    if names == "test_name,tuner_method,config_cls,config_kwargs_1,config_kwargs_2":
        first, second = (
            {**_SMALL, "init_weights": False, "target_modules": [name]} for name in ("lin0", "lin1")
        )
        return [
            ("same", "badit", BaditConfig, first, first),
            ("different", "badit", BaditConfig, first, second),
        ]
    task = _TASK_TYPES.get(module, "CAUSAL_LM")
    if names == "model_id":
        return _local_models(task)
    return {
        "config_cls": [_SmallConfig],
        "config_cls,config_kwargs": [(BaditConfig, {**_SMALL, "task_type": task})],
        "config_class,mandatory_kwargs": [(BaditConfig, {})],
    }.get(names)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    if not name.startswith("test") or not hasattr(obj, "pytestmark"):
        return
    marks = []
    for mark in obj.pytestmark:
        is_ours = mark.name == "parametrize" and isinstance(mark.args[0], str)
        ours = _parameters(mark.args[0], collector.path.stem) if is_ours else None
        marks.append(mark if ours is None else pytest.mark.parametrize(mark.args[0], ours).mark)
    obj.pytestmark = marks


def pytest_collection_modifyitems(config, items):
    values = {
        item: getattr(getattr(item, "callspec", None), "params", {}).values() for item in items
    }
    ours = [
        item
        for item in items
        if any(isinstance(v, type) and issubclass(v, BaditConfig) for v in values[item])
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours
    for item in ours:
        name = item.nodeid.rpartition("/")[2]
        key = next((key for key in (name, name.partition("[")[0]) if key in _LISTED), None)
        if key is not None:
            _matched.add(key)
            item.add_marker(pytest.mark.xfail(reason=_LISTED[key], strict=True))


def pytest_sessionfinish(session):
    unknown = _LISTED.keys() - _matched
    if unknown and not session.config.option.keyword and not session.config.option.collectonly:
        raise pytest.UsageError(f"listed.yaml names what is no test: {', '.join(sorted(unknown))}")

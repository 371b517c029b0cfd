"""PEFT knows the method by name, once, and not at another package's expense."""

import importlib
import json
import pickle

import pytest
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import badit.tuner
from badit.errors import BaditError
from badit.tuner import BaditConfig, BaditModel
from badit.tuner.config import peft_type
from badit.tuner.model import register
from tuner.helpers import config


def test_the_enum_member_is_like_any_other():
    member = peft_type()
    assert member is PeftType.BADIT is PeftType["BADIT"] is PeftType("BADIT")
    assert isinstance(member, PeftType)
    assert (member.name, member.value, str.__str__(member)) == ("BADIT", "BADIT", "BADIT")
    assert list(PeftType).count(member) == 1
    assert member in PeftType
    assert member != PeftType.LORA
    assert len({member, PeftType.LORA}) == 2
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "BADIT"}


def test_registering_again_changes_nothing():
    members = list(PeftType)
    register(BaditConfig, BaditModel)
    importlib.reload(badit.tuner)
    assert peft_type() is PeftType.BADIT
    assert list(PeftType) == members
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BADIT] is BaditConfig


def test_a_foreign_registration_under_the_name_is_refused(monkeypatch):
    foreign = type("ForeignConfig", (), {"__module__": "elsewhere.config"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.BADIT, foreign)
    with pytest.raises(BaditError, match=r"'badit' is already registered by elsewhere\.config; uninstall"):
        register(BaditConfig, BaditModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BADIT] is foreign


def test_every_option_round_trips_through_json(tmp_path):
    options = {
        "num_experts": 5, "r": 3, "lora_alpha": 7.5, "lora_dropout": 0.2, "target_modules": ["q_proj", "gate_proj"],
        "exclude_modules": ["lm_head"], "routing": "token", "gates": "softmax", "top_k": 2, "init_weights": "lora",
        "svd_method": "exact", "svd_tolerance": 0.01, "bias": "none", "modules_to_save": ["lm_head"],
        "layers_to_transform": [1], "layers_pattern": "layers",
    }  # fmt: skip
    config(**options).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, BaditConfig)
    for name, value in options.items():
        found = getattr(loaded, name)
        assert found == (set(value) if name in ("target_modules", "exclude_modules") else value), name

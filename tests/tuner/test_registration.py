"""PEFT knows the method by name, once, and not at another package's expense."""

import importlib
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import badit.tuner
from badit.errors import BaditError
from badit.tuner import BaditConfig, BaditModel
from badit.tuner.config import peft_type
from badit.tuner.model import register


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

"""PEFT knows the method by name, once, and another package's method of that name stays."""

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


def test_the_enum_member_is_like_any_other_and_made_once():
    members = list(PeftType)
    importlib.reload(badit.tuner)
    assert list(PeftType) == members
    member = peft_type()
    assert member is PeftType.BADIT is PeftType["BADIT"] is PeftType("BADIT")
    assert members.count(member) == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "BADIT"}


def test_a_foreign_registration_under_the_name_is_refused(monkeypatch):
    foreign = type("ForeignConfig", (), {"__module__": "elsewhere.config"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.BADIT, foreign)
    with pytest.raises(BaditError, match=r"'badit' is already registered by elsewhere\.config; uninstall"):
        register(BaditConfig, BaditModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BADIT] is foreign

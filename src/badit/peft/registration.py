"""Enters BADIT into PEFT's registry, at run time and without touching any of PEFT's files.

``peft.utils.register_peft_method`` is PEFT's own door for new methods, but it only opens to members of the ``PeftType``
enum, and PEFT offers no way to add one. So this module adds the member, the one thing here that reaches into PEFT.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from badit.errors import BaditError

_NAME = "BADIT"


def peft_type() -> PeftType:
    """The enum member ``PeftType.BADIT``, made on the first call."""
    if _NAME not in PeftType.__members__:
        member: Any = str.__new__(PeftType, _NAME)
        member._name_ = _NAME
        member._value_ = _NAME
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(_NAME)
        PeftType._member_map_[_NAME] = member
        PeftType._value2member_map_[_NAME] = member
        # EnumType refuses setattr on an enum class; `type` itself does not.
        type.__setattr__(PeftType, _NAME, member)
    return PeftType[_NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Registers the method once; importing twice is harmless.

    Raises:
        BaditError: another package, or a later PEFT, has registered a method of this name.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type())
    if registered is config_cls:
        return
    if registered is not None:
        raise BaditError(
            f"a PEFT method named 'badit' is already registered by {registered.__module__}; "
            "uninstall that package or this one"
        )
    register_peft_method(name=_NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix="badit_")

"""Enters a method into PEFT's registry, at run time and without touching any of PEFT's files.

``peft.utils.register_peft_method`` is PEFT's own door for new methods, but it only opens to members of the ``PeftType``
enum, and PEFT offers no way to add one. So this module adds the member, the one thing here that reaches into PEFT.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from badit.errors import BaditError


def peft_type(name: str = "BADIT") -> PeftType:
    """The enum member ``PeftType.<name>``, made on the first call."""
    if name not in PeftType.__members__:
        member: Any = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        # EnumType refuses setattr on an enum class; `type` itself does not.
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register(config_cls: Any, model_cls: Any) -> None:
    """Registers the method that ``config_cls.method`` names, once; importing twice is harmless.

    Raises:
        BaditError: another package, or a later PEFT, has registered a method of this name.
    """
    name = config_cls.method.lower()
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type(config_cls.method))
    if registered is config_cls:
        return
    if registered is not None:
        raise BaditError(
            f"a PEFT method named {name!r} is already registered by {registered.__module__}; "
            "uninstall that package or this one"
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)

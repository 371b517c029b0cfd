"""Checks of a saved adapter before PEFT loads it.

The folder may be damaged, belong to another run, or be untrusted. So its settings must equal the
run's: they cannot select the classes that are built, the modules that PEFT imports, or the memory
that is allocated. Pickled files are not read.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from badit.recipe.method import BOOKKEEPING
from badit.support.errors import BaditError, explained, first_line
from badit.support.files import read_json

Shapes = Mapping[str, tuple[int, ...]]

# Fields that PEFT fills in when it adapts the model.
_MAY_DIFFER = BOOKKEEPING | {"target_modules", "fan_in_fan_out"}


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of the tensors in a safetensors file.

    BaditError if it is missing or damaged.
    """
    if not path.is_file():
        fix = "pickled weights are not read; remove the folder to train again"
        raise BaditError(f"{path.parent}: has no {path.name}; {fix}")
    with explained(path, action="loaded", any_error=True), safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


def saved_config(path: Path, wanted: Any, shapes: Shapes) -> Any:
    """Returns a saved configuration.

    BaditError unless it equals ``wanted``, the run's, and its bookkeeping fields are valid.
    """
    saved = read_json(path)
    expected = _fields(wanted)
    config_class = type(wanted)
    try:
        settings = config_class.check_kwargs(**saved)  # refuses other formats
        _refuse_unknown(settings.keys() - expected.keys())
        config = config_class(**settings)
        # The file's own type, because the class sets peft_type whatever the file says.
        values = _fields(config) | {"peft_type": saved.get("peft_type")}
    except Exception as error:  # the values can have any type
        raise BaditError(f"{path}: {first_line(error)}") from None

    expected["peft_type"] = wanted.peft_type.value
    for key, value in expected.items():
        if key not in _MAY_DIFFER and values[key] != value:
            problem = f"is {values[key]!r:.60}, but the run's recipe says {value!r:.60}"
            raise BaditError(f"{path}: {key}: {problem}; this adapter belongs to another run")
    _refuse_regex(path, config.target_modules, wanted.target_modules)
    _refuse_sizes(path, config, shapes)
    return config


def _refuse_unknown(settings: set[str]) -> None:
    if settings:
        fix = "upgrade PEFT, or remove the line"
        raise BaditError(f"{min(settings)!r:.60}: is unknown to this version of PEFT; {fix}")


def _fields(config: Any) -> dict[str, Any]:
    """Returns a configuration's fields.

    target_parameters are sorted, because PEFT does not keep their order.
    """
    fields = config.to_dict()
    parameters = fields.get("target_parameters")
    if isinstance(parameters, list | set):
        fields["target_parameters"] = sorted(map(str, parameters)) or None
    return fields


def _refuse_regex(path: Path, names: Any, wanted: Any) -> None:
    # A regex is matched against every module name and can take exponential time, so only the
    # recipe's own is accepted.
    is_list = isinstance(names, set) and all(isinstance(name, str) for name in names)
    if not is_list and names not in (None, wanted):
        raise BaditError(f"{path}: target_modules: must be a list of names, not {names!r:.60}")


def _refuse_sizes(path: Path, config: Any, shapes: Shapes) -> None:
    """Raises BaditError if tensors would be created that are larger than those of the file."""
    # PEFT creates the tensors from the configuration before it reads the file's.
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for number in range(1, len(getattr(config, "extensions", ())) + 1):
        if not any(name.endswith(f".badit_extensions.A_{number}") for name in shapes):
            problem = f"has {len(config.extensions)} extensions, but {SAFETENSORS_WEIGHTS_NAME} has"
            raise BaditError(f"{path}: extensions: {problem} {number - 1}")
    for size in _sizes(config):
        if not isinstance(size, int):
            raise BaditError(f"{path}: {size!r:.60} must be a whole number, as it is a size")
        if size > largest:
            problem = f"no tensor of {SAFETENSORS_WEIGHTS_NAME} has it"
            raise BaditError(f"{path}: has the size {size!r:.60}, but {problem}")


def _sizes(config: Any) -> Iterator[int]:
    for name in ("past_branches", "num_components", "r"):
        yield getattr(config, name, 0)
    if getattr(config, "gates", None) == "clusters":
        yield config.num_clusters
    for extension in getattr(config, "extensions", ()):
        yield from (extension.rank, extension.clusters, extension.used, len(extension.tasks))
    ranks = getattr(config, "rank_pattern", None) or {}
    for rank in ranks.values():
        if isinstance(rank, int):
            yield rank

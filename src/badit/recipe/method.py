"""The method of a run: resolves a ``method`` section to a configuration with every default.

Imports torch and PEFT, unlike the other modules of this room.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_type_hints

from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from pydantic import TypeAdapter

from badit import presets
from badit.baselines import BASELINES, neurons
from badit.recipe.options import refuse_method, refuse_unknown_options
from badit.recipe.schema import Recipe
from badit.support.errors import BaditError
from badit.tuner.config import (
    FORMAT_FIELD,
    TOP_K_REFUSED,
    BaditConfig,
    ExpertConfig,
    RegroupOptions,
    described,
)
from badit.tuner.model import calls_during_training

# Fields of an adapter's configuration that badit or PEFT sets, not the recipe.
BOOKKEEPING = {
    "task_type",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "peft_version",
    "tasks",
    "past_branches",
    "stores_clusters",
    "extensions",
    "mixing",
    FORMAT_FIELD,
}
# auto_mapping names a module that PEFT would import.
_NOT_OPTIONS = BOOKKEEPING | {"peft_type", "auto_mapping", "runtime_config"}

SURGERY = ("pcgrad", "cagrad")  # LoRA with gradient surgery, see badit.training.surgery
# Values of init_lora_weights with which PEFT leaves the base weights unchanged.
_KEEP_BASE = (True, False, "gaussian", "orthogonal")
_NoOptions = dataclasses.make_dataclass("_NoOptions", ())


class Kind(NamedTuple):
    """What a method's name stands for."""

    config_class: type[Any]  # its fields are the method's options
    fixed: Mapping[str, Any] = {}  # the fields that the name sets
    trains: Literal["adapter", "base weights", "neurons", "nothing"] = "adapter"


#: All methods, by their names in a recipe.
KINDS: dict[str, Kind] = {
    **dict.fromkeys(presets.NAMES, Kind(BaditConfig)),
    **{name: Kind(*baseline) for name, baseline in BASELINES.items()},
    **dict.fromkeys(SURGERY, Kind(*BASELINES["lora"])),
    "task-neurons": Kind(neurons.NeuronOptions, trains="neurons"),
    "full": Kind(_NoOptions, trains="base weights"),
    "base": Kind(_NoOptions, trains="nothing"),
}
NAMES = list(KINDS)


@dataclasses.dataclass(frozen=True)
class ResolvedMethod:
    """A method's name and its configuration, with every default filled in."""

    name: str  # a key of KINDS; BADIT's is that of the nearest preset
    options: Any  # a PEFT configuration, or the options of a method that trains base weights
    regroup: RegroupOptions | None  # None: components are not regrouped during training
    #: The method section of the resolved recipe. PEFT's own configurations have the options that
    #: the recipe sets: their defaults are PEFT's, and adapter_config.json has all of them.
    section: Mapping[str, Any]

    @property
    def config(self) -> Any:
        """The PEFT configuration, or None for a method that adds no adapter."""
        return self.options if isinstance(self.options, PeftConfig) else None

    @property
    def title(self) -> str:
        """The name to show, for BADIT the one that its options have."""
        return presets.method_name(self.section)

    @property
    def is_badit(self) -> bool:
        return isinstance(self.options, BaditConfig)

    @property
    def trains(self) -> bool:
        return KINDS[self.name].trains != "nothing"

    @property
    def trains_base_weights(self) -> bool:
        return KINDS[self.name].trains in ("base weights", "neurons")

    @property
    def needs_tasks(self) -> bool:
        """Whether the task of every row must be known, in training and in inference."""
        return getattr(self.options, "needs_tasks", False)

    @property
    def needs_whole_weights(self) -> bool:
        """Whether the method cannot train sharded weights."""
        return getattr(self.options, "needs_whole_weights", False)

    @property
    def adds_tasks(self) -> bool:
        """Whether tasks can be added to a trained adapter, each with its own expert."""
        config = self.options
        if not isinstance(config, BaditConfig) or config.target_parameters:
            return False
        return config.routing == "prompt" and not config.is_released_form

    def refuse_recipe(self, recipe: Recipe) -> None:
        """Raises BaditError if another section of the recipe conflicts with the method."""
        if self.trains_base_weights:
            self._refuse_adapter_settings(recipe)
        if recipe.training.objective == "dpo":
            self._refuse_preferences(recipe)
        uses_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
        if self._grows(recipe) and _is_sharded():
            fix = "launch it without FSDP and DeepSpeed, as with DDP"
            raise BaditError(f"extend: adding a task needs unsharded weights; {fix}")
        if recipe.training.optimizer == "orthogonal" and uses_deepspeed:
            problem = "orthogonal cannot run with DeepSpeed; use FSDP2, DDP, adamw or lora+"
            raise BaditError(f"training.optimizer: {problem}")
        if self.regroup is not None and self.regroup.reset_smallest is not None:
            _refuse_resets(recipe, uses_deepspeed)
        if self.name in SURGERY:
            self._refuse_single_tasks(recipe)
        if KINDS[self.name].trains == "neurons" and recipe.training.weight_decay:
            problem = f"must be 0 with {self.name}; it would change frozen neurons too"
            raise BaditError(f"training.weight_decay: {problem}")

    def _grows(self, recipe: Recipe) -> bool:
        """Returns whether tasks are added to trained experts, or train some of them."""
        is_sequence = recipe.data.order is not None
        adds_stages = is_sequence and recipe.extend.own_experts and self.adds_tasks
        return recipe.extend.run is not None or adds_stages

    def _refuse_preferences(self, recipe: Recipe) -> None:
        """Raises BaditError if the run cannot be trained with ``objective: dpo``."""
        problem = self._problem_with_preferences
        if problem:
            fix = "use badit, cluster-gates, lora, dora, rslora, sapt or full"
            raise BaditError(f"method: {self.name} cannot be trained with DPO: {problem}; {fix}")
        dpo = "training.objective=dpo"
        if recipe.data.order is not None:
            raise BaditError(f"data.order: {dpo} trains all tasks together; remove one of them")
        if recipe.extend.run is not None:
            raise BaditError(f"extend: tasks cannot be added with {dpo}; train a new run")
        if _is_sharded():
            raise BaditError(f"{dpo}: needs unsharded weights; launch it with DDP")

    @property
    def _problem_with_preferences(self) -> str:
        if self.name in SURGERY or KINDS[self.name].trains == "neurons":
            return "it needs the loss of single answers"
        config = self.config
        if config is None:
            return ""
        if isinstance(config, LoraConfig) and config.init_lora_weights not in _KEEP_BASE:
            return "it changes the weights of the base model, which is the reference"
        if getattr(config, "bias", "none") != "none":
            return "TRL copies the adapter, and PEFT trains the biases (bias) of one adapter only"
        calls = calls_during_training(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)])
        if calls:
            return f"TRL's trainer does not call its {', '.join(calls)}"
        return ""

    def _refuse_single_tasks(self, recipe: Recipe) -> None:
        # With one task per micro-batch, the run would be plain LoRA.
        if recipe.data.order is not None:
            fix = "train without an order of tasks"
            raise BaditError(f"method: {self.name} needs several tasks at a time; {fix}")
        if recipe.training.per_device_train_batch_size == 1:
            problem = f"1 has one task for {self.name}"
            fix = "raise it, and lower training.gradient_accumulation_steps"
            raise BaditError(f"training.per_device_train_batch_size: {problem}; {fix}")

    def _refuse_adapter_settings(self, recipe: Recipe) -> None:
        training = recipe.training
        # Base weights in float16 would need loss scaling, which badit does not use.
        if recipe.model.dtype == "float16":
            problem = "base weights cannot be trained in float16"
            raise BaditError(f"model.dtype: {problem}; use bfloat16 with {self.name}")
        if recipe.model.quantisation:
            problem = f"{self.name} cannot train quantised base weights"
            raise BaditError(f"model.quantisation: {problem}; remove this key")
        if training.optimizer != "adamw":
            problem = f"{training.optimizer} trains only adapters"
            raise BaditError(f"training.optimizer: {problem}; use adamw for {self.name}")
        if training.router_lr_ratio != 1:
            problem = f"{self.name} has no router; leave it out for this method"
            raise BaditError(f"training.router_lr_ratio: {problem}")
        if "learning_rate" not in training.model_fields_set:
            problem = f"the default is for adapters; set it for {self.name}, as 2.0e-5"
            raise BaditError(f"training.learning_rate: {problem}")


def _is_sharded() -> bool:
    return any(map(parse_flag_from_env, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")))


def _refuse_resets(recipe: Recipe, uses_deepspeed: bool) -> None:
    """Raises BaditError if the optimizer's moments of a component cannot be reset."""
    if recipe.training.optimizer == "orthogonal" or uses_deepspeed:
        fix = "use adamw or lora+, without DeepSpeed"
        raise BaditError(f"method.regroup.reset_smallest: resets Adam's moments; {fix}")


def resolve_method(section: Mapping[str, Any]) -> ResolvedMethod:
    """Resolves a ``method`` section; BaditError for an unknown name or option, or a bad value."""
    refuse_method(section)
    options = dict(section)
    name = options.pop("name", "badit")
    kind = KINDS[name]
    regroup = None
    if name in presets.NAMES:
        options = presets.with_preset({"name": name, **options})
        regroup = _take_regroup(options)
    config = _built(name, kind, options)
    if regroup is not None:
        regroup = _fitted(regroup, config)

    # See ResolvedMethod.section for the methods of PEFT.
    if isinstance(config, PeftConfig) and not isinstance(config, ExpertConfig):
        resolved = {"name": name, **options}
    else:
        resolved = {"name": name, **_option_values(config, kind)}
    if name in presets.NAMES:
        resolved["regroup"] = None if regroup is None else dataclasses.asdict(regroup)
        # The options decide the method: the same options have the same name.
        name = presets.preset_name(resolved)
        resolved["name"] = name
    return ResolvedMethod(name, config, regroup, resolved)


def _take_regroup(options: dict[str, Any]) -> RegroupOptions | None:
    """Removes regroup from BADIT's options, and returns the regrouping."""
    regroup = options.pop("regroup", None)
    if regroup is None:
        return None
    if not isinstance(regroup, dict):
        form = "must be a mapping such as {every: 20}, or null to train without DOG"
        raise BaditError(f"method.regroup: {form}")
    return _built("regroup", Kind(RegroupOptions), regroup, "method.regroup")


def _fitted(regroup: RegroupOptions, config: BaditConfig) -> RegroupOptions:
    """Returns the options with their defaults for an adapter; BaditError if they conflict."""
    if config.top_k is not None and config.top_k < config.num_experts:
        raise BaditError(f"method.regroup: {TOP_K_REFUSED} (regroup: null)")
    try:
        return regroup.fitted_to(config)
    except BaditError as error:  # begins with regroup.OPTION
        raise BaditError(f"method.{error}") from None


def _built(name: str, kind: Kind, options: Mapping[str, Any], place: str = "method") -> Any:
    """Builds a configuration; errors begin with ``place`` and the option's name."""
    fields = dataclasses.fields(kind.config_class)
    allowed = {field.name for field in fields if field.init} - _NOT_OPTIONS - kind.fixed.keys()
    refuse_unknown_options(name, options, sorted(allowed), place)
    fixed = dict(kind.fixed)
    if issubclass(kind.config_class, PeftConfig):
        # badit trains causal language models only; PEFT's wrapper depends on this type.
        fixed["task_type"] = "CAUSAL_LM"
    try:
        return kind.config_class(**fixed, **options)
    except BaditError as error:  # begins with the option's name
        raise BaditError(f"method.{error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise BaditError(f"method: {error}") from None


def _option_values(config: Any, kind: Kind) -> dict[str, Any]:
    values = {}
    for name, _, _ in described(kind.config_class):
        if name in _NOT_OPTIONS or name in kind.fixed:
            continue
        value = getattr(config, name)
        # The configurations turn lists of modules into sets, which are not plain YAML.
        values[name] = sorted(value) if isinstance(value, set) else value
    return values


def option_types(name: str) -> dict[str, Any]:
    """Returns the JSON schemas of badit's own options of a method; PEFT does not check its own."""
    config_class = KINDS[name].config_class
    kinds: dict[str, Any] = {}
    if issubclass(config_class, ExpertConfig | neurons.NeuronOptions):
        kinds |= _schemas(config_class)
    if name in presets.NAMES:
        schemas = _schemas(RegroupOptions)
        kinds |= {f"regroup.{key}": schema for key, schema in schemas.items()}
    return kinds


def _schemas(config_class: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(config_class, include_extras=True)
    names = [name for name, _, _ in described(config_class)]
    return {name: TypeAdapter(hints[name]).json_schema() for name in names}


def options_of(name: str) -> list[tuple[str, Any, str]]:
    """Returns the name, default and description of each option of a method."""
    kind = KINDS[name]
    hidden = _NOT_OPTIONS | kind.fixed.keys()
    options = [option for option in described(kind.config_class) if option[0] not in hidden]
    if name not in presets.NAMES:
        return options
    if name == "badit":
        options.append(("preset", "default", "'released': the form of the paper's released code."))
    meaning = "Regroup components (DOG), with the options below or {} (default: do not)."
    options.append(("regroup", None, meaning))
    options += [
        (f"regroup.{key}", default, text) for key, default, text in described(RegroupOptions)
    ]
    return options

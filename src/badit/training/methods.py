"""Methods: built from a recipe's ``method`` section, applied to a base model, saved and loaded.

Methods that add a PEFT adapter and methods that train the base model's weights have the same interface.
"""

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast, get_args

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from badit.baselines import BASELINES, Baseline, neurons
from badit.models import load_skeleton
from badit.recipe.schema import Recipe
from badit.runs.folder import RunFolder
from badit.support.errors import BaditError, explained, first_line, nearest
from badit.support.files import read_json
from badit.training.regrouping import TOP_K_REFUSED, AngleLog, RegroupCallback, RegroupOptions
from badit.training.surgery import Surgery, SurgeryTrainer
from badit.training.trainer import AnswerTrainer
from badit.tuner.config import FORMAT_FIELD, RETIRED_FIELDS, BaditConfig, described
from badit.tuner.distributed import parameter_count, rank_and_size
from badit.tuner.model import TaskBatches, hooks_of
from badit.tuner.targets import chosen_targets

# Fields of an adapter's configuration that badit or PEFT sets, not the recipe.
_BOOKKEEPING = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "tasks",
                "past_branches", FORMAT_FIELD}  # fmt: skip
_INTERNAL = _BOOKKEEPING | {
    "peft_type",
    "auto_mapping",
    "runtime_config",
}  # not options of a recipe
_MAY_DIFFER = _BOOKKEEPING | {
    "target_modules",
    "fan_in_fan_out",
    "num_clusters",
}  # from a recipe to an adapter
WEIGHTS = "weights.safetensors"
Tensors = Mapping[str, torch.Tensor]


class Method:
    """The interface of all methods. The class itself is the method ``base``, the unchanged base model as a baseline."""

    trains_base_weights = False  # if True, the base weights are loaded in float32

    def __init__(
        self, name: str, options: Any = None, regroup: dict[str, Any] | None = None
    ) -> None:
        self.name, self.options, self.regroup = name, options, regroup
        self.trains = name != "base"
        self.config: Any = (
            options if isinstance(options, PeftConfig) else None
        )  # of methods that train an adapter
        self.needs_whole_weights = getattr(
            options, "needs_whole_weights", False
        )  # see ExpertConfig
        self.needs_tasks = getattr(options, "needs_tasks", False)

    def refuse_recipe(self, recipe: Recipe) -> None:
        """Raises BaditError if another section of the recipe conflicts with the method."""
        if recipe.training.optimizer == "orthogonal" and parse_flag_from_env(
            "ACCELERATE_USE_DEEPSPEED"
        ):
            raise BaditError(
                "training.optimizer: orthogonal cannot run with DeepSpeed; use FSDP2, DDP, adamw or lora+"
            )

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> Any:
        """Prepares the base model for its first training; ``tasks`` are the names of all tasks."""
        return model

    def proceed(self, model: PreTrainedModel, folder: Path) -> Any:
        """Loads what :meth:`save` wrote to ``folder``, and prepares the model for the next task of a sequence."""
        loaded = self.load(model, folder, trainable=True)
        hooks_of(loaded).next_task()
        return loaded

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
        """Loads what :meth:`save` wrote to ``folder``, by default for inference; BaditError if it is damaged."""
        return model

    def save(
        self, model: Any, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        """Saves the trained weights; ``base_model`` is its name in the recipe, ``weights`` replace a model's shards."""

    def trained_parameters(self, model: Any) -> int:
        """Returns the number of trainable parameters of a model prepared by :meth:`apply`."""
        return (
            sum(parameter_count(p) for p in model.parameters() if p.requires_grad)
            if self.trains
            else 0
        )

    def before_training(self, model: Any, batches: TaskBatches) -> None:
        """Called before training, also before that of a resumed run, with the training batches of each task."""

    def callbacks(self, run: RunFolder) -> list[TrainerCallback]:
        return []

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        return AnswerTrainer(**arguments)


class AdapterMethod(Method):
    """A method that trains a PEFT adapter; the base weights are frozen."""

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> PeftModel:
        """Adds the adapter. All methods have the same default target modules; some also need the tasks' names."""
        config: Any = self.config
        if isinstance(self.config, LoraConfig) and any(
            isinstance(module, Conv1D) for module in model.modules()
        ):
            if (
                config.init_lora_weights == "olora"
            ):  # PEFT does not transpose its weight before the QR
                raise BaditError(
                    "method: PEFT's olora cannot adapt this model's Conv1D layers; use pissa instead"
                )
            config.fan_in_fan_out = True  # PEFT would set this too, with a warning
        if self.needs_tasks:
            config.tasks = list(tasks)
        config.target_modules = chosen_targets(model, config)
        if config.target_modules is None:
            raise BaditError(
                f"method.target_modules: name the modules to adapt in a {model.config.model_type}"
            )
        try:
            return get_peft_model(model, config)  # pyright: ignore[reportReturnType] (never a PeftMixedModel)
        except BaditError:
            raise
        except re.error as error:
            field = (
                "exclude_modules" if error.pattern == config.exclude_modules else "target_modules"
            )
            raise BaditError(f"method.{field}: is not a regular expression ({error})") from None
        # Modules that do not exist, a rank that does not fit in memory, or an option of PEFT with an invalid value.
        except Exception as error:
            raise BaditError(f"method: {first_line(error)}") from error

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
        """Loads an adapter saved by a run of this method into the base model, after checking it.

        The folder may be damaged, belong to another run, or be untrusted. So its settings must equal the recipe's: they
        cannot select the classes that are built, the modules that PEFT imports, or the memory that is allocated.
        Pickled files are not read.
        """
        shapes = _tensor_shapes(
            folder / SAFETENSORS_WEIGHTS_NAME
        )  # if it is missing, PEFT would load a pickled file
        wanted = copy.deepcopy(self.config)
        convert_peft_config_for_transformers(
            wanted, model, None
        )  # as PEFT did before training, for fused experts
        config = _saved_config(folder / CONFIG_NAME, wanted, shapes)
        with explained(folder, action="loaded", any_error=True), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(
                model, str(folder), config=config, is_trainable=trainable
            )
            loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if not all(tensor.isfinite().all() for tensor in loaded.values()):
            fix = "train again with a lower training.learning_rate"
            raise BaditError(
                f"{folder}: holds NaN or infinite values: its training has diverged; {fix}"
            )
        if unknown := sorted(shapes.keys() - loaded.keys()):
            other = f"belongs to another base model or method, because it has the tensor {unknown[0]!r:.120}"
            raise BaditError(f"{folder}: {other}; use the base model that it was trained on")
        return adapted if trainable else adapted.eval()

    def save(
        self, model: PeftModel, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        # The recipe's name: the model's own may be a local cache folder. save_embedding_layers=False: embeddings are
        # frozen, and PEFT would look up this name on the hub to decide whether to save them.
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)

    def callbacks(self, run: RunFolder) -> list[TrainerCallback]:
        if self.regroup is not None:
            return [RegroupCallback(**self.regroup, log_path=run.regroupings_path)]
        # One expert, or experts that share one A, have no angles.
        has_angles = getattr(self.config, "num_experts", 1) > 1 and not self.config.shares_A
        return [AngleLog(run.angles_path)] if has_angles else []


class SurgeryMethod(AdapterMethod):
    """PEFT's LoRA with gradient surgery between the tasks of a micro-batch: pcgrad and cagrad."""

    def refuse_recipe(self, recipe: Recipe) -> None:
        super().refuse_recipe(recipe)
        # With one task per micro-batch, the run would be plain LoRA.
        if recipe.data.order is not None:
            raise BaditError(
                f"method: {self.name} needs several tasks at a time; train without an order of tasks"
            )
        if recipe.training.per_device_train_batch_size == 1:
            fix = "raise it, and lower training.gradient_accumulation_steps"
            raise BaditError(
                f"training.per_device_train_batch_size: 1 has one task for {self.name}; {fix}"
            )

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        return SurgeryTrainer(surgery=cast("Surgery", self.name), **arguments)


class WeightsMethod(Method):
    """Full fine-tuning: all weights of the base model are trained in float32 and saved."""

    trains_base_weights = True

    def refuse_recipe(self, recipe: Recipe) -> None:
        if recipe.model.dtype == "float16":
            raise BaditError(
                f"model.dtype: base weights cannot be trained in float16; use bfloat16 with {self.name}"
            )
        if recipe.model.quantisation:
            raise BaditError(
                f"model.quantisation: {self.name} cannot train quantised base weights; remove this key"
            )
        if recipe.training.optimizer != "adamw":
            other = recipe.training.optimizer
            raise BaditError(
                f"training.optimizer: {other} trains only adapters; use adamw for {self.name}"
            )
        if recipe.training.router_lr_ratio != 1:
            raise BaditError(
                f"training.router_lr_ratio: {self.name} has no router; leave it out for this method"
            )
        if "learning_rate" not in recipe.training.model_fields_set:
            raise BaditError(
                f"training.learning_rate: the default is for adapters; set it for {self.name}, as 2.0e-5"
            )

    def load(
        self, model: PreTrainedModel, folder: Path, *, trainable: bool = False
    ) -> PreTrainedModel:
        path = folder / WEIGHTS
        shapes = _tensor_shapes(path)
        known = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        if unknown := [name for name in shapes if shapes[name] != known.get(name)]:
            raise BaditError(
                f"{path}: belongs to another base model; use the one with the weight {unknown[0]!r:.120}"
            )
        if missing := sorted(self._saved_names(model) - shapes.keys()):
            raise BaditError(
                f"{path}: has no weight {missing[0]}; remove the folder to train it again"
            )
        with explained(path, action="loaded", any_error=True):
            model.load_state_dict(load_file(path), strict=False)
        return model if trainable else model.eval()

    def _saved_names(self, model: PreTrainedModel) -> set[str]:
        """Returns the names of the weights that a saved file must have."""
        return {name for name, _ in model.named_parameters()}

    def save(
        self, model: PreTrainedModel, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        trained = {
            name: (weights or {}).get(name, p).detach().contiguous() for name, p in trained.items()
        }
        # A single metadata entry, because safetensors writes several in a random order.
        origin = json.dumps({"base_model": base_model, "method": self.name})
        save_file(trained, folder / WEIGHTS, metadata={"badit": origin})


def _tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the names and shapes of the tensors in a safetensors file; BaditError if it is missing or damaged."""
    if not path.is_file():
        fix = "pickled weights are not read; remove the folder to train again"
        raise BaditError(f"{path.parent}: has no {path.name}; {fix}")
    with explained(path, action="loaded", any_error=True), safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a dict)


def _fields(config: Any) -> dict[str, Any]:
    """Returns a configuration's fields; target_parameters, of which PEFT does not keep the order, sorted."""
    fields = config.to_dict()
    if isinstance(names := fields.get("target_parameters"), list | set):
        fields["target_parameters"] = sorted(map(str, names)) or None
    return fields


def _saved_config(path: Path, wanted: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """Returns a saved configuration; BaditError unless it equals the recipe's and its bookkeeping fields are valid."""
    saved, kind, expected = read_json(path), type(wanted), _fields(wanted)
    try:
        config = kind(
            **kind.check_kwargs(**{key: saved[key] for key in saved.keys() & expected.keys()})
        )
        found = _fields(config) | {"peft_type": saved.get("peft_type")}
    except Exception as error:  # values of any type
        raise BaditError(f"{path}: {first_line(error)}") from None
    if unknown := sorted(saved.keys() - expected.keys() - RETIRED_FIELDS):
        fix = "upgrade PEFT, or remove the line"
        raise BaditError(f"{path}: {unknown[0]!r:.60}: is unknown to this version of PEFT; {fix}")
    for key, value in (expected | {"peft_type": wanted.peft_type.value}).items():
        if key not in _MAY_DIFFER and found[key] != value:
            differs = f"is {found[key]!r:.60}, but the run's recipe says {value!r:.60}"
            raise BaditError(f"{path}: {key}: {differs}; this adapter belongs to another run")
    # A regex is matched against every module name and can take exponential time, so only the recipe's own is accepted.
    names = config.target_modules
    is_list = isinstance(names, set) and all(isinstance(name, str) for name in names)
    if not is_list and names not in (None, wanted.target_modules):
        raise BaditError(f"{path}: target_modules: must be a list of names, not {names!r:.60}")
    # The sizes of the tensors that are created before those of the file are read.
    sizes = [getattr(config, name, 0) for name in ("past_branches", "num_components", "r")]
    sizes += [config.num_clusters] if getattr(config, "gates", None) == "clusters" else []
    sizes += [
        rank
        for rank in (getattr(config, "rank_pattern", None) or {}).values()
        if isinstance(rank, int)
    ]
    if (size := max(sizes)) > max(chain([0], *shapes.values())):
        raise BaditError(
            f"{path}: has the size {size!r:.60}, but no tensor of {SAFETENSORS_WEIGHTS_NAME} has it"
        )
    return config


class NeuronMethod(WeightsMethod):
    """Task neurons: trains only the weights of the FFN neurons with the highest scores on the stage's tasks."""

    _masks: dict[str, torch.Tensor] | None = None  # None until the neurons are selected

    def refuse_recipe(self, recipe: Recipe) -> None:
        super().refuse_recipe(recipe)
        if recipe.training.weight_decay:
            raise BaditError(
                "training.weight_decay: must be 0 with task-neurons; it would change frozen neurons too"
            )

    def trained_parameters(self, model: PreTrainedModel) -> int:
        """Returns the number for one task until the neurons are selected; then the exact number for all tasks."""
        count = sum(neurons.trained_parameters(model, self._masks).values())
        return round(self.options.share * count) if self._masks is None else count

    def _saved_names(self, model: PreTrainedModel) -> set[str]:
        return (
            super()._saved_names(model) & neurons.trained_parameters(model).keys()
        )  # tied weights have one name

    def before_training(self, model: PreTrainedModel, batches: TaskBatches) -> None:
        used = [
            islice(of_task, self.options.score_batches * rank_and_size()[1])
            for of_task in batches.values()
        ]
        scores = [neurons.neuron_scores(model, of_task) for of_task in used]
        masks = [neurons.top_neurons(of_task, self.options.share) for of_task in scores]
        self._masks = {
            name: torch.stack([mask[name] for mask in masks]).any(dim=0) for name in masks[0]
        }
        neurons.train_only(model, self._masks)


def build_method(section: Mapping[str, Any]) -> Method:
    """Builds the method of a ``method`` section; BaditError for an unknown name or option, or an invalid value."""
    options = dict(section)
    name = options.pop("name", "badit")
    if name not in NAMES:
        raise BaditError(
            f"method.name: unknown method {name!r:.60}{nearest(name, NAMES)}; known: {', '.join(NAMES)}"
        )
    kind = KINDS[name]
    for key in options.keys() & RETIRED_FIELDS:
        raise BaditError(f"method.{key}: this option was removed and had no effect; delete it")
    for key in options.keys() & kind.fixed.keys():
        raise BaditError(
            f"method.{key}: is set by the method name {name} (to {kind.fixed[key]}); delete it"
        )
    regroup = None
    if name == "badit":
        if (preset := options.pop("preset", "default")) not in ("default", "paper"):
            raise BaditError(f"method.preset: must be default or paper, got {preset!r:.60}")
        regroup = options.pop("regroup", {} if preset == "paper" else None)
        if regroup is not None and not isinstance(regroup, dict):
            raise BaditError(
                "method.regroup: must be a mapping such as {every: 20}, or null to train without DOG"
            )
        if preset == "paper":
            options = {**BaditConfig.PAPER, **options}
            regroup = None if regroup is None else {**RegroupOptions.PAPER, **regroup}
    initial = str(options.get("init_lora_weights"))
    if initial.startswith("pissa_niter"):
        raise BaditError(
            "method.init_lora_weights: pissa_niter is random, and loading would repeat it; use pissa"
        )
    if initial in ("eva", "lora_ga"):
        raise BaditError(
            f"method.init_lora_weights: {initial} needs a pass over data; use another value, such as true"
        )
    if isinstance(
        kept := options.get("modules_to_save"), str
    ):  # PEFT would match each of its letters
        raise BaditError(f"method.modules_to_save: must be a list, such as [{kept:.60}]")
    if kept and options.get("ensure_weight_tying"):  # PEFT would change the list
        raise BaditError(
            "method.ensure_weight_tying: cannot be used with modules_to_save; name all modules there"
        )
    built = _built(name, kind.config_cls, options, kind.fixed)
    if regroup is not None:
        _built("regroup", RegroupOptions, regroup, {}, "method.regroup")
        if built.top_k is not None and built.top_k < built.num_experts:
            raise BaditError(f"method.regroup: {TOP_K_REFUSED} (regroup: null)")
    return _CLASSES.get(name, AdapterMethod)(name, built, regroup)


_CLASSES = {"task-neurons": NeuronMethod, "full": WeightsMethod, "base": Method}
_CLASSES |= dict.fromkeys(get_args(Surgery), SurgeryMethod)
_NoOptions = dataclasses.make_dataclass("_NoOptions", ())  # of methods without options

#: The configuration of every method, by the method's name in a recipe.
KINDS: dict[str, Baseline] = {
    "badit": Baseline(BaditConfig),
    **BASELINES,
    **dict.fromkeys(get_args(Surgery), BASELINES["lora"]),
    "task-neurons": Baseline(neurons.NeuronOptions),
    "full": Baseline(_NoOptions),
    "base": Baseline(_NoOptions),
}
NAMES = list(KINDS)


def options_of(name: str) -> list[tuple[str, Any, str]]:
    """Returns the name, default and description of each option of a method."""
    kind = KINDS[name]
    options = [
        one for one in described(kind.config_cls) if one[0] not in _INTERNAL | kind.fixed.keys()
    ]
    if name == "badit":
        options.append(("preset", "default", "'paper': the paper's exact form."))
        options.append(
            (
                "regroup",
                None,
                "Regroup components (DOG), with the options below or {} (default: do not).",
            )
        )
        options += [
            (f"regroup.{key}", default, text) for key, default, text in described(RegroupOptions)
        ]
    return options


def on_skeleton(recipe: Recipe, tasks: Sequence[str], dtype: str = "float32") -> tuple[Method, Any]:
    """Returns a recipe's method, and its base model on the meta device with the method applied, to count and check."""
    model = load_skeleton(**recipe.model.model_dump(exclude={"dtype", "quantisation"}), dtype=dtype)
    method = build_method(recipe.method)
    with torch.device("meta"):
        return method, method.apply(model, tasks)


def _built(
    name: str,
    kind: type,
    options: Mapping[str, Any],
    fixed: Mapping[str, Any],
    place: str = "method",
) -> Any:
    known = (
        {field.name for field in dataclasses.fields(kind) if field.init} - _INTERNAL - fixed.keys()
    )
    for key in options:
        if key not in known:
            raise BaditError(
                f"{place}.{key}: {name} has no such option{nearest(key, known)}; see: badit keys method"
            )
    of_peft = {"task_type": "CAUSAL_LM"} if issubclass(kind, PeftConfig) else {}
    try:
        return kind(**of_peft, **fixed, **options)
    except BaditError as error:  # begins with the option's name
        raise BaditError(f"method.{error}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise BaditError(f"method: {error}") from None

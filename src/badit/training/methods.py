"""Applies a method to a base model, and saves and loads what it trains.

Methods that add a PEFT adapter and methods that train the base model's weights have the same
interface.
"""

import copy
import dataclasses
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainerCallback
from transformers.pytorch_utils import Conv1D

from badit.baselines import neurons
from badit.models import load_skeleton
from badit.recipe.method import KINDS, SURGERY, ResolvedMethod
from badit.recipe.schema import Recipe
from badit.runs.folder import RunFolder
from badit.support.errors import BaditError, explained, first_line
from badit.training.regrouping import RegroupCallback
from badit.training.saved_adapters import saved_config, tensor_shapes
from badit.training.surgery import Surgery, SurgeryTrainer
from badit.training.trainer import AnswerTrainer
from badit.tuner.config import ExpertConfig
from badit.tuner.distributed import parameter_count, rank_and_size
from badit.tuner.model import TaskBatches, hooks_of
from badit.tuner.targets import chosen_targets

WEIGHTS = "weights.safetensors"
Tensors = Mapping[str, torch.Tensor]


class Method:
    """The interface of all methods. The class itself is ``base``, the unchanged base model."""

    def __init__(self, resolved: ResolvedMethod) -> None:
        self.resolved = resolved
        self.name = resolved.name
        self.options = resolved.options

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> Any:
        """Prepares the base model for its first training; ``tasks`` has all tasks' names."""
        return model

    def proceed(self, model: PreTrainedModel, folder: Path) -> Any:
        """Loads what :meth:`save` wrote, and prepares the model for the next task of a sequence."""
        loaded = self.load(model, folder, trainable=True)
        hooks_of(loaded).next_task()
        return loaded

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> Any:
        """Loads what :meth:`save` wrote, by default for inference; BaditError if damaged."""
        return model

    def save(
        self, model: Any, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        """Saves the trained weights.

        ``base_model`` is its name in the recipe; ``weights`` replace the shards of a model.
        """

    def trained_parameters(self, model: Any) -> int:
        """Returns the number of trainable parameters of a model prepared by :meth:`apply`."""
        if not self.resolved.trains:
            return 0
        return sum(parameter_count(p) for p in model.parameters() if p.requires_grad)

    def before_training(self, model: Any, batches: TaskBatches) -> None:
        """Called before training, also of a resumed run, with the training batches by task."""

    def callbacks(self, folder: RunFolder) -> list[TrainerCallback]:
        return []

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        return AnswerTrainer(**arguments)


class AdapterMethod(Method):
    """A method that trains a PEFT adapter; the base weights are frozen."""

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> PeftModel:
        """Adds the adapter. All methods have the same default target modules."""
        # A copy, because PEFT fills in fields, such as the target modules.
        config: Any = copy.deepcopy(self.options)
        if isinstance(self.options, LoraConfig):
            _fit_to_conv1d(config, model)
        if self.resolved.needs_tasks or self.resolved.adds_tasks:
            config.tasks = list(tasks)
        if not isinstance(config, ExpertConfig):  # whose targets the tuner chooses
            config.target_modules = chosen_targets(model, config)
            if config.target_modules is None:
                fix = f"name the modules to adapt in a {model.config.model_type}"
                raise BaditError(f"method.target_modules: {fix}")
        try:
            return get_peft_model(model, config)  # pyright: ignore[reportReturnType]
        except BaditError:
            raise
        except re.error as error:
            is_excluded = error.pattern == config.exclude_modules
            field = "exclude_modules" if is_excluded else "target_modules"
            raise BaditError(f"method.{field}: is not a regular expression ({error})") from None
        # Modules that do not exist, a rank that does not fit in memory, an invalid option of PEFT.
        except Exception as error:
            raise BaditError(f"method: {first_line(error)}") from error

    def load(self, model: PreTrainedModel, folder: Path, *, trainable: bool = False) -> PeftModel:
        """Loads an adapter saved by a run of this method, after checking it."""
        # If this file is missing, PEFT would load a pickled one.
        shapes = tensor_shapes(folder / SAFETENSORS_WEIGHTS_NAME)
        wanted = copy.deepcopy(self.options)
        # As PEFT did before training, for fused experts.
        convert_peft_config_for_transformers(wanted, model, None)
        config = saved_config(folder / CONFIG_NAME, wanted, shapes)
        # As PEFT names it before training. For the recipe's name, which is saved, PEFT would ask
        # the hub whenever a checkpoint is written.
        config.base_model_name_or_path = model.name_or_path
        with explained(folder, action="loaded", any_error=True), warnings.catch_warnings():
            # PEFT only warns of missing tensors, which would keep their initial values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(
                model, str(folder), config=config, is_trainable=trainable
            )
            loaded = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        if not all(tensor.isfinite().all() for tensor in loaded.values()):
            problem = "holds NaN or infinite values: its training has diverged"
            fix = "train again with a lower training.learning_rate"
            raise BaditError(f"{folder}: {problem}; {fix}")
        # PEFT ignores tensors that the model has no place for.
        unknown = sorted(shapes.keys() - loaded.keys())
        if unknown:
            reason = f"because it has the tensor {unknown[0]!r:.120}"
            fix = "use the base model that it was trained on"
            raise BaditError(f"{folder}: belongs to another base model or method, {reason}; {fix}")
        return adapted if trainable else adapted.eval()

    def save(
        self, model: PeftModel, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        # The recipe's name: the model's own may be a local cache folder.
        model.peft_config["default"].base_model_name_or_path = base_model
        # Embeddings are frozen, and PEFT would look up the name on the hub to decide whether to
        # save them.
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)

    def callbacks(self, folder: RunFolder) -> list[TrainerCallback]:
        regroup = self.resolved.regroup
        if regroup is None:
            return []
        options = dataclasses.asdict(regroup)
        return [RegroupCallback(**options, log_path=folder.regroupings_path)]


def _fit_to_conv1d(config: LoraConfig, model: PreTrainedModel) -> None:
    """Adapts the configuration of PEFT's LoRA to a model with Conv1D layers."""
    if not any(isinstance(module, Conv1D) for module in model.modules()):
        return
    if config.init_lora_weights == "olora":  # PEFT does not transpose its weight
        problem = "PEFT's olora cannot adapt this model's Conv1D layers"
        raise BaditError(f"method: {problem}; use pissa instead")
    config.fan_in_fan_out = True  # PEFT would set this too, with a warning


class SurgeryMethod(AdapterMethod):
    """PEFT's LoRA with gradient surgery between the tasks of a micro-batch."""

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        return SurgeryTrainer(surgery=cast("Surgery", self.name), **arguments)


class WeightsMethod(Method):
    """Full fine-tuning: all weights of the base model are trained in float32 and saved."""

    def load(
        self, model: PreTrainedModel, folder: Path, *, trainable: bool = False
    ) -> PreTrainedModel:
        path = folder / WEIGHTS
        shapes = tensor_shapes(path)
        expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        unknown = [name for name in shapes if shapes[name] != expected.get(name)]
        if unknown:
            fix = f"use the one with the weight {unknown[0]!r:.120}"
            raise BaditError(f"{path}: belongs to another base model; {fix}")
        missing = sorted(self._saved_names(model) - shapes.keys())
        if missing:
            raise BaditError(
                f"{path}: has no weight {missing[0]}; remove the folder to train it again"
            )
        with explained(path, action="loaded", any_error=True):
            # Not strict: the file has no buffers and, for task neurons, no frozen weights.
            model.load_state_dict(load_file(path), strict=False)
        return model if trainable else model.eval()

    def _saved_names(self, model: PreTrainedModel) -> set[str]:
        """Returns the names of the weights that a saved file must have."""
        return {name for name, _ in model.named_parameters()}

    def save(
        self, model: PreTrainedModel, folder: Path, base_model: str, weights: Tensors | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        weights = weights or {}
        trained = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                trained[name] = weights.get(name, parameter).detach().contiguous()
        # A single metadata entry, because safetensors writes several in a random order.
        origin = json.dumps({"base_model": base_model, "method": self.name})
        save_file(trained, folder / WEIGHTS, metadata={"badit": origin})


class NeuronMethod(WeightsMethod):
    """Task neurons: trains only the weights of the FFN neurons with the highest scores."""

    _masks: dict[str, torch.Tensor] | None = None  # None until the neurons are selected

    def trained_parameters(self, model: PreTrainedModel) -> int:
        """Returns the number for one task until the neurons are selected; then that for all."""
        count = sum(neurons.trained_parameters(model, self._masks).values())
        if self._masks is None:
            return round(self.options.share * count)
        return count

    def _saved_names(self, model: PreTrainedModel) -> set[str]:
        # Tied weights have one name.
        return super()._saved_names(model) & neurons.trained_parameters(model).keys()

    def before_training(self, model: PreTrainedModel, batches: TaskBatches) -> None:
        # The batches of all ranks, which every rank runs, so that all have the same masks.
        count = self.options.score_batches * rank_and_size()[1]
        masks = []
        for batches_of_task in batches.values():
            scores = neurons.neuron_scores(model, islice(batches_of_task, count))
            masks.append(neurons.top_neurons(scores, self.options.share))
        self._masks = {}
        for name in masks[0]:
            # A neuron is trained if it is among the top neurons of any task.
            of_tasks = torch.stack([mask[name] for mask in masks])
            self._masks[name] = of_tasks.any(dim=0)
        neurons.train_only(model, self._masks)


_CLASSES = {
    "adapter": AdapterMethod,
    "base weights": WeightsMethod,
    "neurons": NeuronMethod,
    "nothing": Method,
}


def training_method(resolved: ResolvedMethod) -> Method:
    """Returns the method that applies a resolved method to a model."""
    if resolved.name in SURGERY:
        return SurgeryMethod(resolved)
    return _CLASSES[KINDS[resolved.name].trains](resolved)


def on_skeleton(
    recipe: Recipe, resolved: ResolvedMethod, tasks: Sequence[str], dtype: str = "float32"
) -> tuple[Method, Any]:
    """Returns a method, and the base model on the meta device with the method applied.

    Used to count and to check parameters without loading weights.
    """
    # A skeleton has no values that could be quantised.
    options = recipe.model.model_dump(exclude={"dtype", "quantisation"})
    model = load_skeleton(**options, dtype=dtype)
    method = training_method(resolved)
    with torch.device("meta"):
        adapted = method.apply(model, tasks)
    if recipe.training.objective == "dpo":
        _refuse_adapted_head(adapted)
    return method, adapted


def _refuse_adapted_head(model: Any) -> None:
    """Raises BaditError if DPO would not train the adapter of the model's head."""
    head = model.get_output_embeddings()
    # Also of the embeddings, if the head has their weight.
    if not isinstance(head, BaseTunerLayer | TrainableTokensWrapper):
        return
    name = next(name for name, module in model.named_modules() if module is head)
    problem = "TRL computes probabilities from the weight of the head, without its adapter"
    fix = f"leave {name.rpartition('.')[2]} out, or name it in modules_to_save"
    key = "target_modules" if isinstance(head, BaseTunerLayer) else "trainable_token_indices"
    raise BaditError(f"method.{key}: cannot be used with training.objective=dpo: {problem}; {fix}")

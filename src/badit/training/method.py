"""What a method does to a base model: makes it trainable, keeps what it learnt, and takes that up again.

Methods that add PEFT adapters (BADIT and most rivals) and methods that train the base model's own weights (full
fine-tuning, task neurons) answer the same few calls, so that a run need not know which of them it has.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from badit.baselines import BranchModel, MtlLoraConfig
from badit.baselines.lora import refuse_unsuitable
from badit.baselines.neurons import (
    all_neurons,
    neuron_scores,
    top_neurons,
    train_only,
    trained_parameters,
    union,
)
from badit.errors import BaditError
from badit.peft.base_model import TARGET_MODULES
from badit.peft.routing_context import before_first_label
from badit.runs import RunFolder
from badit.training.angles import AngleLog
from badit.training.callbacks import ProjectUpdates
from badit.training.regroup import RegroupCallback
from badit.training.surgery import Surgery, SurgeryTrainer
from badit.training.trainer import AnswerTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "weights.safetensors"

# A stage's training batches by task, for methods that look at the data before or after they train on it.
TaskBatches = Mapping[str, Sequence[Mapping[str, torch.Tensor]]]


class Method:
    """The base model as it is, to compare with; and the calls that the other kinds of method answer."""

    trains = False
    #: Whether the base weights must be there in float32, since they are what is trained.
    trains_base_weights = False

    def __init__(self, name: str) -> None:
        self.name = name

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> Any:
        """The base model made ready for its first training, on ``tasks``."""
        return model

    def proceed(self, model: PreTrainedModel, folder: Path) -> Any:
        """The base model with what :meth:`save` left in ``folder``, made ready for the next task of a sequence."""
        return self.load(model, folder)

    def load(self, model: PreTrainedModel, folder: Path) -> Any:
        """The base model with what :meth:`save` left in ``folder``, for inference.

        Raises:
            BaditError: it is missing or damaged.
        """
        return model

    def save(
        self, model: Any, folder: Path, base_model: str, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Writes what was learnt; ``base_model`` is the name that the base model goes by in the recipe.

        ``weights`` are whole tensors by name, of a model that has only shards of them.
        """

    def trained_parameters(self, model: Any) -> int:
        """How many numbers training changes, in a model that :meth:`apply` has made ready."""
        return sum(p.numel() for p in model.parameters() if p.requires_grad) if self.trains else 0

    def before_training(self, model: Any, batches: TaskBatches) -> None:
        """Looks at the data before training on it."""

    def after_training(self, model: Any, batches: TaskBatches) -> None:
        """Looks at the data once more after training on it, before the result is saved."""

    def refuse_shards(self, model: Any) -> None:
        """Called where an engine is about to divide the model over processes.

        Raises:
            BaditError: the method needs whole weights.
        """

    def callbacks(self, run: RunFolder) -> list[TrainerCallback]:
        return []

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        return AnswerTrainer(**arguments)


class AdapterMethod(Method):
    """A method that leaves the base weights alone and trains a PEFT adapter."""

    trains = True

    def __init__(
        self,
        name: str,
        config: PeftConfig,
        *,
        regroup: dict[str, Any] | None = None,
        surgery: Surgery | None = None,
    ) -> None:
        super().__init__(name)
        self.config = config
        self.regroup = regroup
        self.surgery: Surgery | None = surgery

    def apply(self, model: PreTrainedModel, tasks: Sequence[str] = ()) -> PeftModel:
        """PEFT's own methods adapt what BADIT would by default; a method that tells tasks apart learns their names."""
        if isinstance(self.config, LoraConfig):
            refuse_unsuitable(self.config, model)
        config: Any = self.config
        if isinstance(self.config, MtlLoraConfig) and self.config.tasks is None and tasks:
            self.config.tasks = list(tasks)
        if config.target_modules is None:
            default = TARGET_MODULES.get(model.config.model_type)
            if default is None:
                raise BaditError(f"method.target_modules: name the modules to adapt in a {model.config.model_type}")
            config.target_modules = set(default)
        try:
            return get_peft_model(model, config)  # pyright: ignore[reportReturnType] (never a mixed model)
        except BaditError:
            raise
        except ValueError as error:  # such as a target_modules that is not there
            raise BaditError(f"method: {_first_line(error)}") from None

    def proceed(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        adapted = self._loaded(model, folder, trainable=True)
        if isinstance(adapted.base_model, BranchModel):
            adapted.base_model.next_task()
        return adapted

    def load(self, model: PreTrainedModel, folder: Path) -> PeftModel:
        return self._loaded(model, folder, trainable=False).eval()

    def _loaded(self, model: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():  # PEFT would go on to look for a pickled file
            raise BaditError(f"{folder}: has no {SAFETENSORS_WEIGHTS_NAME}; remove the folder to train it anew")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Found missing adapter keys")
                return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
            raise BaditError(f"{folder}: cannot be loaded ({_first_line(error)})") from None

    def save(
        self, model: PeftModel, folder: Path, base_model: str, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        # The name that the recipe gives; a built-in model's own would be a folder of this machine's cache. From a name
        # PEFT would look the embeddings up on a hub, to see whether to save them too: they are frozen.
        model.peft_config["default"].base_model_name_or_path = base_model
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=weights)

    def before_training(self, model: PeftModel, batches: TaskBatches) -> None:
        if isinstance(model.base_model, BranchModel):
            model.base_model.start_task(_prompt_embeddings(model.base_model, batches))

    def after_training(self, model: PeftModel, batches: TaskBatches) -> None:
        if isinstance(model.base_model, BranchModel):
            model.base_model.end_task(_prompt_embeddings(model.base_model, batches))

    def refuse_shards(self, model: PeftModel) -> None:
        if isinstance(model.base_model, BranchModel):
            raise BaditError(f"{self.name} works on whole weights: launch it without FSDP and DeepSpeed")
        if getattr(self.config, "changes_base_weight", False):
            raise BaditError("method.base_weight: folded needs whole base weights; take delta with FSDP and DeepSpeed")

    def callbacks(self, run: RunFolder) -> list[TrainerCallback]:
        if self.regroup is None:
            return [ProjectUpdates(), AngleLog(run.angles)]
        return [ProjectUpdates(), RegroupCallback(**self.regroup, log_path=run.regroupings)]

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        if self.surgery is None:
            return AnswerTrainer(**arguments)
        return SurgeryTrainer(surgery=self.surgery, **arguments)


class WeightsMethod(Method):
    """Full fine-tuning: every weight of the base model is trained, in float32, and saved."""

    trains = True
    trains_base_weights = True

    def load(self, model: PreTrainedModel, folder: Path) -> PreTrainedModel:
        path = folder / WEIGHTS
        try:
            weights = load_file(path)
            missing = model.load_state_dict(weights, strict=False).unexpected_keys
        except FileNotFoundError:
            raise BaditError(f"{folder}: has no {WEIGHTS}; remove the folder to train it anew") from None
        except (OSError, RuntimeError, SafetensorError) as error:
            raise BaditError(f"{path}: cannot be loaded ({_first_line(error)})") from None
        if missing:
            raise BaditError(f"{path}: belongs to another base model, which has a weight {missing[0]}")
        model.tie_weights()
        return model.eval()

    def save(
        self, model: PreTrainedModel, folder: Path, base_model: str, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        whole = weights or {}
        trained = {
            name: whole.get(name, p).detach().contiguous() for name, p in model.named_parameters() if p.requires_grad
        }
        save_file(trained, folder / WEIGHTS, metadata={"base_model": base_model, "method": self.name})


@dataclasses.dataclass(frozen=True)
class NeuronOptions:
    """Options of task neurons."""

    share: float = 0.1
    score_batches: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.share, float | int) or not 0 < self.share <= 1:
            raise BaditError(f"share must be above 0 and at most 1, got {self.share!r}")
        if not isinstance(self.score_batches, int) or self.score_batches < 1:
            raise BaditError(f"score_batches must be a whole number of at least 1, got {self.score_batches!r}")


class NeuronMethod(WeightsMethod):
    """Task neurons: of the base model's weights only those of the neurons that matter to the stage's tasks."""

    def __init__(self, name: str, options: NeuronOptions) -> None:
        super().__init__(name)
        self.options = options
        self._masks: dict[str, torch.Tensor] | None = None

    def trained_parameters(self, model: PreTrainedModel) -> int:
        """Before the data has been seen, those of one task's neurons; several tasks share some of them."""
        if self._masks is None:
            return round(self.options.share * trained_parameters(model, all_neurons(model)))
        return trained_parameters(model, self._masks)

    def refuse_shards(self, model: PreTrainedModel) -> None:
        raise BaditError(f"{self.name} works on whole weights: launch it without FSDP and DeepSpeed")

    def before_training(self, model: PreTrainedModel, batches: TaskBatches) -> None:
        masks = [
            top_neurons(neuron_scores(model, of_task[: self.options.score_batches]), self.options.share)
            for of_task in batches.values()
        ]
        self._masks = union(*masks)
        train_only(model, self._masks)

    def trainer(self, **arguments: Any) -> AnswerTrainer:
        if arguments["args"].weight_decay:
            raise BaditError("training.weight_decay: must be 0 with task-neurons, or it moves the frozen neurons too")
        return super().trainer(**arguments)


@torch.no_grad()
def _prompt_embeddings(tuner: BranchModel, batches: TaskBatches) -> torch.Tensor:
    """p0 (N, D) of all prompts."""
    device = tuner.device
    rows = [
        tuner.prompt_embeddings(
            batch["input_ids"].to(device),
            (batch["attention_mask"].bool() & before_first_label(batch["labels"])).to(device),
        )
        for of_task in batches.values()
        for batch in of_task
    ]
    return torch.cat(rows)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

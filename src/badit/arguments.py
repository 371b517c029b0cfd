"""The ``training`` section of a recipe: transformers' TrainingArguments by their names, and badit's few own keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from badit.environment import status
from badit.errors import nearest, problems

OptimizerName = Literal["adamw", "lora+", "orthogonal"]
# What every library below can count to; a seed must suit numpy's generator as well, which takes none below 0.
MOST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=MOST)]
Seed = CountOrZero


def _steps(steps: float) -> float:
    """A number of steps or, below 1, a fraction of the run: as transformers takes it."""
    if steps >= 1 and steps != int(steps):
        raise ValueError("must be a whole number of steps, or below 1, a fraction of the run")
    return int(steps) if steps == int(steps) else steps


Steps = Annotated[float, Field(ge=0, le=MOST), AfterValidator(_steps)]
PositiveSteps = Annotated[float, Field(gt=0, le=MOST), AfterValidator(_steps)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingSection(Section):
    """Optimisation: fields of transformers' TrainingArguments, by their own names, and badit's own.

    Only the fields that badit has its own default for, or checks more strictly, are declared here. Every other field of
    TrainingArguments is accepted and passed on (:func:`build_recipe` checks it).
    """

    model_config = ConfigDict(extra="allow")

    num_train_epochs: float = Field(1.0, gt=0, le=1e6)
    max_steps: int = Field(-1, ge=-1, le=MOST, description="if positive, the number of steps in place of epochs")
    per_device_train_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    optimizer: OptimizerName = Field(
        "adamw", description="lora+: B learns lora_plus_ratio times as fast as A; orthogonal: badit.OrthogonalUpdates"
    )
    lora_plus_ratio: float = Field(16.0, gt=0, description="for optimizer: lora+")
    router_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of routers, and whatever is no factor, over that of the factors"
    )
    learning_rate: float = Field(5e-4, gt=0)
    lr_scheduler_type: str = Field("cosine", description="such as cosine, linear, constant or constant_with_warmup")
    warmup_steps: Steps = Field(0.03, description="below 1: a fraction of the run")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")
    gradient_checkpointing: bool = False
    seed: Seed = 0
    full_determinism: bool = Field(False, description="only operations that give the same bits every time, if slower")
    max_skipped_steps: CountOrZero = Field(10, description="steps to skip for a loss or gradient that is not finite")
    logging_steps: PositiveSteps = Field(10, description="steps between lines of metrics.jsonl")
    save_steps: PositiveSteps = Field(100, description="steps between checkpoints")
    eval_strategy: Literal["no", "steps", "epoch"] = Field("no", description="when to measure eval_loss, on validation")
    eval_steps: PositiveSteps | None = Field(None, description="steps between evaluations (default: logging_steps)")
    load_best_model_at_end: bool = Field(
        False, description="keep the adapter with the lowest eval_loss; every evaluated step gets a checkpoint"
    )
    metric_for_best_model: Literal["loss", "eval_loss"] | None = None
    early_stopping_patience: Count | None = Field(
        None, description="stop after so many evaluations without a lower eval_loss (needs load_best_model_at_end)"
    )
    report_to: list[str] = Field([], description="trackers: tensorboard, trackio, wandb, mlflow, … (badit[trackers])")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return ([] if names == "none" else [names]) if isinstance(names, str) else names

    @model_validator(mode="after")
    def _stops_at_the_best(self) -> TrainingSection:
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        return self

    def arguments(self) -> dict[str, Any]:
        """The values for TrainingArguments: all but badit's own, which are for badit.trainer.AnswerTrainer."""
        own = {"max_skipped_steps", "optimizer", "lora_plus_ratio", "router_lr_ratio", "early_stopping_patience"}
        return self.model_dump(exclude=own)


#: What this section called fields in earlier releases (and transformers in one case), and their names now.
RENAMED_ARGUMENTS = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "scheduler": "lr_scheduler_type",
    "warmup": "warmup_steps",
    "warmup_ratio": "warmup_steps",
    "deterministic": "full_determinism",
    "log_every": "logging_steps",
    "save_every": "save_steps",
}

# Fields of TrainingArguments that are not for a recipe to set (a * stands for the rest of a name), and why.
_SETTLED_ARGUMENTS = {
    "output_dir": "the run's folder is the recipe's output",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint",
    "do_* prediction_loss_only include_for_metrics batch_eval_metrics *_full_eval eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object": "during training the loss alone is measured",
    "eval_on_start": "a resumed run would evaluate again",
    "per_device_eval_batch_size": "set evaluation.batch_size",
    "restore_callback_states_from_checkpoint": "an exact resumption always does so",
    "remove_unused_columns label_names": "batches have exactly what the method needs",
    "group_by_length train_sampling_strategy length_column_name": "batches of similar length are batches of one task; "
    "raise gradient_accumulation_steps for less padding, since a step's micro-batches are sorted by length",
    "activation_checkpointing": "set gradient_checkpointing",
    "*_checkpointing_kwargs": "badit needs use_reentrant=False and sets it",
    "auto_find_batch_size": "an exact resumption needs a known batch size",
    "save_total_limit save_only_model": "the last two and the best are kept, with all that an exact resumption needs",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint as it is",
    "fp16*": "the steps that its loss scaling skips would count as failed; set model.dtype, or bf16",
    "push_to_hub hub_*": "publish a finished run with badit push",
    "disable_tqdm": "badit has its own progress bar",
    "include_num_input_tokens_seen": "tokens are always counted",
    "local_rank parallelism_config": "the launcher sets it",
}


@cache
def argument_names() -> set[str]:
    """The fields of TrainingArguments, read from its source, since importing transformers takes seconds."""
    source = package_folder("transformers") / "training_args.py"
    return set(re.findall(r"^    (\w+): ", source.read_text(encoding="utf-8"), re.M))


def package_folder(name: str) -> Path:
    """Where an installed package is, without importing it."""
    return Path(find_spec(name).origin).parent  # pyright: ignore


def key_problems(training: Mapping[Any, Any]) -> Iterator[str]:
    """What is wrong with the section's keys, each as ``training.KEY: …``."""
    known = {*TrainingSection.model_fields, *argument_names()}
    for key in training:
        if key in RENAMED_ARGUMENTS:
            yield f"training.{key}: is called {RENAMED_ARGUMENTS[key]}, as transformers has it"
        elif reason := settled(key):
            yield f"training.{key}: is not for a recipe to set: {reason}"
        elif key not in known:
            close = get_close_matches(str(key), [*known, *RENAMED_ARGUMENTS], n=1)
            hint = f" (did you mean '{RENAMED_ARGUMENTS.get(close[0], close[0])}'?)" if close else ""
            yield f"training.{key!s:.120}: unknown key{hint}"


def settled(key: str) -> str | None:
    """Why a field of TrainingArguments is not for a recipe to set; None if it is."""
    reasons = (why for names, why in _SETTLED_ARGUMENTS.items() if any(fnmatchcase(key, one) for one in names.split()))
    return None if key in TrainingSection.model_fields else next(reasons, None)


def value_problems(training: TrainingSection) -> Iterator[str]:
    """What is wrong with the values that :class:`TrainingSection` does not declare, which needs transformers."""
    given = dict(training.model_extra or {})
    if training.optimizer == "orthogonal" and "optim" in given:
        yield "training.optim: does not go with optimizer: orthogonal; leave one of them out"
    if training.lr_scheduler_type not in ("cosine", "linear", "constant", "constant_with_warmup"):
        given["lr_scheduler_type"] = training.lr_scheduler_type
    if not given and not training.report_to:
        return
    with status("loading libraries"):
        from transformers import TrainingArguments
        from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in training.report_to:
        if name not in INTEGRATION_TO_CALLBACK and name != "all":
            yield f"training.report_to: unknown tracker {name!r:.60}{nearest(name, INTEGRATION_TO_CALLBACK)}"
    types = get_type_hints(TrainingArguments)
    for key, value in given.items():
        wanted: Any = types[key]
        for part in get_args(wanted) or (wanted,):
            if isinstance(part, type) and issubclass(part, Enum):  # its values, and no other text
                wanted = Literal[tuple(member.value for member in part)]
        try:
            TypeAdapter(wanted).validate_python(value, strict=True)
        except ValidationError as error:
            yield f"training.{key}: {problems(error, value)[0][1]}"

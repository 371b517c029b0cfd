"""The ``training`` section of a recipe: the fields of transformers' TrainingArguments, and badit's own keys."""

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, ValidationInfo
from pydantic.functional_validators import field_validator, model_validator

from badit.support.console import status
from badit.support.errors import nearest, problems
from badit.support.steps import PositiveSteps, Steps

# The largest integer that every library accepts. Seeds are at least 0, because numpy refuses negative ones.
LARGEST = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        is_given = any(
            isinstance(each, bool) for each in (value if isinstance(value, list) else [value])
        )
        kind = str(cls.model_fields[info.field_name or ""].annotation) if is_given else ""
        if re.search(r"\b(int|float)\b", kind) and not re.search(r"\b(bool|dict)\b", kind):
            raise ValueError("must be a number, not true or false")
        return value


class TrainingSection(Section, extra="allow"):
    """Declares badit's own fields and those of TrainingArguments with another default or stricter checks.

    All other fields of TrainingArguments are accepted and passed on (:func:`build_recipe` checks them).
    """

    num_train_epochs: float = Field(1.0, gt=0, le=1e6, description="passes over the training data")
    max_steps: int = Field(
        -1, ge=-1, le=LARGEST, description="if positive, overrides num_train_epochs"
    )
    per_device_train_batch_size: Count = Field(8, description="instances of a micro-batch")
    gradient_accumulation_steps: Count = Field(1, description="micro-batches of a step")
    optimizer: Literal["adamw", "lora+", "orthogonal"] = Field(
        "adamw",
        description="lora+: B learns lora_plus_ratio times as fast as A; orthogonal: badit.OrthogonalUpdates",
    )
    lora_plus_ratio: float = Field(
        16.0, gt=0, description="learning rate of B over that of A, with optimizer: lora+"
    )
    router_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of other parameters, over that of the factors"
    )
    learning_rate: float = Field(
        2e-3, gt=0, description="of the factors; see router_lr_ratio and lora_plus_ratio"
    )
    lr_scheduler_type: str = Field(
        "cosine", description="such as cosine, linear, constant or constant_with_warmup"
    )
    warmup_steps: Steps = Field(0.03, description="below 1: a fraction of the run")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, as in AdamW")
    max_grad_norm: float = Field(1.0, ge=0, description="0 disables clipping")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations: less memory, slower"
    )
    seed: CountOrZero = Field(
        0, description="of the initialisation, the order of the data, and dropout"
    )
    full_determinism: bool = Field(
        False, description="use only deterministic operations, which may be slower"
    )
    max_skipped_steps: CountOrZero = Field(
        10, description="non-finite losses or gradients to skip before an error"
    )
    logging_steps: PositiveSteps = Field(10, description="steps between lines of metrics.jsonl")
    save_steps: PositiveSteps = Field(100, description="steps between checkpoints")
    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        "no", description="when to measure the validation loss"
    )
    eval_steps: PositiveSteps | None = Field(
        None, description="steps between evaluations (default: logging_steps)"
    )
    load_best_model_at_end: bool = Field(
        False,
        description="keep the adapter with the lowest eval_loss; saves a checkpoint at every evaluation",
    )
    metric_for_best_model: Literal["loss", "eval_loss"] | None = Field(
        None, description="only the loss is measured"
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="stop after this many evaluations without a lower eval_loss (needs load_best_model_at_end)",
    )
    report_to: list[str] = Field(
        [], description="tensorboard, trackio (both in badit[trackers]), wandb, mlflow, …"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_as_text(cls, values: Any) -> Any:  # YAML reads no as false
        if not isinstance(values, dict):
            return values
        strategies = [
            key for key in values if str(key).endswith("_strategy") and values[key] is False
        ]
        return {**values, **dict.fromkeys(strategies, "no")}

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        return ([] if names == "none" else [names]) if isinstance(names, str) else names

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        if self.eval_steps and self.eval_strategy != "steps":
            raise ValueError("eval_steps needs eval_strategy: steps")
        if self.load_best_model_at_end and "no" in (
            self.eval_strategy,
            (self.model_extra or {}).get("save_strategy"),
        ):
            raise ValueError(
                "load_best_model_at_end needs eval_strategy and save_strategy: steps or epoch"
            )
        return self

    @classmethod
    def key_problems(cls, training: Mapping[Any, Any]) -> Iterator[str]:
        """Yields the problems with the section's keys, each as ``training.KEY: …``."""
        known = {*cls.model_fields, *argument_names()}
        for key in training:
            if key in RENAMED_ARGUMENTS:
                yield f"training.{key}: is now called {RENAMED_ARGUMENTS[key]}, as in transformers"
            elif reason := fixed_reason(key):
                yield f"training.{key}: cannot be set in a recipe: {reason}"
            elif key not in known and isinstance(key, str):  # the schema refuses other keys
                close = get_close_matches(key, [*known, *RENAMED_ARGUMENTS], n=1)
                hint = (
                    f" (did you mean '{RENAMED_ARGUMENTS.get(close[0], close[0])}'?)"
                    if close
                    else ""
                )
                yield f"training.{key:.120}: unknown key{hint}"

    def value_problems(self) -> Iterator[str]:
        """Yields the problems with values that only transformers can check; imports it if there are such values."""
        given = dict(self.model_extra or {})
        for key in ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"):
            if self.optimizer == "orthogonal" and key in given:
                yield f"training.{key}: cannot be combined with optimizer: orthogonal; remove one of them"
        if self.lr_scheduler_type not in ("cosine", "linear", "constant", "constant_with_warmup"):
            given["lr_scheduler_type"] = self.lr_scheduler_type
        if not given and not self.report_to:
            return
        with status("loading libraries"):
            from transformers import TrainingArguments
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK and name != "all":
                yield f"training.report_to: unknown tracker {name!r:.60}{nearest(name, INTEGRATION_TO_CALLBACK)}"
        types = get_type_hints(TrainingArguments)
        for key, value in given.items():
            wanted: Any = types[key]
            for part in get_args(wanted) or (wanted,):
                if isinstance(part, type) and issubclass(part, Enum):  # only the enum's values
                    wanted = Literal[tuple(member.value for member in part)]
            wanted = Annotated[wanted, _RANGES.get(key, Field())]
            try:
                TypeAdapter(wanted).validate_python(value, strict=True)
            except ValidationError as error:
                yield f"training.{key}: {problems(error, value)[0][1]}"


RENAMED_ARGUMENTS = {  # field names of earlier releases (and one of transformers'), with the current names
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

_FIXED_ARGUMENTS = {  # fields of TrainingArguments that a recipe cannot set (* is a wildcard), and the reasons
    "output_dir": "set output, the run's folder",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint",
    "do_* prediction_loss_only include_for_metrics batch_eval_metrics *_full_eval eval_accumulation_steps "
    "eval_do_concat_batches eval_use_gather_object": "evaluation during training measures only the loss",
    "eval_on_start": "a resumed run would evaluate again",
    "per_device_eval_batch_size": "set evaluation.batch_size instead",
    "restore_callback_states_from_checkpoint": "badit always restores them on resuming",
    "remove_unused_columns label_names": "badit builds batches with exactly the columns that the method needs",
    "group_by_length train_sampling_strategy length_column_name": "batches of similar length contain few tasks; "
    "for less padding raise gradient_accumulation_steps: the examples of each step are sorted by length",
    "activation_checkpointing": "set gradient_checkpointing instead",
    "*_checkpointing_kwargs": "badit needs use_reentrant=False and sets it",
    "greater_is_better": "the best model has the lowest eval_loss",
    "auto_find_batch_size accelerator_config": "exact resuming needs a fixed batch size and order",
    "save_total_limit save_only_model": "the last two checkpoints and the best are kept, with all that resuming needs",
    "enable_jit_checkpoint": "badit already saves a checkpoint on SIGTERM",
    "fp16*": "steps that its loss scaling skips would count as skipped_steps; set model.dtype, or bf16",
    "push_to_hub hub_*": "publish a finished run with badit push",
    "disable_tqdm": "badit has its own progress bar",
    "dataloader_drop_last": "the last instances of an epoch are trained too",
    "include_num_input_tokens_seen": "badit always counts tokens",
    "local_rank parallelism_config": "the launcher sets it",
}

# Ranges that transformers does not check.
_RANGES = {"label_smoothing_factor": Field(ge=0, le=1), "neftune_noise_alpha": Field(ge=0)}


@cache
def argument_names() -> set[str]:
    """Returns the field names of TrainingArguments, read from its source: importing transformers takes seconds."""
    source = package_folder("transformers") / "training_args.py"
    return set(re.findall(r"^    (\w+): ", source.read_text(encoding="utf-8"), re.M))


def package_folder(name: str) -> Path:
    """Returns the folder of an installed package, without importing it."""
    return Path(find_spec(name).origin).parent  # pyright: ignore


def fixed_reason(key: object) -> str | None:
    """Returns why a recipe cannot set a field of TrainingArguments, or None if it can."""
    if key in TrainingSection.model_fields:
        return None
    known = ((name, reason) for names, reason in _FIXED_ARGUMENTS.items() for name in names.split())
    return next((reason for name, reason in known if fnmatchcase(str(key), name)), None)

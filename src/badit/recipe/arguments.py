"""The ``training`` section of a recipe: transformers' TrainingArguments, and badit's own keys."""

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

from badit.support.console import loading_libraries
from badit.support.errors import nearest, problems
from badit.support.steps import LARGEST, PositiveSteps, Steps

Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]  # also seeds: numpy refuses negative ones


class Section(BaseModel):
    """A section of a recipe: unknown keys, NaN and infinity are refused, and fields are fixed."""

    # Infinities would pass the lower bounds: YAML can write them as .inf.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would convert true to 1.
        values = value if isinstance(value, list) else [value]
        if not any(isinstance(item, bool) for item in values):
            return value
        annotation = str(cls.model_fields[info.field_name or ""].annotation)
        if re.search(r"\b(bool|dict)\b", annotation):
            return value
        if re.search(r"\b(int|float)\b", annotation):
            raise ValueError("must be a number, not true or false")
        return value


_FINITE = ConfigDict(allow_inf_nan=False)


#: The losses of TRL's DPOConfig that need no other option.
DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
]

# The best rate of BADIT's defaults with AdamW (benchmarks/experiments/harness-c.md).
_RATE = 2e-3
# The defaults of TRL's DPOConfig (1e-6) and SFTConfig (2e-5) differ by the same factor. DPO can
# lower the likelihood of an answer without limit, so large updates spoil the model.
_RATE_OF_DPO = _RATE / 20


def _default_rate(section: Mapping[str, Any]) -> float:
    """Returns the learning rate of a section with the fields that precede it."""
    return _RATE_OF_DPO if section.get("objective") == "dpo" else _RATE


class TrainingSection(Section, extra="allow"):
    """badit's own fields, and those of TrainingArguments with another default or stricter checks.

    All other fields of TrainingArguments are accepted and passed on (:func:`build_recipe` checks
    them).
    """

    objective: Literal["sft", "dpo"] = Field(
        "sft",
        description="sft: fine-tune on the answers; dpo: prefer the chosen to the rejected ones, "
        "relative to the untuned model and without dropout (needs badit[trl])",
    )
    dpo_beta: float = Field(
        0.1, gt=0, description="higher: stay closer to the untuned model, with objective: dpo"
    )
    dpo_loss: DpoLoss = Field("sigmoid", description="loss_type of TRL's DPOConfig")
    num_train_epochs: float = Field(1.0, gt=0, le=1e6, description="passes over the training data")
    max_steps: int = Field(
        -1, ge=-1, le=LARGEST, description="if positive, overrides num_train_epochs"
    )
    per_device_train_batch_size: Count = Field(8, description="instances of a micro-batch")
    gradient_accumulation_steps: Count = Field(1, description="micro-batches of a step")
    optimizer: Literal["adamw", "lora+", "orthogonal"] = Field(
        "adamw",
        description="lora+: B learns lora_plus_ratio times as fast as A; "
        "orthogonal: badit.OrthogonalUpdates",
    )
    lora_plus_ratio: float = Field(
        16.0, gt=0, description="learning rate of B over that of A, with optimizer: lora+"
    )
    router_lr_ratio: float = Field(
        1.0, gt=0, description="learning rate of other parameters, over that of the factors"
    )
    learning_rate: float = Field(
        default_factory=_default_rate,
        gt=0,
        description=f"of the factors (with objective: dpo: {_RATE_OF_DPO:g}); see router_lr_ratio "
        "and lora_plus_ratio",
        json_schema_extra={"default": _RATE},
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
        description="keep the adapter with the lowest eval_loss; "
        "saves a checkpoint at every evaluation",
    )
    metric_for_best_model: Literal["loss", "eval_loss"] | None = Field(
        None, description="only the loss is measured"
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="stop after this many evaluations without a lower eval_loss "
        "(needs load_best_model_at_end)",
    )
    report_to: list[str] = Field(
        [], description="tensorboard, trackio (both in badit[trackers]), wandb, mlflow, …"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_as_text(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        # YAML reads no as false.
        strategies = [
            key for key in values if str(key).endswith("_strategy") and values[key] is False
        ]
        return {**values, **dict.fromkeys(strategies, "no")}

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_or_several(cls, names: Any) -> Any:
        if names == "none":
            return []
        if isinstance(names, str):
            return [names]
        return names

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError("early_stopping_patience needs load_best_model_at_end: true")
        if self.eval_steps and self.eval_strategy != "steps":
            raise ValueError("eval_steps needs eval_strategy: steps")
        if self.objective == "dpo":
            for key in _NOT_IN_DPO & (self.model_extra or {}).keys():
                raise ValueError(f"{key} does not apply to objective: dpo; remove it")
        # save_strategy is an argument of transformers without a field here.
        strategies = self.eval_strategy, (self.model_extra or {}).get("save_strategy")
        if self.load_best_model_at_end and "no" in strategies:
            raise ValueError(
                "load_best_model_at_end needs eval_strategy and save_strategy: steps or epoch"
            )
        return self

    @classmethod
    def key_problems(cls, training: Mapping[Any, Any]) -> Iterator[str]:
        """Yields the problems with the section's keys, each as ``training.KEY: …``."""
        names = {*cls.model_fields, *argument_names()}
        for key in training:
            if key in RENAMED_ARGUMENTS:
                yield f"training.{key}: is now called {RENAMED_ARGUMENTS[key]}, as in transformers"
            elif reason := fixed_reason(key):
                yield f"training.{key}: cannot be set in a recipe: {reason}"
            elif key not in names and isinstance(key, str):  # the schema refuses other keys
                hint = ""
                # A former name that is misspelt, too, is suggested under its present form.
                for close in get_close_matches(key, [*names, *RENAMED_ARGUMENTS], n=1):
                    hint = f" (did you mean '{RENAMED_ARGUMENTS.get(close, close)}'?)"
                yield f"training.{key:.120}: unknown key{hint}"

    def value_problems(self) -> Iterator[str]:
        """Yields the problems with values that only transformers can check.

        transformers is imported only if there are such values, because this takes seconds.
        """
        values = dict(self.model_extra or {})
        if self.optimizer == "orthogonal":
            problem = "cannot be combined with optimizer: orthogonal; remove one of them"
            yield from (f"training.{key}: {problem}" for key in _OF_ADAMW if key in values)
        # Common schedules are known here, so that most recipes need no import of transformers.
        if self.lr_scheduler_type not in ("cosine", "linear", "constant", "constant_with_warmup"):
            values["lr_scheduler_type"] = self.lr_scheduler_type
        if not values and not self.report_to:
            return
        with loading_libraries():
            from transformers import TrainingArguments
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

        for name in self.report_to:
            if name not in INTEGRATION_TO_CALLBACK and name != "all":
                hint = nearest(name, INTEGRATION_TO_CALLBACK)
                yield f"training.report_to: unknown tracker {name!r:.60}{hint}"
        annotations = get_type_hints(TrainingArguments)
        for key, value in values.items():
            kind: Any = Annotated[_values_of(annotations[key]), _RANGES.get(key, Field())]
            try:
                # Strict: else a number may be given as text, and transformers receives the text.
                TypeAdapter(kind, config=_FINITE).validate_python(value, strict=True)
            except ValidationError as error:
                _, text = problems(error, value)[0]
                yield f"training.{key}: {text}"


def _values_of(annotation: Any) -> Any:
    """Returns the type of a field in YAML, which has the values of an enum, not its members."""
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, Enum):
            return Literal[tuple(member.value for member in kind)]
    return annotation


# Arguments of transformers' optimizers, which optimizer: orthogonal replaces.
_OF_ADAMW = ("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon")

# Arguments of transformers that TRL's DPO would ignore, or apply to the reference too.
_NOT_IN_DPO = {"label_smoothing_factor", "neftune_noise_alpha"}

# Field names of earlier releases (and one of transformers'), with the current names.
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

# Fields of TrainingArguments that a recipe cannot set (* is a wildcard), and the reasons.
_FIXED_ARGUMENTS = {
    "output_dir": "set output, the run's folder",
    "resume_from_checkpoint": "a run resumes from its own last checkpoint",
    "do_* prediction_loss_only include_for_metrics batch_eval_metrics *_full_eval "
    "eval_accumulation_steps eval_do_concat_batches eval_use_gather_object": (
        "evaluation during training measures only the loss"
    ),
    "eval_on_start": "a resumed run would evaluate again",
    "per_device_eval_batch_size": "set evaluation.batch_size instead",
    "restore_callback_states_from_checkpoint": "badit always restores them on resuming",
    "remove_unused_columns label_names": (
        "badit builds batches with exactly the columns that the method needs"
    ),
    "group_by_length train_sampling_strategy length_column_name": (
        "batches of similar length contain few tasks; for less padding raise "
        "gradient_accumulation_steps: the examples of each step are sorted by length"
    ),
    "activation_checkpointing": "set gradient_checkpointing instead",
    "*_checkpointing_kwargs": "badit needs use_reentrant=False and sets it",
    "greater_is_better": "the best model has the lowest eval_loss",
    "auto_find_batch_size accelerator_config": "exact resuming needs a fixed batch size and order",
    "save_total_limit save_only_model": (
        "the last two checkpoints and the best are kept, with all that resuming needs"
    ),
    "enable_jit_checkpoint": "badit already saves a checkpoint on SIGTERM",
    "fp16*": (
        "steps that its loss scaling skips would count as skipped_steps; set model.dtype, or bf16"
    ),
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
    """Returns the field names of TrainingArguments.

    They are read from its source, because importing transformers takes seconds.
    """
    package: Any = find_spec("transformers")
    source = Path(package.origin).with_name("training_args.py")
    # Only the fields of the dataclass are annotated at this indentation.
    return set(re.findall(r"^    (\w+): ", source.read_text(encoding="utf-8"), re.M))


def fixed_reason(key: object) -> str | None:
    """Returns why a recipe cannot set a field of TrainingArguments, or None if it can."""
    if key in TrainingSection.model_fields:
        return None
    for patterns, reason in _FIXED_ARGUMENTS.items():
        if any(fnmatchcase(str(key), pattern) for pattern in patterns.split()):
            return reason
    return None

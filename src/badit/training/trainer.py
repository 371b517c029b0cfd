"""A Trainer with a loss on answers only, micro-batches of similar length, and skipping of non-finite steps.

Its callbacks write the metrics file, show one progress bar and report to experiment trackers.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import patch_environment
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    get_available_reporting_integrations,
)

from badit.recipe.arguments import TrainingSection
from badit.support.console import is_main_process, say
from badit.support.errors import BaditError, explained
from badit.support.files import append_to_log, rewind_log
from badit.training.checkpoints import step_of
from badit.training.optimizers import OrthogonalUpdates, lora_plus_groups
from badit.training.regrouping import RegroupCallback
from badit.tuner.distributed import any_of_all
from badit.tuner.model import hooks_of
from badit.tuner.prompt import IGNORED_LABEL, before_first_label

_DEFAULTS = TrainingSection.model_validate({})
_names_section = explained(
    "training", action="used", any_error=True
)  # decorator: values that transformers refuses
_say_once = cache(say)  # once, not in every stage of a sequence


class AnswerTrainer(Trainer):
    """Trains on batches of ``input_ids``, ``attention_mask`` and ``labels`` (−100 on all but the answers), and, for
    methods that need task names, ``tasks`` (one per row).

    The loss is the cross-entropy averaged over the answer tokens of the whole accumulated batch. If the method has an
    extra loss (``Hooks.extra_loss``), its mean over the micro-batches is added.

    Args:
        options: a recipe's ``training`` section, for badit's own options.
        quotas: the number of examples per task in an epoch. The dataset must have ``tasks``, one per example.
    """

    @_names_section
    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        options: TrainingSection = _DEFAULTS,
        quotas: Mapping[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            # The Trainer would use nn.DataParallel, whose threads would share the routing state.
            command = (
                f"accelerate launch --multi_gpu --num_processes {args.n_gpu} -m badit train RECIPE"
            )
            _say_once(f"badit: training on one of {args.n_gpu} GPUs; to use all of them: {command}")
            args._n_gpu = 1  # transformers has no public setter
        callbacks: list[TrainerCallback] = [
            _StepCallback(self)
        ]  # first, because other callbacks read gradients
        if options.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
        callbacks += kwargs.pop("callbacks", None) or []
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        self.skipped_steps = 0
        self.micro_batches: list[
            tuple[torch.Tensor, Mapping[str, Any]]
        ] = []  # losses and inputs since the last step
        self.options, self._quotas = options, quotas
        # compute_loss divides by the number of labels in the accumulated batch, so the Trainer must count them.
        self.model_accepts_loss_kwargs = True

    @_names_section
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the Trainer's optimizer, with parameter groups if learning rates differ, or orthogonal updates."""
        trained: Any = self.model if model is None else model
        rate, decay = self.args.learning_rate, self.args.weight_decay
        other = rate * self.options.router_lr_ratio
        ratio = self.options.lora_plus_ratio if self.options.optimizer == "lora+" else 1.0
        if self.optimizer is None and self.options.optimizer == "orthogonal":
            self.optimizer = OrthogonalUpdates(trained, rate, other_lr=other, weight_decay=decay)
        elif self.optimizer is None and (ratio, other) != (1.0, rate):
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = lora_plus_groups(trained, rate, ratio, other_lr=other)
            self.optimizer = kind(groups, **arguments, weight_decay=decay)
        return super().create_optimizer(model)

    create_scheduler = _names_section(Trainer.create_scheduler)
    get_train_dataloader = _names_section(Trainer.get_train_dataloader)
    set_initial_training_values = _names_section(Trainer.set_initial_training_values)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None) or [
            len(example["input_ids"]) for example in dataset
        ]
        # The ranks split a global batch, which equals the batch of a single process with this total size.
        per_step = (
            self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tasks = () if self._quotas is None else dataset.tasks
        # ``state.epoch`` is whole at the start of an epoch, and fractional if a run resumes within an epoch.
        return EpochSampler(
            lengths, per_step, seed, lambda: int(self.state.epoch or 0), tasks, self._quotas
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also logs a new regrouping's metrics and the skipped steps; NaN as loss if all since the last line were."""
        logs = dict(logs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegroupCallback):
                logs |= callback.take_metrics()
        if self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        if "loss" in logs:
            last = next(
                (line for line in reversed(self.state.log_history) if "loss" in line), {"step": 0}
            )
            if (
                self.skipped_steps - last.get("skipped_steps", 0)
                == self.state.global_step - last["step"]
            ):
                logs["loss"] = math.nan
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the scalar loss, with the extra loss in training; logits in the outputs are (1, L, vocabulary)."""
        losses_L, _, outputs = answer_losses(
            model, inputs, label_smoothing=self.args.label_smoothing_factor
        )
        count = len(losses_L) if num_items_in_batch is None else num_items_in_batch
        loss = losses_L.sum() / torch.as_tensor(count).clamp_min(1)  # 0 for a batch without labels
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = (
                loss * self.accelerator.num_processes
            )  # data-parallel wrappers average over the ranks
        if (
            model.training
            and (extra := hooks_of(model).extra_loss(inputs["attention_mask"])) is not None
        ):
            # If num_items_in_batch is given, the Trainer does not average over the micro-batches.
            loss = loss + extra / (
                1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            )
        self.micro_batches.append((loss.detach(), inputs))
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skips the epoch if the resumed training had ended, where the Trainer would take another step."""
        callbacks: Any = self.state.stateful_callbacks
        if callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # With save_strategy "best" this decides whether to save, also if the run was told to save and stop.
        return super()._determine_best_metric(*args, **kwargs) or self.control.should_save

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Also preserves the CPU's random state, so that evaluation does not change the training."""
        with torch.random.fork_rng([]):  # without the devices', which evaluation does not read
            return super().evaluate(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns as loss the mean over instances of the negative log-likelihood per answer token, in nats."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses_L, row_L, _ = answer_losses(model, inputs)
        counts_B = torch.bincount(row_L, minlength=len(inputs["labels"])).clamp_min(1)
        totals_B = torch.zeros(len(counts_B), device=losses_L.device).index_add(0, row_L, losses_L)
        data, left = self.accelerator.gradient_state, len(counts_B)
        if data.end_of_dataloader and data.remainder > 0:
            # With several processes accelerate pads the last batches with repeated instances, which do not count.
            left = max(1, data.remainder - self.args.process_index * self.args.eval_batch_size)
        return (totals_B / counts_B)[:left].mean(), None, None


def answer_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    use_cache: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Returns the cross-entropy of every answer token of a batch, for a model that may be wrapped for data parallelism.

    ``inputs`` has input_ids, attention_mask and labels, (B, T), and the ``tasks`` of the rows for methods that need
    them. Returns the losses (L,) in float32, their rows in the batch (L,), and the outputs, with logits (1, L,
    vocabulary) and, with ``use_cache``, the key-value cache.
    """
    labels_BT = inputs["labels"]
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
    # The number of labels determines shapes, so this synchronises with the GPU, once: all later code uses the indices.
    row_L, position_L = (targets_BT != IGNORED_LABEL).nonzero(as_tuple=True)
    batch = {key: value for key, value in inputs.items() if key not in ("labels", "tasks")} | {
        "use_cache": use_cache
    }
    if hooks_of(model).routes_prompts:
        batch["prompt_mask"] = before_first_label(labels_BT, inputs["attention_mask"])
    unwrapped: Any = getattr(model, "module", model)  # inside a data-parallel wrapper
    output_layer = unwrapped.get_output_embeddings()

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][row_L, position_L][None], *args[1:])

    # The output layer gets only the labels' positions, as one row (1, L, hidden). Later operations on the logits
    # (soft-capping, scaling) act on each position separately.
    with (
        hooks_of(model).rows_of(inputs.get("tasks")),
        output_layer.register_forward_pre_hook(select),
    ):
        outputs = model(**batch)
    losses_L = F.cross_entropy(
        outputs.logits[0].float(),
        targets_BT[row_L, position_L],
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses_L, row_L, outputs


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """Shuffles depending only on the seed and the current epoch, so that a resumed run gets the same batches.

    Each optimizer step is a random sample from all tasks. Within a step the examples are sorted by length, which
    reduces padding in the micro-batches. (Whole steps of similar length would contain few tasks, which trains worse.)
    The full step with the longest example comes first, so that a run that lacks memory fails at once.

    With ``tasks`` (one per example) and ``quotas`` (the number of examples per task), an epoch repeats the examples of
    small tasks and draws a new subset of large tasks.
    """

    lengths: Sequence[int]
    examples_per_step: int
    seed: int
    epoch: Callable[[], int]
    tasks: Sequence[str] = ()
    quotas: Mapping[str, int] | None = None

    def __len__(self) -> int:
        return len(self.lengths) if self.quotas is None else sum(self.quotas.values())

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())

        def shuffled(items: Sequence[Any]) -> list[Any]:
            return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

        quotas, by_task = self.quotas or {}, defaultdict[str, list[int]](list)
        for index, task in enumerate(self.tasks):
            by_task[task].append(index)
        chosen = [] if by_task else list(range(len(self.lengths)))
        for task, indices in by_task.items():
            repeats, rest = divmod(quotas[task], len(indices))
            chosen += indices * repeats + shuffled(indices)[:rest]
        order, size = shuffled(chosen), self.examples_per_step
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        steps = [sorted(step, key=self.lengths.__getitem__, reverse=True) for step in steps]
        # A short step must stay last, or the loader's batches would not match the steps.
        longest = max(range(len(order) // size), key=lambda i: self.lengths[steps[i][0]], default=0)
        steps.insert(0, steps.pop(longest))
        return iter([index for step in steps for index in step])


class _StepCallback(TrainerCallback):
    """Skips steps with non-finite gradients, calls the method's update hooks, and sets when to log and save.

    Skipped gradients change no weight, no moment and no Gram matrix. Too many (with DeepSpeed one) stop the run.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(kwargs["model"]).after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Evaluate an epoch in its last step, so that a checkpoint of this step includes the evaluation.
        if args.eval_strategy == "epoch":
            ended = state.epoch % 1 == 0 or state.global_step >= state.max_steps
            control.should_evaluate = ended and args.eval_delay <= state.epoch
        # Log the last step and every evaluated step; save every evaluated step if the best model is loaded at the end.
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps
        control.should_save |= control.should_evaluate and args.load_best_model_at_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, model = self._trainer, kwargs["model"]
        micro_batches, trainer.micro_batches = trainer.micro_batches, []
        parameters = [p for p in model.parameters() if p.grad is not None]
        tensors: list[Any] = [loss for loss, _ in micro_batches] + [
            parameter.grad for parameter in parameters
        ]
        tensors = [
            each.to_local() if isinstance(each, DTensor) else each for each in tensors
        ]  # this rank's shards
        # One synchronisation with the device for all tensors.
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        if any_of_all(not bool(finite)):
            trainer.skipped_steps += 1
            # DeepSpeed has already taken the step, so it cannot be skipped. A run may skip at most half of its steps.
            in_backward = isinstance(kwargs["optimizer"], DeepSpeedOptimizerWrapper)
            limit = (
                0 if in_backward else min(trainer.options.max_skipped_steps, state.max_steps // 2)
            )
            if trainer.skipped_steps > limit:
                raise BaditError(
                    f"training: the loss or its gradient is not finite in step {state.global_step + 1}, after {limit} "
                    f"skipped steps; the batch has instances {_instances(micro_batches, trainer.train_dataset)}; "
                    "check these, or lower training.learning_rate"
                )
            for parameter in parameters:
                parameter.grad = None  # optimizers skip parameters without a gradient
        hooks_of(model).before_update()


def _instances(
    micro_batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]], examples: Sequence[Any]
) -> str:
    """Names up to 8 instances of the micro-batches with a non-finite loss (of all, if only gradients are affected)."""
    bad = [inputs for loss, inputs in micro_batches if not bool(loss.isfinite())]
    rows = {
        (task, tuple(ids[mask.bool()].tolist()))
        for inputs in bad or [inputs for _, inputs in micro_batches]
        for task, ids, mask in zip(
            inputs["tasks"], inputs["input_ids"], inputs["attention_mask"], strict=True
        )
    }
    named = (
        f"{one['task']}/{one['id']}"
        for one in examples
        if (one["task"], tuple(one["input_ids"])) in rows
    )
    return ", ".join(islice(named, 8))  # enough to find the cause


_LOSSES = {"loss", "eval_loss"}


class MetricsLog(TrainerCallback):
    """Appends the Trainer's log lines to a file, after removing those that a resumed run will log again.

    Omits run times, throughput and the final summary, which depend on the process, and the metrics of regroupings.
    """

    def __init__(self, path: Path) -> None:
        self._log = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rewind_log(self._log, state.global_step)

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and logs.keys() & _LOSSES:
            # JSON has no NaN or infinity: such a loss becomes null, and other such values (grad_norm) are omitted.
            kept = {
                key: value if math.isfinite(value) else None
                for key, value in logs.items()
                if (math.isfinite(value) or key in _LOSSES)
                and not key.endswith(("_runtime", "_per_second"))
                and not key.startswith("regroup/")
            }
            append_to_log(self._log, {"step": state.global_step, **kept})


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar, which starts at the resumed step and shows the latest losses."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses: dict[str, str] = {}
        self.current_step = state.global_step
        if state.is_world_process_zero:
            sizes = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(desc="Training", unit="step", dynamic_ncols=True, **sizes)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._losses |= {
            name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs
        }
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._losses, refresh=False)

    def close(self) -> None:
        """Closes the bars, so that later output starts on a new line."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


def trackers_of(training: TrainingSection) -> list[str]:
    """Returns the names of the experiment trackers to report to; BaditError if one is not installed."""
    names, installed = training.report_to, get_available_reporting_integrations()
    for name in names:
        if name not in installed and name != "all":
            raise BaditError(
                f"training.report_to: {name} is not installed; install it, or leave it out"
            )
    return installed if "all" in names else names


@contextmanager
def tracking(trainer: AnswerTrainer, folder: Path, checkpoint: Path | None) -> Iterator[None]:
    """A context in which trackers write to the run's folder, unless environment variables name another folder.

    TensorBoard hides the steps after ``checkpoint``, which are logged again. The W&B run begins and ends here:
    transformers does not end it, so the next stage of a sequence would log to it.
    """
    names = trackers_of(trainer.options) if is_main_process() else []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if checkpoint is None else step_of(checkpoint) + 1
        trainer.add_callback(
            TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step))
        )
    run: Any = nullcontext()
    if (
        "wandb" in names and (wandb := import_module("wandb")).run is None
    ):  # it reads WANDB_DIR once per process
        project, where = (
            os.environ.get("WANDB_PROJECT", "badit"),
            os.environ.get("WANDB_DIR", str(folder)),
        )
        run = wandb.init(project=project, dir=where, name=folder.resolve().name)
    with run, patch_environment(SWANLAB_LOG_DIR=os.environ.get("SWANLAB_LOG_DIR", folder)):
        yield

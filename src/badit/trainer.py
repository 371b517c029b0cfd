"""HF's Trainer with a loss on answers only, micro-batches of similar length, and steps that are not finite left out.

Its callbacks write the metrics file, show one progress bar and report to experiment trackers.
"""

from __future__ import annotations

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
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_available_reporting_integrations

from badit.arguments import TrainingSection
from badit.checkpoint import step_of
from badit.environment import is_main_process
from badit.errors import BaditError, say
from badit.files import append_to_log, rewind_log
from badit.gradients import any_of_all, steps_in_backward
from badit.optimizer import OrthogonalUpdates, lora_plus_groups
from badit.regroup import RegroupCallback
from badit.tuner.model import hooks_of
from badit.tuner.prompt import before_first_label

_DEFAULTS = TrainingSection.model_validate({})
_say_once = cache(say)  # not again in every stage of a sequence


class AnswerTrainer(Trainer):
    """Trains on batches of ``input_ids``, ``attention_mask`` and ``labels`` (−100 on all but the answers), and perhaps
    ``tasks``, the rows' task names, for methods that tell tasks apart.

    The loss is the cross-entropy averaged over the answer tokens of the whole accumulated batch. A method with a loss
    of its own (``Hooks.extra_loss``) adds the mean of that over the micro-batches.

    Args:
        options: a recipe's ``training`` section, for the options that are not TrainingArguments'.
        quotas: how many examples of each task an epoch has, of a dataset with ``tasks``, every example's.
    """

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
            # The Trainer would split batches over them in threads, which the routing state cannot follow.
            command = f"accelerate launch --multi_gpu --num_processes {args.n_gpu} -m badit train RECIPE"
            _say_once(f"badit: training on one of {args.n_gpu} GPUs; to use all of them: {command}")
            args._n_gpu = 1  # transformers has no public way
        callbacks: list[TrainerCallback] = [_EveryStep(self)]  # first: others read gradients
        if options.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
        callbacks += kwargs.pop("callbacks", None) or []
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        self.skipped_steps = 0
        self.finished = False  # whether the training had come to its end before it was resumed
        self.micro_batches: list[tuple[torch.Tensor, Mapping[str, Any]]] = []  # of the step: losses and inputs
        self.options, self._quotas = options, quotas
        # The loss below is divided by the number of labels in the accumulated batch, so the Trainer must count them.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """HF's, on groups with learning rates of their own if these are asked for; or orthogonal updates."""
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

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None) or [len(example["input_ids"]) for example in dataset]
        # Of several processes each takes its part of a common batch, which is the one that a single process would have.
        per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tasks = () if self._quotas is None else dataset.tasks
        # ``state.epoch`` is whole at an epoch's start, and has a fraction where a run is resumed within.
        return EpochSampler(lengths, per_step, seed, lambda: int(self.state.epoch or 0), tasks, self._quotas)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """HF's, whose losses are kept until the step's end."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_batches.append((loss, inputs))
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """HF's, with a new regrouping's metrics, and the number of skipped steps once there are any.

        The loss is NaN, and not 0, where every step since the last line has been skipped.
        """
        logs = dict(logs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegroupCallback):
                logs |= callback.take_metrics()
        if self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps
        if "loss" in logs:
            last = next((line for line in reversed(self.state.log_history) if "loss" in line), {"step": 0})
            if self.skipped_steps - last.get("skipped_steps", 0) == self.state.global_step - last["step"]:
                logs["loss"] = math.nan
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Cross-entropy (a scalar) at the labelled positions; logits in the outputs are (1, labels, vocabulary)."""
        unwrapped = self.accelerator.unwrap_model(model)
        losses_L, _, outputs = answer_losses(model, inputs, unwrapped, self.args.label_smoothing_factor)
        count = len(losses_L) if num_items_in_batch is None else num_items_in_batch
        # A batch may hold no label at all, and has a loss of 0 then.
        loss = losses_L.sum() / (count.clamp_min(1) if isinstance(count, torch.Tensor) else max(count, 1))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # data-parallel wrappers take the mean over the ranks
        if model.training and (extra := hooks_of(unwrapped).extra_loss(inputs["attention_mask"])) is not None:
            # Given the number of items, the Trainer leaves it to us to average over the micro-batches.
            loss = loss + extra / (1 if num_items_in_batch is None else self.current_gradient_accumulation_steps)
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """HF's, which takes a step also where a resumed training has none left."""
        if self.finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """HF's, which leaves the training's random numbers as they are."""
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean over the batch's instances of their negative log-likelihood per answer token, in nats."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses_L, row_L, _ = answer_losses(model, inputs, self.accelerator.unwrap_model(model))
        counts_B = torch.bincount(row_L, minlength=len(inputs["labels"])).clamp_min(1)
        totals_B = torch.zeros(len(counts_B), device=losses_L.device).index_add(0, row_L, losses_L)
        data, left = self.accelerator.gradient_state, len(counts_B)
        if data.end_of_dataloader and data.remainder > 0:
            # accelerate fills the last batches of several processes up with instances that count elsewhere.
            left = max(1, data.remainder - self.args.process_index * self.args.eval_batch_size)
        return (totals_B / counts_B)[:left].mean(), None, None


def answer_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    unwrapped: nn.Module,
    label_smoothing: float = 0.0,
    *,
    use_cache: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The cross-entropy of every answer token of a batch.

    Args:
        model: what is called, perhaps wrapped for data parallelism; ``unwrapped`` is the model within.
        inputs: input_ids, attention_mask and labels, (B, T); for methods that tell tasks apart, the rows' ``tasks``.
        use_cache: whether the outputs have the keys and values.

    Returns:
        The losses (L,) in float32, the row in the batch of each (L,), and the model's outputs, whose logits are
        (1, L, vocabulary).
    """
    labels_BT = inputs["labels"]
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=-100)
    # How many there are decides shapes, so a GPU is waited for here, once: the indices serve for all that follows.
    row_L, position_L = (targets_BT != -100).nonzero(as_tuple=True)
    batch = {key: value for key, value in inputs.items() if key not in ("labels", "tasks")} | {"use_cache": use_cache}
    batch |= prompt_argument(unwrapped, inputs["attention_mask"].bool() & before_first_label(labels_BT))
    with hooks_of(unwrapped).rows_of(inputs.get("tasks")), logits_only_at(unwrapped, row_L, position_L):
        outputs = model(**batch)
    losses_L = F.cross_entropy(
        outputs.logits[0].float(), targets_BT[row_L, position_L], reduction="none", label_smoothing=label_smoothing
    )
    return losses_L, row_L, outputs


def prompt_argument(model: nn.Module, prompt_mask_BT: torch.Tensor) -> dict[str, torch.Tensor]:
    """The argument that tells a model which routes by prompt where that is, and nothing for a model that does not."""
    return {"prompt_mask": prompt_mask_BT} if hooks_of(model).routes_prompts else {}


@contextmanager
def logits_only_at(model: nn.Module, row_L: torch.Tensor, position_L: torch.Tensor) -> Iterator[None]:
    """Within, the output layer sees only these positions of these rows of the batch, as one row (1, L, hidden).

    What a model does to its logits afterwards (soft-capping, scaling) applies to each position alone.
    """
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][row_L, position_L][None], *args[1:])

    with head.register_forward_pre_hook(select):
        yield


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """A shuffle that depends on seed and (present) epoch alone, so that a resumed run sees the same batches.

    Each optimizer step is a random draw from all tasks. Within a step the examples are sorted by length, so that
    accumulated micro-batches hold little padding. (Batches of similar length would be batches of one task, which trains
    worse.) The step with the longest example comes first, since that is where memory runs out.

    With ``tasks``, every example's, and ``quotas``, which has the same tasks, an epoch takes so many examples from each
    task: small tasks are repeated, and of large ones every epoch draws a new subset.
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
        # A short step stays last, or the loader's own cut would fall out of step with this one.
        longest = max(range(len(order) // size), key=lambda i: self.lengths[steps[i][0]], default=0)
        steps.insert(0, steps.pop(longest))
        return iter([index for step in steps for index in step])


class _EveryStep(TrainerCallback):
    """Drops gradients that are not finite, and tells the method's model and the Trainer where it stands.

    Neither weights nor moments nor Gram matrices ever see such gradients. A run that keeps meeting them is stopped.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(kwargs["model"]).after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Logs the last step and every evaluated one, and saves every evaluated one if the best is wanted.
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps
        control.should_save |= control.should_evaluate and args.load_best_model_at_end

    on_epoch_end = on_step_end

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, model = self._trainer, kwargs["model"]
        micro_batches, trainer.micro_batches = trainer.micro_batches, []
        parameters = [p for p in model.parameters() if p.grad is not None]
        tensors: list[Any] = [loss for loss, _ in micro_batches] + [parameter.grad for parameter in parameters]
        tensors = [each.to_local() if isinstance(each, DTensor) else each for each in tensors]  # own shards
        # One synchronisation for all tensors.
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        if any_of_all(not bool(finite)):
            trainer.skipped_steps += 1
            # DeepSpeed has taken the step by now: nothing is left to skip. A short run must not skip more than half.
            in_backward = steps_in_backward(kwargs["optimizer"])
            limit = 0 if in_backward else min(trainer.options.max_skipped_steps, state.max_steps // 2)
            if trainer.skipped_steps > limit:
                raise BaditError(
                    f"training: the loss or its gradient is not finite in step {state.global_step + 1}, after {limit} "
                    f"skipped steps; the batch has instances {_instances(micro_batches, trainer.train_dataset)}; "
                    "look at these, or lower training.learning_rate"
                )
            for parameter in parameters:
                parameter.grad = None  # optimizers pass over parameters without a gradient
        hooks_of(model).before_update()


def _instances(
    micro_batches: Sequence[tuple[torch.Tensor, Mapping[str, Any]]], examples: Sequence[Mapping[str, Any]]
) -> str:
    """The instances of the micro-batches with a loss that is not finite (of all, where only gradients are not)."""
    bad = [inputs for loss, inputs in micro_batches if not bool(loss.isfinite())]
    rows = {
        (task, tuple(ids[mask.bool()].tolist()))
        for inputs in bad or [inputs for _, inputs in micro_batches]
        for task, ids, mask in zip(inputs["tasks"], inputs["input_ids"], inputs["attention_mask"], strict=True)
    }
    named = (f"{one['task']}/{one['id']}" for one in examples if (one["task"], tuple(one["input_ids"])) in rows)
    return ", ".join(islice(named, 8))  # the first few are enough to find the fault


_LOSSES = {"loss", "eval_loss"}


class MetricsLog(TrainerCallback):
    """Appends the trainer's log lines to a file, less those that a resumed run is about to log again.

    Left out are times, rates and the closing line, which are of this process alone, and what regroupings.jsonl has.
    """

    def __init__(self, path: Path) -> None:
        self._log = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            rewind_log(self._log, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and logs.keys() & _LOSSES:
            # The gradient's norm is infinite in a step that is skipped, which JSON has no number for.
            kept = {
                key: value if math.isfinite(value) else None
                for key, value in logs.items()
                if (math.isfinite(value) or key in _LOSSES)
                and not key.endswith(("_runtime", "_per_second"))
                and not key.startswith("regroup/")
            }
            append_to_log(self._log, {"step": state.global_step, **kept})


class ProgressBar(ProgressCallback):
    """HF's, from where a resumed training continues, with the latest losses behind the bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._losses: dict[str, str] = {}
        self.current_step = state.global_step
        if state.is_world_process_zero:
            sizes = {"total": state.max_steps, "initial": state.global_step}
            self.training_bar = tqdm(desc="Training", unit="step", dynamic_ncols=True, **sizes)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self._losses |= {name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._losses, refresh=False)

    def close(self) -> None:
        """Ends the bars' lines, for what is written after them."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()


def trackers_of(training: TrainingSection) -> list[str]:
    """The experiment trackers of transformers to report to; BaditError if one is not installed."""
    names, installed = training.report_to, get_available_reporting_integrations()
    for name in names:
        if name not in installed and name != "all":
            raise BaditError(f"training.report_to: {name} is not installed; install it, or leave it out")
    return installed if "all" in names else names


def tensorboard(training: TrainingSection, folder: Path, checkpoint: Path | None) -> list[TensorBoardCallback]:
    """HF's callback, which by itself could neither write into the run's folder nor hide steps that are logged again."""
    if "tensorboard" not in trackers_of(training) or not is_main_process():
        return []
    from torch.utils.tensorboard import SummaryWriter

    purge_step = None if checkpoint is None else step_of(checkpoint) + 1
    return [TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step))]


@contextmanager
def tracker_folders(training: TrainingSection, folder: Path) -> Iterator[None]:
    """Within, trackers write their files into the run's folder, unless the user's environment names another one.

    W&B's run begins and ends here: HF's callback ends none, so that a sequence's next stage would log to it.
    """
    wandb: Any = import_module("wandb") if "wandb" in trackers_of(training) and is_main_process() else None
    run: Any = nullcontext()
    if wandb and wandb.run is None:  # it reads WANDB_DIR once per process
        project, where = os.environ.get("WANDB_PROJECT", "badit"), os.environ.get("WANDB_DIR", str(folder))
        run = wandb.init(project=project, dir=where, name=folder.resolve().name)
    with run, patch_environment(SWANLAB_LOG_DIR=os.environ.get("SWANLAB_LOG_DIR", folder)):
        yield

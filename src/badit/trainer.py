"""HF's Trainer with a loss on answers only, micro-batches of similar length, and steps that are not finite left out.

Its callbacks write the metrics file and show one progress bar.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from badit.arguments import TrainingSection
from badit.errors import BaditError, say
from badit.files import StepLog
from badit.gradients import any_of_all, steps_in_backward
from badit.optimizer import OrthogonalUpdates, lora_plus_groups
from badit.regroup import RegroupCallback
from badit.tuner.model import hooks_of
from badit.tuner.prompt import before_first_label

# Of a batch that is not finite, an error names so many instances.
_NAMED = 8
_DEFAULTS = TrainingSection.model_validate({})


class AnswerTrainer(Trainer):
    """Trains on batches of ``input_ids``, ``attention_mask`` and ``labels`` (−100 on all but the answers), and perhaps
    ``tasks``, the rows' task names, for methods that tell tasks apart.

    The loss is the cross-entropy averaged over the answer tokens of the whole accumulated batch. A method with a loss
    of its own (``Hooks.extra_loss``) adds the mean of that over the micro-batches. The output layer runs only on
    positions that predict a label: with a vocabulary of 49 thousand that is the largest single saving.

    Args:
        options: a recipe's ``training`` section, for the options that are not TrainingArguments'.
        quotas: how many examples of each task an epoch has (:func:`badit.data.quotas`); they need ``task``, its name.

    Attributes:
        skipped_steps: how many have been skipped so far.
        finished: whether the training had come to its end before it was resumed.
        last_line: of the log: the step, and the skipped ones until then.
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
            _say_how_to_use_all(args.n_gpu)
            args._n_gpu = 1  # transformers has no public way
        callbacks: list[TrainerCallback] = [_EveryStep(self)]  # first: others read gradients
        if options.early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
        callbacks += kwargs.pop("callbacks", None) or []
        super().__init__(model, args, callbacks=callbacks, **kwargs)
        self.skipped_steps, self.finished = 0, False
        self.last_line = (0, 0)
        self.micro_batches: list[tuple[torch.Tensor, Mapping[str, Any]]] = []  # of the step: losses and inputs
        self.sampler: EpochSampler | None = None
        self.options, self._quotas = options, quotas
        # The loss below is divided by the number of labels in the accumulated batch, so the Trainer must count them.
        self.model_accepts_loss_kwargs = True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """HF's, on groups with learning rates of their own if these are asked for; or orthogonal updates."""
        options, rate = self.options, self.args.learning_rate
        trained: Any = self.model if model is None else model
        other = rate * options.router_lr_ratio
        ratio = options.lora_plus_ratio if options.optimizer == "lora+" else 1.0
        if self.optimizer is None and options.optimizer == "orthogonal":
            self.optimizer = OrthogonalUpdates(trained, rate, other_lr=other, weight_decay=self.args.weight_decay)
        elif self.optimizer is None and (ratio, other) != (1.0, rate):
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            groups = lora_plus_groups(trained, rate, ratio, other_lr=other)
            self.optimizer = kind(groups, **arguments, weight_decay=self.args.weight_decay)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None) or [len(example["input_ids"]) for example in dataset]
        # Of several processes each takes its part of a common batch, which is the one that a single process would have.
        per_step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        tasks: Sequence[str] = ()
        if self._quotas is not None:
            tasks = getattr(dataset, "tasks", None) or [example["task"] for example in dataset]
        self.sampler = EpochSampler(lengths, per_step, seed, tasks, self._quotas)
        return self.sampler

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
        step, skipped = self.last_line
        if "loss" in logs:
            if self.skipped_steps - skipped == self.state.global_step - step:
                logs["loss"] = math.nan
            self.last_line = self.state.global_step, self.skipped_steps
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
        if model.training:
            extra = hooks_of(unwrapped).extra_loss(inputs["attention_mask"])
            if extra is not None:
                # Given the number of items, the Trainer leaves it to us to average over the micro-batches.
                parts = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
                loss = loss + extra / parts
        return (loss, outputs) if return_outputs else loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """HF's, which takes a step also where a resumed training has none left."""
        if self.finished:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """HF's, which leaves the training's random numbers as they are."""
        self._to_evaluate = len(self.eval_dataset if eval_dataset is None else eval_dataset)  # pyright: ignore
        self._batches_evaluated = 0  # by this process
        with torch.random.fork_rng():
            return super().evaluate(eval_dataset, *args, **kwargs)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The mean over the batch's instances of their negative log-likelihood per answer token, in nats."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses_L, row_L, _ = answer_losses(model, inputs, self.accelerator.unwrap_model(model))
        counts_B = torch.bincount(row_L, minlength=len(inputs["labels"])).clamp_min(1)
        totals_B = torch.zeros(len(counts_B), device=losses_L.device).index_add(0, row_L, losses_L)
        # Processes take batches in turn, and accelerate fills the last ones up with instances that count elsewhere.
        batch = self._batches_evaluated * self.args.world_size + self.args.process_index
        self._batches_evaluated += 1
        left = max(1, self._to_evaluate - batch * self.args.eval_batch_size)
        return (totals_B / counts_B)[:left].mean(), None, None


@cache
def _say_how_to_use_all(gpus: int) -> None:
    command = f"accelerate launch --multi_gpu --num_processes {gpus} -m badit train RECIPE"
    say(f"badit: training on one of {gpus} GPUs; to use all of them: {command}")


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
        inputs: input_ids, attention_mask and labels, (B, T); and, for methods that tell tasks apart, ``tasks``, the
            task's name of each row.
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

    A hook on the output layer works for every architecture and padding side, and what a model does to its logits
    afterwards (soft-capping, scaling) applies to each position alone.
    """
    head: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]

    def select(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][row_L, position_L][None], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@dataclass(eq=False)
class EpochSampler(Sampler[int]):
    """A shuffle that depends on seed and epoch alone, so that a resumed run sees the same batches.

    Each optimizer step is a random draw from all tasks. Within a step the examples are sorted by length, so that
    accumulated micro-batches hold little padding. (Batches of similar length would be batches of one task, which trains
    worse.) The step with the longest example comes first, since that is where memory runs out.

    With ``tasks``, every example's, and ``quotas`` an epoch takes so many examples from each task: small tasks are
    repeated, and of large ones every epoch draws a new subset.
    """

    lengths: Sequence[int]
    examples_per_step: int
    seed: int
    tasks: Sequence[str] = ()
    quotas: Mapping[str, int] | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.lengths) if self.quotas is None else sum(self.quotas[task] for task in set(self.tasks))

    def _drawn(self, quotas: Mapping[str, int], generator: torch.Generator) -> list[int]:
        by_task: dict[str, list[int]] = {}
        for index, task in enumerate(self.tasks):
            by_task.setdefault(task, []).append(index)
        chosen: list[int] = []
        for task, indices in by_task.items():
            repeats, rest = divmod(quotas[task], len(indices))
            some = torch.randperm(len(indices), generator=generator)[:rest].tolist()
            chosen += indices * repeats + [indices[i] for i in some]
        return [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.quotas is None:
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = self._drawn(self.quotas, generator)
        per_step = self.examples_per_step
        steps = [order[start : start + per_step] for start in range(0, len(order), per_step)]
        by_length = [sorted(step, key=self.lengths.__getitem__, reverse=True) for step in steps]
        # A short step stays last, or the loader's own cut would fall out of step with this one.
        full = len(order) // per_step
        longest = max(range(full), key=lambda i: self.lengths[by_length[i][0]], default=0)
        if by_length:
            by_length.insert(0, by_length.pop(longest))
        return iter([index for step in by_length for index in step])


class _EveryStep(TrainerCallback):
    """Drops gradients that are not finite, and tells the sampler, the method's model and the Trainer where it stands.

    Neither weights nor moments nor Gram matrices ever see such gradients. A single infinity may be an instance's or the
    precision's; a run that keeps meeting them is broken, and going on would only hide it.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # ``state.epoch`` is whole at an epoch's start, and keeps that part where a run is resumed within.
        if self._trainer.sampler is not None:  # a subclass may have another
            self._trainer.sampler.epoch = int(state.epoch or 0)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hooks_of(kwargs["model"]).after_update()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Logs the last step and every evaluated one, and saves every evaluated one if the best is wanted.
        control.should_log |= control.should_evaluate or state.global_step >= state.max_steps
        control.should_save |= control.should_evaluate and args.load_best_model_at_end

    on_epoch_end = on_step_end

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._drop_non_finite(state, kwargs["model"], kwargs["optimizer"])
        hooks_of(kwargs["model"]).before_update()

    def _drop_non_finite(self, state: Any, model: nn.Module, optimizer: Any) -> None:
        trainer = self._trainer
        micro_batches, trainer.micro_batches = trainer.micro_batches, []
        parameters = [p for p in model.parameters() if p.grad is not None]
        gradients: list[Any] = [parameter.grad for parameter in parameters]
        tensors = [loss for loss, _ in micro_batches]
        tensors += [each.to_local() if isinstance(each, DTensor) else each for each in gradients]  # own shards
        # One synchronisation for all tensors.
        finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
        if not any_of_all(not bool(finite)):
            return
        trainer.skipped_steps += 1
        # DeepSpeed has taken the step by now, so nothing is left to skip. A short run must not skip more than half.
        limit = 0 if steps_in_backward(optimizer) else min(trainer.options.max_skipped_steps, state.max_steps // 2)
        if trainer.skipped_steps > limit:
            raise BaditError(
                f"training: the loss or its gradient is not finite in step {state.global_step + 1}, after "
                f"{limit} skipped steps; the batch has {_instances(micro_batches, trainer.train_dataset)}; "
                "look at these, or lower training.learning_rate"
            )
        for parameter in parameters:
            parameter.grad = None  # optimizers pass over parameters without a gradient


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
    names = [
        f"{example['task']}/{example['id']}"
        for example in examples
        if (example["task"], tuple(example["input_ids"])) in rows
    ]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"instance{'s' if len(names) > 1 else ''} {', '.join(names[:_NAMED])}{more}"


_LOSSES = {"loss", "eval_loss"}


class MetricsLog(TrainerCallback):
    """Appends the trainer's log lines to a file, less those that a resumed run is about to log again.

    Times and rates are left out, and so is the closing line: they tell of this process, and a resumed run has had
    several. environment.json has the training's. So are a regrouping's, of which regroupings.jsonl has more.
    """

    def __init__(self, path: Path) -> None:
        self._log = StepLog(path)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._log.rewind(state.global_step)

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
            self._log.append({"step": state.global_step, **kept})


class ProgressBar(TrainerCallback):
    """One bar with the time left and the latest losses; it also says when the training waits for something else."""

    def __init__(self) -> None:
        self._bar = tqdm(disable=True)  # until the training begins
        self._losses: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="Training",
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.set_description("Training", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()
        if control.should_evaluate or control.should_save:
            self._bar.set_description("Evaluating" if control.should_evaluate else "Saving")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.set_description("Saving" if control.should_save else "Training")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if logs:
            self._losses |= {name: f"{logs[name]:.3f}" for name in sorted(_LOSSES, reverse=True) if name in logs}
            self._bar.set_postfix(self._losses, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar's line, for what is written after it."""
        self._bar.close()

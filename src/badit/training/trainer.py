"""A Trainer with a loss on answers only, recipe options, and skipping of non-finite steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import chain, islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from badit.recipe.arguments import TrainingSection
from badit.support.console import say
from badit.support.errors import BaditError, explained
from badit.training.optimizers import OrthogonalUpdates, lora_plus_groups
from badit.training.regrouping import RegroupCallback
from badit.training.sampler import EpochSampler
from badit.tuner.answers import answer_logits
from badit.tuner.distributed import any_of_all, objects_of_ranks
from badit.tuner.model import hooks_of
from badit.tuner.prompt import before_first_label

MicroBatch = tuple[torch.Tensor, Mapping[str, Any]]  # its loss and its inputs

_DEFAULTS = TrainingSection.model_validate({})
# A decorator: values that transformers refuses are reported as those of the recipe's section.
_names_section = explained("training", action="used", any_error=True)
_say_once = cache(say)  # once, not in every stage of a sequence


class AnswerTrainer(Trainer):
    """Trains on batches of ``input_ids``, ``attention_mask`` and ``labels`` (−100 on all but the
    answers), and, for methods that need task names, ``tasks`` (one per row).

    The loss is the cross-entropy averaged over the answer tokens of the whole accumulated batch. If
    the method has an extra loss (``Hooks.extra_loss``), its mean over the micro-batches is added.

    Args:
        options: a recipe's ``training`` section, for badit's own options.
        quotas: the number of examples per task in an epoch. The dataset must have ``tasks``, one
            per example.
    """

    @_names_section
    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        options: TrainingSection = _DEFAULTS,
        quotas: Mapping[str, int] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            _use_one_gpu(args)
        # The first callback, because the others read the gradients that it removes.
        own_callbacks: list[TrainerCallback] = [_StepCallback(self)]
        if options.early_stopping_patience:
            own_callbacks.append(EarlyStoppingCallback(options.early_stopping_patience))
        super().__init__(model, args=args, callbacks=[*own_callbacks, *callbacks], **kwargs)

        self.options = options
        self.skipped_steps = 0
        self.micro_batches: list[MicroBatch] = []  # since the last step
        # In an evaluation, by task: the sum of its instances' losses, and their number.
        self._losses_by_task: dict[str, list[float]] = {}
        self.losses_by_task: dict[str, list[float]] = {}  # of the last evaluation, by all ranks
        self._quotas = quotas
        # compute_loss divides by the number of labels in the accumulated batch, so the Trainer must
        # count them.
        self.model_accepts_loss_kwargs = True

    @_names_section
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Creates the optimizer of the options, or the Trainer's if it can do the same."""
        if self.optimizer is None:
            self.optimizer = self._optimizer_of_options(self.model if model is None else model)
        return super().create_optimizer(model)

    def _optimizer_of_options(self, model: Any) -> torch.optim.Optimizer | None:
        rate = self.args.learning_rate
        other_rate = rate * self.options.router_lr_ratio
        weight_decay = self.args.weight_decay
        if self.options.optimizer == "orthogonal":
            return OrthogonalUpdates(model, rate, other_lr=other_rate, weight_decay=weight_decay)

        ratio = 1.0
        if self.options.optimizer == "lora+":
            ratio = self.options.lora_plus_ratio
        if ratio == 1.0 and other_rate == rate:
            return None  # a single learning rate

        optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, model)
        groups = lora_plus_groups(model, rate, ratio, other_lr=other_rate)
        return optimizer_class(groups, **arguments, weight_decay=weight_decay)

    create_scheduler = _names_section(Trainer.create_scheduler)
    get_train_dataloader = _names_section(Trainer.get_train_dataloader)
    set_initial_training_values = _names_section(Trainer.set_initial_training_values)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> EpochSampler:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = getattr(dataset, "lengths", None)
        if lengths is None:
            lengths = [len(example["input_ids"]) for example in dataset]

        # The ranks split a global batch, which equals the batch of a single process with this size.
        global_batch = self._train_batch_size * self.args.world_size
        seed = self.args.data_seed
        if seed is None:
            seed = self.args.seed
        return EpochSampler(
            lengths,
            examples_per_step=global_batch * self.args.gradient_accumulation_steps,
            seed=seed,
            # Whole at the start of an epoch, and fractional if a run resumes within an epoch.
            epoch=lambda: int(self.state.epoch or 0),
            tasks=() if self._quotas is None else dataset.tasks,
            quotas=self._quotas,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Also logs a new regrouping's metrics and the number of skipped steps.

        The loss is NaN if all steps since the last logged loss were skipped.
        """
        logs = dict(logs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RegroupCallback):
                logs |= callback.take_metrics()
        if self.skipped_steps:
            logs["skipped_steps"] = self.skipped_steps

        if "loss" in logs:
            history = reversed(self.state.log_history)
            last = next((line for line in history if "loss" in line), {"step": 0})
            skipped = self.skipped_steps - last.get("skipped_steps", 0)
            if skipped == self.state.global_step - last["step"]:
                logs["loss"] = math.nan
        super().log(logs, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the scalar loss, in training with the extra loss.

        The logits in the outputs are (1, L, vocabulary).
        """
        smoothing = self.args.label_smoothing_factor
        losses_L, _, outputs = answer_losses(model, inputs, label_smoothing=smoothing)
        num_labels = num_items_in_batch  # of the whole accumulated batch
        if num_labels is None:
            num_labels = len(losses_L)
        loss = losses_L.sum() / torch.as_tensor(num_labels).clamp_min(1)  # 0 without labels
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Data-parallel wrappers average over the ranks.
            loss = loss * self.accelerator.num_processes

        extra_loss = None
        if model.training:
            extra_loss = hooks_of(model).extra_loss(inputs["attention_mask"])
        if extra_loss is not None:
            if num_items_in_batch is not None:
                # The Trainer does not average over the micro-batches in this case.
                extra_loss = extra_loss / self.current_gradient_accumulation_steps
            loss = loss + extra_loss

        self.micro_batches.append((loss.detach(), inputs))
        if return_outputs:
            return loss, outputs
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Skips the epoch if the resumed training had ended; the Trainer would take a step."""
        callbacks: Any = self.state.stateful_callbacks
        if callbacks["TrainerControl"]["args"]["should_training_stop"]:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # With save_strategy "best" this decides whether to save, also if the run was told to save
        # and stop.
        return super()._determine_best_metric(*args, **kwargs) or self.control.should_save

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Preserves the CPU's random state, because evaluation must not change the training."""
        with torch.random.fork_rng([]):  # without the devices', which evaluation does not read
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Adds ``eval_loss/TASK``, the mean loss of each task's instances, to the metrics."""
        self._losses_by_task = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        of_ranks = objects_of_ranks(self._losses_by_task)
        sums: dict[str, list[float]] = {}
        for task, (loss, count) in chain.from_iterable(of_rank.items() for of_rank in of_ranks):
            total = sums.setdefault(task, [0.0, 0])
            total[0] += loss
            total[1] += count
        self.losses_by_task = sums
        assert output.metrics is not None
        for task in sorted(sums):
            loss, count = sums[task]
            output.metrics[f"{metric_key_prefix}_loss/{task}"] = loss / count
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Returns as loss the mean over instances; by default of the NLL per answer token."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            means_B = self.instance_losses(model, inputs)
        num_instances = len(means_B)

        loader = self.accelerator.gradient_state
        if loader.end_of_dataloader and loader.remainder > 0:
            # With several processes accelerate pads the last batches with repeated instances, which
            # do not count.
            first_of_rank = self.args.process_index * self.args.eval_batch_size
            num_instances = max(1, loader.remainder - first_of_rank)
        means_B = means_B[:num_instances]
        # Not strict: the padding that accelerate has added has tasks too.
        for task, loss in zip(inputs.get("tasks", ()), means_B.tolist(), strict=False):
            total = self._losses_by_task.setdefault(task, [0.0, 0])
            total[0] += loss
            total[1] += 1
        return means_B.mean(), None, None

    def instance_losses(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the validation loss of each instance of a batch."""
        losses_L, row_L, _ = answer_losses(model, inputs)
        num_instances = len(inputs["labels"])
        labels_B = torch.bincount(row_L, minlength=num_instances).clamp_min(1)
        totals_B = losses_L.new_zeros(num_instances).index_add(0, row_L, losses_L)
        return totals_B / labels_B

    @property
    def sums(self) -> dict[str, Any]:
        """What the next log line needs of the steps before it, besides the loss: JSON values."""
        return {}

    @sums.setter
    def sums(self, values: Mapping[str, Any]) -> None:
        pass


def _use_one_gpu(args: TrainingArguments) -> None:
    # The Trainer would use nn.DataParallel, whose threads would share the routing state.
    launch = f"accelerate launch --multi_gpu --num_processes {args.n_gpu} -m badit train RECIPE"
    _say_once(f"badit: training on one of {args.n_gpu} GPUs; to use all of them: {launch}")
    args._n_gpu = 1  # transformers has no public setter


def answer_losses(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    label_smoothing: float = 0.0,
    use_cache: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Returns the cross-entropy of every answer token of a batch.

    The model may be wrapped for data parallelism. ``inputs`` has input_ids, attention_mask and
    labels, (B, T), and the ``tasks`` of the rows for methods that need them. Returns the losses
    (L,) in float32, their rows in the batch (L,), and the outputs, with logits (1, L, vocabulary)
    and, with ``use_cache``, the key-value cache.
    """
    batch = dict(inputs)
    labels_BT = batch.pop("labels")
    row_tasks = batch.pop("tasks", None)
    hooks = hooks_of(model)
    if hooks.routes_prompts:
        batch["prompt_mask"] = before_first_label(labels_BT, batch["attention_mask"])
    with hooks.rows_of(row_tasks):
        answer = answer_logits(model, {**batch, "use_cache": use_cache}, labels_BT)

    losses_L = F.cross_entropy(
        answer.logits_LV.float(), answer.target_L, reduction="none", label_smoothing=label_smoothing
    )
    return losses_L, answer.row_L, answer.outputs


class _StepCallback(TrainerCallback):
    """Skips non-finite steps, calls the method's update hooks, and sets when to log and save.

    Skipped gradients change no weight, no moment and no Gram matrix. Too many (with DeepSpeed one)
    stop the run.
    """

    def __init__(self, trainer: AnswerTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = kwargs["model"]
        micro_batches = self._trainer.micro_batches
        self._trainer.micro_batches = []
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        tensors = [loss for loss, _ in micro_batches]
        tensors += [parameter.grad for parameter in parameters]

        # One synchronisation with the device for all tensors.
        if any_of_all(not bool(_all_finite(tensors))):
            self._count_skipped_step(state, kwargs["optimizer"], micro_batches)
            for parameter in parameters:
                parameter.grad = None  # optimizers skip parameters without a gradient
        hooks_of(model).before_update()

    def on_optimizer_step(self, *args, **kwargs):
        hooks_of(kwargs["model"]).after_update()

    def on_step_end(self, args, state, control, **kwargs):
        is_last_step = state.global_step >= state.max_steps
        # Evaluate an epoch in its last step, so that a checkpoint of this step includes the
        # evaluation.
        if args.eval_strategy == "epoch":
            epoch_ends = state.epoch % 1 == 0 or is_last_step
            control.should_evaluate = epoch_ends and args.eval_delay <= state.epoch
        # Log the last step and every evaluated step; save every evaluated step if the best model is
        # loaded at the end.
        control.should_log |= control.should_evaluate or is_last_step
        control.should_save |= control.should_evaluate and args.load_best_model_at_end

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = False  # already done in the last step

    def _count_skipped_step(
        self, state: Any, optimizer: Any, micro_batches: Sequence[MicroBatch]
    ) -> None:
        trainer = self._trainer
        trainer.skipped_steps += 1
        # A run may skip at most half of its steps.
        limit = min(trainer.options.max_skipped_steps, state.max_steps // 2)
        if isinstance(optimizer, DeepSpeedOptimizerWrapper):
            limit = 0  # DeepSpeed has already taken the step in the backward pass
        if trainer.skipped_steps > limit:
            problem = f"the loss or its gradient is not finite in step {state.global_step + 1}"
            instances = _instances(micro_batches, trainer.train_dataset)
            raise BaditError(
                f"training: {problem}, after {limit} skipped steps; the batch has instances "
                f"{instances}; check these, or lower training.learning_rate"
            )


def _all_finite(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """Returns a scalar tensor: whether all tensors, or this rank's shards of them, are finite."""
    are_finite = []
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        are_finite.append(tensor.isfinite().all())
    return torch.stack(are_finite).all()


def _instances(micro_batches: Sequence[MicroBatch], examples: Any) -> str:
    """Names up to 8 instances of the micro-batches with a non-finite loss.

    If only gradients are affected, all micro-batches are suspects.
    """
    suspects = [inputs for loss, inputs in micro_batches if not bool(loss.isfinite())]
    if not suspects:
        suspects = [inputs for _, inputs in micro_batches]

    rows = set()
    for inputs in suspects:
        mask_BT = inputs["attention_mask"].bool()
        columns = zip(inputs["tasks"], inputs["input_ids"], mask_BT, strict=True)
        for task, ids_T, mask_T in columns:
            token_ids = ids_T[mask_T].tolist()
            rows.add((task, tuple(token_ids)))

    # Batches do not have the identifiers of their rows.
    names = (
        f"{example['task']}/{example['id']}"
        for example in examples
        if (example["task"], tuple(example["input_ids"])) in rows
    )
    return ", ".join(islice(names, 8))  # enough to find the cause

"""Trains a resolved run, without scoring it.

With ``data.order`` the tasks are trained one after another, each in its own folder. An interrupted
training continues from its last checkpoint.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from badit.data.examples import (
    AnswerCollator,
    Examples,
    PairCollator,
    batches_by_task,
    encode_tasks,
)
from badit.data.sampling import mixture
from badit.data.tasks import Task
from badit.runs.fingerprints import (
    EXAMPLES,
    base_fingerprints,
    keep_inputs,
    task_fingerprints,
    tokenizer_fingerprint,
)
from badit.runs.resolved import ResolvedRun
from badit.support.console import is_main_process, quiet, say, say_once, status
from badit.support.environment import environment, peak_memory
from badit.support.errors import BaditError
from badit.support.files import copy_folder, read_json, replace_folder, write_json
from badit.training.attention import fast_on_short_sequences
from badit.training.checkpoints import Checkpoints, discard, last_checkpoint, safe_resuming
from badit.training.encoding import encoded, refuse_beyond_model
from badit.training.extending import (
    add_tasks,
    check_extension,
    compared,
    refuse_new_expert,
    report,
    train_covering,
)
from badit.training.hf_arguments import refuse_without_trl, training_arguments
from badit.training.loading import load_base, model_dtype
from badit.training.logs import MetricsLog, ProgressBar, divergence, trackers_of, tracking
from badit.training.methods import Method, on_skeleton, training_method
from badit.training.regrouping import RegroupCallback
from badit.training.trainer import AnswerTrainer
from badit.tuner import hooks_of
from badit.tuner.distributed import parameter_count, whole_weights

_SEEDS_OF_A_RUN = 1_000  # each stage of a sequence has its own seed, also in runs with nearby seeds


def fit(run: ResolvedRun, *, progress: bool = True, allow_changed_inputs: bool = False) -> None:
    """Trains a run. A sequence of tasks is trained one after another.

    The caller locks the run's folder. Under accelerate or torchrun all processes train, and only
    rank 0 writes it. BaditError as in :func:`badit.train`; also if data, base model or
    tokenizer changed, unless ``allow_changed_inputs``.
    """
    folder = run.folder
    # Refuses libraries that are not installed, before anything is written.
    trackers_of(run.recipe.training)
    refuse_without_trl(run.recipe.training)
    dtype = model_dtype(run.recipe)  # reads the model's configuration, before anything is written
    if run.recipe.training.objective == "dpo":
        # Refuses an adapter that TRL would not train.
        on_skeleton(run.recipe, run.method, [task.name for task in run.tasks], dtype=dtype)
    if run.recipe.extend.run is not None:
        check_extension(run)
    # Only rank 0 writes; the other ranks wait for it in the first training step.
    if is_main_process():
        run.prepare_folder()
        if not folder.environment_path.is_file():
            record = {**environment(), "dtype": dtype, "mixture": run.mixture}
            write_json(folder.environment_path, record)
    keep_inputs(folder, task_fingerprints(run.tasks), allow_changed_inputs)
    is_trained = folder.adapter_path.is_dir() or folder.scores_path.is_file()
    if is_trained or not run.method.trains:
        discard(folder.checkpoints_path)
        return

    run = _with_first_dtype(run)
    stages = run.stages
    for number, (stage_folder, _) in enumerate(stages):
        # Stages that an interrupted run has completed are not trained again.
        if not stage_folder.adapter_path.is_dir():
            _Stage(run, number, progress).train(allow_changed_inputs)
        discard(stage_folder.checkpoints_path)  # no longer needed for resuming
    # The run's adapter is that of its last stage.
    if run.recipe.data.order and is_main_process():
        records = [stage_folder.environment for stage_folder, _ in stages]
        summaries = [record["training"] for record in records]
        record = {**folder.environment, "training": joint_training(summaries)}
        record |= _diverged(next(filter(None, (of.get("diverged") for of in records)), None))
        write_json(folder.environment_path, record)
        copy_folder(stages[-1][0].adapter_path, folder.adapter_path)


def _with_first_dtype(run: ResolvedRun) -> ResolvedRun:
    """Returns the run with the dtype in which it began: "fast" could be another one now."""
    first = run.folder.known_environment.get("dtype")
    model = run.recipe.model
    if model.dtype != "fast" or first not in ("bfloat16", "float32"):
        return run
    model = model.model_copy(update={"dtype": first})
    resumed = replace(run, recipe=run.recipe.model_copy(update={"model": model}))
    # A cached property, which replace() does not copy: the tasks would be read again.
    resumed.tasks = run.tasks
    return resumed


def _diverged(problem: str | None) -> dict[str, str]:
    """Returns the entry of environment.json for a training that has diverged."""
    return {} if problem is None else {"diverged": problem}


def joint_training(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combines the summaries of consecutive trainings.

    The maximum of parameters and memory, the sum of the rest.
    """
    maxima = ("trainable_parameters", "parameters", "peak_memory_gib")
    joint = {}
    for key in trainings[0]:
        values = [training[key] for training in trainings]
        joint[key] = max(values) if key in maxima else sum(values)
    joint["seconds"] = round(joint["seconds"], 1)
    return joint


@dataclass
class _StageData:
    """The data of a stage's training."""

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    collate: AnswerCollator
    batches: Any  # the training batches of each task
    held_out: list[dict[str, Any]] | None  # to measure the validation loss


class _Stage:
    """The training of one stage of a run, counted from 0; a mixed run has only one."""

    def __init__(self, run: ResolvedRun, number: int, progress: bool) -> None:
        self.run = run
        self.recipe = run.recipe
        self.number = number
        self.progress = progress
        self.folder, self.tasks = run.stages[number]
        self.seed = run.recipe.training.seed + _SEEDS_OF_A_RUN * number
        self.method = training_method(run.method)

    def train(self, allow_changed_inputs: bool) -> None:
        """Trains from the base model or the previous stage's adapter, and saves the result."""
        # Before the model is prepared, because adapters start from random numbers.
        transformers.set_seed(self.seed)
        # bfloat16 would round small updates of a weight away.
        dtype = "float32" if self.run.method.trains_base_weights else None
        base, tokenizer = load_base(self.recipe, dtype=dtype)
        template = self.recipe.prompt.chat_template
        inputs = base_fingerprints(base) | tokenizer_fingerprint(tokenizer, template)
        keep_inputs(self.run.folder, inputs, allow_changed_inputs)
        checkpoint = last_checkpoint(self.folder.checkpoints_path)
        model = self._adapted(base, checkpoint)
        data = self._data(tokenizer, base)
        keep_inputs(self.run.folder, self._fingerprint_of(data), allow_changed_inputs)
        was_deterministic = torch.are_deterministic_algorithms_enabled()
        # Starts the group of processes.
        arguments = training_arguments(self.run, self.folder.path, self.seed, checkpoint)
        with status(f"preparing the data for {self.method.name}", in_logs=True):
            if self.recipe.extend.merge:
                train_covering(model, data.batches)
            self.method.before_training(model, data.batches)
        if checkpoint is None:  # else it has what this sets, such as the clusters of prompts
            with quiet(not self.progress), fast_on_short_sequences(base):
                self._compare_with_earlier(model, data)
                hooks_of(model).start_task(data.batches)

        bar = ProgressBar()
        trainer = self._trainer(model, arguments, data, bar)
        saving = Checkpoints(trainer, self.folder.checkpoints_path)
        # After all callbacks that write to a checkpoint, because it seals the checkpoint.
        trainer.add_callback(saving)
        tracked = tracking(trainer, self.folder.path, checkpoint)
        with safe_resuming(trainer, checkpoint), saving, tracked, fast_on_short_sequences(base):
            try:
                trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
            finally:
                bar.close()
                # full_determinism applies to training only.
                torch.use_deterministic_algorithms(was_deterministic)
        self._say_best(trainer)
        with status("saving"):
            hooks_of(model).end_task(data.batches)
            self._save(model, trainer, saving.seconds)
        # In the next stage, all ranks read the adapter that rank 0 has written.
        trainer.accelerator.wait_for_everyone()
        # Otherwise the next model, for scoring or the next stage, would be sharded too.
        unset_hf_deepspeed_config()

    def _compare_with_earlier(self, model: Any, data: _StageData) -> None:
        """Says how a stage's task relates to those of earlier stages, whose order is fixed.

        :func:`check_extension` has compared all tasks with an earlier run.
        """
        if self.number > 0 and self.run.adds_tasks(self.number):
            for line in report(compared(model, self.recipe.extend, data.batches)):
                say_once(f"badit: {line}")

    def _fingerprint_of(self, data: _StageData) -> dict[str, str]:
        name = EXAMPLES
        if self.recipe.data.order:
            name += f" of {self.tasks[0].name}"
        return {name: data.examples.fingerprint}

    def _adapted(self, base: Any, checkpoint: Path | None) -> Any:
        with status(f"preparing the model for {self.method.name}", in_logs=True):
            previous = self.run.starts_from(self.number)
            if previous is None:
                model = self.method.apply(base, self._task_names(checkpoint))
                if len(self.run.stages) > 1 and self.run.adds_tasks(1):
                    refuse_new_expert(model, self.recipe.extend)
            else:
                model = self.method.proceed(base, previous)
            names = [task.name for task in self.tasks]
            if self.run.adds_tasks(self.number):
                add_tasks(model, self.recipe.extend, names)
        if self.recipe.training.gradient_checkpointing:
            # The embeddings are frozen: else no gradient would reach checkpointed layers.
            model.enable_input_require_grads()
        return model

    def _task_names(self, checkpoint: Path | None) -> list[str]:
        """Returns the names of the tasks that a new adapter is trained on."""
        if self.method.resolved.needs_tasks:  # of all stages
            return [task.name for task in self.run.tasks]
        if checkpoint is not None and (checkpoint / CONFIG_NAME).is_file():
            # Tasks may have been added to the data since the clusters were found.
            saved = read_json(checkpoint / CONFIG_NAME).get("tasks")
            if saved is not None:
                return saved
        return [task.name for task in self.tasks]

    def _data(self, tokenizer: PreTrainedTokenizerBase, base: Any) -> _StageData:
        recipe = self.recipe
        order = mixture(self.tasks, recipe.data.seed)
        options = recipe.prompt.model_dump()
        examples = encode_tasks(tokenizer, self.tasks, options, order, progress=self.progress)
        refuse_beyond_model(examples, base)
        collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
        size = recipe.training.per_device_train_batch_size
        held_out = None
        if recipe.training.eval_strategy != "no":
            held_out = validation_examples(tokenizer, recipe, self.tasks, base)
        batches = batches_by_task(examples, collate, size)
        return _StageData(tokenizer, examples, collate, batches, held_out)

    def _trainer(
        self, model: Any, arguments: TrainingArguments, data: _StageData, bar: ProgressBar
    ) -> AnswerTrainer:
        callbacks = [MetricsLog(self.folder.metrics_path), *self.method.callbacks(self.folder)]
        if self._keeps_experts():
            # The components of frozen experts keep their groups.
            callbacks = [one for one in callbacks if not isinstance(one, RegroupCallback)]
        if self.progress:
            callbacks.insert(1, bar)
        options = {
            "model": model,
            "args": arguments,
            "train_dataset": data.examples,
            "eval_dataset": data.held_out,
            "data_collator": data.collate,
            "callbacks": callbacks,
            "quotas": self.recipe.data.quotas(self.tasks),
            "options": self.recipe.training,
        }
        if self.recipe.training.objective == "dpo":
            trainer = self._preference_trainer(options, data.tokenizer)
        else:
            trainer = self.method.trainer(**options)
        # It prints the log lines, which are in metrics.jsonl.
        trainer.remove_callback(transformers.PrinterCallback)
        _refuse_sharding(trainer, self.method)
        return trainer

    def _preference_trainer(
        self, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> AnswerTrainer:
        from badit.training.preferences import PreferenceTrainer  # imports TRL

        reference = None
        if self.run.method.trains_base_weights:
            reference, _ = load_base(self.recipe, dtype="float32")
        options["data_collator"] = PairCollator(tokenizer.pad_token_id, with_tasks=True)
        return PreferenceTrainer(processing_class=tokenizer, reference=reference, **options)

    def _keeps_experts(self) -> bool:
        """Returns whether the stage adds tasks to trained experts, or trains some of them."""
        return self.recipe.extend.run is not None or self.run.adds_tasks(self.number)

    def _say_best(self, trainer: AnswerTrainer) -> None:
        state = trainer.state
        if not self.progress or state.best_metric is None:
            return
        if trainer.args.load_best_model_at_end:
            best = f"step {state.best_global_step} (eval_loss {state.best_metric:.4f})"
            say(f"badit: trained {state.global_step} steps; kept the model of {best}")

    def _save(self, model: Any, trainer: AnswerTrainer, seconds: float) -> None:
        weights = whole_weights(model)  # gathers the shards of all ranks
        if not trainer.is_world_process_zero():
            return
        summary = {
            "trainable_parameters": self.method.trained_parameters(model),
            "parameters": sum(parameter_count(parameter) for parameter in model.parameters()),
            "steps": trainer.state.global_step,
            "tokens": int(trainer.state.num_input_tokens_seen),
            "seconds": round(seconds, 1),
            "peak_memory_gib": peak_memory(),
        }
        folder = self.folder
        problem = None
        if not trainer.args.load_best_model_at_end:  # else the model of an earlier step is kept
            problem = divergence(trainer.state.log_history)
        if problem is not None:
            say(f"badit: {folder.path}: the training has diverged ({problem})")
        # Before the adapter, whose folder marks the stage as trained.
        record = {**folder.known_environment, "training": summary, **_diverged(problem)}
        write_json(folder.environment_path, record)
        # Renamed when complete, so that a killed process leaves no incomplete adapter.
        partial = folder.adapter_path.with_name("adapter.partial")
        discard(partial)
        self.method.save(model, partial, self.recipe.model.name, weights)
        replace_folder(partial, folder.adapter_path)


def validation_examples(
    tokenizer: PreTrainedTokenizerBase, recipe: Any, tasks: Sequence[Task], model: Any
) -> list[dict[str, Any]]:
    """Returns the encoded validation instances, by length: such batches have little padding."""
    pairs = [(task, instance) for task in tasks for instance in task.validation]
    examples = encoded(tokenizer, recipe, pairs, model)
    return sorted(examples, key=lambda example: len(example["input_ids"]))


def _refuse_sharding(trainer: AnswerTrainer, method: Method) -> None:
    """Raises BaditError for ways of sharding that the method or badit does not support."""
    is_sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if method.resolved.needs_whole_weights and is_sharded:
        problem = f"{method.name} needs unsharded weights; launch it without FSDP and DeepSpeed"
        raise BaditError(f"method: {problem}")
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin and (plugin.fsdp_version == 1 or plugin.cpu_ram_efficient_loading):
        fix = "fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false, as in docs/fsdp2.yaml"
        raise BaditError(f"FSDP: set {fix}")

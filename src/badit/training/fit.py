"""Trains a recipe: reads the tasks, loads the base model, applies the method, encodes, trains and saves.

With ``data.order`` the tasks are trained one after another, each in its own folder. Interrupted runs can be resumed.
"""

import hashlib
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import release_memory
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.import_utils import is_liger_kernel_available

from badit.data.encoded import AnswerCollator, Examples, batches_by_task, encode_tasks
from badit.data.prompts import build_prompt, encode_examples, encode_prompts, end_of_turn_id
from badit.data.tasks import Instance, Task, mixture, ordered
from badit.models import Dtype, device, fast_dtype, load_base_model, warn_of_slow_dtype
from badit.recipe.arguments import argument_names
from badit.recipe.schema import Recipe, Split
from badit.runs.folder import RunFolder
from badit.support.console import is_main_process, say, status
from badit.support.environment import environment, peak_memory
from badit.support.errors import BaditError, explained
from badit.support.files import copy_folder, replace_folder, write_json
from badit.training.attention import fast_on_short_sequences
from badit.training.checkpoints import STAGING, Checkpoints, discard, last_checkpoint, safe_resuming
from badit.training.methods import Method, build_method
from badit.training.trainer import MetricsLog, ProgressBar, trackers_of, tracking
from badit.tuner import hooks_of
from badit.tuner.distributed import parameter_count, whole_weights

# The key of the base model's fingerprint among a run's inputs.
BASE_MODEL = "the base model"


@dataclass
class Plan:
    """A recipe's tasks and method, before a model is loaded. Tasks of a sequential recipe are in training order."""

    recipe: Recipe
    tasks: list[Task]
    method: Method

    def __repr__(self) -> str:
        counts = f"{self.training_instances} training, {self.test_instances} test instances"
        return f"Plan({len(self.tasks)} tasks, {counts})"

    @property
    def stages(self) -> list[tuple[RunFolder, list[Task]]]:
        """The parts with their own results, and their tasks: all tasks of a mixed run, or one task of a sequence."""
        run = RunFolder.at(self.recipe.output)
        if not self.recipe.data.order:
            return [(run, self.tasks)]
        folder, width = (
            run.path / "stages",
            max(2, len(str(len(self.tasks)))),
        )  # sorted names are in training order
        return [
            (RunFolder.at(folder / f"{i:0{width}}-{task.name}"), [task])
            for i, task in enumerate(self.tasks, start=1)
        ]

    @property
    def mixture(self) -> dict[str, int]:
        """The number of training instances per task in an epoch (in a sequence, an epoch of the task's stage)."""
        sizes = {task.name: len(task.train) for task in self.tasks}
        return self.recipe.data.quotas(self.tasks) or sizes

    @property
    def training_instances(self) -> int:
        return sum(len(task.train) for task in self.tasks)

    @property
    def test_instances(self) -> int:
        return sum(len(getattr(task, self.recipe.evaluation.split)) for task in self.tasks)


def make_plan(recipe: Recipe, *, split: Split | None = None) -> Plan:
    """Builds the method and reads tasks; BaditError if one has no instances in ``split`` (default: the recipe's).

    If some tasks have no training instances, as in official split lists, the others need no instances to score.
    """
    data = recipe.data
    method = build_method(recipe.method)
    method.refuse_recipe(recipe)
    with status("reading the tasks"):
        tasks = data.load()
    split = split or recipe.evaluation.split
    untrained = [task.name for task in tasks if not task.train]
    trained = len(tasks) - len(untrained)
    if not trained:
        raise BaditError("data: no task has training instances; add some")
    set_it = "set data.validation_per_task to hold out some of its training instances"
    too_few = "at least 4 training instances are needed to hold one out; add some, or leave the task out of data.tasks"
    score_those = "to score held-out training instances: evaluation.split=validation data.validation_per_task=10"
    for task in tasks:
        hold_out = too_few if data.validation_per_task or 0 < len(task.train) < 4 else set_it
        need_not_score = untrained and task.train if split == "test" else not task.train
        if not getattr(task, split) and not need_not_score:
            fix = score_those if split == "test" and len(task.train) >= 4 else hold_out
            raise BaditError(f"data: task {task.name} has no {split} instances; {fix}")
        if recipe.training.eval_strategy != "no" and task.train and not task.validation:
            raise BaditError(
                f"training.eval_strategy: task {task.name} has no validation instances; {hold_out}"
            )
    if data.order is not None:
        tasks = ordered(tasks, data.order)
        if untrained:
            raise BaditError(
                f"data: task {untrained[0]} has no training instances, which data.order needs; add some"
            )
    elif method.name == "badit" and trained <= 8 and "num_clusters" not in recipe.method:
        method.config.num_clusters = (
            trained  # more clusters raised the loss (docs/experiments/few-tasks.md)
        )
    return Plan(recipe, tasks, method)


def fit(recipe: Recipe, *, progress: bool = True, allow_changed_inputs: bool = False) -> RunFolder:
    """Trains a recipe without scoring it. A sequence of tasks is trained one after another, each with its own result.

    The caller locks the run's folder. Under accelerate or torchrun all processes train, and only rank 0 writes it.
    BaditError as in :func:`badit.train`; also if data or base weights changed, unless ``allow_changed_inputs``.
    """
    plan = make_plan(recipe)
    trackers_of(recipe.training)
    dtype = model_dtype(recipe)  # reads the model's configuration, before anything is written
    # Only rank 0 writes; the other ranks wait for it in the first training step.
    run = RunFolder.prepare(recipe) if is_main_process() else RunFolder.at(recipe.output)
    if is_main_process() and not run.environment_path.is_file():
        write_json(run.environment_path, {**environment(), "dtype": dtype, "mixture": plan.mixture})
    keep_inputs(run, task_fingerprints(plan.tasks), allow_changed_inputs)
    if run.adapter_path.is_dir() or run.scores_path.is_file() or not plan.method.trains:
        discard(run.checkpoints_path)
        return run
    began = run.known_environment.get("dtype")
    if recipe.model.dtype == "fast" and began in (
        "bfloat16",
        "float32",
    ):  # "fast" could choose another dtype now
        plan.recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"dtype": began})}
        )
    folders = [folder for folder, _ in plan.stages]
    for number, folder in enumerate(folders):
        if not folder.adapter_path.is_dir():
            _train_stage(plan, number, progress, allow_changed_inputs)
        discard(folder.checkpoints_path)  # no longer needed for resuming
    if recipe.data.order and is_main_process():
        summaries = [folder.environment["training"] for folder in folders]
        write_json(run.environment_path, {**run.environment, "training": joint_training(summaries)})
        copy_folder(folders[-1].adapter_path, run.adapter_path)
    return run


def _train_stage(plan: Plan, number: int, progress: bool, allow_changed_inputs: bool) -> None:
    """Trains stage ``number``, counted from 0, from the base model or the previous stage's adapter."""
    (folder, tasks), recipe, method, data = (
        plan.stages[number],
        plan.recipe,
        plan.method,
        plan.recipe.data,
    )
    seed = (
        recipe.training.seed + 1_000 * number
    )  # unique per stage, also among runs with nearby seeds

    transformers.set_seed(seed)
    base, tokenizer = base_model(recipe, dtype="float32" if method.trains_base_weights else None)
    keep_inputs(
        RunFolder.at(recipe.output), {BASE_MODEL: model_fingerprint(base)}, allow_changed_inputs
    )
    with status(f"preparing the model for {method.name}"):
        if number == 0:
            model = method.apply(base, [task.name for task in plan.tasks])
        else:
            model = method.proceed(base, plan.stages[number - 1][0].adapter_path)
    if recipe.training.gradient_checkpointing:
        model.enable_input_require_grads()

    examples = encode_tasks(
        tokenizer, tasks, recipe.prompt.model_dump(), mixture(tasks, data.seed), progress=progress
    )
    refuse_beyond_model(examples, base)
    collate = AnswerCollator(tokenizer.pad_token_id, with_tasks=True)
    batches = batches_by_task(examples, collate, recipe.training.per_device_train_batch_size)
    held_out = None
    if recipe.training.eval_strategy != "no":
        held_out = encoded(
            tokenizer, recipe, [(task, one) for task in tasks for one in task.validation], base
        )
        held_out.sort(key=lambda example: len(example["input_ids"]))
    deterministic = torch.are_deterministic_algorithms_enabled()
    checkpoint = last_checkpoint(folder.checkpoints_path)
    arguments = training_arguments(
        plan, folder.path, seed, checkpoint
    )  # starts the group of processes
    with status(f"preparing the data for {method.name}"):
        method.before_training(model, batches)
        if checkpoint is None:  # otherwise it has what this sets, such as the clusters of prompts
            hooks_of(model).start_task(batches)
    bar = ProgressBar()
    trainer = method.trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=held_out,
        data_collator=collate,
        callbacks=[
            MetricsLog(folder.metrics_path),
            *([bar] if progress else []),
            *method.callbacks(folder),
        ],
        quotas=data.quotas(tasks),
        options=recipe.training,
    )
    trainer.remove_callback(
        transformers.PrinterCallback
    )  # prints the log lines, which are in metrics.jsonl
    if method.needs_whole_weights and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise BaditError(
            f"method: {method.name} needs unsharded weights; launch it without FSDP and DeepSpeed"
        )
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if fsdp and (fsdp.fsdp_version == 1 or fsdp.cpu_ram_efficient_loading):
        raise BaditError(
            "FSDP: set fsdp_version: 2 and fsdp_cpu_ram_efficient_loading: false, as in docs/fsdp2.yaml"
        )

    trainer.add_callback(saving := Checkpoints(trainer, folder.checkpoints_path))
    tracked = tracking(trainer, folder.path, checkpoint)
    with safe_resuming(trainer, checkpoint), saving, tracked, fast_on_short_sequences(base):
        try:
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        finally:
            bar.close()
            torch.use_deterministic_algorithms(
                deterministic
            )  # full_determinism applies to training only
    seconds, state = saving.seconds, trainer.state
    if progress and state.best_metric is not None and trainer.args.load_best_model_at_end:
        best = f"step {state.best_global_step} (eval_loss {state.best_metric:.4f})"
        say(f"badit: trained {state.global_step} steps; kept the model of {best}")

    with status("saving"):
        hooks_of(model).end_task(batches)
        weights = whole_weights(model)
        if trainer.is_world_process_zero():
            summary = {
                "trainable_parameters": method.trained_parameters(model),
                "parameters": sum(parameter_count(parameter) for parameter in model.parameters()),
                "steps": state.global_step,
                "tokens": int(state.num_input_tokens_seen),
                "seconds": round(seconds, 1),
                "peak_memory_gib": peak_memory(),
            }
            write_json(folder.environment_path, {**folder.known_environment, "training": summary})
            partial = folder.adapter_path.with_name("adapter.partial")
            discard(partial)
            method.save(model, partial, recipe.model.name, weights)
            replace_folder(partial, folder.adapter_path)
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # otherwise the next model, for scoring or the next stage, would be sharded too


def keep_inputs(run: RunFolder, found: Mapping[str, str], allow_changed: bool = False) -> None:
    """Records the inputs' fingerprints in environment.json; BaditError if one changed, unless ``allow_changed``."""
    if (
        not is_main_process()
    ):  # rank 0 may still have to replace the record of a first attempt that failed
        return
    content, changed = run.known_environment, changed_inputs(run, found)
    if changed and not allow_changed:
        raise BaditError(
            f"{run.path}: {', '.join(changed)} changed since the run began; restore the original input, choose another "
            "output=FOLDER, or, in badit train, continue with --allow-changed-inputs"
        )
    if changed and run.adapter_path.is_dir():  # the record stays that of the training
        say(
            f"badit: {', '.join(changed)} changed since the run was trained; badit evaluate scores it again"
        )
        return
    kept = {name: value for name, value in content.get("inputs", {}).items() if name not in changed}
    updated = {**content, "inputs": {**kept, **found}}
    if changed:
        updated["changed_inputs"] = sorted({*content.get("changed_inputs", ()), *changed})
    if content and updated != content:
        write_json(run.environment_path, updated)


def changed_inputs(run: RunFolder, found: Mapping[str, str]) -> list[str]:
    """Returns the names of changed inputs of a run; ``found`` has either all of its tasks or the base model."""
    known: dict[str, str] = run.known_environment.get("inputs", {})
    kind = {name for name in known if (name == BASE_MODEL) == (BASE_MODEL in found)}
    return sorted(
        name for name in kind | found.keys() if kind and known.get(name) != found.get(name)
    )


def task_fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns a hash of each task's definition, demonstrations and instances."""
    return {f"task {task.name}": task.fingerprint for task in tasks}


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of all unquantised weights: the sum of the bits in bfloat16, and up to 64 numbers of each."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
            continue  # quantised
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 64)][:64].bfloat16().float().cpu()
        total = int(flat.bfloat16().view(torch.int16).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {total}".encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_beyond_model(examples: Iterable[Mapping[str, Any]], model: Any, more: int = 0) -> None:
    """Raises BaditError if an instance plus ``more`` tokens exceeds the model's positions, or an id its embeddings."""
    config, embeddings = model.config.get_text_config(), len(model.get_input_embeddings().weight)
    rotary = getattr(config, "rope_parameters", None) or getattr(
        config, "rope_theta", None
    )  # unlimited
    positions = math.inf if rotary else getattr(config, "max_position_embeddings", None) or math.inf
    if isinstance(examples, Examples):  # the table finds the extremes quickly
        longest, largest_id = max(examples.lengths, default=0), examples.largest_id
        if longest + more <= positions and largest_id < embeddings:
            return
    for example in examples:
        ids, where = example["input_ids"], f"instance {example['task']}/{example['id']}"
        if len(ids) + more > positions:
            size = f"{len(ids)} tokens{f' plus {more} new' if more else ''}, but the model has {positions} positions"
            raise BaditError(
                f"{where}: has {size}; lower prompt.max_source_tokens or the number of new tokens"
            )
        if max(ids, default=0) >= embeddings:
            beyond = f"is beyond the model's {embeddings} embeddings"
            raise BaditError(f"{where}: token id {max(ids)} {beyond}; use its tokenizer")


def training_arguments(
    plan: Plan, folder: Path, seed: int, checkpoint: Path | None = None
) -> TrainingArguments:
    """Returns the recipe's training arguments with those that badit sets; BaditError if they are incompatible."""
    given = plan.recipe.training.model_dump(include=argument_names())  # without badit's own fields
    defaults = {
        "bf16": plan.method.trains_base_weights
        and model_dtype(plan.recipe) == "bfloat16",  # stored in float32
        "use_cpu": not torch.accelerator.is_available(),  # transformers needs it for bf16 and for several processes
        "dataloader_pin_memory": False,
        "log_level_replica": "passive",  # the level of rank 0, else the other ranks print warnings that it hides
        "project": "badit",
        "run_name": folder.resolve().name,
    }
    if given.pop("gradient_checkpointing"):
        # transformers renamed it within version 5
        name = f"{'activation' if 'activation_checkpointing' in argument_names() else 'gradient'}_checkpointing"
        given |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    fixed = {
        "output_dir": str(folder / "checkpoints" / STAGING),
        "resume_from_checkpoint": None
        if checkpoint is None
        else str(checkpoint),  # read by the callbacks
        "seed": seed,
        "report_to": [
            name for name in trackers_of(plan.recipe.training) if name != "tensorboard"
        ],  # see tracking()
        "include_num_input_tokens_seen": "non_padding",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "prediction_loss_only": True,
        "per_device_eval_batch_size": plan.recipe.evaluation.batch_size,
    }
    if given.get("use_liger_kernel") and not is_liger_kernel_available():
        raise BaditError(
            "training.use_liger_kernel: liger-kernel is not installed; install it, or remove this key"
        )
    if (best := given.pop("load_best_model_at_end")) or given.get("save_strategy") == "best":
        given["metric_for_best_model"] = "loss"
    with explained(
        "training", action="used", any_error=True
    ):  # incompatible values, or DeepSpeed is not installed
        arguments = TrainingArguments(**{**defaults, **given, **fixed})
    # Set afterwards: transformers refuses other intervals of checkpoints, but AnswerTrainer saves at every evaluation.
    arguments.load_best_model_at_end = best
    return arguments


def joint_training(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combines the summaries of consecutive trainings: the maximum of parameters and memory, the sum of the rest."""
    most = ("trainable_parameters", "parameters", "peak_memory_gib")
    total = {
        key: (max if key in most else sum)(one[key] for one in trainings) for key in trainings[0]
    }
    return {**total, "seconds": round(total["seconds"], 1)}


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    pairs: Iterable[tuple[Task, Instance]],
    model: Any,
) -> list[dict[str, Any]]:
    """Encodes instances (token ids, labels) in the recipe's prompt format; BaditError if the model cannot take one."""
    examples = encode_examples(tokenizer, list(pairs), **recipe.prompt.model_dump())
    if model is not None:  # None if a server runs it
        refuse_beyond_model(examples, model)
    return examples


def encoded_texts(
    tokenizer: Any,
    recipe: Recipe,
    texts: Sequence[str],
    task: Task | None,
    model: Any,
    more: int,
    *,
    raw: bool = False,
) -> list[list[int]]:
    """Returns token ids of a task's inputs or of whole prompts, unchanged if ``raw``; ``more`` tokens will follow."""
    prompts: list[Any] = list(texts)
    if not raw:
        inputs = [Instance(id="", input=text, outputs=("",)) for text in texts]
        task = task or Task(name="prompt", definition=None)
        prompts = [build_prompt(task, instance, recipe.prompt.encoding) for instance in inputs]
    options = recipe.prompt.model_dump(include={"max_source_tokens", "chat_template"})
    found = encode_prompts(tokenizer, prompts, **options)
    refuse_beyond_model(
        [{"task": "prompt", "id": i, "input_ids": ids} for i, ids in enumerate(found)], model, more
    )
    return found


def base_model(
    recipe: Recipe, *, dtype: Dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a recipe's base model to this process's device, and its tokenizer; ``dtype`` overrides the recipe's."""
    dtype = dtype or model_dtype(recipe)
    release_memory()  # of adapted models of earlier stages, which have reference cycles
    model, tokenizer = load_base_model(
        **recipe.model.model_dump(exclude={"dtype"}), dtype=dtype, device=device()
    )
    warn_of_slow_dtype(dtype, device())
    # The end of answers in training, which may be missing in the base model's generation configuration.
    end, known = (
        end_of_turn_id(tokenizer, recipe.prompt.chat_template),
        model.generation_config.eos_token_id,
    )
    ends = known if isinstance(known, list) else [known]
    if end not in ends:
        model.generation_config.eos_token_id = [one for one in ends if one is not None] + [end]
    if (
        not model.generation_config.do_sample
    ):  # transformers saves no changed configuration with unused settings
        vars(model.generation_config).update(
            temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None
        )
    return model, tokenizer


def model_dtype(recipe: Recipe) -> Dtype:
    """Returns the dtype of a recipe's base model on this process's device."""
    return fast_dtype(device()) if recipe.model.dtype == "fast" else recipe.model.dtype


def load_run(run: RunFolder, recipe: Recipe | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Returns a run's model, with its trained weights if the method trains, for inference, and the tokenizer.

    ``run`` may be a stage's folder if the run's ``recipe`` is given. BaditError if the adapter is missing or damaged.
    """
    recipe = recipe or run.trusted_recipe()
    method = build_method(recipe.method)
    if not method.trains:
        return base_model(recipe)
    whole = RunFolder.at(recipe.output)
    if not run.adapter_path.is_dir():
        command = shlex.join(["badit", "train", str(whole.config_path), f"output={whole.path}"])
        raise BaditError(f"{run.path}: has no adapter yet; finish its training with: {command}")
    model, tokenizer = base_model(recipe)
    if changed_inputs(whole, {BASE_MODEL: model_fingerprint(model)}):
        fix = "restore it, or train again with another output=FOLDER"
        raise BaditError(
            f"{run.path}: the base model {recipe.model.name} has changed since the run was trained; {fix}"
        )
    return method.load(model, run.adapter_path), tokenizer

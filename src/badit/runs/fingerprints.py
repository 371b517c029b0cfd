"""Fingerprints of a run's inputs, so that it never continues with others.

The inputs are the data, the base model's weights and configuration, the tokenizer, and the token
ids of the training examples.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from badit.data.encoding import ChatTemplate, end_of_turn_id, token_ids, uses_template
from badit.data.tasks import Task
from badit.runs.folder import RunFolder
from badit.support.console import is_main_process, say
from badit.support.errors import BaditError
from badit.support.files import write_json

# Names of inputs. Those of tasks begin with "task ", those of configurations with "the model's ".
BASE_MODEL = "the base model"
TOKENIZER = "the tokenizer"
EXAMPLES = "the encoded training examples"

_SAMPLED = 64  # numbers of a weight that are part of its fingerprint
# Words, cases, numbers, spaces, accents and scripts, which normalisation and splitting can affect.
_TEXT = "Name the capital of FRANCE:  3.14, 2026\n\tdef f(x): return été, ﬁ, straße, 東京, мир 🙂"
# What does not affect the numbers that a model computes, or is a part of the recipe.
_NOT_COMPUTED = {
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def task_fingerprints(tasks: Sequence[Task]) -> dict[str, str]:
    """Returns a hash of each task's definition, demonstrations and instances."""
    return {f"task {task.name}": task.fingerprint for task in tasks}


def base_fingerprints(model: PreTrainedModel) -> dict[str, str]:
    """Returns a hash of a base model's weights, and the settings of its configuration.

    Each setting is compared by itself, so that settings that a later release of transformers adds
    or renames are no change.
    """
    fingerprints = {BASE_MODEL: model_fingerprint(model)}
    for name, value in model.config.get_text_config().to_dict().items():
        if name in _NOT_COMPUTED or name.startswith("_") or name.endswith("_token_id"):
            continue
        text = json.dumps(value, sort_keys=True, default=str)
        if len(text) > 64:
            text = hashlib.sha256(text.encode()).hexdigest()[:16]
        fingerprints[f"the model's {name}"] = text
    return fingerprints


def model_fingerprint(model: PreTrainedModel) -> str:
    """Returns a hash of all unquantised weights.

    It covers of each weight the sum of the bits in bfloat16, and up to 64 numbers.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        is_quantised = type(parameter.data) is not torch.Tensor
        if is_quantised or not parameter.is_floating_point():
            continue
        flat = parameter.detach().flatten()
        # In bfloat16, since model.dtype fast may load the same weights in float32 elsewhere.
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].bfloat16().float().cpu()
        # A sum of integers is exact in any order, so it does not depend on the threads.
        total = int(flat.bfloat16().view(torch.int16).sum(dtype=torch.int64))
        digest.update(f"{name} {tuple(parameter.shape)} {total}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(
    tokenizer: PreTrainedTokenizerBase, chat_template: ChatTemplate
) -> dict[str, str]:
    """Returns a hash of the vocabulary, the used chat template, and the tokens of a text."""
    template = None
    if uses_template(tokenizer, chat_template):
        template = tokenizer.chat_template
    parts = [
        sorted(tokenizer.get_vocab().items()),
        template,
        end_of_turn_id(tokenizer, chat_template),
        tokenizer("")["input_ids"],  # a BOS that it adds
        token_ids(tokenizer, [_TEXT]),
    ]
    return {TOKENIZER: hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}


def keep_inputs(
    folder: RunFolder, fingerprints: Mapping[str, str], allow_changed: bool = False
) -> None:
    """Records fingerprints in environment.json.

    BaditError if an input changed since the run began, unless ``allow_changed``.
    """
    # Other ranks: rank 0 may still have to replace the record of a first attempt that failed.
    if not is_main_process():
        return
    changed = changed_inputs(folder, fingerprints)
    names = ", ".join(changed)
    if changed and not allow_changed:
        fix = "restore the original input, choose another output=FOLDER, or, in badit train, "
        fix += "continue with --allow-changed-inputs"
        raise BaditError(f"{folder.path}: {names} changed since the run began; {fix}")
    if changed and folder.adapter_path.is_dir():  # the record stays that of the training
        say(f"badit: {names} changed since the run was trained; badit evaluate scores it again")
        return

    environment = folder.known_environment
    inputs = {k: v for k, v in environment.get("inputs", {}).items() if k not in changed}
    updated = {**environment, "inputs": {**inputs, **fingerprints}}
    if changed:
        updated["changed_inputs"] = sorted({*environment.get("changed_inputs", ()), *changed})
    if environment and updated != environment:
        write_json(folder.environment_path, updated)


def changed_inputs(folder: RunFolder, fingerprints: Mapping[str, str]) -> list[str]:
    """Returns the names of inputs that differ from those that the run began with."""
    return differing_inputs(folder.known_environment.get("inputs", {}), fingerprints)


def differing_inputs(recorded: Mapping[str, str], fingerprints: Mapping[str, str]) -> list[str]:
    """Returns the names of inputs that differ from recorded ones.

    All tasks are compared together, so that an added or removed task differs; of other inputs,
    those that both have. Inputs that were not recorded, as by earlier releases, are no difference.
    """
    kinds = {_kind(name) for name in recorded} & {_kind(name) for name in fingerprints}
    names = {name for name in (*recorded, *fingerprints) if _kind(name) in kinds}
    return sorted(name for name in names if recorded.get(name) != fingerprints.get(name))


def _kind(name: str) -> str:
    return "task" if name.startswith("task ") else name

"""An example of a request to a server of an export."""

import json
import shlex
from contextlib import suppress

from badit.data.encoding import as_request, end_of_turn_id
from badit.data.prompts import Prompt, build_prompt
from badit.data.tasks import SPLITS
from badit.export.exporting import Export
from badit.models import load_tokenizer
from badit.runs.resolved import ResolvedRun
from badit.support.errors import BaditError

_COMPARED = 1_000  # instances of each split among which the shortest prompt is chosen


def served_name(exported: Export) -> str:
    """Returns the name under which the printed vLLM command serves an adapter or a model."""
    return exported.folder.resolve().name


def example_request(run: ResolvedRun, exported: Export) -> str:
    """Returns a curl command that asks vLLM, on its default port, to answer a prompt of the run.

    It is the shortest prompt of the export's task, or of all tasks, so that the command is short.
    Of an export of all tasks, the first one answers.
    """
    one = next(iter(exported.tasks.values()), exported)
    recipe = run.recipe
    tokenizer = load_tokenizer(
        recipe.model.name,
        trust_remote_code=recipe.model.trust_remote_code,
        revision=recipe.model.revision,
    )
    prompt = _shortest_prompt(run, one.record["task"])
    body = {"model": served_name(one), **as_request(tokenizer, prompt, **recipe.prompt.of_prompts)}
    # As the run answers.
    body |= {"max_tokens": recipe.evaluation.max_new_tokens, "temperature": 0}
    end = end_of_turn_id(tokenizer, recipe.prompt.chat_template)
    if end != tokenizer.eos_token_id:  # at which vLLM ends answers
        body["stop_token_ids"] = [end]
    path = "chat/completions" if "messages" in body else "completions"
    words = ["curl", f"http://127.0.0.1:8000/v1/{path}", "-H", "content-type: application/json"]
    return shlex.join([*words, "-d", json.dumps(body)])


def _shortest_prompt(run: ResolvedRun, task_name: str | None) -> Prompt:
    """Returns the shortest prompt of a task or of all tasks; PROMPT if the run has no instances."""
    prompts = []
    # A LoRA can be exported without its run's data, which may have been removed.
    with suppress(BaditError):
        for task in run.tasks:
            if task_name not in (None, task.name):
                continue
            for split in SPLITS:
                prompts += [
                    build_prompt(task, instance, run.recipe.prompt.encoding)
                    for instance in getattr(task, split)[:_COMPARED]
                ]
    placeholder = Prompt("", "PROMPT", "", is_message=True)
    return min(prompts, key=_length, default=placeholder)


def _length(prompt: Prompt) -> int:
    return len(prompt.text) + sum(len(content) for _, content in prompt.history)

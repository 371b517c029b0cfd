"""EleutherAI's lm-evaluation-harness for runs and for adapters with prompt routing.

It needs ``pip install 'badit[eval]'``.

    import badit.integrations.lm_eval  # registers the model "badit" with lm_eval

    lm_eval.simple_evaluate(model="badit", model_args={"run": "runs/mine"}, tasks=["arc_easy"])

lm_eval's own ``hf`` does not mark the end of the context, so gates also depend on the continuation
and the padding.

Shape suffixes: B = requests, T = positions, L = tokens of all continuations.
"""

import json
import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from tqdm import tqdm

import badit.baselines  # noqa: F401 (registers the baselines with PEFT)
from badit.data import AnswerCollator
from badit.data.encoding import IGNORED_LABEL, uses_template
from badit.models import device as accelerator
from badit.models import resolve_model
from badit.runs.folder import RunFolder
from badit.runs.resolved import open_run
from badit.support.errors import BaditError, explained
from badit.training.loading import load_run
from badit.training.trainer import answer_losses
from badit.tuner import hooks_of

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ModuleNotFoundError as error:
    raise BaditError(
        f"badit harness: {error.name} is not installed; run pip install 'badit[eval]'"
    ) from None

_HFLM: Any = HFLM  # lm_eval's decorator hides its type

#: The texts (context, continuation), None for parts of a longer text; and the token ids of context
#: and continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
#: A continuation's log-likelihood in nats, and whether greedy decoding gives it.
Score = tuple[float, bool]


@register_model("badit")
class BaditLM(_HFLM):
    """lm_eval's ``hf``, but gates depend only on a request's context, including its examples.

    Args:
        run: a run's folder, instead of ``pretrained`` and ``peft``: loads the trained model.
        task: the task of all requests, for methods that need each row's task.
        pretrained: a base model that :func:`badit.load_base_model` accepts, or a loaded model.
        device: the device of the model (default: the accelerator, if there is one).
        trust_remote_code: run Python code that comes with the base model.
        options: further options of ``hf``, such as ``peft``, ``dtype``, ``batch_size`` and
            ``max_length``.
    """

    def __init__(
        self,
        run: str | None = None,
        *,
        task: str | None = None,
        pretrained: Any = None,
        device: str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        if (run is None) == (pretrained is None):
            raise BaditError(
                "model_args: give either run=FOLDER or pretrained=MODEL, optionally with "
                "peft=ADAPTER"
            )
        if options.get("softmax_dtype") is not None:
            raise BaditError(
                "model_args: softmax_dtype: log-likelihoods are always computed in float32; "
                "remove it"
            )
        if run is not None:
            if "peft" in options:
                raise BaditError(
                    "model_args: a run has its own adapter; remove peft, or use pretrained "
                    "instead of run"
                )
            folder = RunFolder(run, trust_remote_code=trust_remote_code)
            pretrained, tokenizer = _load(folder, task, device)
            options.setdefault("tokenizer", tokenizer)
        elif isinstance(pretrained, str):
            # lm_eval does not know the name of the built-in model.
            pretrained = resolve_model(pretrained)
        super().__init__(
            pretrained=pretrained,
            device=device or str(accelerator()),
            trust_remote_code=trust_remote_code,
            **options,
        )
        if self.backend != "causal":
            raise BaditError(
                "model_args: pretrained: badit scores causal language models only; use --model hf"
            )
        self._task = task

    @torch.no_grad()
    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Score]:
        """Returns the score of each continuation. The longest ones are computed first."""

        def length(request: Request) -> int:
            return len(request[1]) + len(request[2])

        # As in hf, the longest first, so that a lack of memory shows at the start.
        collator = Collator(requests, sort_fn=lambda request: -length(request))
        size = override_bs or self.batch_size
        if size == "auto" and requests:
            # Requests differ in length, and a batch of the longest must fit.
            size = self._detect_batch_size([max(requests, key=length)])
        scores: list[Score] = []
        with tqdm(
            total=len(requests),
            disable=disable_tqdm or self.rank != 0,
            desc="Running loglikelihood requests",
        ) as bar:
            batches: Any = collator.get_batched(n=size)  # pyright: ignore[reportArgumentType]
            for batch in batches:
                scores += self._scored(batch)
                for (texts, *_), score in zip(batch, scores[-len(batch) :], strict=True):
                    # Windows of a longer text have no texts, which are the cache's keys.
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, score)
                bar.update(len(batch))
        return collator.get_original(scores)

    def _scored(self, requests: Sequence[Request]) -> list[Score]:
        """Scores one batch. The gates of each row depend on its context only."""
        examples = [self._example(*request) for request in requests]
        collate = AnswerCollator(self.tokenizer.pad_token_id, with_tasks=self._task is not None)
        batch: Any = send_to_device(collate(examples), self.device)
        # The last token is predicted but not an input: it is masked, and needs no position.
        mask_BT = F.pad(batch["attention_mask"][:, 1:], (0, 1))
        batch |= {"attention_mask": mask_BT, "position_ids": mask_BT.cumsum(dim=1) - 1}
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            losses_L, row_L, outputs = answer_losses(self.model, batch)
        targets_L = batch["labels"][batch["labels"] != IGNORED_LABEL]
        is_greedy_L = outputs.logits[0].argmax(dim=-1) == targets_L
        lengths_B = row_L.bincount().tolist()
        of_rows = zip(losses_L.split(lengths_B), is_greedy_L.split(lengths_B), strict=True)
        return [(-float(losses.sum()), bool(is_greedy.all())) for losses, is_greedy in of_rows]

    def _example(self, texts: Any, context: list[int], continuation: list[int]) -> dict[str, Any]:
        """Returns an example whose answer is the continuation; a long context loses its start."""
        size = len(continuation)
        if not 1 <= size <= self.max_length:
            raise BaditError(
                f"a continuation has {size} tokens; must have 1 to {self.max_length} (max_length)"
            )
        # One token more than the model reads, because the last one is only predicted.
        ids = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
        return {"input_ids": ids, "prompt_length": len(ids) - size, "task": self._task}

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._rows_of_task(len(inps)):  # ``hf`` calls this to find the largest batch that fits
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._rows_of_task(len(context)):
            return super()._model_generate(context, *args, **kwargs)

    def _rows_of_task(self, rows: int) -> AbstractContextManager[None]:
        return hooks_of(self.model).rows_of(None if self._task is None else [self._task] * rows)


def _load(folder: RunFolder, task: str | None, device: str | None) -> tuple[Any, Any]:
    """Loads a run's model and tokenizer."""
    run = open_run(folder)
    if task is None and run.method.needs_tasks:
        raise BaditError(f"model_args: {run.method.name} needs the name of a task; add task=NAME")
    model, tokenizer = load_run(run)
    if uses_template(tokenizer, run.recipe.prompt.chat_template):
        logging.getLogger(__name__).info(
            "Trained in the model's chat format: use --apply_chat_template."
        )
    # lm_eval's command line passes cuda:0 by default, on any machine.
    if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
        with explained("model_args: device", action="used", any_error=True):
            model = model.to(device)
    return model, tokenizer


def run_command_line(run: str, arguments: Sequence[str]) -> None:
    """Runs the command ``lm_eval run`` with the options ``arguments`` on a run's model."""
    from lm_eval.__main__ import cli_evaluate

    if any(argument.partition("=")[0] in ("--model", "-m") for argument in arguments):
        raise BaditError("--model: is the run; use lm_eval itself for other models")
    model = ["--model", "badit", "--model_args", json.dumps({"run": run})]
    # cli_evaluate reads its options from the arguments of the process.
    sys.argv = ["lm_eval", "run", *model, *arguments]
    try:
        cli_evaluate()
    # A BaditError is a ValueError too.
    except BaditError:
        raise
    except ValueError as error:
        raise BaditError(f"lm_eval: {error}") from error

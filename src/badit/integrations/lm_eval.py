"""EleutherAI's lm-evaluation-harness (``pip install 'badit[eval]'``) for runs and for adapters with prompt routing.

    import badit.integrations.lm_eval                         # registers the model "badit" with lm_eval
    lm_eval.simple_evaluate(model="badit", model_args={"run": "runs/mine"}, tasks=["arc_easy"])

lm_eval's own ``hf`` does not mark the end of the context, so gates also depend on the continuation and the padding.
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
from badit.models.loading import device as accelerator
from badit.models.loading import resolve_model
from badit.runs.folder import RunFolder
from badit.runs.resolved import open_run
from badit.support.errors import BaditError, explained
from badit.training.loading import load_run
from badit.training.trainer import answer_losses
from badit.tuner import hooks_of

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise BaditError(
        f"badit harness: {error.name} is not installed; run pip install 'badit[eval]'"
    ) from None

_HFLM: Any = HFLM  # lm_eval's decorator hides its type
#: The texts (context, continuation), None for parts of a longer text; and the token ids of context and continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("badit")
class BaditLM(_HFLM):
    """lm_eval's ``hf``, but gates depend only on a request's context, which includes few-shot examples.

    Args:
        run: a run's folder, instead of ``pretrained`` and ``peft``: loads the trained model.
        task: the task of all requests, for methods that need each row's task.
        pretrained: a base model that :func:`badit.load_base_model` accepts, or a loaded model.
        device: the device of the model (default: the accelerator, if there is one).
        trust_remote_code: run Python code that comes with the base model.
        options: further options of ``hf``, such as ``peft``, ``dtype``, ``batch_size`` and ``max_length``.
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
                "model_args: give either run=FOLDER or pretrained=MODEL, optionally with peft=ADAPTER"
            )
        if options.get("softmax_dtype") is not None:
            raise BaditError(
                "model_args: softmax_dtype: log-likelihoods are always computed in float32; remove it"
            )
        if run is not None:
            if "peft" in options:
                raise BaditError(
                    "model_args: a run has its own adapter; remove peft, or use pretrained instead of run"
                )
            resolved = open_run(RunFolder(run, trust_remote_code=trust_remote_code))
            recipe = resolved.recipe
            if task is None and resolved.method.needs_tasks:
                raise BaditError(
                    f"model_args: {resolved.method.name} needs the name of a task; add task=NAME"
                )
            pretrained, tokenizer = load_run(resolved)
            options.setdefault("tokenizer", tokenizer)
            if uses_template(tokenizer, recipe.prompt.chat_template):
                logging.getLogger(__name__).info(
                    "Trained in the model's chat format: use --apply_chat_template."
                )
            # lm_eval's command line passes cuda:0 by default, on any machine.
            if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
                with explained("model_args: device", action="used", any_error=True):
                    pretrained = pretrained.to(device)
        elif isinstance(pretrained, str):
            pretrained = resolve_model(pretrained)
        device = device or str(accelerator())
        super().__init__(
            pretrained=pretrained, device=device, trust_remote_code=trust_remote_code, **options
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
    ) -> list[tuple[float, bool]]:
        """Returns each continuation's log-likelihood (nats) and whether greedy decoding gives it; longest first."""
        ordered = sorted(
            range(len(requests)),
            key=lambda i: len(requests[i][1]) + len(requests[i][2]),
            reverse=True,
        )
        size = override_bs or self.batch_size
        if size == "auto" and ordered:
            size = self._detect_batch_size([requests[i] for i in ordered])
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        hidden = disable_tqdm or self.rank != 0
        with tqdm(
            total=len(requests), disable=hidden, desc="Running loglikelihood requests"
        ) as bar:
            for start in range(0, len(ordered), int(size)):
                batch = ordered[start : start + int(size)]
                for i, answer in zip(
                    batch, self._scored([requests[i] for i in batch]), strict=True
                ):
                    found[i] = answer
                    if (texts := requests[i][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(batch))
        return found

    def _scored(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Scores one batch. The gates of each row depend on its context only."""
        examples = []
        for _, context, continuation in requests:
            if not 1 <= (size := len(continuation)) <= self.max_length:
                raise BaditError(
                    f"a continuation has {size} tokens; must have 1 to {self.max_length} (max_length)"
                )
            ids = [*(context or [self.prefix_token_id]), *continuation][-(self.max_length + 1) :]
            examples.append(
                {"input_ids": ids, "prompt_length": len(ids) - size, "task": self._task}
            )
        collate = AnswerCollator(self.tokenizer.pad_token_id, with_tasks=self._task is not None)
        batch: Any = send_to_device(collate(examples), self.device)
        # The last token is predicted but not an input: it is masked, and needs no position of its own.
        mask_BT = F.pad(batch["attention_mask"][:, 1:], (0, 1))
        batch |= {"attention_mask": mask_BT, "position_ids": mask_BT.cumsum(dim=1) - 1}
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=precision, enabled=precision is not None):
            losses_L, row_L, outputs = answer_losses(self.model, batch)
        greedy_L = (
            outputs.logits[0].argmax(dim=-1) == batch["labels"][batch["labels"] != IGNORED_LABEL]
        )
        lengths = row_L.bincount().tolist()
        parts = zip(losses_L.split(lengths), greedy_L.split(lengths), strict=True)
        return [(-float(losses.sum()), bool(greedy.all())) for losses, greedy in parts]

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._rows_of_task(len(inps)):  # ``hf`` calls this to find the largest batch that fits
            return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._rows_of_task(len(context)):
            return super()._model_generate(context, *args, **kwargs)

    def _rows_of_task(self, rows: int) -> AbstractContextManager[None]:
        return hooks_of(self.model).rows_of(None if self._task is None else [self._task] * rows)


def run_command_line(run: str, arguments: Sequence[str]) -> None:
    """Runs the command ``lm_eval run`` with the options ``arguments`` on a run's model."""
    from lm_eval.__main__ import cli_evaluate

    if any(each.partition("=")[0] in ("--model", "-m") for each in arguments):
        raise BaditError("--model: is the run; use lm_eval itself for other models")
    sys.argv = [
        "lm_eval",
        "run",
        "--model",
        "badit",
        "--model_args",
        json.dumps({"run": run}),
        *arguments,
    ]
    try:
        cli_evaluate()
    except BaditError:
        raise
    except ValueError as error:
        raise BaditError(f"lm_eval: {error}") from error

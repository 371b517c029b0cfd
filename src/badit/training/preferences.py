"""Trains on preference data (DPO) with TRL's trainer, in badit's order of the examples.

The reference model is the base model. For adapters this is the model with the adapter switched off.
"""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from badit.recipe.arguments import TrainingSection
from badit.training.trainer import AnswerTrainer


def dpo_arguments(training: TrainingSection, **arguments: Any) -> DPOConfig:
    """Returns the arguments of a :class:`PreferenceTrainer`, from those of transformers."""
    # TRL's default differs from transformers'.
    arguments.setdefault("gradient_checkpointing", False)
    # Examples are truncated when they are encoded.
    options: dict[str, Any] = {"beta": training.dpo_beta, "max_length": None}
    return DPOConfig(**arguments, **options, loss_type=[training.dpo_loss])


class PreferenceTrainer(AnswerTrainer, DPOTrainer):
    """TRL's DPOTrainer for the batches of :class:`badit.data.examples.PairCollator`.

    Args:
        train_dataset: encoded pairs, as ``eval_dataset``.
        reference: the base model, if the model is trained itself and not an adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        train_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        eval_dataset: Any = None,
        reference: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        self._encoded = {"train": train_dataset, "eval": eval_dataset}
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        values = [parameter.data for parameter in trained]
        super().__init__(
            model,
            args,
            # TRL takes only its own kind of dataset, see _prepare_dataset.
            train_dataset=Dataset.from_list([{"prompt": ""}]),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            ref_model=reference,
            **kwargs,
        )
        # TRL takes the adapter for a trained one, and has added a copy as the reference. Without
        # the copy, it switches the adapter off.
        if isinstance(model, PeftModel):
            model.delete_adapter("ref")
        # TRL rounds the adapters of quantised models to bfloat16, in which small updates are lost.
        for parameter, value in zip(trained, values, strict=True):
            parameter.data = value
        self.model_accepts_loss_kwargs = False  # the loss is a mean over pairs
        self.processing_class = None  # else each checkpoint has a copy of the tokenizer

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """Returns the encoded pairs: their prompts have the tokens of generation."""
        return self._encoded[dataset_name]

    def _send_telemetry(self) -> None:
        """Does nothing: badit reports no usage."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: badit writes its own card of the run."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of a batch of pairs, without outputs."""
        loss = self._pair_loss(model, _tensors(inputs))
        self.micro_batches.append((loss.detach(), inputs))
        return loss

    def _pair_loss(self, model: nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return DPOTrainer.compute_loss(self, model, tensors)

    def instance_losses(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the loss of each pair of a batch."""
        # One pair at a time: TRL returns only the mean of a batch, whose pairs may be of several
        # tasks. All ranks have batches of the same size.
        chosen = torch.arange(len(inputs["input_ids"]) // 2)
        tensors = _tensors(inputs)
        losses = []
        for i in chosen:
            pair = torch.stack([i, i + len(chosen)])
            losses.append(
                self._pair_loss(model, {name: value[pair] for name, value in tensors.items()})
            )
        return torch.stack(losses)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Sets ``eval_loss`` to the mean over pairs."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums, counts = zip(*self.losses_by_task.values(), strict=True)
        assert output.metrics is not None
        # transformers weighs the last batch wrongly, because a pair is two sequences.
        output.metrics[f"{metric_key_prefix}_loss"] = sum(sums) / sum(counts)
        return output

    @property
    def sums(self) -> dict[str, Any]:
        return {"train": dict(self._metrics["train"]), "tokens": self._total_train_tokens}

    @sums.setter
    def sums(self, values: Mapping[str, Any]) -> None:
        self._metrics["train"].update(values["train"])
        self._total_train_tokens = values["tokens"]


def _tensors(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns a batch without the names of its tasks."""
    return {name: value for name, value in inputs.items() if name != "tasks"}

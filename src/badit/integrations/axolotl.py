"""Axolotl plugin: trains a BADIT adapter, with its options under the key ``badit``.

plugins: [badit.integrations.axolotl.BaditPlugin]
adapter: badit
"""

from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from peft import PeftModel, get_peft_model
from pydantic import BaseModel

from badit.support.errors import BaditError
from badit.training.regrouping import RegroupCallback
from badit.tuner import BaditConfig, hooks_of


class BaditSection(BaseModel):
    """The key ``badit``: options of ``BaditConfig``.

    Its key ``regroup`` (for DOG) has options of ``RegroupCallback``.
    """

    badit: dict[str, Any] = {}


class BaditPlugin(BasePlugin):
    """Trains a BADIT adapter, or continues the one in ``lora_model_dir``."""

    def register(self, cfg: Any) -> None:
        # Axolotl would write the base model and only warn.
        if cfg.get("adapter") == "badit" and cfg.get("merge_lora"):
            raise BaditError(
                "merge-lora: a BADIT adapter has no single weight to merge into; load it with PEFT"
            )

    def get_input_args(self) -> str:
        return f"{__name__}.BaditSection"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name="badit")]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> Any:
        """Returns the adapted model and its configuration.

        With ``config_only`` (DPO), TRL adapts the model itself.
        """
        if cfg.adapter != "badit":
            return None
        options = {name: value for name, value in cfg.badit.items() if name != "regroup"}
        config = BaditConfig(**{"task_type": "CAUSAL_LM", **options})
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, model.active_peft_config
        return get_peft_model(model, config), config

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        if cfg.adapter != "badit":
            return []
        # The clusters of prompts are found on the training data, before the first step.
        hooks_of(trainer.model).start_task({"all": trainer.get_train_dataloader()})
        regroup = cfg.badit.get("regroup")
        if regroup in (None, False):
            return []
        # regroup: true means the default options.
        options = {} if regroup is True else regroup
        return [RegroupCallback(**options)]

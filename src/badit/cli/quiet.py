"""Less talk from the libraries below, for a command line that shows its own progress."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_environment() -> None:
    """To be called before transformers is imported, which reads these settings then."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore", FutureWarning)
    # Where they are installed, these tell of other devices' kernels and of changes in torch at every import.
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_loading() -> None:
    """Hides transformers' bar for reading weights from disk; the hub's own bars for downloads stay."""
    from transformers.utils import logging

    logging.disable_progress_bar()

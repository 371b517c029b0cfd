"""LoRA and its relatives, all of them PEFT's own: a name here is a ``LoraConfig`` with one field settled.

* lora (Hu et al. 2021, arXiv 2106.09685): y = W x + s·B A x, A kaiming(√5), B zero, s = lora_alpha / r.
* pissa (Meng et al. 2024, arXiv 2404.02948): A and B start as the r leading singular triples, W ← W − s·B A. The SVD is
  exact, and loading an adapter repeats it to find the same W. PEFT's quick ``pissa_niter_N`` starts from random
  numbers: loading finds another W, and with it another model, so it cannot be used in a run that is saved.
* olora (Büyükakyüz 2024, arXiv 2406.01775): the same with W = QR, B = Q[:, :r], A = R[:r].
* dora (Liu et al. 2024, arXiv 2402.09353): LoRA on the weight's direction, next to a trained magnitude per row.
* rslora (Kalajdzievski 2023, arXiv 2312.03732): LoRA with s = lora_alpha / √r.

pissa and olora change the base weight, until the adapter is unloaded and after: PEFT keeps no copy of it.
"""

from __future__ import annotations

from peft import LoraConfig

from badit.baselines import BASELINES, Baseline

for _name, _settled in {
    "lora": {},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
}.items():
    BASELINES[_name] = Baseline(LoraConfig, _settled)

#!/usr/bin/env python3
"""Method trials on a real LLM at a tenth of the cost of a full run.

The lower layers of SmolLM2 are frozen; their output is computed once and cached. Adapters are on
gate_proj of the upper layers only. A run of 2,500 examples takes about five minutes on one core.
Learning rates are chosen on `val` (held out of each task's training data). `test` is read once, by
the final command of a stage.

    rig.py --name lora_1e-3 --lr 1e-3
    rig.py --name dirs_orth --init dirs --opt orthogonal --lr 2e-3 --seed 1
    summary.py benchmarks/results/rig-a lora_adamw lora_orthogonal   # paired, by method and seed

Adapter: y = W x + s · B (g ∘ A x) [− s · B0 A0 x for --init bad].
Shapes: A (N, I), B (O, N), a gate g per component.
"""

# pyright: reportOptionalSubscript=false, reportOptionalMemberAccess=false
# pyright: reportArgumentType=false, reportCallIssue=false

import argparse
import glob
import json
import math
import os
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
p = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
p.add_argument("--name", required=True)
p.add_argument("--out", default="rig-results")
p.add_argument(
    "--model",
    default=os.path.expanduser("~/.cache/badit/smollm2-135m-0.1.2-format1"),
    help="folder of the built-in model",
)
p.add_argument(
    "--data", default=os.environ.get("BADIT_SUPERNI"), help="folder of the SuperNI tasks"
)
p.add_argument(
    "--tasks", default="073,1510,1687,181,363,591,639,748,875", help="task numbers, or 'all'"
)
p.add_argument("--only", default="", help="train on this task alone (one model per task)")
p.add_argument(
    "--train", type=int, default=300, help="maximum number of training instances per task"
)
p.add_argument("--held", type=int, default=60, help="evaluation instances per task")
p.add_argument("--split", choices=("val", "test"), default="val")
p.add_argument("--layers", type=int, default=6, help="number of adapted upper layers")
p.add_argument(
    "--max-tokens", type=int, default=220, help="maximum length of a prompt; its middle is cut"
)
p.add_argument("--epochs", type=int, default=1)
p.add_argument("--batch", type=int, default=8)
p.add_argument("--seed", type=int, default=0, help="seed of initialisation and order")
p.add_argument("--data-seed", type=int, default=7, help="seed of the choice of training instances")
p.add_argument("--N", type=int, default=32)
p.add_argument("--K", type=int, default=8)
p.add_argument("--scale", type=float, default=8.0)
p.add_argument("--init", choices=("lora", "dirs", "bad"), default="lora")
p.add_argument(
    "--gate",
    choices=("none", "expert", "component", "oracle"),
    default="none",
    help="oracle: per task",
)
p.add_argument(
    "--shared", action="store_true", help="half of the experts have no gate (for --gate expert)"
)
p.add_argument("--act", choices=("softmax", "exp"), default="softmax")
p.add_argument(
    "--rank", type=int, default=8, help="rank of the prompt embedding (for --gate component)"
)
p.add_argument("--fixed-projection", action="store_true", help="do not train the prompt embedding")
p.add_argument(
    "--opt",
    choices=("adamw", "orthogonal", "riemannian"),
    default="adamw",
    help="riemannian: PEFT's",
)
p.add_argument("--lr", type=float, default=2e-3)
p.add_argument(
    "--b-rate", type=float, default=1.0, help="LoRA+: ratio of B's learning rate to A's (for adamw)"
)
p.add_argument(
    "--router-rate", type=float, default=1.0, help="ratio of the router's learning rate to --lr"
)
p.add_argument(
    "--dog", type=int, default=0, help="steps between regroupings; 0: none (for --gate expert)"
)
p.add_argument(
    "--must-pay", action="store_true", help="undo a regrouping that the next window does not favour"
)
a = p.parse_args()
torch.set_num_threads(1)
torch.manual_seed(a.seed)
random.seed(a.seed)
from peft.optimizers import create_riemannian_optimizer  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from badit.method import group_components, grouping_objective  # noqa: E402
from badit.training.optimizers import OrthogonalUpdates  # noqa: E402

tok = AutoTokenizer.from_pretrained(a.model)
model = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.bfloat16).requires_grad_(False)
LAYERS = model.model.layers
FIRST = len(LAYERS) - a.layers
folders = sorted(glob.glob(f"{a.data}/task*"))
number = lambda folder: os.path.basename(folder)[4:].split("_")[0]  # noqa: E731
if a.tasks != "all":
    folders = [f for f in folders if number(f) in a.tasks.split(",")]
NOW = {}  # the current batch: prompt mask (B, T), task (B)


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, (outputs, inputs) = base, base.weight.shape
        if a.init == "lora":
            A, B = (
                nn.init.kaiming_uniform_(torch.empty(a.N, inputs), a=math.sqrt(5)),
                torch.zeros(outputs, a.N),
            )
        else:
            U, S, V = torch.linalg.svd(base.weight.float(), full_matrices=False)
            root = (S[: a.N] / a.scale).sqrt()
            A = root[:, None] * V[: a.N] if a.init == "bad" else V[: a.N] / math.sqrt(3)
            B = U[:, : a.N] * root if a.init == "bad" else torch.zeros(outputs, a.N)
        # In dictionaries, as in PEFT: OrthogonalUpdates finds pairs of factors by these names.
        self.lora_A, self.lora_B = (
            nn.ParameterDict({"rig": A.contiguous()}),
            nn.ParameterDict({"rig": B.contiguous()}),
        )
        self.start = (A.clone(), B.clone()) if a.init == "bad" else None
        self.label, self.former, self.moved = torch.arange(a.N) // (a.N // a.K), None, 0
        self.R = self.Z = None
        if a.gate == "expert":
            self.R = nn.Parameter(torch.zeros(a.K, inputs))
        elif a.gate == "component":
            self.Z = nn.Parameter(
                0.35 * torch.randn(a.rank, inputs), requires_grad=not a.fixed_projection
            )
            self.R = nn.Parameter(torch.zeros(a.N, a.rank))
        elif a.gate == "oracle":
            self.R = nn.Parameter(torch.zeros(len(folders), a.N))
        self.seen, self.mean, self.var, self.gram = (
            0,
            torch.zeros(inputs),
            torch.zeros(inputs),
            None,
        )

    A = property(lambda self: self.lora_A["rig"])
    B = property(lambda self: self.lora_B["rig"])

    def gates(self, x):
        if a.gate == "oracle":
            logits = self.R[NOW["task"]]
        else:
            m = NOW["prompt"][..., None]
            z = (x.float() * m).sum(1) / m.sum(1)
            if self.training:
                self.seen += 1
                w, mean, var = (
                    max(1 / self.seen, 0.02),
                    z.detach().mean(0),
                    z.detach().var(0, unbiased=False),
                )
                self.var = (1 - w) * self.var + w * var + w * (1 - w) * (mean - self.mean) ** 2
                self.mean = torch.lerp(self.mean, mean, w)
            z = 8 / math.sqrt(z.shape[-1]) * (z - self.mean) * (self.var + 1e-12).rsqrt()
            logits = (z if self.Z is None else z @ self.Z.T) @ self.R.T
        if a.shared:
            logits = logits[:, a.K // 2 :]
        g = (
            logits.softmax(-1) * logits.shape[-1]
            if a.act == "softmax"
            else logits.clamp(-1.5, 1.5).exp()
        )
        if a.shared:  # a constant gate of 1 for the shared experts
            g = torch.cat([torch.ones(len(g), a.K // 2), g], dim=1)
        return (g[:, self.label] if a.gate == "expert" else g)[:, None]

    def forward(self, x):
        h = F.linear(x, self.A.to(x.dtype))
        if a.gate != "none":
            self.last = self.gates(x)
            h = h * self.last.to(h.dtype)
        z = F.linear(h, self.B.to(x.dtype))
        if self.start:
            z = z - F.linear(F.linear(x, self.start[0].to(x.dtype)), self.start[1].to(x.dtype))
        return self.base(x) + a.scale * z


adapted = []
for layer in LAYERS[FIRST:]:
    layer.mlp.gate_proj = Adapted(layer.mlp.gate_proj)
    adapted.append(layer.mlp.gate_proj)


def encoded(instance, definition):
    output = instance["output"] if isinstance(instance["output"], str) else instance["output"][0]
    source = tok(f"{definition.strip()}\n\nInput: {instance['input']}\nOutput: ")["input_ids"]
    if len(source) > a.max_tokens:
        source = source[: a.max_tokens // 2] + source[-(a.max_tokens // 2) :]
    return source, tok(output + tok.eos_token)["input_ids"][:40]


train, held = [], []
for task, folder in enumerate(folders):
    parts = {
        split: json.loads(Path(folder, f"{split}.json").read_text()) for split in ("train", "test")
    }
    definition = parts["train"]["Definition"]
    definition = definition if isinstance(definition, str) else definition[0]
    pool = parts["train"]["Instances"][:]
    random.Random(7).shuffle(pool)
    val, rest = pool[: a.held], pool[a.held :]
    random.Random(a.data_seed).shuffle(rest)
    train += [(task, *encoded(i, definition)) for i in rest[: a.train]]
    held += [
        (task, *encoded(i, definition))
        for i in (val if a.split == "val" else parts["test"]["Instances"][: a.held])
    ]


@torch.no_grad()
def trunk(examples, tag):
    """Returns the frozen lower layers' output for every example (T, D), possibly cached."""
    seed = a.data_seed if tag == "train" else ""
    key = f"{tag}-{a.layers}-{a.train}-{a.held}-{a.max_tokens}-{a.tasks.replace(',', '.')}-{seed}"
    file = f"{a.out}/cache/{key}.pt"
    if os.path.exists(file):
        return torch.load(file)
    hidden, order = (
        [None] * len(examples),
        sorted(range(len(examples)), key=lambda k: sum(map(len, examples[k][1:]))),
    )
    for start in range(0, len(order), 16):
        ks = order[start : start + 16]
        rows = [torch.tensor(examples[k][1] + examples[k][2]) for k in ks]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        h = model.model.embed_tokens(ids)
        rope = model.model.rotary_emb(h, torch.arange(ids.shape[1])[None])
        for layer in LAYERS[:FIRST]:
            h = layer(h, position_embeddings=rope)
            h = h[0] if isinstance(h, tuple) else h
        for k, row, states in zip(ks, rows, h, strict=True):
            hidden[k] = states[: len(row)].clone()
    os.makedirs(f"{a.out}/cache", exist_ok=True)
    torch.save(hidden, f"{file}.{os.getpid()}")
    os.replace(f"{file}.{os.getpid()}", file)
    return hidden


H_train, H_held = trunk(train, "train"), trunk(held, a.split)
if a.only:
    mine = [i for i, e in enumerate(train) if number(folders[e[0]]) == a.only]
    train, H_train = [train[i] for i in mine], [H_train[i] for i in mine]


def losses(examples, hidden, ks):
    """Returns, by answer token, the NLL, whether it was the most likely token, and its row."""
    h = nn.utils.rnn.pad_sequence([hidden[k] for k in ks], batch_first=True)
    labels, prompt = torch.full(h.shape[:2], -100), torch.zeros(h.shape[:2])
    for row, k in enumerate(ks):
        _, source, answer = examples[k]
        labels[row, len(source) - 1 : len(source) + len(answer) - 1] = torch.tensor(answer)
        prompt[row, : len(source)] = 1
    NOW.update(prompt=prompt, task=torch.tensor([examples[k][0] for k in ks]))
    rope = model.model.rotary_emb(h, torch.arange(h.shape[1])[None])
    for layer in LAYERS[FIRST:]:
        h = layer(h, position_embeddings=rope)
        h = h[0] if isinstance(h, tuple) else h
    chosen = labels != -100
    logits, target = model.lm_head(model.model.norm(h[chosen])).float(), labels[chosen]
    return (
        F.cross_entropy(logits, target, reduction="none"),
        logits.argmax(-1) == target,
        chosen.nonzero()[:, 0],
    )


@torch.no_grad()
def evaluate():
    [layer.eval() for layer in adapted]
    rows, gates = [None] * len(held), []
    order = sorted(range(len(held)), key=lambda k: len(H_held[k]))
    for start in range(0, len(order), 16):
        ks = order[start : start + 16]
        nll, right, row = losses(held, H_held, ks)
        if a.gate != "none":
            gates.append(torch.stack([layer.last[:, 0] for layer in adapted], 1))
        for r, k in enumerate(ks):
            rows[k] = (
                held[k][0],
                round(nll[row == r].mean().item(), 4),
                int(right[row == r].all()),
            )
    [layer.train() for layer in adapted]

    def task_mean(i):
        of_tasks = [[row[i] for row in rows if row[0] == t] for t in range(len(folders))]
        return sum(sum(values) / len(values) for values in of_tasks) / len(of_tasks)

    spread = torch.cat(gates).std(0).mean().item() if gates else None
    return {"nll": task_mean(1), "em": 100 * task_mean(2), "gate_std": spread, "instances": rows}


down, up = [x.A for x in adapted], [x.B for x in adapted]
router = [q for x in adapted for q in (x.R, x.Z) if q is not None and q.requires_grad]
if a.opt == "adamw":
    groups = [{"params": down, "lr": a.lr}, {"params": up, "lr": a.lr * a.b_rate}]
    groups += [{"params": router, "lr": a.lr * a.router_rate}] if router else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0)
elif a.opt == "riemannian":
    options = {"lr": a.lr, "weight_decay": 0}
    optimizer = create_riemannian_optimizer(nn.ModuleList(adapted), torch.optim.AdamW, **options)
else:
    optimizer = OrthogonalUpdates(nn.ModuleList(adapted), lr=a.lr, other_lr=a.lr * a.router_rate)
rates = [group["lr"] for group in optimizer.param_groups]
steps = a.epochs * math.ceil(len(train) / a.batch)


def regroup():
    """Regroups with DOG; with --must-pay, undoes a grouping that the next Gram does not favour."""
    for x in adapted:
        gram = x.gram.double().numpy()
        if a.must_pay and x.former is not None:
            former, present = (
                grouping_objective(gram, labels.numpy()) for labels in (x.former, x.label)
            )
            x.label = x.label if present >= former else x.former
        x.former = x.label
        x.label = torch.from_numpy(group_components(gram, x.label.numpy(), seed=step))
        x.moved += int((x.label != x.former).sum())
        x.gram = None


began, step, log = time.process_time(), 0, []
for _ in range(a.epochs):
    order = list(range(len(train)))
    random.shuffle(order)
    batches = []
    for start in range(0, len(order), 8 * a.batch):
        near = sorted(order[start : start + 8 * a.batch], key=lambda k: len(H_train[k]))
        batches += [near[i : i + a.batch] for i in range(0, len(near), a.batch)]
    random.shuffle(batches)
    for ks in batches:
        nll, _, row = losses(train, H_train, ks)
        loss = (nll / torch.bincount(row, minlength=len(ks))[row]).sum() / len(ks)
        loss.backward()
        if a.dog:
            for x in adapted:
                g = x.A.grad @ x.A.grad.T + x.B.grad.T @ x.B.grad
                d = g.diagonal().clamp_min(1e-20).rsqrt()
                g = g * d[:, None] * d
                x.gram = g if x.gram is None else x.gram + g
            if (step + 1) % a.dog == 0 and step < 0.7 * steps:
                regroup()
        nn.utils.clip_grad_norm_(down + up + router, 1.0)
        now = min(1, (step + 1) / max(1, 0.05 * steps)) * (
            0.05 + 0.475 * (1 + math.cos(math.pi * step / steps))
        )
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * now
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        log.append(loss.item())
        if step % 100 == 0:
            seconds, mean = time.process_time() - began, sum(log[-100:]) / 100
            print(
                f"{a.name}  step {step} of {steps}  loss {mean:.4f}  {seconds:.0f} CPU s",
                flush=True,
            )
versions = {name: version(name) for name in ("torch", "transformers", "peft")} | {
    "cpu": platform.processor() or platform.machine()
}
arguments = {key: value for key, value in vars(a).items() if key not in ("out", "model", "data")}
result = evaluate() | {
    "arguments": arguments,
    "versions": versions,
    "parameters": sum(q.numel() for q in down + up + router),
    "moved": sum(x.moved for x in adapted),
    "train_loss": sum(log[-50:]) / len(log[-50:]),
    "cpu_seconds": time.process_time() - began,
}
with open(f"{a.out}/{a.name}.partial", "w") as file:
    json.dump(result, file, separators=(",", ":"))
os.replace(f"{a.out}/{a.name}.partial", f"{a.out}/{a.name}.json")
print(f"{a.name:32s} parameters {result['parameters']:7d}  train {result['train_loss']:.4f}")
print(f"{a.split} nll {result['nll']:.4f}  em {result['em']:.2f}  gate std {result['gate_std']}")

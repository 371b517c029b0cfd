"""The options of a rig run."""

import argparse
import os

MODEL = os.path.expanduser("~/.cache/badit/smollm2-135m-0.1.2-format1")


def parsed() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    option = parser.add_argument
    option("--name", required=True)
    option("--out", default="rig-results", help="folder of the results and the cache")
    option("--model", default=MODEL, help="folder of the built-in model")
    option("--data", default=os.environ.get("BADIT_SUPERNI"), help="folder of the SuperNI tasks")
    option("--tasks", default="073,1510,1687,181,363,591,639,748,875", help="numbers, or 'all'")
    option("--only", default="", help="train on this task alone (one model per task)")
    option("--train", type=int, default=300, help="maximum number of training instances per task")
    option("--held", type=int, default=60, help="evaluation instances per task")
    option("--split", choices=("val", "test"), default="val")
    option("--layers", type=int, default=6, help="number of adapted upper layers")
    option("--max-tokens", type=int, default=220, help="length of a prompt; its middle is cut")
    option("--epochs", type=int, default=1)
    option("--batch", type=int, default=8)
    option("--seed", type=int, default=0, help="seed of initialisation and order")
    option("--data-seed", type=int, default=7, help="seed of the choice of training instances")

    option("--N", type=int, default=32, help="number of components")
    option("--K", type=int, default=8, help="number of experts")
    option("--scale", type=float, default=8.0)
    option("--init", choices=("lora", "dirs", "bad"), default="lora")
    gates = ("none", "expert", "component", "oracle")
    option("--gate", choices=gates, default="none", help="oracle: per task")
    option("--shared", action="store_true", help="half of the experts have no gate")
    option("--act", choices=("softmax", "exp"), default="softmax")
    option("--rank", type=int, default=8, help="of the prompt embedding of component gates")
    option("--fixed-projection", action="store_true", help="do not train the prompt embedding")

    optimizers = ("adamw", "orthogonal", "riemannian")
    option("--opt", choices=optimizers, default="adamw", help="riemannian: PEFT's")
    option("--lr", type=float, default=2e-3)
    option("--b-rate", type=float, default=1.0, help="LoRA+: ratio of B's learning rate to A's")
    option("--router-rate", type=float, default=1.0, help="ratio of the router's rate to --lr")
    option("--dog", type=int, default=0, help="steps between regroupings of experts; 0: none")
    option("--must-pay", action="store_true", help="undo a regrouping that does not pay")
    return parser.parse_args()

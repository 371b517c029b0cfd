"""BADIT's presets, what its unset options stand for, and the name of a set of options.

Options are the keys of a recipe's ``method`` section, or the fields of BaditConfig. Tables, model
cards, reports and the studio name a method by its options, because ``badit`` in a recipe stood for
other options in earlier versions. This module needs no torch, so that tables are printed quickly.
"""

from collections.abc import Mapping
from typing import Any

Options = Mapping[str, Any]

#: The paper's three parts: singular experts, grouping by spherical clustering of the components'
#: gradients, and a combination of abilities for every prompt. Exact at step 0.
SYSTEM: Options = {
    "init_weights": "bad",
    "gates": "clusters",
    "gated": "change",
    "key": "layer",
    "codes": "grouped-random",
}
#: Fixed random gates for each cluster of prompts, from LoRA's start. Of the paper's parts, it has
#: the combination for every prompt.
CLUSTER_GATES: Options = {
    "init_weights": "lora",
    "gates": "clusters",
    "gated": "factors",
    "key": "layer",
    "codes": "random",
}
#: The form of the paper's released code, with which step 0 differs from the base model. The paper
#: has dropout 0.05, but its released code applies none.
RELEASED: Options = {
    "num_experts": 8,
    "r": 4,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "routing": "prompt",
    "router_input": "mean",
    "gates": "softmax",
    "gated": "factors",
    "init_weights": "bad",
    "svd_method": "exact",
}
#: The regrouping of RELEASED: once in each of ten epochs, during the first half of training.
RELEASED_REGROUPING: Options = {
    "every": 0.1,
    "stop": 0.5,
    "solver": "paper",
    "restarts": 10,
    "rescale": False,
}
#: What ``BaditConfig()`` and ``method: badit`` stand for.
DEFAULT = SYSTEM

#: The names of BADIT in a recipe; ``badit`` also has the preset ``released``.
NAMES = ("badit", "cluster-gates")
RELEASED_NAME = "badit (released)"
# In the order in which equally near presets are preferred.
_PRESETS = {
    "badit": {**SYSTEM, "regroup": None},
    "cluster-gates": {**CLUSTER_GATES, "regroup": None},
    RELEASED_NAME: {**RELEASED, "regroup": RELEASED_REGROUPING},
}

# What runs and adapters left out that were saved before they had these options.
_FORMER = {name: value for name, value in CLUSTER_GATES.items() if name != "gates"}


def with_preset(section: Options) -> dict[str, Any]:
    """Returns the options of a section of BADIT with those of its preset, without the preset.

    The options of the section take precedence.
    """
    options = {key: value for key, value in section.items() if key not in ("name", "preset")}
    if section.get("name") == "cluster-gates":
        return {**CLUSTER_GATES, **options}
    if section.get("preset") != "released":
        return options
    regroup = options.get("regroup", {})
    if isinstance(regroup, Mapping):
        options["regroup"] = {**RELEASED_REGROUPING, **regroup}
    return {**RELEASED, **options}


def filled(options: Options) -> dict[str, Any]:
    """Returns options of which none that decides the method is unset (None or missing).

    An unset option gets its value of DEFAULT where the other options allow it:

    - ``gates`` are clusters of prompts with routing by prompt, a standardised input, several
      experts, no ``top_k`` and no ``target_parameters``, if they leave step 0 unchanged. Else they
      are those of a router, with mean 1.
    - ``key`` and ``codes`` are those of DEFAULT with clusters only; matched codes need a key for
      the whole model.
    - ``gated`` has an effect with ``init_weights="bad"`` only.
    """
    values = dict(options)

    def fill(name: str, value: Any) -> None:
        if values.get(name) is None:
            values[name] = value

    fill("routing", "prompt")
    fill("router_input", "standardised" if values["routing"] == "prompt" else "mean")
    fill("init_weights", DEFAULT["init_weights"])
    fill("gated", DEFAULT["gated"] if values["init_weights"] == "bad" else "factors")
    fill("gates", DEFAULT["gates"] if _can_cluster(values) else "mean_one")
    if values["gates"] != "clusters":
        fill("key", "layer")
        fill("codes", "random")
    fill("key", "embedding" if values.get("codes") == "matched" else DEFAULT["key"])
    fill("codes", DEFAULT["codes"])
    return values


def _can_cluster(values: Options) -> bool:
    """Returns whether gates of clusters are possible and leave the model unchanged at step 0."""
    if values["routing"] != "prompt" or values["router_input"] != "standardised":
        return False
    if values.get("num_experts") == 1 or values.get("top_k") is not None:
        return False
    if values.get("target_parameters"):
        return False
    return values["init_weights"] != "bad" or values["gated"] == "change"


def saved_section(section: Options) -> dict[str, Any]:
    """Returns a saved section, or the fields of a saved adapter, with the options that it left out.

    Earlier versions saved only the options that a recipe set, or did not have the options ``gated``
    to ``codes``. What they stood for is independent of the present default.
    """
    completed = dict(section)
    if section.get("name", "badit") != "badit" or "codes" in section:
        return completed
    if section.get("preset") == "paper":  # its former name
        completed["preset"] = "released"
    if completed.get("preset") == "released":
        return completed
    return {**_FORMER, **completed}


def paper_parts(options: Options) -> dict[str, bool]:
    """Returns which of the paper's three parts a set of options has."""
    values = filled(options)
    # One cluster has no other to compare its gradients with, and all prompts have the same gates.
    one_cluster = _has_one_cluster(values)
    is_grouped = values["codes"] in ("grouped", "grouped-random") and not one_cluster
    is_regrouped = _regroups_as_published(values.get("regroup"))
    is_combined = (
        values["routing"] == "prompt" and values.get("num_experts") != 1 and not one_cluster
    )
    return {
        "singular experts": values["init_weights"] in ("bad", "directions"),
        "grouping": is_grouped or is_regrouped,
        # A placebo gives a cluster the combination of another one.
        "combination": is_combined and not values.get("permute_codes"),
    }


def _has_one_cluster(values: Options) -> bool:
    return values["gates"] == "clusters" and values.get("num_clusters") == 1


def _regroups_as_published(regroup: Any) -> bool:
    """Returns whether any component may move during training, not only the least changed ones."""
    if isinstance(regroup, Mapping) and regroup.get("reset_smallest") is not None:
        return False
    return regroup is not None


def method_name(section: Options) -> str:
    """Returns the name of a method, for BADIT the one that its options have.

    ``badit`` has all three parts of the paper, ``badit (released)`` is the released code's form.
    Other options are named by the nearest preset: ``badit (changed: init_weights=lora)``.
    """
    name = section.get("name", "badit")
    if name not in NAMES:
        return f"{name!s:.60}"
    options = filled(with_preset(section))
    changes = {name: _changes(options, preset) for name, preset in _PRESETS.items()}
    if changes[RELEASED_NAME] and all(paper_parts(options).values()):
        return "badit"
    if options["gates"] != "clusters" or options.get("num_experts") == 1:
        del changes["cluster-gates"]
    nearest = min(changes, key=lambda name: len(changes[name]))
    if not changes[nearest]:
        return nearest
    changed = f"changed: {', '.join(changes[nearest])}"
    if nearest == RELEASED_NAME:
        return f"badit (released, {changed})"
    return f"{nearest} ({changed})"


def cites_paper(title: str) -> bool:
    """Returns whether a method with this name of :func:`method_name` is the paper's."""
    return title in ("badit", RELEASED_NAME)


def preset_name(section: Options) -> str:
    """Returns the name in a recipe, of NAMES, that is nearest to a section of BADIT."""
    return method_name(section).split(" ")[0]


def _changes(options: Options, preset: Options) -> list[str]:
    """Returns the options that have an effect and differ from a preset, as ``name=value``."""
    expected = _effective(filled(preset))
    return [
        f"{name}={value!s:.40}"
        for name, value in _effective(options).items()
        if value != expected.get(name)
    ]


def _effective(options: Options) -> dict[str, Any]:
    """Returns the options that decide the method, without those that have no effect."""
    if options.get("num_experts") == 1:
        return {"init_weights": options["init_weights"], "num_experts": 1}
    names = ["init_weights", "routing", "gates"]
    if options["init_weights"] == "bad":
        names.append("gated")
    if options["routing"] == "prompt":
        names.append("router_input")
    if options["gates"] == "clusters":
        names += ["key", "codes"]
    if _has_one_cluster(options):
        names.append("num_clusters")
    # Options that no preset has.
    names += [name for name in ("permute_codes", "top_k") if options.get(name)]
    effective = {name: options[name] for name in names}
    # The configuration of an adapter does not say whether it was regrouped.
    if "regroup" in options:
        effective["regroup"] = "off" if options["regroup"] is None else "on"
    return effective

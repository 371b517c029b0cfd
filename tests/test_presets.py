"""BADIT's presets, what unset options stand for, and the names that options have."""

import json
import re
from pathlib import Path

import pytest

from badit.comparison.results import load_results
from badit.comparison.tables import FORMATS, method_table
from badit.presets import (
    CLUSTER_GATES,
    RELEASED,
    RELEASED_REGROUPING,
    SYSTEM,
    filled,
    method_name,
    paper_parts,
    saved_section,
)
from badit.recipe.method import resolve_method
from badit.tuner import BaditConfig
from refusals import refuses

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
REGROUPED = {"regroup": {"every": 5}}
MATCHED = {**SYSTEM, "key": "embedding", "codes": "matched"}
ROUTED = {"init_weights": "bad", "gates": "mean_one"}


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (SYSTEM, "badit"),
        ({**SYSTEM, "init_weights": "directions"}, "badit"),
        ({**SYSTEM, "num_experts": 4, "num_clusters": 9}, "badit"),
        ({**MATCHED, **REGROUPED}, "badit"),
        ({**MATCHED, "regroup": {"reset_smallest": 0.05}},
         "badit (changed: key=embedding, codes=matched, regroup=on)"),
        (MATCHED, "badit (changed: key=embedding, codes=matched)"),
        ({**ROUTED, **REGROUPED}, "badit"),
        ({**SYSTEM, "permute_codes": True}, "badit (changed: permute_codes=True)"),
        ({**SYSTEM, "init_weights": "lora"}, "badit (changed: init_weights=lora)"),
        ({**SYSTEM, "init_weights": "lora", "top_k": 2, "gates": "mean_one", "codes": "random"},
         "badit (changed: init_weights=lora, gates=mean_one, top_k=2)"),
        (CLUSTER_GATES, "cluster-gates"),
        ({**CLUSTER_GATES, "num_clusters": 3, "r": 2}, "cluster-gates"),
        ({**CLUSTER_GATES, "init_weights": "directions"},
         "cluster-gates (changed: init_weights=directions)"),
        ({**SYSTEM, "codes": "random"}, "badit (changed: codes=random)"),
        ({**SYSTEM, "codes": "random", **REGROUPED}, "badit"),
        ({**CLUSTER_GATES, **REGROUPED}, "cluster-gates (changed: regroup=on)"),
        ({**CLUSTER_GATES, "num_experts": 1}, "badit (changed: init_weights=lora, num_experts=1)"),
        ({"name": "badit", "preset": "released"}, "badit (released)"),
        ({"name": "badit", "preset": "released", "lora_dropout": 0.1, "num_experts": 4},
         "badit (released)"),
        ({"name": "badit", "preset": "released", "regroup": None},
         "badit (released, changed: regroup=off)"),
        # An adapter does not say whether it was regrouped.
        (RELEASED, "badit (released)"),
        ({"name": "cluster-gates"}, "cluster-gates"),
        ({**SYSTEM, "num_clusters": 1}, "badit (changed: num_clusters=1)"),
        ({"name": "cluster-gates", "num_clusters": 1}, "cluster-gates (changed: num_clusters=1)"),
        ({**RELEASED, "num_clusters": 1, "regroup": RELEASED_REGROUPING}, "badit (released)"),
        ({"name": "lora", "r": 4}, "lora"),
    ],
)  # fmt: skip
def test_options_have_one_name(options, name):
    assert method_name(options) == name


@pytest.mark.parametrize("options", [SYSTEM, {**RELEASED, "regroup": RELEASED_REGROUPING}])
def test_methods_of_the_paper_have_all_its_parts(options):
    assert all(paper_parts(options).values())


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"init_weights": "lora"}, "singular experts"),
        ({"codes": "random"}, "grouping"),
        ({"key": "embedding", "codes": "matched"}, "grouping"),
        ({"gates": "mean_one", "key": None, "codes": None}, "grouping"),
        ({"permute_codes": True}, "combination"),
    ],
)
def test_a_change_of_the_system_removes_one_part(change, missing):
    parts = paper_parts({**SYSTEM, **change})
    assert [part for part, is_on in parts.items() if not is_on] == [missing]


def test_one_cluster_has_neither_groups_nor_combinations():
    parts = paper_parts({**SYSTEM, "num_clusters": 1})
    assert [part for part, is_on in parts.items() if is_on] == ["singular experts"]


def test_cluster_gates_combine_abilities_and_have_no_other_part():
    parts = paper_parts(CLUSTER_GATES)
    assert [part for part, is_on in parts.items() if is_on] == ["combination"]


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ({"name": "badit"}, "cluster-gates"),
        ({"r": 2, "regroup": None}, "cluster-gates"),
        ({"name": "badit", "init_weights": "directions"},
         "cluster-gates (changed: init_weights=directions)"),
        ({"name": "badit", "init_weights": "bad", "regroup": {}}, "badit"),
        ({"name": "badit", "init_weights": "bad", "regroup": None},
         "badit (changed: gates=mean_one, gated=factors)"),
        ({"name": "badit", "preset": "paper"}, "badit (released)"),
        # Sections of this version have all options.
        ({"name": "badit", **SYSTEM}, "badit"),
        ({"name": "lora"}, "lora"),
    ],
)  # fmt: skip
def test_saved_sections_keep_the_defaults_of_their_time(section, name):
    assert method_name(saved_section(section)) == name


@pytest.mark.parametrize("default", [CLUSTER_GATES, SYSTEM])
@pytest.mark.parametrize(
    ("options", "unset"),
    [
        ({}, {"gates": "clusters", "router_input": "standardised"}),
        ({"routing": "token"}, {"gates": "mean_one", "router_input": "mean"}),
        ({"router_input": "mean"}, {"gates": "mean_one"}),
        ({"top_k": 2}, {"gates": "mean_one"}),
        ({"num_experts": 1}, {"gates": "mean_one"}),
        ({"target_parameters": ["experts.down_proj"]}, {"gates": "mean_one"}),
        ({"gates": "softmax"}, {"key": "layer", "codes": "random"}),
        ({"init_weights": "bad", "gated": "factors"}, {"gates": "mean_one", "codes": "random"}),
        ({"init_weights": "bad", "gated": "change"}, {"gates": "clusters"}),
        ({"init_weights": "directions"}, {"gates": "clusters", "gated": "factors"}),
        ({"codes": "matched"}, {"gates": "clusters", "key": "embedding"}),
        ({"codes": "grouped"}, {"gates": "clusters", "key": "layer"}),
        ({"codes": "random"}, {"gates": "clusters"}),
    ],
)
def test_unset_options_get_values_that_the_others_allow(monkeypatch, default, options, unset):
    monkeypatch.setattr("badit.presets.DEFAULT", default)
    config = BaditConfig(**options)
    assert {name: getattr(config, name) for name in unset} == unset
    assert {name: getattr(config, name) for name in options if name != "target_parameters"} == {
        name: value for name, value in options.items() if name != "target_parameters"
    }
    if config.gates != "clusters":
        assert (config.key, config.codes) == ("layer", "random")
    # A second resolution changes nothing: adapters and runs save every option.
    assert filled(vars(config)) == vars(config)


@pytest.mark.parametrize("default", [CLUSTER_GATES, SYSTEM])
def test_default_is_decided_in_one_place(monkeypatch, default):
    monkeypatch.setattr("badit.presets.DEFAULT", default)
    for config in (
        BaditConfig(),
        resolve_method({}).config,
        resolve_method({"name": "badit"}).config,
    ):
        assert {name: getattr(config, name) for name in default} == default


def test_presets_set_their_options_and_yield_to_others():
    assert vars(BaditConfig.cluster_gates()).items() >= CLUSTER_GATES.items()
    assert vars(BaditConfig.released()).items() >= RELEASED.items()
    assert BaditConfig.cluster_gates(init_weights="directions", r=2).init_weights == "directions"
    assert BaditConfig.released(gates="mean_one").gates == "mean_one"
    method = resolve_method({"name": "cluster-gates", "num_clusters": 5, "regroup": {"every": 3}})
    assert (method.config.num_clusters, method.regroup.every) == (5, 3)


def test_resolved_name_is_that_of_the_options():
    """So a run is resumed by each name that stands for its options."""
    first, second = (
        resolve_method(section).section
        for section in ({"name": "badit", **CLUSTER_GATES}, {"name": "cluster-gates"})
    )
    assert first == second
    assert first["name"] == "cluster-gates"
    assert resolve_method({"name": "cluster-gates", **SYSTEM}).name == "badit"
    assert resolve_method({"name": "badit", "preset": "released"}).title == "badit (released)"


@pytest.mark.parametrize(
    ("message", "section"),
    [
        (r"method\.preset: 'paper' is called 'released' now", {"preset": "paper"}),
        (r"method\.preset: must be default or released, got 'papers'", {"preset": "papers"}),
        (r"method\.preset: cluster-gates is a preset itself",
         {"name": "cluster-gates", "preset": "released"}),
        (r"method\.codes: 'matched' needs gates='clusters'",
         {"codes": "matched", "gates": "mean_one"}),
        (r"method\.codes: 'grouped' needs gates='clusters'",
         {"codes": "grouped", "routing": "token"}),
        (r"method\.key: 'embedding' needs gates='clusters'",
         {"key": "embedding", "top_k": 2}),
        (r"method\.gates: 'clusters' needs routing='prompt'",
         {"name": "cluster-gates", "routing": "token"}),
    ],
)  # fmt: skip
def test_presets_and_contradictions_are_refused_in_one_line(message, section):
    def resolve():
        resolve_method(section)

    refuses(message, resolve)


def test_committed_results_say_what_their_methods_are():
    titles = load_results(RESULTS / "evidence-cpu").titles
    assert titles["badit"] == "cluster-gates"
    assert titles["badit-paper"] == "badit (released)"
    assert titles["badit-router"].startswith("badit (changed: ")
    assert titles["lora"] == "lora"
    assert load_results(RESULTS / "superni-cpu").titles["badit"] == "badit"


@pytest.mark.parametrize("form", ["text", "markdown", "latex"])
def test_tables_keep_the_given_names_and_say_what_the_methods_are(form):
    table = FORMATS[form](method_table(load_results(RESULTS / "evidence-seeds-cpu")))
    assert re.search(r"by their options: badit \\?= cluster-gates$", table, re.MULTILINE)
    assert re.search(r"^(\| )?badit \(\\?= cluster-gates\)", table, re.MULTILINE)


def test_all_committed_badit_cells_have_the_options_of_their_time():
    """Else their names would be those of a later default."""
    for file in sorted(RESULTS.glob("*/results.json")):
        for cell in json.loads(file.read_text()).get("cells", ()):
            section = (cell.get("config") or {}).get("method", {"name": "none"})
            is_former = "preset" in section or "init_weights" in section or "gates" in section
            assert section["name"] != "badit" or is_former or file.parent.name == "demo", file

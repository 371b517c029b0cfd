"""The paper's exact form under one name, regrouping by fractions of the run, and what regrouping refuses."""

import pytest
from peft import get_peft_model

from badit import BaditConfig, Regrouper
from badit.errors import BaditError
from badit.methods import build_method


def test_the_papers_form_has_one_name():
    method = build_method({"name": "badit", "preset": "paper"})
    config = BaditConfig.paper()
    assert (config.gates, config.init_weights, config.svd_method) == ("softmax", "bad", "exact")
    for name in BaditConfig.PAPER:
        assert getattr(method.config, name) == getattr(config, name), name
    assert method.regroup["solver"] == "paper"
    own = build_method({"name": "badit", "preset": "paper", "num_experts": 4, "regroup": {"restarts": 3}})
    assert (own.config.num_experts, own.config.gates) == (4, "softmax")
    assert (own.regroup["restarts"], own.regroup["stop"]) == (3, 0.5)
    assert build_method({"name": "badit", "preset": "paper", "regroup": None}).regroup is None
    with pytest.raises(BaditError, match=r"method\.preset: must be default or paper, got 'papers'"):
        build_method({"name": "badit", "preset": "papers"})


@pytest.mark.parametrize(
    ("every", "steps"), [(0.1, [10, 20, 30, 40, 50]), (0.25, [25, 50]), (30, [30]), (1e-9, [*range(1, 51)])]
)
def test_a_fraction_of_the_run_between_regroupings(tiny_model, every, steps):
    model = get_peft_model(tiny_model("llama"), BaditConfig(num_experts=2, r=1))
    regrouper = Regrouper(model, 100, every=every, stop=0.5)
    regrouped = []
    regrouper._regroup = lambda: regrouped.append(regrouper.steps)
    for _ in range(100):
        regrouper.step()
    assert regrouped == steps


def test_regrouping_into_experts_that_are_switched_off_is_refused(tiny_model):
    with pytest.raises(BaditError, match="components into experts that top_k switches off"):
        build_method({"name": "badit", "top_k": 2})
    assert build_method({"name": "badit", "top_k": 2, "regroup": None}).config.top_k == 2
    model = get_peft_model(tiny_model("llama"), BaditConfig(num_experts=4, r=1, top_k=2))
    with pytest.raises(BaditError, match=r"gate_proj\.default: regrouping would move components"):
        Regrouper(model, 10)

"""Model cards: their content, and the escaping of text from data."""

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from badit.api import Run
from badit.hub.card import hub_id, model_card
from badit.presets import SYSTEM
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.support.files import write_json

HOSTILE = (
    "a|b](https://evil.example) www.evil.example &#91;<script>x</script>\n---\n"
    "license: mit\n# <!-- `![](y)` \u202e @me"
)
PAPER = "https://arxiv.org/abs/2605.05676"


def make_run(folder, task="capitals", **sections):
    """Creates the files of a finished run, without training."""
    run = Run.at(folder)
    run.adapter_path.mkdir(parents=True)
    run.config_path.write_text(dump_recipe(build_recipe({**sections, "output": str(folder)})))
    scores = {"rouge_l": 51.25, "exact_match": 40.0}
    write_json(run.scores_path, {**scores, "tasks": {task: {**scores, "instances": 4}}})
    training = {"trainable_parameters": 1_234_567, "steps": 80}
    write_json(run.environment_path, {"packages": {"torch": "2.13.0"}, "training": training})
    return run


def card_of(run, **options):
    return ModelCard(model_card(run, **options))


def html_of(card):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)


def code_of(card):
    """Returns the code that loads the model, and checks its syntax."""
    code = card.text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    return code


def test_card_has_scores_data_options_and_loading_code(tmp_path):
    data = {"source": ["$NOT_SET/my-tasks.jsonl", "/home/someone/others.csv"]}
    training = {"deepspeed": "/home/someone/zero.json"}
    card = card_of(make_run(tmp_path / "mine", data=data, training=training))
    assert card.data.to_dict() == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["badit", "multi-task"],
    }
    page = html_of(card)
    rows = (
        ("capitals", f"{51.25:.1f}", "40.0", "4"),
        ("data", "my-tasks.jsonl, others.csv"),
        ("method.name", "badit"),
        ("deepspeed", "zero.json"),
        ("learning_rate", "0.002"),
        ("trainable_parameters", "1,234,567"),
        ("packages", "torch 2.13.0"),
    )
    for row in rows:
        assert "\n".join(f"<td>{value}</td>" for value in row) in page
    assert "someone" not in str(card)
    assert "Loading requires the Python package badit and the import below" in card.text
    assert "pip install" not in card.text
    assert "import badit.tuner" in code_of(card)
    assert 'base, tokenizer = badit.load_base_model("smollm2-135m")' in code_of(card)
    assert "4-bit" in card.text  # the weights on the hub differ


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("badit", "`pip install badit`"),
        ("git+https://code.example/badit@v1", "`pip install git+https://code.example/badit@v1`"),
        ("a `b`\n# c", r"`pip install 'a b\n# c'`"),
    ],
)
def test_card_installs_badit_from_the_place_that_is_set(tmp_path, monkeypatch, place, shown):
    monkeypatch.setenv("BADIT_INSTALL_FROM", place)
    run = make_run(tmp_path / "mine")
    assert f"requires the Python package badit ({shown}) and the import" in card_of(run).text
    exported = card_of(run, export={"rank": 4, "mixture": None})
    assert "pip install" not in exported.text, "it loads without badit"


def test_runs_of_other_methods_and_base_models_are_loaded_from_the_hub(tmp_path):
    other = make_run(tmp_path / "other", method={"name": "loramoe"}, model={"name": "org/base"})
    code = code_of(card_of(other, address="org/tuned"))
    assert "import badit.baselines" in code
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in code
    assert 'PeftModel.from_pretrained(base, "org/tuned")' in code

    lora = make_run(tmp_path / "lora", method={"name": "lora"})
    assert "pip install" not in card_of(lora).text

    pinned = card_of(make_run(tmp_path / "pinned", model={"name": "org/base", "revision": "v1"}))
    assert 'AutoModelForCausalLM.from_pretrained("org/base", revision="v1")' in code_of(pinned)
    assert "<td>model.revision</td>\n<td>v1</td>" in html_of(pinned)


@pytest.mark.parametrize(
    ("method", "title", "is_the_papers"),
    [
        ({"name": "badit", **SYSTEM}, "badit", True),
        ({"name": "badit", "preset": "released"}, "badit (released)", True),
        ({"name": "cluster-gates"}, "cluster-gates", False),
        ({"name": "badit", **SYSTEM, "codes": "random"}, "badit (changed: codes=random)", False),
        ({"name": "lora"}, "lora", False),
    ],
)
def test_card_names_the_method_by_its_options_and_cites_the_paper_for_its_own(
    tmp_path, method, title, is_the_papers
):
    page = html_of(card_of(make_run(tmp_path / "mine", method=method)))
    assert f"<h1>{title} on HuggingFaceTB/SmolLM2-135M-Instruct</h1>" in page
    assert (PAPER in page) == is_the_papers
    assert ("released code" in page) == (title == "badit (released)")


def test_exports_are_loaded_without_badit_and_name_what_they_change(tmp_path):
    run = make_run(tmp_path / "run", model={"name": "org/base"})
    lora = card_of(run, export={"rank": 64, "mixture": "the mean over 2 tasks"})
    assert 'AutoPeftModelForCausalLM.from_pretrained("FOLDER")' in code_of(lora)
    assert "badit." not in code_of(lora)
    assert lora.data.tags == ["badit", "multi-task", "lora"]
    assert "the mean over 2 tasks" in lora.text
    assert "mean over tasks" in lora.text

    of_task = card_of(run, export={"rank": 8, "mixture": "of a", "task": "capitals"})
    assert "| capitals |" in of_task.text
    assert "mean over tasks" not in of_task.text

    compressed = {"rank": 8, "exact_rank": 64, "mixture": None, "relative_error": {"total": 0.403}}
    text = card_of(run, export=compressed).text
    assert "compressed from rank 64 to 8, with a relative error of 0.4," in text

    merged = card_of(run, export={"rank": None, "mixture": None}, address="org/merged")
    assert merged.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("org/merged")' in code_of(merged)


def test_base_model_licence_is_read_from_its_card(tmp_path):
    (tmp_path / "base").mkdir()
    run = make_run(tmp_path / "run", model={"name": str(tmp_path / "base")})
    assert (hub_id(run.recipe), card_of(run).data.license) == (None, None)
    for header, licence in (
        ("license: gemma\n---\n# A model", "gemma"),
        ("license: [\n---", None),
        ("- a\n---", None),
    ):
        (tmp_path / "base" / "README.md").write_text(f"---\n{header}\n")
        assert card_of(run).data.license == licence, header


def test_text_from_data_is_escaped(tmp_path):
    source = f"/x/{HOSTILE.replace('/', '')}"
    method = {"name": "badit", **SYSTEM}
    run = make_run(tmp_path / "a`<b>", HOSTILE, data={"source": source}, method=method)
    card = card_of(run, export={"rank": 4, "mixture": HOSTILE})
    assert card.data.license == "apache-2.0"
    page, text = html_of(card), str(card).replace(PAPER, "")
    assert [markup for markup in ("<script", "<!--", "<img") if markup in page] == []
    assert [link for link in ("\u202e", "https:", "www.", "&#91;") if link in text] == []
    assert page.count("<a ") == page.count(f'<a href="{PAPER}">') == page.count("<h1>") == 1
    scores = page.partition("<table>")[2].partition("</table>")[0]
    assert scores.count("<td>") == 8, "expected a row of four cells for the task, and the mean"

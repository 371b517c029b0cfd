"""Model cards: their content, and the escaping of text from data."""

from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from badit.api import Run
from badit.hub.card import hub_id, model_card
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.support.files import write_json

HOSTILE = "a|b](https://evil.example) www.evil.example &#91;<script>x</script>\n---\n"
HOSTILE += "license: mit\n# <!-- `![](y)` \u202e @me"
PAPER = "https://arxiv.org/abs/2605.05676"


def make_run(folder, task="capitals", **sections):
    """Creates the files of a finished run, without training."""
    run = Run.at(folder)
    run.adapter_path.mkdir(parents=True)
    run.config_path.write_text(dump_recipe(build_recipe({**sections, "output": str(folder)})))
    scores, training = (
        {"rouge_l": 51.25, "exact_match": 40.0},
        {"trainable_parameters": 1_234_567, "steps": 80},
    )
    write_json(run.scores_path, {**scores, "tasks": {task: {**scores, "instances": 4}}})
    write_json(run.environment_path, {"packages": {"torch": "2.13.0"}, "training": training})
    return run


def card_of(run, **options):
    return ModelCard(model_card(run, **options))


def html_of(card):
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)


def test_card_has_scores_data_options_and_loading_code(tmp_path):
    data = {"source": ["$NOT_SET/my-tasks.jsonl", "/home/someone/others.csv"]}
    card = card_of(
        make_run(tmp_path / "mine", data=data, training={"deepspeed": "/home/someone/zero.json"})
    )
    expected = {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "adapter",
    }
    expected |= {"library_name": "peft", "license": "apache-2.0", "pipeline_tag": "text-generation"}
    assert card.data.to_dict() == {**expected, "tags": ["badit", "multi-task"]}
    rows = [
        ("capitals", f"{51.25:.1f}", "40.0", "4"),
        ("data", "my-tasks.jsonl, others.csv"),
        ("method.name", "badit"),
    ]
    rows += [("deepspeed", "zero.json"), ("learning_rate", "0.002")]
    rows += [("trainable_parameters", "1,234,567"), ("packages", "torch 2.13.0")]
    page = html_of(card)
    for row in rows:
        assert "\n".join(f"<td>{value}</td>" for value in row) in page
    assert "someone" not in str(card)
    assert "`pip install badit`" in card.text
    assert "import badit.tuner" in card.text
    assert "4-bit" in card.text  # the weights on the hub differ
    assert 'base, tokenizer = badit.load_base_model("smollm2-135m")' in card.text
    compile(card.text.partition("```python\n")[2].partition("```")[0], "card", "exec")


def test_loading_code_for_baselines_lora_and_exports(tmp_path):
    other = make_run(tmp_path / "other", method={"name": "loramoe"}, model={"name": "org/base"})
    text = card_of(other, address="org/tuned").text
    assert "import badit.baselines" in text
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in text
    assert 'PeftModel.from_pretrained(base, "org/tuned")' in text
    assert "pip install" not in card_of(make_run(tmp_path / "lora", method={"name": "lora"})).text
    run = make_run(tmp_path / "run", model={"name": "org/base"})
    lora = card_of(run, export={"rank": 64, "mixture": "the mean over 2 tasks"})
    assert 'AutoPeftModelForCausalLM.from_pretrained("FOLDER")' in lora.text
    assert "badit." not in lora.text.partition("```python")[2].partition("```")[0]
    assert lora.data.tags == ["badit", "multi-task", "lora"]
    assert "the mean over 2 tasks" in lora.text
    of_one = card_of(
        run, export={"rank": 8, "mixture": "of a", "task": next(iter(run.scores["task"]))}
    ).text
    assert (of_one.count("| 1 |"), "mean over tasks" in of_one, "mean over tasks" in lora.text) == (
        1,
        False,
        True,
    )
    compressed = {"rank": 8, "exact_rank": 64, "mixture": None, "relative_error": {"total": 0.403}}
    assert (
        "compressed from rank 64 to 8, with a relative error of 0.4,"
        in card_of(run, export=compressed).text
    )
    pinned = card_of(make_run(tmp_path / "pinned", model={"name": "org/base", "revision": "v1"}))
    assert 'AutoModelForCausalLM.from_pretrained("org/base", revision="v1")' in pinned.text
    assert "<td>model.revision</td>\n<td>v1</td>" in html_of(pinned)
    merged = card_of(run, export={"rank": None, "mixture": None}, address="org/merged")
    assert merged.data.library_name == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("org/merged")' in merged.text


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
    run = make_run(tmp_path / "a`<b>", HOSTILE, data={"source": f"/x/{HOSTILE.replace('/', '')}"})
    card = card_of(run, export={"rank": 4, "mixture": HOSTILE})
    assert card.data.license == "apache-2.0"
    page, text = html_of(card), str(card).replace(PAPER, "")
    assert [each for each in ("<script", "<!--", "<img") if each in page] == []
    assert [each for each in ("\u202e", "https:", "www.", "&#91;") if each in text] == []
    assert page.count("<a ") == page.count(f'<a href="{PAPER}">') == page.count("<h1>") == 1
    scores = page.partition("<table>")[2].partition("</table>")[0]
    assert (scores.count("<tr>"), scores.count("<td>")) == (3, 8), (
        "expected a header, the task and the mean"
    )

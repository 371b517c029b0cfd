"""Decoding compared with a naive loop: batches, end tokens, adapters, streaming; and scores of
answers.
"""

import itertools
from functools import partial
from statistics import fmean
from unittest.mock import Mock

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from badit import BaditConfig, Run
from badit.data import AnswerCollator, Instance, Task
from badit.evaluation import generation
from badit.evaluation.answers import score_model
from badit.evaluation.generation import generate_answers, stream_answer
from badit.evaluation.losses import prompt_losses
from badit.metrics.answers import METRICS, Prediction
from badit.recipe.loading import build_recipe
from badit.recipe.saved import dump_recipe
from badit.runs.predictions import read_predictions, write_predictions
from badit.training.encoding import encoded
from data.examples import make_tokenizer
from refusals import refuses
from steps import evaluate
from tuner.helpers import adapted, greedy_by_hand, randomise

RECIPE = build_recipe(
    {"evaluation": {"max_new_tokens": 4, "batch_size": 2}, "prompt": {"chat_template": "never"}}
)
OPTIONS = [None, {}, {"router_input": "standardised"}, {"routing": "token"}]
AWKWARD = [
    Prediction("a", "2", "", ("x",), ""),
    Prediction("task b", "1", 'line\nbreak \u2028 and "quotes"', ("ü", "中"), "p\r\n"),
    Prediction("task b", "0", "y", ("x",), "p"),
]


def until(ends, tokens):
    return list(itertools.takewhile(lambda token: token not in ends, tokens))


def words(tokens):
    return " ".join(f"w{token}" for token in tokens if token > 1)  # tokens 0 and 1 are special


def generate(model, tokenizer, prompts, **options):
    return generate_answers(
        model, tokenizer, prompts, **{"max_new_tokens": 12, "progress": False, **options}
    )


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_answers_match_naive_decoding_in_prompt_order(model, tokenizer, prompts, free, batch_size):
    expected = [words(until({1}, tokens)) for tokens in free]
    assert len(set(expected)) > 4  # a wrong order is detected only if the answers differ
    assert generate(model, tokenizer, prompts, batch_size=batch_size) == expected
    assert generate(model, tokenizer, []) == []


def spy_on(model, monkeypatch):
    """Replaces ``model.generate`` by a mock that calls it, and returns the mock."""
    monkeypatch.setattr(model, "generate", Mock(wraps=model.generate))
    return model.generate


@pytest.mark.parametrize("family", ["rwkv", "recurrent_gemma", "minimax"])
def test_models_that_ignore_the_padding_mask_answer_one_prompt_at_a_time(
    tokenizer, prompts, family, monkeypatch
):
    of_family = {
        "rwkv": {"attention_hidden_size": 32},
        "recurrent_gemma": {"lru_width": 32, "num_hidden_layers": 3},
    }
    of_family["minimax"] = {
        "num_key_value_heads": 2,
        "num_local_experts": 2,
        "block_size": 8,
        "head_dim": 8,
    }
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(
        family, **sizes | of_family[family], vocab_size=len(tokenizer), pad_token_id=0
    )
    spy = spy_on(model := AutoModelForCausalLM.from_config(config).eval(), monkeypatch)
    generate(model, tokenizer, prompts[:2], batch_size=2)
    assert [len(call.kwargs["input_ids"]) for call in spy.mock_calls] == [1, 1]


def test_padding_with_a_regular_token_is_not_part_of_the_answer(model, prompts, free):
    model.generation_config.eos_token_id = end = free[1][4]
    expected = [" ".join(f"w{token}" for token in until({end}, tokens)) for tokens in free]
    assert (
        len({len(answer.split()) for answer in expected}) > 1
    )  # some answers end early and are padded
    assert generate(model, word_tokenizer(0), prompts) == expected


def test_model_decoding_options_are_ignored_and_all_state_is_restored(
    model, tokenizer, prompts, monkeypatch
):
    expected = generate(model, tokenizer, prompts)
    tokenizer.padding_side = "right"
    own = model.generation_config
    own.do_sample, own.temperature, own.top_p, own.repetition_penalty, own.no_repeat_ngram_size = (
        True,
        2.0,
        0.5,
        9.0,
        1,
    )
    assert generate(model, tokenizer, prompts) == expected
    assert model.generation_config is own
    assert tokenizer.padding_side == "right"
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, tokenizer, prompts)
    assert model.generation_config is own
    assert tokenizer.padding_side == "right"


@pytest.fixture
def ending(model, free):
    """The model with end tokens that give its answers different lengths."""
    model.generation_config.eos_token_id = [free[1][4], free[5][2], free[2][7]]
    return model


@pytest.mark.parametrize("routing", [None, "prompt", "token"])
def test_finished_rows_are_removed_from_the_batch(
    ending, tokenizer, prompts, free, routing, monkeypatch
):
    """A row ends at an end token of model or tokenizer; the others keep their own mixtures."""
    model, expected = (
        ending,
        [words(until({1, *ending.generation_config.eos_token_id}, tokens)) for tokens in free],
    )
    if routing:
        config = BaditConfig(
            num_experts=4,
            r=2,
            init_weights="lora",
            target_modules=["gate_proj"],
            routing=routing,
            task_type="CAUSAL_LM",
        )
        model = randomise(get_peft_model(ending, config)).eval()
        expected = generate(model, tokenizer, prompts, batch_size=1)
    assert len({len(answer.split()) for answer in expected}) >= 2
    spy = spy_on(model, monkeypatch)
    assert generate(model, tokenizer, prompts) == expected
    rows = [len(call.kwargs["input_ids"]) for call in spy.mock_calls]
    assert rows[0] == 8
    assert len(rows) > 1
    assert all(2 * after <= before for before, after in itertools.pairwise(rows))


def test_batch_keeps_all_rows_if_the_cache_cannot_remove_rows(
    ending, tokenizer, prompts, monkeypatch
):
    expected = generate(ending, tokenizer, prompts)
    monkeypatch.setattr(generation, "select_rows", lambda cache, rows: False)
    spy = spy_on(ending, monkeypatch)
    assert generate(ending, tokenizer, prompts) == expected
    assert [len(call.kwargs["input_ids"]) for call in spy.mock_calls] == [8, 8]


def stream(model, tokenizer, prompt, **options):
    shown = []
    options = {"show": shown.append, "max_new_tokens": 12, **options}
    return stream_answer(model, tokenizer, prompt, **options), shown


def test_empty_prompts_and_invalid_options_are_refused(model, tokenizer):
    for call, message in (
        (lambda: generate(model, tokenizer, [[5], []]), "prompt 1 has no tokens"),
        (lambda: generate(model, tokenizer, [[5]], batch_size=0), "batch_size"),
        (lambda: generate(model, tokenizer, [[5]], max_new_tokens=0), "max_new_tokens"),
        (lambda: stream(model, tokenizer, []), "has no tokens"),
        (lambda: stream(model, tokenizer, [5], max_new_tokens=0), "at least 1, not 0"),
    ):
        refuses(message, call)


def test_streamed_answer_matches_naive_decoding_and_grows_by_tokens(
    model, tokenizer, prompts, free
):
    ended = []
    for prompt, tokens in zip(prompts, free, strict=True):
        tokens = until({1}, tokens)
        answer, shown = stream(model, tokenizer, prompt)
        ended.append(len(tokens) < 12)
        assert answer == (words(tokens), len(tokens), ended[-1])
        expected = [words(tokens[: i + 1]) for i in range(len(tokens))]
        assert shown == [*expected, *expected[-1:] * ended[-1]]
    assert any(ended)
    own = model.generation_config
    with pytest.raises(ZeroDivisionError):
        stream(model, tokenizer, prompts[1], show=lambda text: 1 / 0)
    assert model.generation_config == own


def test_incomplete_characters_are_not_streamed(model, prompts):
    tokenizer = make_tokenizer()
    ids = tokenizer("naïve €", add_special_tokens=False)["input_ids"]

    def generate(input_ids, stopping_criteria, **_):
        for token in ids:
            input_ids = torch.cat([input_ids, torch.tensor([[token]])], dim=1)
            stopping_criteria(input_ids, None)
        return {"sequences": input_ids}

    model.generate = generate
    answer, shown = stream(model, tokenizer, prompts[0], max_new_tokens=len(ids))
    assert answer.text == "naïve €"
    assert all("naïve €".startswith(text) for text in shown)
    assert len(set(shown)) < len(ids), "some tokens are only part of a character"


def tasks_of(*answers):
    """Returns two tasks, with three instances and one, whose second references are the answers."""
    pairs = zip(["w5 w6 w7", "w9", "w3 w3 w3 w3 w90", "w77 w8"], answers, strict=True)
    instances = [
        Instance(id=f"i{i}", input=text, outputs=("zzz", answer))
        for i, (text, answer) in enumerate(pairs)
    ]
    right = Task(
        name="right", definition="w1", test=tuple(instances[:3]), validation=tuple(instances[:1])
    )
    return [right, Task(name="wrong", definition="w1", test=tuple(instances[3:]))]


def test_scores_and_predictions_match_their_instances(model, tokenizer):
    _, answers = score_model(model, tokenizer, RECIPE, tasks_of(*"abcd"), "test", progress=False)
    tasks = tasks_of(*[answer.prediction for answer in answers[:3]], "d")
    scores, predictions = score_model(model, tokenizer, RECIPE, tasks, "test", progress=False)
    for task, score, count in (("right", 100.0, 3), ("wrong", 0.0, 1)):
        nll = [prediction.nll for prediction in predictions if prediction.task == task]
        expected = {
            "rouge_l": score,
            "exact_match": score,
            "nll": pytest.approx(fmean(nll)),
            "instances": count,
        }
        assert scores["tasks"][task].items() >= expected.items()
        # Answers of tasks without preferences have no preference.
        assert scores["tasks"][task].keys() == {*METRICS, "instances"} - {"preference"}
    for metric in ("rouge_l", "exact_match"):
        assert (scores[metric], scores[f"{metric}_instances"]) == (50.0, 75.0)
    ids = [(p.task, p.instance_id) for p in predictions]
    assert ids == [("right", "i0"), ("right", "i1"), ("right", "i2"), ("wrong", "i3")]
    for prediction, instance in zip(
        predictions, [i for task in tasks for i in task.test], strict=True
    ):
        assert instance.input in prediction.prompt
        assert prediction.references == instance.outputs
    _, predictions = score_model(model, tokenizer, RECIPE, tasks[:1], "validation", progress=False)
    assert [p.instance_id for p in predictions] == ["i0"]


@pytest.mark.parametrize(
    ("family", "options"), [*(("llama", one) for one in OPTIONS), ("gpt2", {}), ("gemma2", {})]
)
def test_shared_prompt_cache_keeps_nll_and_answers(
    family, options, tiny_model, tokenizer, monkeypatch
):
    model = tiny_model(family, vocab_size=128, initializer_range=0.5)
    model = model if options is None else adapted(model, **options)
    texts = [
        ("w5 w6 w7", "w3 w4"),
        ("w9", "w5"),
        ("w3 w3 w3 w3 w90 w4 w6", "w7 w8 w9 w10"),
        ("w77 w8", "w9 w2 w3"),
    ]
    instances = [
        Instance(id=f"i{i}", input=text, outputs=(answer,))
        for i, (text, answer) in enumerate(texts)
    ]
    task = Task(name="t", definition="w1", test=tuple(instances))
    examples = encoded(tokenizer, RECIPE, [(task, instance) for instance in instances], model)
    prompts = [example["input_ids"][: example["prompt_length"]] for example in examples]
    sums, counts = prompt_losses(model, [AnswerCollator(0)(examples)])
    answers = generate(model, tokenizer, prompts, max_new_tokens=4, batch_size=2)
    spy = spy_on(model, monkeypatch)
    score = partial(score_model, model, tokenizer, RECIPE, [task], "test", progress=False)
    _, predictions = score()
    assert [prediction.nll for prediction in predictions] == pytest.approx(
        (sums / counts).tolist(), rel=1e-4
    )
    assert [prediction.prediction for prediction in predictions] == answers
    # A sliding-window cache cannot restore dropped positions, so gemma2 does not reuse it.
    assert any(name in spy.mock_calls[0].kwargs for name in ("cache", "past_key_values")) == (
        family != "gemma2"
    )
    model.get_input_embeddings().weight.data[:] = torch.nan
    refuses("task t, instance i0: the NLL is not finite", score)


def test_predictions_round_trip_and_survive_an_interrupted_write(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    write_predictions(folder, [AWKWARD[1], AWKWARD[0], AWKWARD[2]])
    assert sorted(file.name for file in folder.iterdir()) == ["a.jsonl", "task b.jsonl"]
    assert read_predictions(folder) == AWKWARD
    write_predictions(folder, AWKWARD[:1])
    assert [file.name for file in folder.iterdir()] == ["a.jsonl"], (
        "no stale predictions of other tasks"
    )
    write_predictions(folder, AWKWARD)
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_predictions(folder, [Prediction("task b", "9", "", ("x",), "")])
    assert read_predictions(folder) == AWKWARD


def test_task_names_cannot_lead_out_of_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "link.jsonl").symlink_to(tmp_path / "out.jsonl")
    for name in ("../up", f"{tmp_path}/absolute", "link"):
        refuses(
            "leads out of",
            write_predictions,
            tmp_path / "inside",
            [Prediction(name, "1", "", ("x",), "")],
        )
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_invalid_predictions_and_unknown_splits_are_refused(tmp_path):
    for line, message in (
        ("{", r"a\.jsonl: invalid JSON at line 2"),
        ('{"references": [], "surplus": 1}', r"a\.jsonl: line 2: .*evaluate the run again"),
    ):
        write_predictions(tmp_path, AWKWARD[:1])
        with (tmp_path / "a.jsonl").open("a") as file:
            file.write(line + "\n")
        refuses(message, read_predictions, tmp_path)
    refuses(r"no \.jsonl files", read_predictions, tmp_path / "empty")
    message = r"split: unknown 'tests' \(did you mean 'test'\?\); known: test, validation"
    (tmp_path / "config.yaml").write_text(dump_recipe(build_recipe({})))
    refuses(message, evaluate, Run.at(tmp_path), split="tests")


def word_tokenizer(start, **special):
    """Returns a tokenizer of 128 words, `w0` to `w127`; special tokens replace those before
    `start`.
    """
    vocabulary = [*special.values(), *(f"w{i}" for i in range(start, 128))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="w127"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.fixture
def tokenizer():
    return word_tokenizer(2, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def model(tiny_model):
    # Large weights make the logits far from uniform, so that the largest one is unambiguous.
    sizes = {"vocab_size": 128, "intermediate_size": 64, "initializer_range": 0.5}
    return tiny_model("llama", **sizes, bos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(2, 128, (length,), generator=generator).tolist()
        for length in [3, 17, 1, 9, 9, 30, 2, 5]
    ]


@pytest.fixture
def free(model, prompts):
    """Greedy continuations of the prompts, without cache, padding and end tokens."""
    ids = [torch.tensor([prompt]) for prompt in prompts]
    return [
        greedy_by_hand(model, each, torch.ones_like(each), 12)[0, each.shape[1] :].tolist()
        for each in ids
    ]

"""lm-evaluation-harness with prompt routing: gates do not depend on the continuation."""

import logging
import re
import sys
from functools import partial
from operator import itemgetter

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from badit.cli import main
from badit.integrations.lm_eval import BaditLM, run_command_line
from data.examples import write_rows
from refusals import refuses
from studio.conftest import BADIT
from tuner.helpers import adapted, cached_steps, generate

# (context, continuation) of several lengths. The last two have the same input tokens, but different
# contexts.
PAIRS = [
    ("Name the capital of Italy.", " Rome"),
    ("Name the capital of Italy.", " Paris or Rome, one of the two"),
    ("Now complete the following example, and take your time to think about it:", " Input: France"),
    ("Answer", " with the capital of the country."),
    ("", "Output: Paris"),
    ("Peru has", " a capital, Lima"),
    ("Peru has a capital,", " Lima"),
]


def requests(pairs, kind="loglikelihood"):
    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)
    ]


def score_pairs(model, pairs):
    likelihoods, greedy = zip(*model.loglikelihood(requests(pairs), disable_tqdm=True), strict=True)
    return torch.tensor(likelihoods), list(greedy)


@pytest.fixture
def base(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(
        model_folder
    )


@pytest.fixture
def routed(base):
    """A model whose gates differ between prompts, and its tokenizer."""
    return adapted(base[0]), base[1]


def wrapped(cls, model, batch_size=4, **options):
    return cls(pretrained=model[0], tokenizer=model[1], batch_size=batch_size, **options)


def decoded_likelihood(model, context, continuation):
    """Scores the continuation token by token, as in generation.

    The cache was filled by the context alone. Returns the log-likelihood and whether it is greedy.
    """
    ids = torch.tensor([context + continuation])
    logits = cached_steps(model, ids, torch.ones_like(ids), len(context), DynamicCache())[0, :-1]
    targets = ids[0, len(context) :]
    likelihoods = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(likelihoods.sum()), bool((logits.argmax(-1) == targets).all())


def test_continuation_is_scored_with_the_gates_of_generation(routed):
    scorer = wrapped(BaditLM, routed)
    likelihoods, greedy = score_pairs(scorer, PAIRS)
    for (context, continuation), likelihood, is_greedy in zip(
        PAIRS, likelihoods, greedy, strict=True
    ):
        ids = scorer.tok_encode(context + continuation)
        # Without context, lm_eval prepends a token.
        start = len(scorer.tok_encode(context)) if context else 1
        expected = decoded_likelihood(routed[0], ids[:start], ids[start:])
        assert (float(likelihood), is_greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])


def test_scores_do_not_depend_on_batch_size_or_order_unlike_with_hf(routed):
    """With hf, gates also depend on the continuation and the padding (docs/lm-eval.md)."""
    ours, _ = score_pairs(wrapped(BaditLM, routed, 2), PAIRS)
    for batch_size, options in ((1, {}), (16, {}), ("auto", {"max_batch_size": 4})):
        reversed_, _ = score_pairs(wrapped(BaditLM, routed, batch_size, **options), PAIRS[::-1])
        assert torch.allclose(reversed_.flip(0), ours, rtol=1e-5)
    alone, _ = score_pairs(wrapped(HFLM, routed, 1, logits_cache=False), PAIRS)
    batched, _ = score_pairs(wrapped(HFLM, routed, 8, logits_cache=False), PAIRS)
    assert (alone - ours).abs().max() > 0.05
    assert (batched - alone).abs().max() > 0.05
    # A continuation of one token is predicted from the context alone.
    assert torch.isclose(alone[0], ours[0], rtol=1e-5)


def test_plain_lora_scores_equal_those_of_hf(base):
    model, tokenizer = base
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules=["gate_proj"], init_lora_weights=False)
    ).eval()
    ours, greedy = score_pairs(wrapped(BaditLM, (model, tokenizer)), PAIRS)
    # hf's cache uses wrong positions if the same text has contexts of different lengths, as in the
    # last two pairs.
    theirs, theirs_greedy = score_pairs(
        wrapped(HFLM, (model, tokenizer), logits_cache=False), PAIRS
    )
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert greedy == theirs_greedy


def test_generations_equal_those_of_hf_and_are_scored_as_greedy(routed):
    contexts = [context for context, _ in PAIRS if context]
    asked = [(context, {"until": ["Rome"], "max_gen_toks": 6}) for context in contexts]
    single, batched, of_hf = (
        wrapped(cls, routed, size).generate_until(
            requests(asked, "generate_until"), disable_tqdm=True
        )
        for cls, size in ((BaditLM, 1), (BaditLM, 4), (HFLM, 4))
    )
    assert single == batched == of_hf
    assert any(single)
    scorer = wrapped(BaditLM, routed)
    triples = []
    for prompt in map(scorer.tok_encode, contexts):
        ids = torch.tensor([prompt])
        answer = generate(routed[0], ids, torch.ones_like(ids), 4)[0, len(prompt) :]
        triples.append((None, prompt, answer.tolist()))
    scores = scorer._loglikelihood_tokens(triples, disable_tqdm=True)
    assert all(is_greedy for _, is_greedy in scores)


def test_rolling_windows_are_routed_by_the_text_before_them(routed):
    scorer = wrapped(BaditLM, routed, max_length=12)
    text = " ".join(["Answer with the capital of the country. Input: Italy Output: Rome"] * 3)
    text = scorer.tokenizer.decode(scorer.tok_encode(text)[1:-1])
    ids = [scorer.prefix_token_id, *scorer.tok_encode(text)]
    windows = [
        (ids[start : start + 1], ids[start + 1 : start + 13])
        for start in range(0, len(ids) - 12, 12)
    ]
    assert len(windows) >= 3
    expected = sum(decoded_likelihood(routed[0], *window)[0] for window in windows)
    last = ids[1 + 12 * len(windows) :]
    assert last, "no last window; its context must be the preceding text that fits"
    expected += decoded_likelihood(routed[0], ids[-13 : -len(last)], last)[0]
    asked = requests([(text,)], "loglikelihood_rolling")
    (likelihood,) = scorer.loglikelihood_rolling(asked, disable_tqdm=True)
    assert likelihood == pytest.approx(expected, rel=1e-5)


def test_long_contexts_lose_their_start_and_bad_continuations_are_refused(routed):
    scorer = wrapped(BaditLM, routed, max_length=8)
    long, continuation = list(range(5, 25)), [30, 31, 32]
    blank = []
    for context, used in ((long, long[-6:]), (blank, [scorer.prefix_token_id])):
        request = (None, context, continuation)
        ((likelihood, _),) = scorer._loglikelihood_tokens([request], disable_tqdm=True)
        expected, _ = decoded_likelihood(routed[0], used, continuation)
        assert likelihood == pytest.approx(expected, rel=1e-5)
    for bad in ([], [9] * 9):
        message = rf"a continuation has {len(bad)} tokens; must have 1 to 8"
        refuses(message, scorer._loglikelihood_tokens, [(None, long, bad)], disable_tqdm=True)


@pytest.fixture
def task_folder(tmp_path):
    """Two custom lm_eval tasks, each with its own YAML file, on the same .jsonl file."""
    folder = tmp_path / "harness-tasks"
    choices = ["Rome, of course", "Paris", "Lima"]
    docs = [
        {"question": "Name the capital." * (1 + i % 3), "choices": choices, "answer": i % 3}
        for i in range(6)
    ]
    file = str(write_rows(folder / "docs.jsonl", *docs))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": file}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    choice = {
        "task": "toy_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    answer = {
        "task": "toy_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, answer):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    return folder


@pytest.fixture(autouse=True)
def _apart(tmp_path, monkeypatch):
    """Isolates lm_eval: no network, its own cache, and restored log settings.

    lm_eval's own tasks, which are slow to list, are not available.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", sys.argv)  # restored afterwards; the command replaces it
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def evaluated(model, arguments, tasks, batch_size=4):
    """Evaluates both tasks; returns the log-likelihoods of the choices, and the generations."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model,
        arguments,
        tasks=["toy_choice", "toy_answer"],
        batch_size=batch_size,
        device="cpu" if model == "hf" else None,  # hf needs CUDA by default
        bootstrap_iters=0,
        task_manager=manager,
    )
    choices, answers = (
        [sample["resps"] for sample in sorted(samples, key=itemgetter("doc_id"))]
        for samples in map(results["samples"].get, ("toy_choice", "toy_answer"))
    )
    return {
        "likelihoods": [float(choice[0][0]) for responses in choices for choice in responses],
        "texts": [responses[0][0] for responses in answers],
    }


def test_run_and_its_adapter_give_the_same_results(trained, task_folder):
    run = trained(BADIT)
    base = run.trusted_recipe().model.name
    adapter = {"pretrained": base, "peft": str(run.adapter_path)}
    of_run = evaluated("badit", {"run": str(run.path)}, task_folder)
    of_adapter = evaluated("badit", adapter, task_folder, batch_size=1)
    of_hf = evaluated("hf", adapter, task_folder)
    assert of_adapter["likelihoods"] == pytest.approx(of_run["likelihoods"], rel=1e-4)
    assert of_run["texts"] == of_adapter["texts"] == of_hf["texts"]


def test_harness_command_with_custom_tasks(trained, task_folder, tmp_path, command):
    tasks = ["--tasks", "toy_choice,toy_answer", "--include_path", str(task_folder)]
    output = ["--batch_size", "4", "--log_samples", "--output_path", str(tmp_path / "written")]
    run = trained(BADIT).path
    assert "exact_match" in command("harness", run, *tasks, *output, "--apply_chat_template")
    (samples,) = (tmp_path / "written").rglob("samples_toy_answer_*.jsonl")
    assert "<|im_start|>" in samples.read_text()


def test_methods_that_need_tasks_use_and_require_the_task_argument(trained):
    run = str(trained({"name": "mtl-lora", "r": 4}).path)
    asked, scores = requests([("Name the capital.", {"max_gen_toks": 4})], "generate_until"), []
    for task in ("cities", "rivers"):
        scorer = BaditLM(run=run, task=task, batch_size="auto", max_batch_size=2)
        scores.append(score_pairs(scorer, PAIRS)[0])
        assert len(scorer.generate_until(asked, disable_tqdm=True)) == 1
    assert not torch.allclose(*scores, rtol=1e-4)
    refuses("mtl-lora needs the name of a task; add task=NAME", BaditLM, run=run, batch_size=2)


def test_invalid_arguments_are_refused(trained, task_folder, capsys):
    refuses("give either run=FOLDER or pretrained=MODEL", BaditLM, run="a", pretrained="b")
    refuses("a run has its own adapter", BaditLM, run="a", peft="b")
    refuses("softmax_dtype: .*; remove it", BaditLM, run="a", softmax_dtype="float64")
    run = str(trained(BADIT).path)
    refuses("model_args: device: cannot be used", BaditLM, run=run, device="gpu")
    refuses("--model: is the run", run_command_line, run, ["--model=hf", "--tasks", "toy_choice"])
    for folder, task, message in (
        ("nowhere", "toy_choice", "nowhere: has no config.yaml"),
        (run, "no_such_task", "no_such_task"),
    ):
        assert main(["harness", folder, "--tasks", task, "--include_path", str(task_folder)]) == 2
        assert re.match(f"badit: .*{message}", capsys.readouterr().err.strip().splitlines()[-1])

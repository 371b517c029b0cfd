"""Rouge-L and exact match compared with plain formulas."""

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

import reference as naive
from badit.data import load_tasks
from badit.data.tasks import column
from badit.metrics.answers import exact_match, normalize_answer, rouge_l
from refusals import refuses

SUPERNI = os.environ.get("BADIT_SUPERNI")
WORDS = ["the", "The", "cats", "cat", "running", "runs,", "relational", "on-off", "a", "12.", "?"]
OTHER_WORDS = [
    "上海",
    "上海市",
    "中文。",
    "カメラ",
    "Москва",
    "москве",
    "café",
    "CAFÉ",
    "हिंदी",
    "हिंदू",
    "กิน",
    "서울은",
]
OTHER_WORDS += ["İ", "👍", "x²", "2024年", "Ä_ö", "\u0301"]
SENTENCES = st.lists(st.sampled_from([*WORDS, *OTHER_WORDS]), max_size=6).map(" ".join)
REFERENCES = st.lists(SENTENCES, min_size=1, max_size=3)
ASCII = st.text(st.characters(max_codepoint=127), max_size=30)
ASCII |= st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
# Without unassigned characters: they may be letters in regex's later version of Unicode.
ASSIGNED = st.text(st.characters(exclude_categories=["Cn", "Cs"]), max_size=20)


def official_rouge_l(prediction, reference):
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return 100 * scorer.score(reference, prediction)["rougeL"].fmeasure


@given(SENTENCES, REFERENCES, SENTENCES)
def test_rouge_l_matches_the_formula_and_references_never_lower_scores(
    prediction, references, another
):
    expected = max(naive.rouge_l(prediction, reference) for reference in references)
    assert rouge_l(prediction, references) == pytest.approx(expected)
    for metric in (rouge_l, exact_match):
        assert (
            0 <= metric(prediction, references) <= metric(prediction, [*references, another]) <= 100
        )


@given(ASCII, ASCII)
def test_rouge_l_of_ascii_text_is_the_official_score(prediction, reference):
    assert rouge_l(prediction, [reference]) == official_rouge_l(prediction, reference)


@pytest.mark.skipif(not SUPERNI, reason="BADIT_SUPERNI does not name a copy of the benchmark")
def test_rouge_l_of_the_benchmark_is_the_official_score_except_for_other_letters():
    differing = set()
    count = 0
    for task in load_tasks(SUPERNI):
        texts = [outputs[0] for outputs in column(task.test, "outputs")]
        for prediction, reference in pairwise(texts):
            count += 1
            if rouge_l(prediction, [reference]) != official_rouge_l(prediction, reference):
                differing |= {prediction, reference}
    assert count > 1000
    assert all(any(c.isalpha() and not c.isascii() for c in text) for text in differing), differing


@given(ASSIGNED)
def test_text_scored_against_itself(text):
    assert rouge_l(text, [text]) == (100.0 if naive.words(text) else 0.0)


@given(st.text(max_size=20))
def test_idempotent_normalization(text):
    normal = normalize_answer(text)
    assert normalize_answer(normal) == normalize_answer(f" \n{text}...!") == normal


def test_known_scores_and_invalid_references():
    for prediction, references, rouge, exact in (
        ("Yes.", ["no", "yes"], 100.0, 100.0),
        ("the cat", ["cat"], 200 / 3, 0.0),  # precision 1/2, recall 1; articles are kept
        ("?!", ["?!"], 0.0, 100.0),
        ("👍", ["👍"], 0.0, 100.0),
        ("上海", ["上海"], 100.0, 100.0),
        ("上海", ["上海市"], 80.0, 0.0),  # a character is a word: precision 1, recall 2/3
        ("в москве", ["В Москве."], 100.0, 100.0),
        ("the café", ["the cafe"], 50.0, 0.0),
        ("हिंदी", ["हिंदू"], 0.0, 0.0),  # marks belong to their word
        ("  The  U.S.A,\tan «Idea» ", ["the usa an «idea»"], 60.0, 100.0),
    ):
        assert (rouge_l(prediction, references), exact_match(prediction, references)) == (
            pytest.approx(rouge),
            exact,
        )
    for wrong in ([], (), "yes"):
        for metric in (rouge_l, exact_match):
            refuses("references", metric, "yes", wrong)

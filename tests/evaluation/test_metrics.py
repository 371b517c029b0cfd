"""Rouge-L and exact match compared with plain formulas."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem.porter import PorterStemmer

from badit.metrics.answers import exact_match, normalize_answer, rouge_l
from refusals import refuses

WORDS = [
    "the",
    "The",
    "cats",
    "cat",
    "running",
    "runs,",
    "relational",
    "on-off",
    "a",
    "12.",
    "?",
    "中文",
    "İ",
]
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join)
REFERENCES = st.lists(SENTENCES, min_size=1, max_size=3)


def naive_tokens(text):
    return [
        PorterStemmer().stem(word) if len(word) > 3 else word
        for word in re.findall("[a-z0-9]+", text.lower())
    ]


def naive_lcs(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + naive_lcs(a[1:], b[1:])
    return max(naive_lcs(a[1:], b), naive_lcs(a, b[1:]))


def naive_rouge_l(prediction, reference):
    answer, target = naive_tokens(prediction), naive_tokens(reference)
    common = naive_lcs(answer, target)
    if not common:
        return 0.0
    precision, recall = common / len(answer), common / len(target)
    return 100 * 2 * precision * recall / (precision + recall)


@given(SENTENCES, REFERENCES, SENTENCES)
def test_rouge_l_matches_the_formula_and_references_never_lower_scores(
    prediction, references, another
):
    expected = max(naive_rouge_l(prediction, reference) for reference in references)
    assert rouge_l(prediction, references) == pytest.approx(expected)
    for metric in (rouge_l, exact_match):
        assert (
            0 <= metric(prediction, references) <= metric(prediction, [*references, another]) <= 100
        )


@given(st.text(max_size=20))
def test_text_scored_against_itself_and_idempotent_normalization(text):
    assert rouge_l(text, [text]) == (100.0 if naive_tokens(text) else 0.0)
    normal = normalize_answer(text)
    assert normalize_answer(normal) == normalize_answer(f" \n{text}...!") == normal


def test_known_scores_and_invalid_references():
    for prediction, references, rouge, exact in (
        ("Yes.", ["no", "yes"], 100.0, 100.0),
        ("the cat", ["cat"], 200 / 3, 0.0),  # precision 1/2, recall 1; articles are kept
        ("?!", ["?!"], 0.0, 100.0),
        ("中文", ["中文"], 0.0, 100.0),
        ("  The  U.S.A,\tan «Idea» ", ["the usa an «idea»"], 60.0, 100.0),
    ):
        assert (rouge_l(prediction, references), exact_match(prediction, references)) == (
            pytest.approx(rouge),
            exact,
        )
    for wrong in ([], (), "yes"):
        for metric in (rouge_l, exact_match):
            refuses("references", metric, "yes", wrong)

"""What each probe makes of the model's answers; the answers are made up."""

import json
import math

import numpy as np
import pytest

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import AnswerItem, BoundaryItem, ChoiceItem
from cpt_mega.gates.probes.answers import Answers
from cpt_mega.gates.probes.boundaries import Boundaries
from cpt_mega.gates.probes.choice import Choice
from cpt_mega.gates.probes.drift import Divergence, Drift, divergence
from cpt_mega.gates.probes.lists import TASKS, list_items
from cpt_mega.gates.probes.perplexity import Perplexity, ScoredDocument
from cpt_mega.gates.requests import Likeliest, Likelihood
from tests.helpers.corpora import write_bpe_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


def answered(*logprobs: float, greedy: bool = False) -> list[Likelihood]:
    return [Likelihood(logprob, greedy, 1) for logprob in logprobs]


def text(encoder: Encoder, request, part=slice(None)) -> str:
    return encoder.tokenizer.decode(request.tokens[part].tolist())


ITEM = ChoiceItem("a", "Which one?", ("red", "a very long colour"), 0)


def test_a_choice_is_right_when_its_log_probability_is_the_largest_and_normalised_a_byte(encoder):
    (found,) = Choice("p", "general", [ITEM], encoder).items(answered(-3.0, -4.0))
    assert found.values["acc"] == 1.0 and found.values["acc_norm"] == 0.0  # 4 / 18 bytes is less than 3 / 3
    assert found.score == found.values["acc"]
    shares = [math.exp(-3) / (math.exp(-3) + math.exp(-4)), math.exp(-4) / (math.exp(-3) + math.exp(-4))]
    assert found.values["brier"] == pytest.approx((1 - shares[0]) ** 2 + shares[1] ** 2)
    assert found.values["share"] == pytest.approx(shares[0])
    (normalised,) = Choice("p", "general", [ITEM], encoder, metric="acc_norm").items(answered(-3.0, -4.0))
    assert normalised.score == 0.0


def test_of_equal_choices_the_first_is_taken_and_a_lost_model_has_no_score(encoder):
    probe = Choice("p", "general", [ITEM], encoder)
    assert probe.items(answered(-3.0, -3.0))[0].values["chosen"] == 0.0
    assert probe.items(answered(math.nan, -3.0))[0].values["chosen"] == 1.0
    for lost in (math.nan, -math.inf):
        items = probe.items(answered(lost, lost))
        assert math.isnan(items[0].score) and math.isnan(items[0].values["brier"])
        assert math.isnan(probe.readings([*items, *probe.items(answered(-3.0, -4.0))])[0].value)


@pytest.mark.parametrize(
    ("style", "before", "scored"),
    [
        ("cloze", "Question: Which one?\nAnswer:", " a very long colour"),
        ("letters", "Question: Which one?\nA. red\nB. a very long colour\nAnswer:", " B"),
        ("continuation", "Which one?", " a very long colour"),
    ],
)
def test_what_is_shown_and_what_is_scored_in_each_style(encoder, style, before, scored):
    _, request = Choice("p", "general", [ITEM], encoder, style).requests
    assert text(encoder, request, slice(0, request.first)) == before
    assert text(encoder, request, slice(request.first, None)) == scored


def test_examples_are_shown_with_their_answers(encoder):
    shown = [ChoiceItem("s", "Colour of snow?", ("black", "white"), 1)]
    request, _ = Choice("p", "general", [ITEM], encoder, shown=shown).requests
    assert text(encoder, request).startswith("Question: Colour of snow?\nAnswer: white\n\nQuestion: Which one?\n")
    (asked,) = Answers(
        "p", "general", [AnswerItem("a", "Who?", "me")], encoder, [AnswerItem("b", "You?", "no")]
    ).requests
    assert text(encoder, asked) == "Question: You?\nAnswer: no\n\nQuestion: Who?\nAnswer: me"


def test_answers_are_measured_in_bits_a_byte(encoder):
    probe = Answers("p", "general", [AnswerItem("a", "Who?", "m\u00fc")], encoder)
    (found,) = probe.items(answered(-4 * math.log(2), greedy=True))
    assert found.values == {"bits_per_byte": pytest.approx(1.0), "exact": 1.0} and found.score == pytest.approx(-1.0)
    assert [(r.metric, r.n) for r in probe.readings([found])] == [("bits_per_byte", 1), ("exact", 1)]


def test_lists_are_the_same_for_one_seed_and_their_answers_right():
    items = list_items(400, 4, 5, seed=1)
    assert items == list_items(400, 4, 5, seed=1) != list_items(400, 4, 5, seed=2)
    assert len({item.id for item in items}) == 400
    for item in items:
        task, asked = item.id.split("-")[0], item.question.splitlines()[-1].removesuffix(" ->")
        numbers = [int(number) for number in asked.split(", ")]
        right = {
            "minimum": min,
            "maximum": max,
            "median": lambda x: sorted(x)[len(x) // 2],
            "parity": lambda x: sum(x) % 2,
        }
        assert item.choices[item.answer] == str(right[task](numbers))
        assert item.question.count("\n") == 4 and item.choices.count(item.choices[item.answer]) == 1
    assert {item.id.split("-")[0] for item in items} == TASKS.keys()
    places = [item.answer for item in items]
    assert all(places.count(place) > 20 for place in range(3))  # no place is always right


def test_a_document_before_another_is_put_there_as_a_document_and_as_its_start(encoder):
    item = BoundaryItem("a", "The code is 4711.", "Nobody said the code but it is", "4711")
    probe = Boundaries("p", "general", [item], encoder)
    alone, apart, together = probe.requests
    assert text(encoder, alone) == "Nobody said the code but it is 4711" and alone.lengths == ()
    assert apart.lengths == (len(apart.tokens) - len(alone.tokens), len(alone.tokens)) and together.lengths == ()
    assert np.array_equal(apart.tokens, together.tokens) and apart.first == together.first
    assert np.array_equal(apart.tokens[apart.first :], alone.tokens[alone.first :])
    assert text(encoder, apart, slice(0, apart.lengths[0])) == "The code is 4711.<|eos|>"
    (found,) = probe.items([Likelihood(-10.0, False, 4), Likelihood(-10.2, False, 4), Likelihood(-2.0, True, 4)])
    assert found.values["leaked"] == pytest.approx(-0.05) and found.values["gain"] == pytest.approx(2.0)
    assert found.score == pytest.approx(-0.05)
    assert probe.readings([found])[0].value == pytest.approx(0.05)
    (lost,) = probe.items([Likelihood(-10.0, False, 4), Likelihood(math.nan, False, 4), Likelihood(-2.0, True, 4)])
    assert math.isnan(probe.readings([found, lost])[0].value)


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 13, 14, 57])
@pytest.mark.parametrize("window", [1, 2, 8, 9])
def test_every_token_of_a_document_is_scored_once_with_half_a_window_before_it(length, window):
    tokens, counts = np.arange(length), np.arange(length) % 3 != 1
    for counted in (None, counts):
        probe = Perplexity("p", "general", [ScoredDocument("a", tokens, counted)], window)
        scored = []
        for number, request in enumerate(probe.requests):
            assert request.inputs <= window
            assert number == 0 or request.first > window // 2 or window == 1
            chosen = np.ones(len(request.tokens), bool) if request.counts is None else request.counts
            scored += request.tokens[request.first :][chosen[request.first :]].tolist()
        assert scored == [place for place in range(1, length) if counted is None or counted[place]]


def test_perplexity_is_over_all_targets_and_bits_over_all_bytes():
    documents = [ScoredDocument("a", np.arange(3), size=4), ScoredDocument("b", np.arange(2), size=6)]
    probe = Perplexity("p", "general", documents, 8)
    items = probe.items([Likelihood(-3.0, False, 2), Likelihood(-6.0, False, 1)])
    assert [item.score for item in items] == [-1.5, -6.0]
    perplexity, bits = probe.readings(items)
    assert perplexity.value == pytest.approx(math.exp(3.0)) and perplexity.n == 3
    assert bits.metric == "bits_per_byte" and bits.value == pytest.approx(9 / math.log(2) / 10)


def test_an_identity_names_all_that_a_score_depends_on(encoder):
    def names(**changes):
        words = {"items": [ITEM], "encoder": encoder, **changes}
        return json.dumps(Choice("p", "general", **words).identity())

    other = [ChoiceItem("a", "Which one?", ("red", "a very long colour"), 1)]
    assert len({names(), names(items=other), names(style="letters"), names(metric="acc_norm"), names(shown=other)}) == 5


def test_encoding_begins_where_the_text_alone_ends(tokenizer, tmp_path):
    plain = Encoder(tokenizer)
    (request,) = plain.continued([("for line in open", "(path)")])
    assert text(plain, request, slice(request.first, None)) == "(path)"
    (empty,) = plain.continued([("", "for")])
    assert empty.first == 1 and empty.tokens[0] == tokenizer.bos_id
    opening = Encoder(TextTokenizer.load(write_bpe_tokenizer(tmp_path / "bos", adds_bos=True)))
    (request,) = opening.continued([("for", " line")])
    assert (
        request.tokens[0] == opening.tokenizer.bos_id and text(opening, request, slice(request.first, None)) == " line"
    )
    with pytest.raises(InputError, match="no token"):
        plain.continued([("for", "")])
    (merged,) = plain.continued([("lin", "e")])  # one token of both: all of it is scored
    assert text(plain, merged, slice(merged.first, None)).endswith("e") and merged.first >= 1


def test_bounds_of_a_divergence_hold_for_any_distributions_and_any_cut():
    draw = np.random.default_rng(2)
    for count in (1, 3, 20, 50):
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in draw.normal(0, 2, (2, 200, 50)))
        exact = (p * np.log(p / q)).sum(1)
        ids = np.argsort(-p, axis=1)[:, :count]
        kept = Likeliest(ids, np.log(np.take_along_axis(p, ids, 1)))
        found = divergence(kept, np.log(np.take_along_axis(q, ids, 1)), np.log(q.min(1)))
        assert (found.low <= exact + 1e-9).all() and (exact <= found.high + 1e-9).all()
        assert np.allclose(found.rest, 1 - np.take_along_axis(p, ids, 1).sum(1))
        if count == 50:
            assert np.allclose(found.low, exact) and np.allclose(found.high, exact)


def test_drift_is_a_mean_over_the_targets_of_each_text():
    probe = Drift("p", "behaviour", [("a", np.arange(3)), ("b", np.arange(2))], 4)
    values = np.array([1.0, 3.0, 5.0])
    items = probe.items(Divergence(values, 2 * values, values / 10))
    assert [item.score for item in items] == [-2.0, -5.0] and items[0].values["kl_at_most"] == 4.0
    assert [(r.metric, r.value) for r in probe.readings(items)][0] == ("kl", 3.5)

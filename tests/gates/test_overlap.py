"""Items of evaluations in corpora: what is found is what a plain search finds, wherever it stands."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_mega.data.indexed import IndexedCorpus, shards_path
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.gates import overlap
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import AnswerItem, ChoiceItem
from cpt_mega.gates.overlap import Overlap, Span, find_items, spans_of
from cpt_mega.gates.probes.answers import Answers
from cpt_mega.gates.probes.choice import Choice
from cpt_mega.gates.probes.probe import Content
from cpt_mega.gates.suite import open_suite
from tests.helpers.corpora import counting_corpus, write_bpe_tokenizer, write_corpus
from tests.helpers.suites import write_suite

SPAN, CHUNK = 256, 64


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Borders come often."""
    monkeypatch.setattr(overlap, "CHUNK_TOKENS", CHUNK)


def _item(tokens, name="item", *more) -> Content:
    return Content(name, tuple(np.array(list(form), np.int64) for form in (tokens, *more)))


def _find(items, corpus, **options) -> Overlap:
    spans = spans_of(corpus, span_tokens=SPAN)
    return find_items({"probe": items}, corpus, spans, **{"threads": 1, **options})["probe"]


@pytest.mark.parametrize("length", [6, 7, 12, 13, 30])
def test_an_item_is_found_wherever_it_stands(tmp_path, length):
    """At every place of a span, across borders of chunks and spans, and to the very end of the corpus."""
    corpus = counting_corpus(tmp_path / "c", [600])
    items = [_item(range(place, place + length), str(place)) for place in range(600 - length + 1)]
    assert _find(items, corpus) == Overlap(len(items), 0, tuple(item.id for item in items))
    outside = [_item(range(place, place + length), str(place)) for place in range(600 - length + 1, 602)]
    found = _find(outside, corpus).found  # the start of a long one is still there
    assert found == tuple(item.id for item in outside if _share(item.forms[0].tolist(), [list(range(600))]) >= 0.5)
    assert bool(found) == (length == 30)


def test_an_item_in_two_documents_is_in_none(tmp_path):
    lengths = [40, 0, 5, 100, 20]
    corpus = counting_corpus(tmp_path / "c", lengths)
    edges = np.cumsum(lengths)
    for length in (6, 13):
        items = [_item(range(place, place + length), str(place)) for place in range(165 - length + 1)]
        within = [
            place for place in range(165 - length + 1) if not any(place < edge < place + length for edge in edges)
        ]
        assert _find(items, corpus).found == tuple(map(str, within))


def test_an_item_is_found_behind_a_place_where_it_crosses(tmp_path):
    item = list(range(7))
    corpus = write_corpus(tmp_path / "c", [item[:3], item[3:], [9, *item, 9]])
    assert _find([_item(item)], corpus).found == ("item",)
    assert _find([_item(item)], write_corpus(tmp_path / "d", [item[:3], item[3:]])).found == ()


@pytest.mark.parametrize(("dtype", "vocabulary"), [(np.uint16, 60_000), (np.int32, 200_000), (np.uint16, 4)])
def test_hashes_decide_nothing_about_what_is_found(tmp_path, monkeypatch, dtype, vocabulary):
    """Also where the filters let everything pass and nearly all n-grams are alike."""
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, vocabulary, draw.integers(0, 90)).tolist() for _ in range(40)]
    corpus = write_corpus(tmp_path / "c", documents, dtype)
    items = [_item(_mixed(draw, documents, vocabulary), str(number)) for number in range(120)]
    expected = tuple(item.id for item in items if _share(item.forms[0].tolist(), documents) >= 0.5)
    assert 10 < len(expected) < 110
    assert _find(items, corpus).found == expected
    monkeypatch.setattr(overlap, "_MOST_FILTER_BITS", 1)
    assert _find(items, corpus).found == expected


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=24), min_size=1, max_size=5), st.lists(st.integers(0, 2), min_size=6)
)
def test_few_tokens_and_many_repetitions(tmp_path_factory, documents, item):
    corpus = write_corpus(tmp_path_factory.mktemp("c") / "c", [*documents, [1]])
    assert bool(_find([_item(item)], corpus).found) == (_share(item, documents) >= 0.5)


def test_n_grams_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    """The first base that is drawn makes two of them equal: sums of t B^k with B = 1 do not know the order."""
    bases = iter([1, 0x9E3779B97F4A7C15])
    made = overlap._Powers
    monkeypatch.setattr(overlap, "_Powers", lambda base, most: made(next(bases), most))
    corpus = counting_corpus(tmp_path / "c", [100])
    forward, backward = range(10, 17), [16, 15, 14, 13, 12, 11, 10]
    assert _find([_item(forward, "there"), _item(backward, "not")], corpus).found == ("there",)


def test_threads_find_what_one_finds(tmp_path):
    draw = np.random.default_rng(2)
    documents = [draw.integers(0, 50_000, draw.integers(1, 400)).tolist() for _ in range(80)]
    corpus = write_corpus(tmp_path / "c", documents, np.uint16)
    items = [_item(_mixed(draw, documents, 50_000), str(number)) for number in range(200)]
    looked = []
    one = _find(items, corpus)
    assert one == _find(items, corpus, threads=4, advance=looked.append) and 20 < len(one.found) < 180
    assert sum(looked) == corpus.tokens and len(looked) > 40


def test_half_of_the_n_grams_is_enough_and_less_is_not(tmp_path):
    corpus = counting_corpus(tmp_path / "c", [200])
    for known, found in ((21, False), (22, True)):  # of 18 + 2 n-grams: 9, and 10
        item = [*range(100, 100 + known), *range(900, 932 - known)]
        assert len(item) == 32 and bool(_find([_item(item)], corpus).found) == found


def test_items_too_short_are_counted_and_not_judged(tmp_path):
    corpus = counting_corpus(tmp_path / "c", [50])
    items = [_item(range(n), f"{n} tokens") for n in range(9)]
    assert _find(items, corpus) == Overlap(3, 6, ("6 tokens", "7 tokens", "8 tokens"))
    assert _find(items[:6], corpus) == Overlap(0, 6, ())


def test_any_form_of_an_item_will_do(tmp_path):
    corpus = counting_corpus(tmp_path / "c", [50])
    assert _find([_item([99, *range(1, 8)], "item", range(8))], corpus).found == ("item",)


def test_a_corpus_in_shards_and_the_probes_are_told_apart(tmp_path):
    counting_corpus(tmp_path / "a", [300])
    counting_corpus(tmp_path / "b", [300], first=300)
    shards_path(tmp_path / "both").write_text(json.dumps(["a", "b"]))
    corpus = IndexedCorpus(tmp_path / "both")
    items = {"one": [_item(range(580, 600))], "two": [_item(range(290, 310)), _item(range(295, 305), "across")]}
    found = find_items(items, corpus, spans_of(corpus, span_tokens=SPAN))
    assert found == {"one": Overlap(1, 0, ("item",)), "two": Overlap(2, 0, ())}


def test_of_a_large_corpus_evenly_spread_parts_are_looked_at(tmp_path):
    corpus = counting_corpus(tmp_path / "c", [10_000])
    assert sum(span.tokens for span in spans_of(corpus, 10_000, 100)) == 10_000
    spans = spans_of(corpus, 2_000, 100)
    assert spans == [Span(0, first, first + 100) for first in range(0, 10_000, 500)]
    assert spans_of(corpus, 10, 100) == [Span(0, 0, 100)]
    items = [_item(range(place, place + 13), str(place)) for place in (0, 499, 599, 600, 9_500, 9_599, 9_987)]
    assert find_items({"p": items}, corpus, spans)["p"].found == ("0", "599", "9500", "9599")


def test_who_is_told_how_far_it_is_may_end_it(tmp_path):
    corpus, told = counting_corpus(tmp_path / "c", [5_000]), []

    def advance(tokens: int) -> None:
        told.append(tokens)
        if len(told) == 2:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        _find([_item(range(20))], corpus, advance=advance)
    assert told == [SPAN, SPAN]


def test_the_content_of_items_is_not_their_prompt(tmp_path):
    """Not what is shown before, nor the words around a question, nor the wrong choices; and it is found within a document."""
    tokenizer = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "tokenizer"))
    encoder = Encoder(tokenizer)
    asked = [
        ChoiceItem(f"c{n}", f"over which dog does it jump {n} times?", ("a lazy fox", "a quick fox"), 1)
        for n in range(4)
    ]
    told = [AnswerItem(f"a{n}", f"over which line is {n}?", f"the path {n}") for n in range(4)]
    for style in ("cloze", "letters", "continuation", "reply"):
        choice = Choice("choice", "domain", asked[2:], encoder, style, shown=asked[:2])
        assert _texts(tokenizer, choice) == [f"over which dog does it jump {n} times? a quick fox" for n in (2, 3)]
    answers = Answers("answers", "domain", told[2:], encoder, told[:2])
    assert _texts(tokenizer, answers) == [f"over which line is {n}? the path {n}" for n in (2, 3)]
    page = "Notes.\nover which line is 2? the path 2\nAnd: over which line is 3? the path 3"
    shown = "Question: over which line is 0?\nAnswer: the path 0\n\nQuestion: What\nAnswer:"
    for text, found in ((page, ("a2", "a3")), (shown, ())):
        corpus = write_corpus(tmp_path / str(len(found)), encoder.documents([text]))
        assert find_items({"p": answers.contents()}, corpus)["p"].found == found


def test_every_kind_of_probe_says_what_is_judged(tmp_path):
    tokenizer = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "tokenizer"))
    suite = open_suite(write_suite(tmp_path), tokenizer, tokenizer.vocab_size, 512)
    contents = {probe.name: probe.contents() for probe in suite.probes}
    assert {name for name, own in contents.items() if own is None} == {"lists", "pairs", "drift"}
    assert {name: [item.id for item in own] for name, own in contents.items() if own is not None} == {
        "choices": [f"c{n}" for n in range(2, 9)],
        "letters": [f"c{n}" for n in range(9)],
        "answers": [f"a{n}" for n in range(5)],
        "texts": [f"t{n}" for n in range(4)],
    }


def _texts(tokenizer, probe) -> list[str]:
    """Of the first forms; all forms are the same text."""
    for content in probe.contents():
        assert len({tokenizer.decode(form.tolist()).strip() for form in content.forms}) == 1 < len(content.forms)
    return [tokenizer.decode(content.forms[0].tolist()) for content in probe.contents()]


def _mixed(draw, documents, vocabulary) -> list[int]:
    """A part of a document and, more or less, something else."""
    document = documents[draw.integers(len(documents))]
    start = int(draw.integers(0, max(1, len(document) - 5)))
    part = document[start : start + int(draw.integers(3, 40))]
    other = draw.integers(0, vocabulary, draw.integers(0, 25) if draw.random() < 0.6 else 0).tolist()
    return ([*part, *other] if draw.random() < 0.5 else [*other, *part]) + [int(x) for x in draw.integers(0, 2, 6)]


def _share(item, documents) -> float:
    """Of the n-grams that stand in some document, by a plain search."""
    length = min(13, len(item))
    grams = [tuple(item[place : place + length]) for place in range(len(item) - length + 1)]
    there = {tuple(d[place : place + length]) for d in documents for place in range(len(d) - length + 1)}
    return sum(gram in there for gram in grams) / len(grams)

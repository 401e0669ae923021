import json
import unicodedata

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from cpt_mega.data import routes
from cpt_mega.data.new_letters import LAST_LETTERS, is_new
from cpt_mega.data.routes import (
    NASTY,
    REFERENCE,
    GuardedRoute,
    ReferenceRoute,
    TiktokenRoute,
    _byte_letters,
    choose_route,
    first_difference,
    open_route,
)
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.data.word_patterns import parts
from cpt_mega.errors import InputError
from tests.helpers.corpora import TEXTS
from tools.bench.tokenizer_kinds import ADDED, KINDS, SPECIALS, train_kind

EXPECTED = dict.fromkeys(KINDS, "gigatoken") | {"Unigram": REFERENCE, "SentencePiece Unigram (.model)": REFERENCE}
VOCAB = {"Llama 2, Mistral 7B": 700, "Gemma": 700, "Unigram": 300}
BYTE_LEVEL = ["GPT-2", "Llama 3", "Qwen 2.5, 3", "Mistral (Tekken)"]


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    """``kind(name)``: a tokenizer of that kind, trained on a few texts."""

    def make(name: str) -> TextTokenizer:
        folder = tmp_path_factory.mktemp("kind")
        return TextTokenizer.load(train_kind(name, TEXTS * 20, VOCAB.get(name, 500), folder))

    return make


@pytest.mark.parametrize("name", KINDS)
def test_the_route_taken_gives_the_tokenizers_ids(kind, name):
    tokenizer = kind(name)
    chosen = choose_route(tokenizer, "auto", TEXTS)
    assert chosen.name == EXPECTED[name]
    assert (chosen.name == REFERENCE) == bool(chosen.passed_over)
    assert first_difference(chosen.route, ReferenceRoute(tokenizer), [*TEXTS, *NASTY]) is None


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_tiktoken_is_exact_for_byte_level_bpe(kind, name):
    tokenizer = kind(name)
    route = choose_route(tokenizer, "tiktoken", TEXTS).route
    assert isinstance(route.route, TiktokenRoute)
    specials = {tokenizer.encoder.tokenizer.token_to_id(token) for token in SPECIALS}
    tokens, _ = route.encode(["a <|endoftext|> b <tool> c"])
    assert not specials & set(tokens.tolist())
    assert tokenizer.encoder.tokenizer.token_to_id(ADDED) in tokens  # an added token that is not special is found


@pytest.mark.parametrize("name", ["Llama 2, Mistral 7B", "Unigram", "SentencePiece BPE (.model)"])
def test_tiktoken_takes_no_other_kind(kind, name):
    with pytest.raises(InputError, match="--encoder = 'tiktoken': takes byte-level BPE alone"):
        choose_route(kind(name), "tiktoken", [])


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}},
    ],
    ids=["lower case", "a blank in front", "no pattern"],
)
def test_tiktoken_refuses_what_it_cannot_do(kind, change):
    path = kind("GPT-2").path
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="takes byte-level BPE alone"):
        open_route(TextTokenizer.load(path), "tiktoken")


def test_the_next_exact_route_is_taken(kind, monkeypatch):
    monkeypatch.setitem(routes.ROUTES, "gigatoken", Liar)
    chosen = choose_route(kind("Llama 3"), "auto", TEXTS)
    assert chosen.name == "tiktoken" and len(chosen.passed_over) == 1


AS_LLAMA2 = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [("bpe", AS_LLAMA2, "gigatoken"), ("bpe", {}, REFERENCE), ("unigram", AS_LLAMA2, REFERENCE)],
    ids=["as Llama 2", "under NFKC", "unigram"],
)
def test_sentencepiece_models(tmp_path, model, options, expected):
    """Control pieces that are spelt out in a text are text, by every route."""
    (tmp_path / "text").write_text("\n".join(TEXTS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=400,
        model_type=model,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    tokenizer = TextTokenizer.load(tmp_path)
    chosen = choose_route(tokenizer, "auto", [*TEXTS, "a </s> b <s>"])
    assert chosen.name == expected
    assert not {tokenizer.eos_id, tokenizer.bos_id} & set(chosen.route.encode(["a </s> b <s>"])[0].tolist())


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "Llama 2, Mistral 7B", "Gemma"])
def test_special_tokens_in_a_text_are_text(kind, name):
    tokenizer = kind(name)
    route = choose_route(tokenizer, "auto", TEXTS).route
    specials = {tokenizer.encoder.tokenizer.token_to_id(token) for token in SPECIALS}
    ids = route.encode(["a <|endoftext|> <|im_start|> b"])[0].tolist()
    assert None not in specials and not specials & set(ids)


@pytest.mark.parametrize("flag", ["single_word", "lstrip", "rstrip"])
def test_added_tokens_that_only_the_reference_finds(kind, flag):
    tokenizer = with_spec(kind("Llama 3"), lambda spec: spec["added_tokens"][-1].update({flag: True}))
    chosen = choose_route(tokenizer, "auto", TEXTS)
    assert chosen.name == REFERENCE
    assert [f"does not know {flag} of the added token '{ADDED}'" in words for words in chosen.passed_over] == [
        True,
        True,
    ]


@pytest.mark.parametrize("route", ["gigatoken", "tiktoken"])
def test_normalisation_is_by_the_tokenizers_own_tables(kind, route):
    tokenizer = kind("Qwen 2.5, 3")
    marks = [chr(point) for point in range(0x300, 0x2000) if unicodedata.combining(chr(point))]
    texts = [f"a{one}{other}e\u0301" for one in marks for other in "\u0323\u0301\u093c"]
    assert first_difference(open_route(tokenizer, route), ReferenceRoute(tokenizer), texts) is None


@pytest.mark.parametrize("change", ["a word without merges", "merges in another order"])
def test_tiktoken_takes_only_what_merges_can_reach(kind, change):
    def edit(spec):
        model = spec["model"]
        if change == "a word without merges":
            model["vocab"]["quick!fox"] = len(model["vocab"]) + 1
        else:
            model["merges"] = model["merges"][::-1]

    with pytest.raises(InputError, match="in the order of their merges alone"):
        open_route(with_spec(kind("GPT-2"), edit), "tiktoken")


def test_tiktoken_refuses_added_tokens_that_begin_alike(kind):
    tokenizer = kind("GPT-2")
    longer = {"id": 900, "content": ADDED + "s", "special": False}
    with pytest.raises(InputError, match="begin alike"):
        open_route(
            with_spec(tokenizer, lambda spec: spec["added_tokens"].append(spec["added_tokens"][-1] | longer)),
            "tiktoken",
        )


@pytest.mark.parametrize("route", ["gigatoken", "tiktoken", REFERENCE])
def test_an_eos_that_the_file_does_not_call_special_is_text_where_it_is_spelt(kind, route):
    tokenizer = with_spec(kind("Llama 3"), lambda spec: [token.update(special=False) for token in spec["added_tokens"]])
    assert tokenizer.eos_id not in open_route(tokenizer, route).encode([f"one{SPECIALS[0]}two"])[0]


def with_spec(tokenizer, edit):
    """The tokenizer with an edited ``tokenizer.json``."""
    spec = json.loads(tokenizer.path.read_text())
    edit(spec)
    tokenizer.path.write_text(json.dumps(spec))
    return TextTokenizer.load(tokenizer.path)


NEW = "\U00016ec2"  # a letter since Unicode 17, which few libraries know


def test_texts_with_letters_that_libraries_class_differently_go_by_the_reference(kind, monkeypatch):
    tokenizer = kind("Llama 3")
    texts = ["plain", f"a {NEW}b", "naïve 🙂 𝐀", NEW, "", "\u088f"]
    route, seen = choose_route(tokenizer, "gigatoken", TEXTS).route, []
    fast = route.route.encode
    monkeypatch.setattr(route.route, "encode", lambda part: (seen.extend(part), fast(part))[1])
    assert first_difference(route, ReferenceRoute(tokenizer), texts) is None
    assert NEW not in "".join(seen) and {"plain", "naïve 🙂 𝐀", ""} <= set(seen)
    assert first_difference(route, ReferenceRoute(tokenizer), [NEW, NEW]) is None
    assert first_difference(route, ReferenceRoute(tokenizer), [f"{NEW} x", "y"]) is None


@pytest.mark.parametrize("name", BYTE_LEVEL)
@pytest.mark.parametrize("route", ["gigatoken", "tiktoken"])
def test_every_other_character_is_classed_as_the_reference_does(kind, name, route):
    """Each character before a letter, a digit and a sign, under a vocabulary that joins its last byte to any of them that
    stands in the same word: so the ids show where words are cut."""
    tokenizer = joining(kind(name))
    points = (point for point in range(0x80, LAST_LETTERS) if not 0xD800 <= point < 0xE000)
    letters = [letter for letter in map(chr, points) if not is_new(letter)]
    lines = ["".join(f"{letter}{follower} " for follower in "A1!") for letter in letters]
    texts = ["".join(lines[start : start + 50]) for start in range(0, len(lines), 50)]
    assert first_difference(open_route(tokenizer, route), ReferenceRoute(tokenizer), texts) is None


@pytest.mark.parametrize("name", KINDS)
def test_only_kinds_with_a_known_pattern_are_cut_before_blanks(kind, name):
    tokenizer = kind(name)
    for route in ("gigatoken", "tiktoken") if name in BYTE_LEVEL else ("gigatoken",):
        if EXPECTED[name] != REFERENCE:
            assert open_route(tokenizer, route).cuts_before_blanks == (name in BYTE_LEVEL)


@pytest.mark.parametrize("token", ["x\n", "\nx", "x y", " x"])
def test_an_added_token_with_a_blank_in_it_is_not_cut(kind, token):
    tokenizer = kind("Llama 3")
    spec = json.loads(tokenizer.path.read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"content": token, "id": 499})
    tokenizer.path.write_text(json.dumps(spec))
    route = open_route(TextTokenizer.load(tokenizer.path), "gigatoken")
    assert route.cuts_before_blanks == (token in ("\nx", " x"))


@pytest.fixture(scope="module")
def byte_level(kind):
    """Tokenizers that join any two letters of one word, line ends and blanks too: the ids show where words are cut."""
    letters = [_byte_letters()[ord(letter)] for letter in "abZ \n\r\t1's.!/"]
    merges = [[one, other] for one in letters for other in letters]
    return {name: with_merges(kind(name), merges) for name in BYTE_LEVEL}


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(text=st.text(st.sampled_from([*"abZ \n\r\t1's.!/é", "\u0301", "\u0378", "\U00016ec2", "北", "🙂"]), max_size=40))
def test_a_text_has_the_ids_of_its_parts(byte_level, name, text):
    reference = ReferenceRoute(byte_level[name])
    assert reference.encode([text])[0].tolist() == reference.encode(parts(text))[0].tolist()
    assert "".join(parts(text)) == text


def test_words_that_go_over_a_cut_would_show(byte_level):
    """Cut behind a sign, where no part ends, the ids are others."""
    reference = ReferenceRoute(byte_level["Llama 3"])
    assert reference.encode(["a.\nb"])[0].tolist() != reference.encode(["a.", "\nb"])[0].tolist()


@pytest.mark.parametrize("name", ["Llama 3", "Llama 2, Mistral 7B"])
def test_of_a_long_text_only_the_words_with_new_letters_go_by_the_reference(kind, name):
    tokenizer = kind(name)
    reference, asked = ReferenceRoute(tokenizer), []

    class Watched(ReferenceRoute):
        def encode(self, texts):
            asked.extend(texts)
            return super().encode(texts)

    route = GuardedRoute(open_route(tokenizer, "gigatoken"), Watched(tokenizer))
    long = "a word\n" * 500 + "x \U00016ec2 y\n" + "more of it\n" * 500
    texts = ["plain", long, "", "\u0378", "the end"]
    ids, lengths = route.encode(texts)
    expected, their_lengths = reference.encode(texts)
    assert ids.tolist() == expected.tolist() and lengths.tolist() == their_lengths.tolist()
    assert asked == ([" \U00016ec2 y", "\u0378"] if name == "Llama 3" else [long, "\u0378"])


def joining(tokenizer: TextTokenizer) -> TextTokenizer:
    """The tokenizer with another vocabulary: bytes, and any byte of a longer letter with what may follow it."""
    last = [letter for letter, byte in zip(_byte_letters(), range(256), strict=True) if 0x80 <= byte < 0xC0]
    return with_merges(tokenizer, [[byte, follower] for byte in last for follower in "A1!"])


def with_merges(tokenizer: TextTokenizer, merges: list[list[str]]) -> TextTokenizer:
    """The tokenizer with bytes and these merges alone."""
    spec = json.loads(tokenizer.path.read_text())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*(token["content"] for token in spec["added_tokens"]), *alphabet, *("".join(merge) for merge in merges)]
    spec["model"] |= {"vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": merges}
    for token in spec["added_tokens"]:
        token["id"] = pieces.index(token["content"])
    tokenizer.path.write_text(json.dumps(spec))
    return TextTokenizer.load(tokenizer.path)


class Liar(ReferenceRoute):
    def encode(self, texts):
        tokens, lengths = super().encode(texts)
        return np.where(tokens == tokens.max(initial=0), 0, tokens), lengths


def test_an_encoder_that_gives_other_ids_is_passed_over(kind, monkeypatch):
    monkeypatch.setitem(routes.ROUTES, "gigatoken", Liar)
    tokenizer = kind("GPT-2")
    monkeypatch.setitem(routes.ROUTES, "tiktoken", Liar)
    chosen = choose_route(tokenizer, "auto", TEXTS)
    assert chosen.name == REFERENCE and [words[:17] for words in chosen.passed_over] == [
        "gigatoken: gives ",
        "tiktoken: gives [",
    ]
    with pytest.raises(InputError, match="--encoder = 'gigatoken': gives"):
        choose_route(tokenizer, "gigatoken", TEXTS)


def test_a_library_that_is_not_there_is_passed_over(kind, monkeypatch):
    monkeypatch.setattr(routes.importlib.util, "find_spec", lambda name: None)
    chosen = choose_route(kind("GPT-2"), "auto", [])
    assert chosen.name == REFERENCE
    assert ["pip install" in words for words in chosen.passed_over] == [True, True]


def test_a_cache_that_starts_anew_changes_nothing(kind, monkeypatch):
    monkeypatch.setattr(routes, "CACHE_TEXT_BYTES", 10)
    tokenizer = kind("Llama 3")
    route = open_route(tokenizer, "gigatoken")
    for _ in range(3):
        assert first_difference(route, ReferenceRoute(tokenizer), TEXTS) is None
    tokens, lengths = route.encode([])
    assert tokens.size == lengths.size == 0


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("edge", [False, True], ids=["plain", "ids at the edges"])
def test_documents_are_stored_at_once_as_one_by_one(tokenizer_folder, bos, edge):
    tokenizer, draw = TextTokenizer.load(tokenizer_folder), np.random.default_rng(1)
    texts = [draw.integers(0 if edge else 2, 6, length).tolist() for length in (3, 0, 1, 5, 0, 2, 1)]
    flat, lengths = np.array(sum(texts, [])), np.array([len(text) for text in texts])
    tokens, stored, kept = tokenizer.stored_documents(flat, lengths, bos)
    expected = [tokenizer.document_ids(text, bos) for text in texts]
    assert kept.tolist() == [index for index, ids in enumerate(expected) if ids]
    assert [part.tolist() for part in np.split(tokens, np.cumsum(stored)[:-1])] == [ids for ids in expected if ids]

"""Which encoder turns a corpus into ids: the fastest that gives the ids of the model's own tokenizer, proved on the way in.

A route is a way from texts to ids. ``reference`` is the tokenizer's own library and always right. ``gigatoken`` (MIT) is a
young library and much faster, ``tiktoken`` (MIT) an older one in between, for byte-level BPE alone. Either is taken for a
tokenizer only after its ids have been those of the reference on a sample of the very corpus and on ``NASTY``, and texts with
letters that libraries may class differently (``GuardedRoute``) never go by it. A new route is a class with ``encode`` and
a line in ``ROUTES``.
"""

import gc
import importlib.util
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import orjson

from cpt_mega.data import word_patterns
from cpt_mega.data.new_letters import texts_with_new_letters
from cpt_mega.data.tokenizer import HF_FILE, TextTokenizer
from cpt_mega.errors import InputError

AUTO, REFERENCE = "auto", "reference"
NFC = {"type": "NFC"}
NONCHARACTER = "\ufdd0"  # stands in no text
# What encoders get wrong first: normalisation, runs of blanks and line ends, digits, joined emoji, marks without a letter,
# other scripts, private use, NUL, byte order marks, contractions, very long words, special tokens spelt out.
NASTY = (
    *("", " ", "  ", "\n", "\r\n\r\n", "\t \t", " \n \n  x", "x   ", "\u00a0\u2003\u3000x", "\u0085\u2028\u2029"),
    *(
        "a\0b",
        "\ufeffbom",
        "\u200b\u200d\u200e",
        "e\u0301 \u00e9 \u212b \u1e9b\u0323",
        "\u0301alone",
        "\ufffd\ue000\U0010ffff",
    ),
    *("I'm you'll THEY'RE it's 'S 'tIs", "0123456789 1,000.50 ١٢٣ ²³ Ⅷ", "ﬁﬂ ＡＢＣ ｱｲｳ", "naïve Straße ĳ ſ İı"),
    *("北京大学 東京 서울 กรุงเทพ हिन्दी العربية עברית", "👩‍👩‍👧‍👦👍🏽🏳️‍🌈🇩🇪", "__init__ == !== <!-- --> ///**** ======"),
    *("a" * 5000, "ab " * 2000, "\n" * 3000, " " * 3000, "🙂" * 500, "北" * 1500),
    *("<s></s><unk><pad>", "<|endoftext|><|im_start|>user<|im_end|>", "[INST] <<SYS>> [/INST]", "▁a ▁▁ Ġb Ċ <0x0A>"),
)
# A cache of words grows with the text it has seen, by 0.1 GB for each of the first 1.7 GB of source code and prose: it
# starts anew after so much, which takes half a second.
CACHE_TEXT_BYTES = 2 << 30


class Route(Protocol):
    """Texts to ids; special tokens are never added, and such strings in a text are text.

    Attributes:
        cuts_before_blanks: whether a text has the ids of its ``word_patterns.parts``, as far as is known.
    """

    cuts_before_blanks: bool

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one behind the other [sum of lengths], and lengths int64 [texts]."""


class ReferenceRoute:
    """The tokenizer's own library: ``tokenizers`` or SentencePiece."""

    cuts_before_blanks = False

    def __init__(self, tokenizer: TextTokenizer):
        self.tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Route."""
        encoded = self.tokenizer.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.fromiter(chain.from_iterable(encoded), np.int64, int(lengths.sum())), lengths


class GigatokenRoute:
    """gigatoken over ``tokenizer.json`` or a SentencePiece BPE model, without the special tokens: it would find them in texts.

    Raises InputError when the library is missing or does not take the tokenizer.
    """

    def __init__(self, tokenizer: TextTokenizer):
        if importlib.util.find_spec("gigatoken") is None:
            raise InputError("--encoder", "gigatoken", "is not installed; pip install gigatoken")
        spec = _spec(tokenizer)
        self._normalise = _Normaliser(tokenizer, spec)
        self.cuts_before_blanks = _cuts_before_blanks(spec)
        self._spec = _plain_hf(tokenizer, spec) if spec else _plain_sentencepiece(tokenizer.path)
        self._renew()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Route."""
        if self._seen > CACHE_TEXT_BYTES:
            self._renew()
        self._seen += sum(map(len, texts))
        if not texts:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        layout = self._encoder.encode_batch(self._normalise(texts), parallel=False).layout
        offsets = layout.offsets.data
        return layout.content.data[offsets[0] : offsets[-1]], np.diff(offsets)

    def _renew(self) -> None:
        import gigatoken

        try:
            kind = gigatoken.Tokenizer
            made = kind.from_json(self._spec) if isinstance(self._spec, str) else kind.from_sentencepiece(self._spec)
            self._encoder, self._seen = made, 0
        except Exception as error:  # the library raises bare ones
            raise InputError("--encoder", "gigatoken", f"does not take this tokenizer: {error}") from error


class GuardedRoute:
    """A fast route for all but letters that only newer Unicode versions know: what holds one goes by the reference.

    Patterns ask whether a character is a letter or a digit, and each library answers by the Unicode tables it was built with.
    One document in 104,269 of source code and documentation differed for that (it listed letters of Unicode 17). Where the
    tokenizer's pattern allows it, only the words with such letters go by the reference, else their whole text.
    """

    def __init__(self, route: Route, reference: Route):
        self.route, self.reference = route, reference
        self.cuts_before_blanks = route.cuts_before_blanks

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Route."""
        unsure = set(texts_with_new_letters(texts))
        if not unsure:
            return self.route.encode(texts)
        pieces = [self._pieces(text) if index in unsure else [(text, True)] for index, text in enumerate(texts)]
        found = {
            sure: iter(_each(route, [text for text, is_sure in chain.from_iterable(pieces) if is_sure == sure]))
            for sure, route in ((True, self.route), (False, self.reference))
        }
        ids = [[next(found[sure]) for _, sure in of_text] for of_text in pieces]
        lengths = [sum(map(len, of_text)) for of_text in ids]
        return np.concatenate(list(chain.from_iterable(ids))), np.array(lengths, np.int64)

    def _pieces(self, text: str) -> list[tuple[str, bool]]:
        """A text with new letters as pieces, and whether the fast route is sure of each: long ones with few new letters
        should not wait for the reference."""
        if not self.cuts_before_blanks:
            return [(text, False)]
        parts = word_patterns.parts(text)
        unsure = set(texts_with_new_letters(parts))
        runs = groupby(enumerate(parts), lambda part: part[0] not in unsure)
        return [("".join(part for _, part in run), sure) for sure, run in runs]


def _each(route: Route, texts: Sequence[str]) -> list[np.ndarray]:
    """The ids of each text."""
    ids, lengths = route.encode(texts)
    return np.split(ids, np.cumsum(lengths)[:-1]) if texts else []


class _Normaliser:
    """NFC as the tokenizer's own library does it, which is by older Unicode tables than others have; else nothing.

    A text that is normalised by Python's tables is so by older ones: what they do not know they leave where it is.
    """

    def __init__(self, tokenizer: TextTokenizer, spec: dict):
        self._own = tokenizer.encoder.tokenizer.normalizer if spec.get("normalizer") == NFC else None

    def __call__(self, texts: Sequence[str]) -> list[str]:
        if self._own is None:
            return list(texts)
        return [text if _is_nfc(text) else self._own.normalize_str(text) for text in texts]


def _is_nfc(text: str) -> bool:
    return text.isascii() or unicodedata.is_normalized("NFC", text)


def _spec(tokenizer: TextTokenizer) -> dict:
    """``tokenizer.json``; empty for a SentencePiece model. Megabytes: read once a route, and not kept."""
    if tokenizer.path.name != HF_FILE:
        return {}
    was_on = gc.isenabled()
    gc.disable()  # it would go through the merges, half a million lists, again and again: 0.1 s
    try:
        return orjson.loads(tokenizer.path.read_bytes())
    finally:
        if was_on:
            gc.enable()


def _plain_added(tokenizer: TextTokenizer, spec: dict, route: str) -> list[dict]:
    """Added tokens that are found in texts. Raises InputError for a way of finding them that only the reference knows."""
    added = [token for token in spec.get("added_tokens") or () if token["content"] not in tokenizer.specials]
    for token in added:
        flags = [flag for flag in ("single_word", "lstrip", "rstrip") if token.get(flag)]
        flags += ["normalized"] * bool(token.get("normalized") and spec.get("normalizer"))
        if flags:
            raise InputError("--encoder", route, f"does not know {flags[0]} of the added token {token['content']!r}")
    return added


def _plain_hf(tokenizer: TextTokenizer, spec: dict) -> str:
    """A ``tokenizer.json`` without special tokens, without what puts any around a text, and without NFC."""
    plain = {"added_tokens": _plain_added(tokenizer, spec, "gigatoken")}
    plain |= dict.fromkeys(("post_processor", "truncation", "padding"))
    plain |= {"normalizer": None} if spec.get("normalizer") == NFC else {}
    return orjson.dumps(spec | plain).decode()


def _plain_sentencepiece(path: Path) -> bytes:
    """A SentencePiece model whose control pieces no text can spell; their ids stay."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    for piece in model.pieces:
        if piece.type == piece.CONTROL:
            piece.piece = NONCHARACTER + piece.piece
    return model.SerializeToString()


class TiktokenRoute:
    """tiktoken over the vocabulary and the pattern of a byte-level BPE ``tokenizer.json``.

    It merges by the ids of the results, which is the order of the merges in a vocabulary that was trained in one go.
    Raises InputError when the library is missing or the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: TextTokenizer):
        if importlib.util.find_spec("tiktoken") is None:
            raise InputError("--encoder", "tiktoken", "is not installed; pip install tiktoken")
        import tiktoken

        spec = _spec(tokenizer)
        pattern = _byte_level_pattern(spec)
        if pattern is None or spec.get("normalizer") not in (None, NFC):
            raise InputError("--encoder", "tiktoken", "takes byte-level BPE alone, as it is or under NFC")
        self._normalise = _Normaliser(tokenizer, spec)
        bytes_of = {letter: bytes([byte]) for byte, letter in enumerate(_byte_letters())}
        wanted = {token["content"]: token["id"] for token in _plain_added(tokenizer, spec, "tiktoken")}
        if any(one != other and other.startswith(one) for one in wanted for other in wanted):
            raise InputError("--encoder", "tiktoken", "finds the shorter of two added tokens that begin alike")
        vocabulary = spec["model"]["vocab"]
        merged = vocabulary.keys() - {token["content"] for token in spec.get("added_tokens") or ()} - tokenizer.specials
        _check_merges(spec["model"]["merges"], vocabulary, merged)
        ranks = {b"".join(map(bytes_of.__getitem__, token)): vocabulary[token] for token in merged}
        self._added, self.cuts_before_blanks = set(wanted), _cuts_before_blanks(spec)
        self._encoder = tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks, special_tokens=wanted)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """See Route."""
        encoded = [
            self._encoder.encode_to_numpy(text, allowed_special=self._added, disallowed_special=())
            for text in self._normalise(texts)
        ]
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        return np.concatenate([np.empty(0, np.uint32), *encoded]), lengths


def _cuts_before_blanks(spec: dict) -> bool:
    added = [token["content"] for token in spec.get("added_tokens") or ()]
    plain = spec.get("normalizer") in (None, NFC)
    return plain and word_patterns.cuts_before_blanks(_byte_level_pattern(spec), added)


def _check_merges(merges: list, vocabulary: dict[str, int], merged: set[str]) -> None:
    """Raises InputError unless tokens come about by merges in the order of their ids, which is all that tiktoken knows."""
    made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    ids = [vocabulary[token] for token in made]
    if any(one >= other for one, other in pairwise(ids)) or {token for token in merged if len(token) > 1} - set(made):
        raise InputError("--encoder", "tiktoken", "takes vocabularies in the order of their merges alone")


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (``bytes_to_unicode`` of GPT-2's encoder.py)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _byte_level_pattern(spec: dict) -> str | None:
    """The pattern by which a byte-level BPE cuts words; None for any other tokenizer."""
    model, cut = spec.get("model") or {}, spec.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    last = steps[-1]
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        return None
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return word_patterns.GPT2
    if len(steps) == 2 and not last.get("use_regex", True) and steps[0].get("type") == "Split":
        split = steps[0]
        is_plain = split.get("behavior") == "Isolated" and not split.get("invert")
        return split["pattern"].get("Regex") if is_plain else None
    return None


ROUTES = {"gigatoken": GigatokenRoute, "tiktoken": TiktokenRoute, REFERENCE: ReferenceRoute}


@dataclass(frozen=True)
class ChosenRoute:
    """A route by name, opened, and a sentence for each faster one that was passed over."""

    name: str
    route: Route
    passed_over: list[str]


def choose_route(tokenizer: TextTokenizer, wanted: str, sample: Iterable[str]) -> ChosenRoute:
    """The route to take.

    Args:
        wanted: a name of ROUTES, or ``auto``: the first one whose ids are the reference's.
        sample: texts of the corpus; not asked for when nothing is to be compared.

    Raises InputError when a route that was asked for by name is not exact or not there.
    """
    reference, passed_over = ReferenceRoute(tokenizer), []
    if wanted == REFERENCE:
        return ChosenRoute(REFERENCE, reference, passed_over)
    texts = [*NASTY, *_around_added(tokenizer), *sample]
    with ThreadPoolExecutor(1) as background:  # its library works without Python's lock, while the route is opened
        expected = background.submit(reference.encode, texts)
        for name in [name for name in ROUTES if name != REFERENCE] if wanted == AUTO else [wanted]:
            try:
                route = open_route(tokenizer, name)
                problem = first_difference(route, reference, texts, expected.result())
            except InputError as error:
                problem = error.fix
            if problem is None:
                return ChosenRoute(name, GuardedRoute(route, reference), passed_over)
            if wanted != AUTO:
                raise InputError("--encoder", wanted, problem)
            passed_over.append(f"{name}: {problem}")
    return ChosenRoute(REFERENCE, reference, passed_over)


def _around_added(tokenizer: TextTokenizer) -> Iterator[str]:
    """Every added token in a word, alone, twice and in other cases."""
    for word in tokenizer.added:
        yield f"a{word}b {word} {word}{word}\n{word.upper()} {word.lower()} {word[:-1]} "


def open_route(tokenizer: TextTokenizer, name: str) -> Route:
    """A route by name, without proof. Raises InputError when it is not there."""
    return ROUTES[name](tokenizer)


def first_difference(
    route: Route, reference: Route, texts: Sequence[str], expected: tuple[np.ndarray, np.ndarray] | None = None
) -> str | None:
    """A sentence about the first text whose ids are not the reference's; None when there is none.

    ``expected`` is what the reference gives for the texts, where it has been asked before.
    """
    expected = expected or reference.encode(texts)
    if all(np.array_equal(a, b) for a, b in zip(route.encode(texts), expected, strict=True)):
        return None
    for text in texts:
        ids, theirs = route.encode([text])[0].tolist(), reference.encode([text])[0].tolist()
        if ids != theirs:
            return f"gives {ids[:8]} for {text[:40]!r}, the tokenizer {theirs[:8]}"
    return "gives other ids in a batch than alone"

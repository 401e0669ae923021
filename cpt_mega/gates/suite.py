"""From a suite file, or the held-out sets of a configuration, to probes; and one look with all of them.

A probe's digest is its name for good: two results may be compared when it is the same. It covers items, prompts and order,
windows, tokenizer and the version of all this code (``FORMAT``), and not the packing, which changes no score.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from cpt_mega.config.load import load_sections
from cpt_mega.config.schema import Config
from cpt_mega.data.heldout import heldout_documents
from cpt_mega.data.indexed import IndexedCorpus
from cpt_mega.data.sources import open_corpus
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.engine.step import Engine
from cpt_mega.errors import InputError
from cpt_mega.gates import items as files
from cpt_mega.gates.asking import distributions, likeliest_tokens, score_requests
from cpt_mega.gates.chats import ChatTexts, in_words
from cpt_mega.gates.encoding import Encoder
from cpt_mega.gates.items import first_items
from cpt_mega.gates.probes.answers import Answers
from cpt_mega.gates.probes.boundaries import Boundaries
from cpt_mega.gates.probes.choice import Choice
from cpt_mega.gates.probes.drift import Drift, divergence
from cpt_mega.gates.probes.lists import list_items
from cpt_mega.gates.probes.perplexity import Perplexity, ScoredDocument, perplexities
from cpt_mega.gates.probes.probe import ItemScore, Probe, Reading
from cpt_mega.gates.requests import Likeliest, Request
from cpt_mega.gates.suite_schema import (
    AnswerOptions,
    BoundaryOptions,
    ChoiceOptions,
    DriftOptions,
    HarnessOptions,
    ListOptions,
    PerplexityOptions,
    ProbeOptions,
    RuleOptions,
    SuiteOptions,
    WeightOptions,
)
from cpt_mega.json_types import finite
from cpt_mega.lineage import combined_digest, text_digest

FORMAT = 1  # another one where the same items would be asked or scored in another way


@dataclass(frozen=True)
class Suite:
    """Probes.

    Attributes:
        row_tokens: of the rows that their requests are packed into.
        digests: by probe.
        of_buckets: names of the probes that make up the perplexity of their bucket.
        rules: what is done about what is found; None for held-out sets alone.
        cut: how many of its items are asked, as a sentence, where not all are, to stay within the tokens of a look.
        frames: a sentence for each probe of replies: how they are put to the model.
        weights: of the buckets, when a checkpoint is chosen (``selection.py``).
    """

    name: str
    row_tokens: int
    probes: tuple[Probe | Drift, ...]
    digests: dict[str, str]
    of_buckets: frozenset[str] = frozenset()
    rules: RuleOptions | None = None
    cut: str = ""
    frames: tuple[str, ...] = ()
    weights: Mapping[str, float] = field(default_factory=lambda: WeightOptions().model_dump())

    @property
    def digest(self) -> str:
        """One name for all of it."""
        return text_digest(json.dumps(sorted(self.digests.items())))

    def bucket_digests(self) -> dict[str, str]:
        """One name for what each bucket's perplexity is measured on."""
        found = defaultdict(list)
        for probe in self.probes:
            if probe.name in self.of_buckets:
                found[probe.bucket].append(self.digests[probe.name])
        return {bucket: combined_digest(sorted(digests)) for bucket, digests in sorted(found.items())}

    @property
    def perplexity_buckets(self) -> set[str]:
        """Buckets whose perplexity is measured."""
        return {probe.bucket for probe in self.probes if probe.name in self.of_buckets}

    @property
    def drifts(self) -> list[Drift]:
        """Probes that compare with an earlier model."""
        return [probe for probe in self.probes if isinstance(probe, Drift)]

    @property
    def tokens(self) -> int:
        """That a look reads, about: what requests have in common may be read once."""
        return _tokens(self.probes)

    def without(self, names: Collection[str]) -> "Suite":
        """Without some probes."""
        kept = tuple(probe for probe in self.probes if probe.name not in names)
        return replace(self, probes=kept, digests={probe.name: self.digests[probe.name] for probe in kept})

    def joined(self, other: "Suite") -> "Suite":
        """Both in one look, in rows of the shorter kind. What ``other`` adds to a bucket that has its perplexity already is
        read apart: that of a bucket does not change with a suite. The weights are those of ``other``.

        Raises InputError where they have a probe of one name.
        """
        twice = sorted(self.digests.keys() & other.digests.keys())
        if twice:
            raise InputError("gates.suite", twice[0], "eval.sets has a set of this name; name the probe otherwise")
        more = {p.name for p in other.probes if p.bucket not in self.perplexity_buckets} & other.of_buckets
        probes, digests = self.probes + other.probes, self.digests | other.digests
        rows = min(self.row_tokens, other.row_tokens) if self.probes else other.row_tokens
        return replace(other, row_tokens=rows, probes=probes, digests=digests, of_buckets=self.of_buckets | more)


@dataclass(frozen=True)
class Found:
    """What a look found of a probe."""

    probe: Probe | Drift
    items: list[ItemScore]

    @cached_property
    def readings(self) -> list[Reading]:
        """See Probe."""
        return self.probe.readings(self.items)

    def lines(self) -> Iterator[dict]:
        """Each item as plain values; None for a number that JSON cannot hold."""
        names = {"probe": self.probe.name, "bucket": self.probe.bucket}
        for item in self.items:
            values = {name: finite(value) for name, value in item.values.items()}
            yield {**names, "id": item.id, "score": finite(item.score), "values": values}

    def to_json(self) -> list[dict]:
        """A line for each reading; None for a value that JSON cannot hold."""
        names = {"bucket": self.probe.bucket, "probe": self.probe.name}
        return [{**names, "metric": r.metric, "value": finite(r.value), "n": r.n} for r in self.readings]


def open_suite(
    path: Path, tokenizer: TextTokenizer, vocab_size: int, longest: int, most_tokens: float = math.inf
) -> Suite:
    """Reads a suite and all of its items.

    Args:
        vocab_size, longest: of the model: its token ids, and the tokens of a text that it can read.
        most_tokens: that a look may read, about. Where the suite has more, each probe asks the same share of its items, and
            always the same ones.

    Raises InputError for anything that is wrong in the suite or its items, or that the model cannot read.
    """
    options = load_sections(path, SuiteOptions, "suite", _locate)
    maker = _Maker(tokenizer, vocab_size, longest, min(options.row_tokens, longest))
    probes = tuple(maker.made(name, probe) for name, probe in options.probes.items())
    probes, cut = _within(maker, options, probes, most_tokens)
    for probe in probes:
        most = max((request.inputs for request in texts_of(probe)), default=0)
        if not most:
            raise InputError(
                f"suite probe {probe.name}", probe.name, "no item has a token to predict; give other items"
            )
        if most > longest:
            fix = f"an item has {most} tokens, and the model reads {longest}; leave it out, or show fewer examples"
            raise InputError(f"suite probe {probe.name}", probe.name, fix)
    ends = [tokenizer.adds_bos, tokenizer.bos_id, tokenizer.eos_id]  # which its files beside the vocabulary decide
    digests, of_buckets = _digests(probes, [tokenizer.digest, ends]), _perplexities(probes)
    frames = tuple(
        maker.frame(probe, options.probes[probe.name]) for probe in probes if _is_reply(options.probes[probe.name])
    )
    told = {"rules": options.rules, "cut": cut, "frames": frames, "weights": options.weights.model_dump()}
    return Suite(options.name, options.row_tokens, probes, digests, of_buckets, **told)


def held_out_suite(config: Config, tokenizer_digest: str, vocab_size: int) -> Suite:
    """The sets of ``eval.sets`` as probes. Raises InputError when one is unusable or was made by another tokenizer."""
    window, names, probes = config.train.seq_length, set(), []
    for option in config.eval.sets:
        corpus = open_corpus(f"eval.sets {option.bucket}", option.path, tokenizer_digest, vocab_size)
        name = Path(option.path).name
        while name in names:  # files of one name in several folders
            name += "+"
        names.add(name)
        documents = _of_corpus(corpus, config.eval.max_tokens, vocab_size)
        probes.append(Perplexity(name, option.bucket, documents, window))
    return Suite("eval.sets", window, tuple(probes), _digests(probes, [tokenizer_digest]), _perplexities(probes))


def texts_of(probe: Probe | Drift) -> list[Request]:
    """All that a probe lets the model read."""
    return probe.texts if isinstance(probe, Drift) else list(probe.requests)


def take_references(
    engine: Engine, drifts: Iterable[Drift], row_tokens: int, stops: Callable[[], bool] = lambda: False
) -> dict[str, Likeliest]:
    """What is kept of a model that others are compared with, by the name of the probe. A collective, as ``take_look``."""
    vocab_size = engine.shape.vocab_size
    return {
        drift.name: likeliest_tokens(engine, drift.texts, row_tokens, min(drift.count, vocab_size), stops)
        for drift in drifts
    }


def take_look(
    engine: Engine,
    suite: Suite,
    references: Mapping[str, Likeliest] | None = None,
    stops: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda requests: None,
) -> list[Found]:
    """Scores all items of all probes, packed together. Changes no weight, generator or data state.

    A collective; the same on all ranks. ``references`` are those of the suite's ``drifts``; ``stops``, ``advance`` and what is
    raised: as ``score_requests`` has it.
    """
    requests = [request for probe in suite.probes for request in probe.requests]
    answers, found = iter(score_requests(engine, requests, suite.row_tokens, stops, advance)), []
    for probe in suite.probes:
        if isinstance(probe, Drift):
            base = references[probe.name]
            now = distributions(engine, probe.texts, suite.row_tokens, base.ids, stops)
            found.append(Found(probe, probe.items(divergence(base, *now))))
        else:
            found.append(Found(probe, probe.items([next(answers) for _ in probe.requests])))
    return found


def perplexity_by_bucket(suite: Suite, found: Sequence[Found]) -> dict[str, float]:
    """Over all target tokens of the probes that are of a bucket."""
    counted = [one for one in found if one.probe.name in suite.of_buckets]
    return perplexities((one.probe.bucket, item.values) for one in counted for item in one.items)


def _within(
    maker: "_Maker", options: SuiteOptions, probes: tuple[Probe | Drift, ...], most_tokens: float
) -> tuple[tuple[Probe | Drift, ...], str]:
    """Probes that read no more than that, about, and how many of the items that leaves, if not all.

    A probe asks one item at least, as a reading of none is no reading: many probes may read more in all.
    """
    tokens = _tokens(probes)
    if tokens <= most_tokens:
        return probes, ""
    counts = {probe.name: max(1, int(len(probe.ids) * most_tokens / tokens)) for probe in probes}
    fewer = [(name, of.model_copy(update={"max_items": counts[name]})) for name, of in options.probes.items()]
    asked, known = sum(counts.values()), sum(len(probe.ids) for probe in probes)
    within = "to stay within gates.look_share of the computing; null asks all"
    note = f"a look asks {asked:,} of the suite's {known:,} items, {within}"
    return tuple(maker.made(name, one) for name, one in fewer), note


def _tokens(probes: Iterable[Probe | Drift]) -> int:
    return sum(request.inputs for probe in probes for request in texts_of(probe))


def _locate(values: dict, folder: Path) -> None:
    """Items and tasks lie beside the file that names them, and so do rules of the user's own."""
    rules = values.get("rules")
    names = rules.get("functions") if isinstance(rules, dict) else None
    if isinstance(names, list):
        rules["functions"] = [str((folder / name).absolute()) if isinstance(name, str) else name for name in names]
    probes = values.get("probes")
    for probe in probes.values() if isinstance(probes, dict) else ():
        for name in ("items", "tasks") if isinstance(probe, dict) else ():
            if isinstance(probe.get(name), str):
                probe[name] = str((folder / probe[name]).absolute())


class _Maker:
    """Makes probes of options; one method a kind."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int, longest: int, window: int):
        self.tokenizer, self.vocab_size, self.longest, self.window = tokenizer, vocab_size, longest, window
        self.encoder = Encoder(tokenizer)

    def made(self, name: str, options: ProbeOptions) -> Probe:
        return getattr(self, f"_{options.kind}")(name, options)

    def _choice(self, name: str, options: ChoiceOptions) -> Choice:
        shown, items = _split(name, files.read_choices(Path(options.items)), options)
        metric = options.metric or ("acc" if options.style == "letters" else "acc_norm")
        chats = self._chats_of(f"suite probe {name}", options)
        return Choice(name, options.bucket, items, self.encoder, options.style, metric, shown, chats=chats)

    def frame(self, probe: Choice, options: ChoiceOptions) -> str:
        """How a probe's replies are put to the model, and why not as chats."""
        count = len(probe.ids)
        if probe.in_words < count:
            others = f", but for {probe.in_words:,} that spell special tokens" * bool(probe.in_words)
            return f"{probe.name}: {count:,} items as the chat template has them{others} (chat: false asks in words)"
        why = "chat: false" if options.chat is False else self.no_chats
        return f"{probe.name}: {count:,} items in words, as User: and Assistant: ({why})"

    def _answers(self, name: str, options: AnswerOptions) -> Answers:
        shown, items = _split(name, files.read_answers(Path(options.items)), options)
        return Answers(name, options.bucket, items, self.encoder, shown)

    def _lists(self, name: str, options: ListOptions) -> Choice:
        items = first_items(list_items(options.count, options.shots, options.longest, options.seed), options.max_items)
        return Choice(name, options.bucket, items, self.encoder, "continuation", "acc", are_generated=True)

    def _boundaries(self, name: str, options: BoundaryOptions) -> Boundaries:
        items = first_items(files.read_pairs(Path(options.items)), options.max_items)
        return Boundaries(name, options.bucket, items, self.encoder)

    def _perplexity(self, name: str, options: PerplexityOptions) -> Perplexity:
        field, path = f"suite probe {name}", Path(options.items)
        if path.suffix == ".jsonl":
            items = first_items(files.read_texts(path, options.field), options.max_items)
            documents = list(_up_to(self._texts(items), options.max_tokens))
        else:
            corpus = open_corpus(field, str(path), self.tokenizer.digest, self.vocab_size)
            found = _of_corpus(corpus, options.max_tokens, self.vocab_size, self.tokenizer)
            documents = first_items(found, options.max_items)
        if not documents:
            raise InputError(field, str(path), "holds no text of two tokens")
        return Perplexity(name, options.bucket, documents, self.window)

    def _drift(self, name: str, options: DriftOptions) -> Drift:
        path = Path(options.items)
        if files.holds_chats(path):
            texts = self._rendered(name, first_items(files.read_chats(path), options.max_items))
        else:
            documents = self._texts(first_items(files.read_texts(path, options.field), options.max_items))
            texts = [(document.id, document.tokens) for document in documents]
        return Drift(name, options.bucket, [text for text in texts if len(text[1]) > 1], options.count)

    def _chats_of(self, field: str, options: ChoiceOptions) -> ChatTexts | None:
        """Raises InputError for a chat that was asked for and cannot be."""
        if options.chat and options.style != "reply":
            raise InputError(f"{field} chat", options.chat, "is for style: reply alone")
        if options.style != "reply" or options.chat is False:
            return None
        if options.chat and self.no_chats:
            raise InputError(f"{field} chat", options.chat, f"{self.no_chats}; or leave chat out")
        return self.chats

    @cached_property
    def _found_chats(self) -> tuple[ChatTexts | None, str]:
        try:
            chats = ChatTexts(self.tokenizer)
            chats.pairs((), "Hello?", ["Yes."])
        except InputError as error:
            return None, f"{error.value} {error.fix}"
        except ValueError as error:
            return None, f"the chat template of {self.tokenizer.path} cannot be used: {error}"
        return chats, ""

    @property
    def chats(self) -> ChatTexts | None:
        """Renders chats, where the tokenizer has a template that can."""
        return self._found_chats[0]

    @property
    def no_chats(self) -> str:
        """Why there is none."""
        return self._found_chats[1]

    def _rendered(self, name: str, items: Sequence[files.ChatItem]) -> list[tuple[str, np.ndarray]]:
        """As the tokenizer's template renders them; without one, as lines of a dialogue.

        One more token follows, so that the first one of a reply is a place that is looked at.
        """
        if self.chats is None:
            tokens = self.encoder.opened([in_words(item.messages) for item in items])
        else:
            tokens = [_prompt_ids(name, self.chats, item) for item in items]
        end = self.tokenizer.eos_id
        return [(item.id, np.array([*ids, end], np.int64)) for item, ids in zip(items, tokens, strict=True)]

    def _harness(self, name: str, options: HarnessOptions) -> Probe:
        from cpt_mega.gates import harness  # lm-eval, an extra that is large and takes its time to import
        from cpt_mega.gates.probes.harness import Harness

        longest = min(options.max_length or self.longest, self.longest)
        maker = harness.RequestMaker(harness.load_tokenizer(self.tokenizer.path.parent), longest)
        folder = None if options.tasks is None else Path(options.tasks)
        task = harness.build_task(f"suite probe {name}", options.task, folder, options.shots)
        return Harness(name, options.bucket, task, maker, options.metric, options.max_items)

    def _texts(self, items: Sequence[files.TextItem]) -> list[ScoredDocument]:
        tokens = self.encoder.documents([item.text for item in items])
        return [
            ScoredDocument(item.id, np.array(ids, np.int64), size=len(item.text.encode()))
            for item, ids in zip(items, tokens, strict=True)
        ]


def _split(name: str, items: list, options: ChoiceOptions | AnswerOptions) -> tuple[list, list]:
    """What is shown, and what is scored."""
    if len(items) <= options.shots:
        fix = f"the file has {len(items)} items; show fewer"
        raise InputError(f"suite probe {name} shots", options.shots, fix)
    return items[: options.shots], first_items(items[options.shots :], options.max_items)


def _of_corpus(
    corpus: IndexedCorpus, max_tokens: int, vocab_size: int, tokenizer: TextTokenizer | None = None
) -> list[ScoredDocument]:
    """Held-out documents; a tokenizer tells how many bytes each has, where all of it counts."""
    sized = tokenizer is not None
    return [
        ScoredDocument(f"{number:08d}", tokens, counts, _bytes(tokenizer, tokens) if sized and counts is None else None)
        for number, tokens, counts in heldout_documents(corpus, max_tokens, vocab_size)
    ]


def _bytes(tokenizer: TextTokenizer, tokens: np.ndarray) -> int:
    """Of a document's text: BOS and EOS are none."""
    ids = tokens.tolist()
    start, end = tokenizer.text_range(ids)
    return len(tokenizer.decode(ids[start:end]).encode())


def _prompt_ids(name: str, chats: ChatTexts, item: files.ChatItem) -> list[int]:
    try:
        return chats.prompt(list(item.messages))
    except ValueError as error:
        raise InputError(f"suite probe {name}", item.id, str(error)) from None


def _up_to(documents: Sequence[ScoredDocument], tokens: int) -> Iterator[ScoredDocument]:
    """Whole documents, as long as they begin before so many tokens."""
    taken = 0
    for document in documents:
        if taken < tokens and len(document.tokens) > 1:
            yield document
        taken += len(document.tokens)


def _is_reply(options: ProbeOptions) -> bool:
    return isinstance(options, ChoiceOptions) and options.style == "reply"


def _perplexities(probes: Iterable[Probe | Drift]) -> frozenset[str]:
    return frozenset(probe.name for probe in probes if isinstance(probe, Perplexity))


def _digests(probes: Sequence[Probe | Drift], tokenizer: list) -> dict[str, str]:
    return {probe.name: text_digest(json.dumps([FORMAT, tokenizer, probe.identity()])) for probe in probes}

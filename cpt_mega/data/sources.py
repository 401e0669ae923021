"""The sources of a mixture: corpora with a role and a weight, checked against the model they are to train."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path

from cpt_mega.data.indexed import IndexedCorpus, corpus_files
from cpt_mega.data.manifest import load_manifest
from cpt_mega.data.mixture import Mixture
from cpt_mega.data.packing import RowPlan
from cpt_mega.data.plan_store import open_plan
from cpt_mega.errors import InputError
from cpt_mega.lineage import file_digest

FIELD = "data.sources"
ROLES = ("domain", "replay", "instruct")
DEFAULT_REPLAY_SHARE = 0.2


@dataclass(frozen=True)
class Source:
    """One source of a mixture.

    Attributes:
        name: unique; cursors, ledgers and the row order go by it.
        role: one of ROLES.
        corpus, plan: the tokens and their packing into rows.
        weight: share of the mixture's tokens, relative to the other sources' weights.
        vocab_size: of the model, to check token ids as rows are read; None checks nothing.
        masked_tokens: those of the corpus that its loss mask leaves out, as far as its manifest knows.
    """

    name: str
    role: str
    corpus: IndexedCorpus
    plan: RowPlan
    weight: float
    vocab_size: int | None = None
    masked_tokens: int = 0

    @property
    def counted_tokens(self) -> int:
        """Tokens of the corpus that count for the loss, and so for shares, ledger and budget."""
        return self.corpus.tokens - self.masked_tokens

    def described(self) -> dict:
        """What it is and how its documents fill rows, as plain values."""
        packing = {
            "seq_length": self.plan.seq_length,
            **asdict(self.plan.statistics),
            "fill": self.plan.statistics.fill,
        }
        return {
            "name": self.name,
            "role": self.role,
            "path": self.corpus.prefix,
            "masked_tokens": self.masked_tokens,
            "packing": packing,
        }


def corpus_identity(prefix: str) -> str:
    """What a corpus is called in lineage: the manifest's content digest, else the SHA-256 of its index.

    The index fixes the documents' lengths, so a data cursor means the same row; only a manifest vouches for tokens.
    """
    manifest = load_manifest(prefix)
    return manifest.content_digest if manifest else file_digest(corpus_files(prefix)[1])


def source_line(prefix: str) -> str:
    """A corpus as an entry of ``data.sources``, to paste into a configuration."""
    path = Path(prefix).resolve()
    return f"{{name: {path.name}, path: {path}, role: domain}}"


def default_weights(roles: Sequence[str], weights: Sequence[float | None]) -> list[float]:
    """Weights as given; if none is, replay (with instruct) gets 20 % of the tokens and the domain sources the rest.

    Sources of one side share equally; where one side is absent the other has everything.
    Raises InputError when only some sources have a weight.
    """
    given = [weight for weight in weights if weight is not None]
    if len(given) == len(weights):
        return given
    if given:
        raise InputError(FIELD, list(weights), "give a weight to every source, or to none")
    sides = ["domain" if role == "domain" else "replay" for role in roles]
    shares = {"domain": 1 - DEFAULT_REPLAY_SHARE, "replay": DEFAULT_REPLAY_SHARE}
    return [shares[side] / sides.count(side) if len(set(sides)) == 2 else 1 / len(sides) for side in sides]


def check_sources(sources: Sequence[Source]) -> None:
    """Raises InputError without sources, for two of one name, for a weight that is not a positive number, and for a
    source without rows, or without a token that counts."""
    if not sources:
        raise InputError(FIELD, [], "give at least one source")
    _check_names([source.name for source in sources])
    for source in sources:
        if not (isfinite(source.weight) and source.weight > 0):
            fix = "a weight is a positive share of tokens; leave the source out to train without it"
            raise InputError(f"{FIELD} {source.name} weight", source.weight, fix)
        if not source.plan.rows:
            raise InputError(f"{FIELD} {source.name} path", source.corpus.prefix, "the corpus holds no token")
        if not source.counted_tokens:
            fix = "its loss mask leaves every token out, so nothing would be learned; preprocess with --loss-mask all"
            raise InputError(f"{FIELD} {source.name} path", source.corpus.prefix, fix)


def fixed_mixture(sources: Sequence[Source]) -> Mixture:
    """The sources by their weights."""
    return Mixture.fixed({source.name: source.weight for source in sources})


def open_sources(
    specs: Iterable[Mapping | object], *, seq_length: int, packing: str, tokenizer_digest: str, vocab_size: int
) -> list[Source]:
    """Opens, checks and packs the corpora of a mixture.

    Args:
        specs: mappings or objects with name, path (prefix), role and weight (or None).
        seq_length: tokens of a row.
        packing: a method of ``plan_rows``; the plans of large corpora are kept beside them.
        tokenizer_digest, vocab_size: the model's. A corpus without a manifest (Megatron-LM's own) is taken as it is;
            its ids are checked as they are read, like all others.

    Raises InputError when a corpus is unusable or was made by another tokenizer.
    """
    specs = [spec if isinstance(spec, Mapping) else vars(spec) for spec in specs]
    _check_names([spec["name"] for spec in specs])
    for spec in specs:
        if spec["role"] not in ROLES:
            raise InputError(f"{FIELD} {spec['name']} role", spec["role"], f"give one of {', '.join(ROLES)}")
    weights = default_weights([spec["role"] for spec in specs], [spec.get("weight") for spec in specs])
    sources = []
    for spec, weight in zip(specs, weights, strict=True):
        corpus = open_corpus(f"{FIELD} {spec['name']}", spec["path"], tokenizer_digest, vocab_size)
        plan, masked = open_plan(corpus, seq_length, packing), _masked_tokens(corpus)
        sources.append(Source(spec["name"], spec["role"], corpus, plan, weight, vocab_size, masked))
    if sources:
        check_sources(sources)
    return sources


def open_corpus(field: str, prefix: str, tokenizer_digest: str, vocab_size: int) -> IndexedCorpus:
    """Opens a corpus for a model; ``field`` names it in errors.

    Raises InputError when it is unusable, or its manifest tells of another tokenizer or a larger vocabulary.
    """
    corpus = IndexedCorpus(prefix)
    manifest = load_manifest(prefix)
    if manifest is None:
        return corpus
    manifest.check_against(corpus)
    if manifest.tokenizer_digest != tokenizer_digest:
        fix = f"made by another tokenizer than the model's ({tokenizer_digest[:12]}); preprocess with the model's"
        raise InputError(f"{field} tokenizer", manifest.tokenizer_digest[:12], fix)
    if manifest.vocab_size > vocab_size:
        fix = f"the model's vocabulary has {vocab_size} tokens; preprocess with the model's tokenizer"
        raise InputError(f"{field} vocab_size", manifest.vocab_size, fix)
    return corpus


def _masked_tokens(corpus: IndexedCorpus) -> int:
    manifest = load_manifest(corpus.prefix) if corpus.has_mask else None
    return 0 if manifest is None or manifest.counted_tokens is None else corpus.tokens - manifest.counted_tokens


def _check_names(names: Sequence[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise InputError(FIELD, name, "two sources have this name; names tell cursors and ledgers apart")

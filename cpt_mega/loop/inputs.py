"""Everything a run reads besides its configuration: the model's description, corpora, evaluation sets, and their names."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt_mega.checkpoint.restore import Start
from cpt_mega.config import Config
from cpt_mega.data.mixture import Mixture
from cpt_mega.data.packing import PACKING_VERSION
from cpt_mega.data.row_checks import RowChecks
from cpt_mega.data.sources import Source, corpus_identity, fixed_mixture, open_sources
from cpt_mega.data.stream import STOP, MixedStream, Repetition
from cpt_mega.data.stream_state import StreamState
from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.arming import notes_on, planned_judge
from cpt_mega.gates.looks import look_tokens
from cpt_mega.gates.rules import Judge
from cpt_mega.gates.suite import Suite, held_out_suite, open_suite
from cpt_mega.hf.model_info import HF_FOLDER, ModelInfo, read_model_info, tokenizer_digest
from cpt_mega.lineage import file_digest, library_versions

MOST_PASSES = 4  # Olmix, arXiv 2602.12237


@dataclass(frozen=True)
class Inputs:
    """``info`` is the starting checkpoint's own: a run's function never comes from elsewhere than its weights."""

    info: ModelInfo
    sources: list[Source]
    suite: Suite
    judge: Judge
    lineage: dict
    warnings: list[str]


def open_inputs(config: Config, start: Start) -> Inputs:
    """Opens and checks all of it. Raises InputError for the first thing that is unusable or does not fit the model."""
    info = read_model_info(start.folder)
    digest = _tokenizer(config, info)
    sources = _sources(config, info, digest)
    held_out = held_out_suite(config, digest, info.shape.vocab_size)
    asked = _suite(config, info, start.folder)
    suite = held_out.joined(asked) if asked else held_out
    lineage = {
        "base_digest": info.base_digest,
        "tokenizer_digest": digest,
        "packing_version": PACKING_VERSION,
        "corpora": {source.name: corpus_identity(source.corpus.prefix) for source in sources},
        "eval": suite.bucket_digests(),
        "suite": asked.digests if asked else {},
        "libraries": library_versions(),
    }
    judge = planned_judge(config, suite)
    return Inputs(info, sources, suite, judge, lineage, list(_warnings(config, sources, suite, judge)))


def _warnings(config: Config, sources: list[Source], suite: Suite, judge: Judge) -> Iterator[str]:
    """Choices that are allowed and that usually end badly."""
    if suite.cut:
        yield suite.cut
    yield from notes_on(judge)
    if sources and all(source.role == "domain" for source in sources):
        yield "no replay source: what the model knew before gets no gradient; add one with role: replay (20 % is usual)"
    if config.gates.general_perplexity_limit is not None and "general" not in suite.perplexity_buckets:
        yield "no gate is armed: eval.sets has no set with bucket: general, so forgetting is not watched"
    roles = Counter(source.role for source in sources)
    if config.data.adaptive.interval_tokens is not None and max(roles.values(), default=0) < 2:
        yield "data.adaptive decides nothing: it moves shares between sources of one role, and no role has two"
    for source, passes in zip(sources, expected_passes(config, sources), strict=True):
        most = config.data.max_epochs
        if most is not None and passes > most:
            ends = "ends the run, at the learning rate that it has then"
            then = ends if config.data.at_max_epochs == STOP else "leaves its share to the others"
            yield f"source {source.name} would be read {passes:,.2g} times over: after {most:g} it {then} (data.max_epochs)"
        elif passes > MOST_PASSES:
            yield f"source {source.name} is read {passes:,.1f} times over: more than {MOST_PASSES} passes usually hurt"


def open_stream(config: Config, sources: list[Source], state: dict) -> MixedStream | None:
    """The stream of a run, where its saved data state says; None without sources, for an evaluation alone.

    Raises InputError for a mixture or an exclusion that does not fit the sources.
    """
    if not sources:
        return None
    data, train = config.data, config.train
    stream = MixedStream(
        sources,
        train.seq_length,
        train.seed,
        StreamState.from_json(state) if state else None,
        mixture=mixture_of(config, sources),
        repetition=Repetition(data.max_epochs, data.at_max_epochs),
        checks=RowChecks(**data.row_checks.model_dump()),
    )
    stream.exclude(data.exclude)
    return stream


def mixture_of(config: Config, sources: Sequence[Source]) -> Mixture:
    """The mixture that a configuration asks for. Raises InputError for a curriculum that is none."""
    points = config.data.curriculum
    if not points:
        return fixed_mixture(sources)
    if config.data.adaptive.interval_tokens is not None:
        fix = "weights follow a curriculum or the losses; leave one of data.curriculum and data.adaptive out"
        raise InputError("data.adaptive.interval_tokens", config.data.adaptive.interval_tokens, fix)
    weighted = [option.name for option in config.data.sources if option.weight is not None]
    if weighted:
        raise InputError(
            f"data.sources {weighted[0]} weight", "given", "data.curriculum has the weights; leave these out"
        )
    names = [source.name for source in sources]
    odd = sorted({name for point in points for name in point.weights} - set(names))
    if odd:
        raise InputError("data.curriculum weights", odd[0], f"no such source; give weights to {', '.join(names)}")
    return Mixture.of([(point.tokens, {name: point.weights.get(name, 0.0) for name in names}) for point in points])


def mean_shares(config: Config, sources: Sequence[Source]) -> list[float]:
    """Each source's share of all tokens of the run."""
    if not sources:
        return []
    mixture, end = mixture_of(config, sources), max(config.train.tokens, 1)
    return [mixture.entitled(number, 0, end) / end for number in range(len(sources))]


def expected_passes(config: Config, sources: Sequence[Source]) -> list[float]:
    """How often the run would read each source to its last token, by what counts in the rows that are not excluded."""
    shares = zip(mean_shares(config, sources), sources, strict=True)
    return [share * config.train.tokens / _tokens_of_a_pass(config, source) for share, source in shares]


def expected_rows(config: Config, sources: Sequence[Source]) -> float:
    """Rows that the run takes to its last token, or to the end of the data if that comes first."""
    passes, most = expected_passes(config, sources), config.data.max_epochs
    if most is not None and config.data.at_max_epochs == STOP:
        done = min([1.0, *(most / times for times in passes if times)])
        passes = [done * times for times in passes]
    elif most is not None:
        passes = _within(passes, most, [_tokens_of_a_pass(config, source) for source in sources])
    return sum(times * _rows_left(config, source) for times, source in zip(passes, sources, strict=True))


def _rows_left(config: Config, source: Source) -> int:
    """Rows that are not excluded; at least one, as no source may lose all."""
    return max(1, source.plan.rows - len(set(config.data.exclude.get(source.name, ()))))


def _tokens_of_a_pass(config: Config, source: Source) -> float:
    return source.counted_tokens * _rows_left(config, source) / source.plan.rows


def _within(passes: list[float], most: float, tokens: list[float]) -> list[float]:
    """No source more often than ``most``, what it leaves to the others in their proportions; ``tokens`` are those of a pass."""
    for _ in passes:
        left = sum((times - most) * size for times, size in zip(passes, tokens, strict=True) if times > most)
        room = sum(times * size for times, size in zip(passes, tokens, strict=True) if times < most)
        more = 1 + left / room if room else 1.0
        passes = [most if times >= most else times * more for times in passes]
    return [min(times, most) for times in passes]


def _tokenizer(config: Config, info: ModelInfo) -> str:
    """Digest of the model's tokenizer. Raises InputError when ``tokenizer.path`` is another one."""
    if config.tokenizer.path is None:
        return info.tokenizer_digest or ""
    path = Path(config.tokenizer.path)
    digest = tokenizer_digest(path) if path.is_dir() else file_digest(path) if path.is_file() else None
    if not digest:
        raise InputError("tokenizer.path", str(path), "holds no tokenizer.json and is no .model file")
    if info.tokenizer_digest not in (None, digest):
        fix = "is not the tokenizer the model was imported with; drop the key or import the model again"
        raise InputError("tokenizer.path", str(path), fix)
    return digest


def _suite(config: Config, info: ModelInfo, folder: Path) -> Suite | None:
    """``gates.suite``, read with the model's tokenizer."""
    if config.gates.suite is None:
        return None
    tokenizer = TextTokenizer.load(config.tokenizer.path or folder / HF_FOLDER)
    shape = info.shape
    return open_suite(Path(config.gates.suite), tokenizer, shape.vocab_size, shape.max_positions, look_tokens(config))


def _sources(config: Config, info: ModelInfo, digest: str) -> list[Source]:
    if not config.data.sources:
        return []
    return open_sources(
        config.data.sources,
        seq_length=config.train.seq_length,
        packing=config.data.packing,
        tokenizer_digest=digest,
        vocab_size=info.shape.vocab_size,
    )

from dataclasses import dataclass, replace

import pytest

from cpt_mega.data.indexed import mask_path
from cpt_mega.data.manifest import CorpusManifest
from cpt_mega.data.sources import DEFAULT_REPLAY_SHARE, check_sources, default_weights, fixed_mixture, open_sources
from cpt_mega.errors import InputError
from tests.helpers.corpora import counting_corpus, make_source, write_corpus

MODEL = {"seq_length": 8, "packing": "best_fit", "tokenizer_digest": "right", "vocab_size": 50}


@dataclass
class Spec:
    name: str
    path: str
    role: str
    weight: float | None = None


@pytest.fixture
def corpus(tmp_path):
    return counting_corpus(tmp_path / "c", [5, 9])


@pytest.fixture
def manifest(corpus):
    manifest = CorpusManifest("right", 50, 1, None, "int32", 2, 14, "c", [], [], "0")
    manifest.write(corpus.prefix)
    return manifest


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["domain", "replay"], [0.8, 0.2]),
        (["domain", "domain", "replay", "instruct"], [0.4, 0.4, 0.1, 0.1]),
        (["replay"], [1.0]),
        (["domain", "domain"], [0.5, 0.5]),
        ([], []),
    ],
)
def test_default_weights(roles, expected):
    assert default_weights(roles, [None] * len(roles)) == pytest.approx(expected)
    assert DEFAULT_REPLAY_SHARE == 0.2


def test_given_weights_are_kept_and_must_be_complete():
    assert default_weights(["domain", "replay"], [3, 1]) == [3, 1]
    with pytest.raises(InputError, match="data.sources.*every source, or to none"):
        default_weights(["domain", "replay"], [3, None])


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_positive(corpus, weight):
    with pytest.raises(InputError, match="data.sources a weight"):
        check_sources([make_source(corpus, "a", weight, 8)])


def test_a_mixture_needs_distinct_sources(corpus, tmp_path):
    source = make_source(corpus, "a", 3, 8)
    with pytest.raises(InputError, match="data.sources"):
        check_sources([])
    with pytest.raises(InputError, match="data.sources = 'a'"):
        check_sources([source, source])
    with pytest.raises(InputError, match="holds no token"):
        check_sources([make_source(write_corpus(tmp_path / "none", []), "b", 1, 8)])
    mixture = fixed_mixture([source, make_source(corpus, "b", 1, 8)])
    assert mixture.names == ("a", "b") and mixture.shares(0) == (0.75, 0.25)


def test_specs_may_be_mappings_or_objects(corpus, manifest):
    spec = Spec("a", corpus.prefix, "domain")
    for given in (spec, vars(spec)):
        (source,) = open_sources([given], **MODEL)
        assert (source.name, source.role, source.weight, source.plan.rows) == ("a", "domain", 1.0, 2)
        assert source.vocab_size == 50


def test_what_a_loss_mask_leaves_out_is_known_from_the_manifest_and_all_of_it_is_refused(corpus, manifest):
    mask_path(corpus.prefix).write_bytes(bytes([1] * 5 + [0] * (corpus.tokens - 5)))
    masked = replace(manifest, loss_mask="assistant", counted_tokens=5)
    masked.write(corpus.prefix)
    (source,) = open_sources([Spec("a", corpus.prefix, "instruct")], **MODEL)
    assert (source.counted_tokens, source.masked_tokens) == (5, corpus.tokens - 5)
    replace(masked, counted_tokens=0).write(corpus.prefix)
    with pytest.raises(InputError, match="data.sources a path.*leaves every token out"):
        open_sources([Spec("a", corpus.prefix, "instruct")], **MODEL)


def test_a_corpus_without_a_manifest_is_taken(corpus):
    assert open_sources([Spec("a", corpus.prefix, "replay", 2.0)], **MODEL)[0].weight == 2.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_digest": "wrong"}, "data.sources a tokenizer = 'wrong'.*another tokenizer"),
        ({"vocab_size": 51}, "data.sources a vocab_size = 51"),
        ({"tokens": 15}, "tokens = 15"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(corpus, manifest, change, message):
    replace(manifest, **change).write(corpus.prefix)
    with pytest.raises(InputError, match=message):
        open_sources([Spec("a", corpus.prefix, "domain")], **MODEL)


def test_bad_specs_are_named(corpus):
    with pytest.raises(InputError, match="data.sources a role = 'main'"):
        open_sources([Spec("a", corpus.prefix, "main")], **MODEL)
    with pytest.raises(InputError, match="two sources"):
        open_sources([Spec("a", corpus.prefix, "domain")] * 2, **MODEL)
    with pytest.raises(InputError, match="no such file"):
        open_sources([Spec("a", corpus.prefix + "x", "domain")], **MODEL)

"""Suites: what a file may say, what is refused, and what a digest covers."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.errors import InputError
from cpt_mega.gates.items import first_items
from cpt_mega.gates.suite import Suite, open_suite, texts_of
from cpt_mega.hf.convert import import_hf
from tests.helpers.corpora import write_bpe_tokenizer, write_corpus
from tests.helpers.models import tiny_llama
from tests.helpers.suites import FILES, SUITE, write_suite

READY = sorted((Path(__file__).resolve().parents[2] / "configs" / "gates").glob("*.yaml"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    return TextTokenizer.load(write_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def folder(tmp_path) -> Path:
    write_suite(tmp_path)
    return tmp_path


def opened(path: Path, tokenizer: TextTokenizer, longest: int = 512):
    return open_suite(path, tokenizer, 1000, longest)


def test_every_kind_is_read_and_asks_something(folder, tokenizer):
    suite = opened(folder / "suite.yaml", tokenizer)
    asked = {probe.name: len(texts_of(probe)) for probe in suite.probes}
    assert asked.pop("lists") > 16
    assert asked == {"choices": 21, "letters": 27, "answers": 5, "pairs": 3, "texts": 4, "drift": 4}
    assert suite.name == "small" and suite.row_tokens == 64 and suite.perplexity_buckets == {"domain"}
    assert suite.digests.keys() == {*asked, "lists"} and len(set(suite.digests.values())) == 7


def test_a_file_may_extend_one_in_another_folder(folder, tokenizer):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "more.jsonl").write_text(json.dumps(FILES["answers.jsonl"][0]))
    (inner / "suite.yaml").write_text(
        "extends: ../suite.yaml\nname: more\nprobes:\n  more: {bucket: safety, kind: answers, items: more.jsonl}\n"
        "  choices: {shots: 0}\n"
    )
    more, whole = opened(inner / "suite.yaml", tokenizer), opened(folder / "suite.yaml", tokenizer)
    assert more.digests.keys() - whole.digests.keys() == {"more"}
    assert {name for name in whole.digests if whole.digests[name] != more.digests[name]} == {"choices"}


def test_weights_are_one_unless_said_and_extended_as_all_else_and_change_no_digest(folder, tokenizer):
    plain = opened(folder / "suite.yaml", tokenizer)
    assert plain.weights == dict.fromkeys(("domain", "general", "behaviour", "safety"), 1.0)
    (folder / "more.yaml").write_text("extends: suite.yaml\nweights: {general: 2, safety: 0}\n")
    (folder / "most.yaml").write_text("extends: more.yaml\nweights: {safety: 0.5}\n")
    most = opened(folder / "most.yaml", tokenizer)
    assert most.weights == plain.weights | {"general": 2.0, "safety": 0.5} and most.digests == plain.digests
    assert Suite("eval.sets", 8, (), {}).joined(most).weights == most.weights
    for wrong in ("{general: -1}", "{general: .inf}", "{generl: 1}", "1"):
        (folder / "wrong.yaml").write_text(f"extends: suite.yaml\nweights: {wrong}\n")
        with pytest.raises(InputError, match="weights"):
            opened(folder / "wrong.yaml", tokenizer)


def change(line: dict) -> dict:
    """The same item, and another text."""
    name = next(name for name in ("question", "target", "text") if name in line)
    return {**line, name: line[name] + "!"}


@pytest.mark.parametrize("name", FILES)
def test_a_digest_changes_with_any_item_of_its_probe_and_with_no_other(folder, tokenizer, name):
    before = opened(folder / "suite.yaml", tokenizer).digests
    lines = [*FILES[name][:-1], change(FILES[name][-1])]
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = opened(folder / "suite.yaml", tokenizer).digests
    changed = {probe for probe in before if before[probe] != after[probe]}
    kind = name.removesuffix(".jsonl")
    assert changed == {"choices": {"choices", "letters"}, "texts": {"texts", "drift"}}.get(kind, {kind})


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("shots: 2}\n  letters", "shots: 1}\n  letters", {"choices"}),
        ("style: letters", "style: cloze", {"letters"}),
        ("count: 8, shots: 2", "count: 8, shots: 3", {"lists"}),
        ("count: 8, shots: 2", "count: 8, shots: 2, seed: 2", {"lists"}),
        ("row_tokens: 64", "row_tokens: 512", {"texts"}),  # the window
        ("items: texts.jsonl}", "items: texts.jsonl, max_items: 2}", {"texts"}),
        ("count: 16", "count: 17", {"drift"}),
        ("items: answers.jsonl", "items: answers.jsonl, max_items: 2", {"answers"}),
        ("name: small", "name: other", set()),
    ],
)
def test_a_digest_covers_what_scores_depend_on_and_nothing_else(folder, tokenizer, old, new, changed):
    before = opened(folder / "suite.yaml", tokenizer).digests
    assert SUITE.count(old) == 1
    after = opened(write_suite(folder, SUITE.replace(old, new)), tokenizer).digests
    assert {probe for probe in before if before[probe] != after[probe]} == changed


def test_a_digest_covers_the_tokenizer(folder, tokenizer, tmp_path):
    other = TextTokenizer.load(write_bpe_tokenizer(tmp_path / "other", adds_bos=True))
    before, after = (opened(folder / "suite.yaml", each).digests for each in (tokenizer, other))
    assert all(before[probe] != after[probe] for probe in before)
    for changed in ({"adds_bos": True}, {"eos_id": 7}):  # by a file beside the vocabulary
        after = opened(folder / "suite.yaml", replace(tokenizer, **changed)).digests
        assert all(before[probe] != after[probe] for probe in before)


def test_texts_of_a_corpus_are_those_of_its_lines(folder, tokenizer):
    ids = [tokenizer.document_ids(each) for each in tokenizer.encode_batch([x["text"] for x in FILES["texts.jsonl"]])]
    write_corpus(folder / "corpus", ids)
    by_lines = opened(folder / "suite.yaml", tokenizer).probes[-2]
    by_corpus = opened(write_suite(folder, SUITE.replace("texts.jsonl}", "corpus}")), tokenizer).probes[-2]
    asked = [[request.tokens.tolist() for request in probe.requests] for probe in (by_lines, by_corpus)]
    assert asked[0] == asked[1]
    sizes = [[document.size for document in probe._documents] for probe in (by_lines, by_corpus)]
    assert sizes[0] == sizes[1] == [len(line["text"]) for line in FILES["texts.jsonl"]]


BAD = [
    ("kind: lists", "kind: list", "probes.lists"),
    ("count: 8", "cuont: 8", "did you mean 'count'"),
    ("count: 8", "count: 0", "probes.lists.lists.count"),
    ("count: 8", "count: 8, longest: 27", "probes.lists.lists.longest"),
    ("items: pairs.jsonl", 'items: "a\\0b.jsonl"', "cannot be read"),
    ("shots: 2}\n  letters", "shots: 9}\n  letters", "the file has 9 items"),
    ("bucket: domain", "bucket: topic", "probes.texts.perplexity.bucket"),
    ("items: pairs.jsonl", "items: gone.jsonl", "gone.jsonl"),
    ("items: pairs.jsonl", "items: texts.jsonl", "texts.jsonl:1"),
    ("items: texts.jsonl}", "items: gone}", "gone"),
    ("name: small\n", "", "name"),
    ("row_tokens: 64", "row_token: 64", "did you mean 'row_tokens'"),
    ("  pairs:", "  choices:", "given twice"),
    ("  pairs:", "  a b:", "probes"),
    (SUITE[SUITE.index("probes:") :], "probes: {}", "probes"),
    (SUITE[SUITE.index("probes:") :], "probes: []", "probes"),
    (SUITE[SUITE.index("probes:") :], "probes: {a: 3}", "probes.a"),
]


@pytest.mark.parametrize(("old", "new", "words"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_with_its_place(folder, tokenizer, old, new, words):
    assert SUITE.count(old) == 1
    path = write_suite(folder, SUITE.replace(old, new))
    with pytest.raises(InputError, match=re.escape(words)):
        opened(path, tokenizer)


def test_items_that_the_model_cannot_read_whole_are_refused(folder, tokenizer):
    with pytest.raises(InputError, match="probe choices.*the model reads 16"):
        opened(folder / "suite.yaml", tokenizer, longest=16)


def test_a_harness_probe_says_what_to_install_where_lm_eval_is_not_there(folder, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delattr("cpt_mega.gates.harness", raising=False)
    for name in ("cpt_mega.gates.harness", "cpt_mega.gates.probes.harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    path = write_suite(folder, SUITE + "  task: {bucket: domain, kind: harness, task: any}\n")
    with pytest.raises(InputError, match=r"lm-eval = .not there .*launch/install.sh harness"):
        opened(path, tokenizer)


def test_a_suite_that_is_too_long_for_a_look_asks_a_part_of_each_probe_and_one_item_at_least(folder, tokenizer):
    whole = opened(folder / "suite.yaml", tokenizer)
    assert not whole.cut
    tokens = sum(request.inputs for probe in whole.probes for request in texts_of(probe))
    half, least = (open_suite(folder / "suite.yaml", tokenizer, 1000, 512, most) for most in (tokens / 2, 1))
    counts = {probe.name: len(probe.ids) for probe in whole.probes}
    assert {probe.name: len(probe.ids) for probe in half.probes} == {n: max(1, k // 2) for n, k in counts.items()}
    assert all(len(probe.ids) == 1 for probe in least.probes)
    assert "gates.look_share" in half.cut and Suite("eval.sets", 9, (), {}).joined(half).cut == half.cut


def test_some_of_the_items_are_the_same_whatever_their_order():
    class One:
        def __init__(self, name):
            self.id = name

    items = [One(f"i{n}") for n in range(50)]
    some = {item.id for item in first_items(items, 10)}
    assert len(some) == 10 and some == {item.id for item in first_items(items[::-1], 10)}
    assert some < {item.id for item in first_items(items, 20)}
    assert [item.id for item in first_items(items, 10)] == sorted(some, key=lambda name: int(name[1:]))
    assert first_items(items, None) == items


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_the_ready_suites_can_be_opened(path, tokenizer):
    suite = opened(path, tokenizer, longest=4096)
    assert sum(len(texts_of(probe)) for probe in suite.probes) > 3000


def test_chats_are_rendered_by_the_template_or_as_a_dialogue(folder, tokenizer, tmp_path):
    chat = {"id": "c", "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]}
    (folder / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    path = write_suite(folder, SUITE.replace("kind: drift, items: texts.jsonl", "kind: drift, items: chats.jsonl"))
    plain = tokenizer.decode(opened(path, tokenizer).drifts[0].texts[0].tokens.tolist())
    assert plain == "User: What?\nAssistant: That.\nAssistant:<|eos|>"
    other = write_bpe_tokenizer(tmp_path / "template")
    (other / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    rendered = TextTokenizer.load(other)
    (text,) = opened(path, rendered).drifts[0].texts
    assert rendered.decode(text.tokens.tolist()) == "<user>What?<assistant>That.<|eos|>"
    (folder / "chats.jsonl").write_text(json.dumps(chat | {"messages": [{"role": "user"}]}) + "\n")
    with pytest.raises(InputError, match="chats.jsonl:1"):
        opened(path, tokenizer)


def test_a_suite_has_one_result_at_every_layout_and_as_an_hf_folder(workers, tmp_path):
    tiny_llama(tmp_path / "hf", tokenizer=True, num_hidden_layers=2)
    import_hf(tmp_path / "hf", tmp_path / "import")
    tiny_llama(tmp_path / "base", tokenizer=True, num_hidden_layers=2, seed=1)
    words = {
        "checkpoint": str(tmp_path / "import"),
        "suite": str(write_suite(tmp_path)),
        "base": str(tmp_path / "base"),
    }
    one = workers(1).run("gate_jobs.look", **words, overrides=["precision=fp32"])[0]
    assert [found["probe"] for found in one] == ["choices", "letters", "answers", "lists", "pairs", "texts", "drift"]
    for overrides in (["parallel.tp=2", "parallel.sp=true"], ["parallel.pp=2"]):
        other, _ = workers(2).run("gate_jobs.look", **words, overrides=["precision=fp32", *overrides])
        for found, again in zip(one, other, strict=True):
            assert [item["id"] for item in found["items"]] == [item["id"] for item in again["items"]]
            for item, same in zip(found["items"], again["items"], strict=True):
                assert item["score"] == pytest.approx(same["score"], abs=1e-4)
    drift = next(found for found in one if found["probe"] == "drift")
    low, high, cut_off = (reading["value"] for reading in drift["readings"])
    assert 0.01 < low < high and 0 < cut_off < 1
    pairs = next(found for found in one if found["probe"] == "pairs")
    assert pairs["readings"][0]["value"] < 1e-5 < abs(pairs["items"][0]["values"]["gain"])

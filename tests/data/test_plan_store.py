import json
import multiprocessing
import os
from dataclasses import asdict

import numpy as np
import pytest
from safetensors import SafetensorError

from cpt_mega.data import plan_store
from cpt_mega.data.indexed import IndexedCorpus, plans_path
from cpt_mega.data.plan_store import ARRAYS, open_plan
from tests.helpers.corpora import counting_corpus

LENGTHS = [3, 70, 9, 1, 16, 33, 2] * 9


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_store, "KEPT_FROM_DOCUMENTS", 1)
    return counting_corpus(tmp_path / "c", LENGTHS)


def files(corpus):
    return sorted(path.name for path in plans_path(corpus.prefix).glob("[!.]*"))


def same(one, two):
    equal = all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ARRAYS)
    return equal and (one.seq_length, one.statistics) == (two.seq_length, two.statistics)


def no_packing(monkeypatch):
    monkeypatch.setattr(plan_store, "plan_rows", lambda *_: pytest.fail("packed again"))


@pytest.mark.parametrize("method", ["best_fit", "concat"])
def test_a_plan_is_made_once_and_then_mapped(corpus, monkeypatch, method):
    made = open_plan(corpus, 32, method)
    no_packing(monkeypatch)
    kept = open_plan(IndexedCorpus(corpus.prefix), 32, method)
    assert same(made, kept) and isinstance(kept.length, np.memmap)
    assert [kept.pieces(row) for row in range(kept.rows)] == [made.pieces(row) for row in range(made.rows)]


def test_other_rows_another_method_and_other_documents_are_other_plans(corpus, tmp_path):
    open_plan(corpus, 32, "best_fit"), open_plan(corpus, 16, "best_fit"), open_plan(corpus, 32, "concat")
    assert len(files(corpus)) == 3
    changed = counting_corpus(tmp_path / "c", [*LENGTHS[1:], 3])  # as many documents, as many tokens
    assert changed.tokens == corpus.tokens and changed.documents == corpus.documents
    plan = open_plan(changed, 32, "best_fit")
    assert len(files(corpus)) == 4
    assert all(start + length <= changed.document_lengths[document] for document, start, length in plan.pieces(0))


def test_few_documents_are_packed_anew_every_time(corpus, monkeypatch):
    monkeypatch.setattr(plan_store, "KEPT_FROM_DOCUMENTS", len(LENGTHS) + 1)
    assert open_plan(corpus, 32, "best_fit").rows and not plans_path(corpus.prefix).exists()


def torn(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def of_something_else(path):
    header = json.dumps({"__metadata__": {"a": "b"}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def not_a_header(path):
    path.write_bytes(b"\xff" * 200)


def zeros_in_the_middle(path):
    raw = bytearray(path.read_bytes())
    raw[-100:-60] = bytes(40)
    path.write_bytes(raw)


DAMAGES = [torn, empty, of_something_else, not_a_header, zeros_in_the_middle]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_made_again(corpus, damage):
    made = open_plan(corpus, 32, "best_fit")
    path = plans_path(corpus.prefix) / files(corpus)[0]
    whole = path.read_bytes()
    damage(path)
    assert same(open_plan(corpus, 32, "best_fit"), made)
    assert path.read_bytes() == whole


def test_without_a_place_to_keep_it_the_plan_is_made_all_the_same(corpus):
    plans_path(corpus.prefix).write_text("no folder")  # root may write anywhere: a folder without write rights would do
    plan = open_plan(corpus, 32, "best_fit")
    assert plan.rows and plans_path(corpus.prefix).read_text() == "no folder"


def test_a_full_disk_is_no_reason_to_stop(corpus, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(plan_store, "save_file", full)
    assert open_plan(corpus, 32, "best_fit").rows
    assert files(corpus) == [] and os.listdir(plans_path(corpus.prefix)) == [".lock"]


def _open(prefix, packed, results):
    plan_store.KEPT_FROM_DOCUMENTS = 1
    really = plan_store.plan_rows

    def counted(*args):
        with packed.get_lock():
            packed.value += 1
        return really(*args)

    plan_store.plan_rows = counted
    results.put(asdict(open_plan(IndexedCorpus(prefix), 64, "best_fit").statistics))


def test_processes_that_start_together_pack_once(corpus):
    context = multiprocessing.get_context("fork")
    packed, results = context.Value("i", 0), context.SimpleQueue()
    processes = [context.Process(target=_open, args=(corpus.prefix, packed, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    assert packed.value == 1 and all(one == found[0] for one in found)
    assert [name for name in os.listdir(plans_path(corpus.prefix)) if name != ".lock"] == files(corpus)


def test_where_there_are_no_locks_all_make_the_same(corpus, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(plan_store.fcntl, "flock", no_locks)
    made = open_plan(corpus, 32, "best_fit")
    first = (plans_path(corpus.prefix) / files(corpus)[0]).read_bytes()
    monkeypatch.setattr(plan_store, "_read", lambda path, seq_length: None)  # as one that looked before it was there
    assert same(open_plan(corpus, 32, "best_fit"), made)
    assert [(plans_path(corpus.prefix) / name).read_bytes() for name in files(corpus)] == [first]

"""A run that would train on what it is judged by is refused before anything is made; what is little is written down."""

import json
import os

import pytest

from cpt_mega.data.tokenizer import TextTokenizer
from cpt_mega.hf.convert import import_hf
from cpt_mega.loop.run_folder import read_lines
from tests.helpers.jobsite import random_documents, write_documents
from tests.helpers.models import tiny_llama

SUITE = """\
name: held out or not
row_tokens: 64
probes:
  answers: {bucket: general, kind: answers, items: answers.jsonl}
  lists: {bucket: general, kind: lists, count: 8, shots: 2}
"""
ITEMS = [
    {"id": f"a{n}", "question": f"Which of the {n} stitches is in time?", "answer": f"the {n}th one"} for n in range(40)
]


@pytest.fixture(scope="module")
def site(jobsite, tmp_path_factory):
    """Overrides for a run whose domain corpus holds 3 of the 40 items of its suite, and its folder."""
    folder = tmp_path_factory.mktemp("overlap")
    tiny_llama(folder / "hf", tokenizer=True, num_hidden_layers=2)
    import_hf(folder / "hf", folder / "import")
    tokenizer = TextTokenizer.load(folder / "hf")
    leaks = [f"A page.\nQ: {item['question']} {item['answer']}, it says." for item in ITEMS[5:8]]
    documents = random_documents(11, 40, 301)
    documents[10:10] = [tokenizer.document_ids(ids) for ids in tokenizer.encode_batch(leaks)]
    write_documents(folder / "leaky", documents)
    (folder / "answers.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "suite.yaml").write_text(SUITE)
    places = {"leaky": (folder, "domain"), "replay": (jobsite.folder, "replay")}
    sources = ", ".join(f"{{name: {name}, path: {at}/{name}, role: {role}}}" for name, (at, role) in places.items())
    return folder, [
        f"model.checkpoint={folder / 'import'}",
        f"data.sources=[{sources}]",
        f"gates.suite={folder / 'suite.yaml'}",
        "gates.look_share=null",
        "train.tokens=300",
        "schedule.warmup_tokens=0",
    ]


def _command(workers, jobsite, world, *words):
    return workers(world).run("command", words=["--config", jobsite.config, *words])


def test_more_than_the_limit_is_refused_and_less_is_written_down_and_nothing_is_looked_for_twice(
    workers, jobsite, site, tmp_path
):
    (_, words), run = site, tmp_path / "run"
    words = [f"run.dir={run}", *words]
    for code, _, error in _command(workers, jobsite, 2, *words):
        assert code == 2 and "Traceback" not in error
        (line,) = [line for line in error.splitlines() if "error:" in line]
        assert "gates.suite = 'answers': 3 of 40 items are in data.sources (leaky: 3), e.g. a5" in line
        assert "gates.max_overlap" in line and "overlap.json" in line
    assert not (run / "checkpoints").exists() and not (run / "ledger.jsonl").exists()
    (known,) = [one for one in _known(run) if one["source"] == "leaky"]
    assert known["looked_at_tokens"] == known["tokens"]
    assert {one["probe"]: one["found"] for one in known["probes"].values()} == {
        "answers": ["a5", "a6", "a7"],
        "domain.heldout": [],
        "general.heldout": [],
    }
    stamp = os.stat(run / "overlap.json").st_mtime_ns
    (code, out, _), _ = _command(workers, jobsite, 2, *words, "gates.max_overlap=0.1")
    assert code == 0 and "overlap: answers: 3 of 40 items are in data.sources (leaky: 3), e.g. a5" in out
    assert "not judged: lists" in out
    assert (
        _command(workers, jobsite, 1, *words, "gates.max_overlap=0.1", "train.tokens=400", "--accept", "train.tokens")[
            0
        ][0]
        == 0
    )
    assert os.stat(run / "overlap.json").st_mtime_ns == stamp
    first, second = _ledger(run)
    assert first["step"] == 0 < second["step"] and first["probes"] == second["probes"]
    assert first["probes"]["answers"] == {"judged": 40, "short": 0, "found": 3, "sources": {"leaky": 3}}
    assert first["probes"]["general.heldout"]["found"] == 0 < first["probes"]["general.heldout"]["judged"]
    assert first["looked_at"] == {"leaky": 1.0, "replay": 1.0} and first["not_judged"] == ["lists"]


@pytest.mark.full
def test_held_out_corpora_are_judged_too_and_changed_ones_again(workers, jobsite, site, tmp_path):
    (folder, words), run = site, tmp_path / "run"
    held = f"eval.sets=[{{path: {tmp_path}/held, bucket: general}}]"
    words = [f"run.dir={run}", *words, held, "gates.suite=null"]
    write_documents(tmp_path / "held", random_documents(11, 40, 301))  # those of the domain, less the three
    ((code, _, error),) = _command(workers, jobsite, 1, *words)
    assert code == 2 and "eval.sets = 'held'" in error and "data.sources (leaky:" in error
    ((code, _, error),) = _command(workers, jobsite, 1, "--dry-run", *words[1:], f"run.dir={tmp_path / 'none'}")
    assert code == 2 and "eval.sets = 'held'" in error and not (tmp_path / "none").exists()
    write_documents(tmp_path / "held", random_documents(12, 40, 301))
    assert _command(workers, jobsite, 1, *words)[0][0] == 0
    assert [len(one["probes"]) for one in _known(run)] == [2, 2]
    os.utime(folder / "leaky.bin", ns=(1, 1))  # written to since
    later = ["train.tokens=400", "--accept", "train.tokens"]
    assert _command(workers, jobsite, 1, *words, *later)[0][0] == 0
    assert [(one["source"], len(one["probes"])) for one in _known(run)] == [("leaky", 2), ("replay", 2), ("leaky", 1)]
    (run / "overlap.json").write_text('{"format": 1, "corpora": 3}')  # damaged: it is made again
    later[0] = "train.tokens=500"
    assert _command(workers, jobsite, 1, *words, *later)[0][0] == 0 and len(_known(run)) == 2


@pytest.mark.full
def test_it_may_be_left_out_and_nothing_is_judged_where_nothing_is_trained(workers, jobsite, site, tmp_path):
    _, words = site
    for number, more in enumerate((["gates.max_overlap=null"], ["train.tokens=0"])):
        run = tmp_path / str(number)
        assert _command(workers, jobsite, 1, f"run.dir={run}", *words, *more)[0][0] == 0
        assert not (run / "overlap.json").exists() and not _ledger(run)


@pytest.mark.full
def test_the_others_wait_while_one_looks_and_a_signal_ends_it(workers, jobsite, site, tmp_path):
    run = tmp_path / "run"
    words = [f"run.dir={run}", *site[1], "gates.max_overlap=0.1"]
    arguments = {"config": jobsite.config, "overrides": words}
    outcomes = workers(2).run("gate_jobs.train_with_many_beats", **arguments, signalled="SIGTERM")
    assert [state for state, _ in outcomes] == ["preempted", "preempted"]
    assert not (run / "overlap.json").exists() and not _ledger(run)
    outcomes = workers(2).run("gate_jobs.train_with_many_beats", **arguments, signalled=None)
    assert [state for state, _ in outcomes] == ["finished", "finished"] and len(_ledger(run)) == 1


def _ledger(run) -> list[dict]:
    return [line for line in read_lines(run / "ledger.jsonl") if line["kind"] == "overlap"]


def _known(run) -> list[dict]:
    return list(json.loads((run / "overlap.json").read_text())["corpora"].values())

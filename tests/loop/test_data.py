"""The data of a run: what is asked for takes effect, what is decided stays decided, and what was seen can be told."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from cpt_mega.data.indexed import mask_path
from cpt_mega.errors import InputError
from cpt_mega.loop.replay import Replay
from tests.helpers.jobsite import metrics, status, write_documents
from tests.helpers.workers import JobFailed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "inspect_data.py"
CURRICULUM = (
    "data.curriculum=[{tokens: 0, weights: {domain: 1, replay: 3}}, {tokens: 1000, weights: {domain: 1, replay: 0}}]"
)
ADAPTIVE = ["data.adaptive.interval_tokens=300", "data.adaptive.strength=40"]


def run_of(workers, jobsite, run, *overrides, world=1):
    words = [f"run.dir={run}", "eval.sets=[]", *overrides]
    return workers(world).run("train", config=jobsite.config, overrides=words)[0]


def ledger(run, kind):
    lines = map(json.loads, (run / "ledger.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def seen(run):
    replay = Replay(run)
    return [[(row.source, row.row) for row in replay.rows_of(step)] for step in range(1, replay.last_step + 1)]


@pytest.fixture(scope="module")
def two_domains(jobsite, tmp_path_factory):
    """Sources of one role on which the model's losses differ: one repeats a token, which is learnt at once."""
    folder = tmp_path_factory.mktemp("domains")
    write_documents(folder / "same", [[7] * 20 + [0] for _ in range(60)])
    specs = [
        {"name": "same", "path": str(folder / "same"), "role": "domain"},
        {"name": "domain", "path": f"{jobsite.folder}/domain", "role": "domain"},
        {"name": "replay", "path": f"{jobsite.folder}/replay", "role": "replay"},
    ]
    return "data.sources=" + yaml.safe_dump(specs, default_flow_style=True, width=10**6).strip()


def test_the_mixture_follows_a_curriculum(workers, jobsite, tmp_path):
    run_of(workers, jobsite, tmp_path / "run", CURRICULUM)
    lines = metrics(tmp_path / "run", "train")
    first, last = lines[0]["tokens_by_source"], lines[-1]["tokens_by_source"]
    assert first["replay"] > 1.5 * first["domain"]
    gained = {name: last[name] - lines[-2]["tokens_by_source"][name] for name in last}
    assert gained["domain"] > 5 * gained["replay"]
    assert last["replay"] == pytest.approx(375, abs=64)  # of the first 1,000 tokens: the mean of 3/4 and 0 is 3/8


@pytest.mark.parametrize("world", [1, 2])
def test_budget_and_ledgers_count_what_a_loss_mask_counts(workers, jobsite, tmp_path, world):
    documents = [[*range(1, 25), 0] for _ in range(40)]
    write_documents(tmp_path / "chat", documents)
    mask_path(tmp_path / "chat").write_bytes(bytes([0] * 20 + [1] * 5) * len(documents))
    chat = {"name": "chat", "path": str(tmp_path / "chat"), "role": "instruct", "weight": 0.5}
    domain = {"name": "domain", "path": f"{jobsite.folder}/domain", "role": "domain", "weight": 0.5}
    sources = "data.sources=" + yaml.safe_dump([domain, chat], default_flow_style=True, width=10**6).strip()
    run_of(workers, jobsite, tmp_path / "run", sources, "train.tokens=300", world=world)
    replay, counted = Replay(tmp_path / "run"), {"domain": 0, "chat": 0}
    for line in metrics(tmp_path / "run", "train"):
        for row in replay.rows_of(line["step"]):
            of_pieces = (piece.length - max(0, 20 - piece.start) * (row.source == "chat") for piece in row.pieces)
            counted[row.source] += sum(of_pieces)
        assert line["tokens_by_source"] == counted and line["tokens"] == sum(counted.values())
    assert 300 <= line["tokens"] < 300 + 8 * 32 and abs(counted["chat"] - counted["domain"]) < 2 * 32


def test_a_source_that_is_read_out_ends_the_run(workers, jobsite, tmp_path):
    state, reason = run_of(workers, jobsite, tmp_path / "run", "data.max_epochs=0.3", "train.tokens=100000")
    assert state == "finished" and "source domain has been read 0.3 times (data.max_epochs)" in reason
    assert status(tmp_path / "run")["step"] == metrics(tmp_path / "run", "train")[-1]["step"] > 0


def test_the_end_of_the_data_is_judged_as_the_end_of_the_budget_is(workers, jobsite, tmp_path):
    words = [f"run.dir={tmp_path / 'run'}", "data.max_epochs=0.3", "train.tokens=100000", "logging.interval_steps=100"]
    gate = "gates.general_perplexity_limit=10"
    state, reason = workers(1).run("train", config=jobsite.config, overrides=[*words, gate])[0]
    last = status(tmp_path / "run")["step"]
    assert state == "finished" and reason.startswith("reached ") and "of 100,000 tokens: source domain" in reason
    assert [line["step"] for line in metrics(tmp_path / "run", "eval")] == [0, 0, last, last]
    assert [line["step"] for line in ledger(tmp_path / "run", "verdict")] == [last]
    # the same command again finds nothing to do, and the end as it is
    assert workers(1).run("train", config=jobsite.config, overrides=[*words, gate])[0][0] == "finished"
    assert len(ledger(tmp_path / "run", "verdict")) == 1
    strict = [f"run.dir={tmp_path / 'strict'}", *words[1:], "optimizer.lr=1.0", "gates.general_perplexity_limit=0.01"]
    (tmp_path / "strict").mkdir()
    for _ in range(last):  # stopped at every step, the last one too, before it could know that it was the last
        (tmp_path / "strict" / "STOP").touch()
        assert workers(1).run("train", config=jobsite.config, overrides=strict)[0][0] == "preempted"
    assert workers(1).run("train", config=jobsite.config, overrides=strict)[0][0] == "gate_stop"
    often = [f"run.dir={tmp_path / 'often'}", *words[1:], gate, "eval.interval_tokens=1"]
    workers(1).run("train", config=jobsite.config, overrides=often)
    assert [line["step"] for line in ledger(tmp_path / "often", "verdict")] == list(range(1, last + 1))


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.full)])
def test_weights_follow_the_losses_and_a_stopped_run_goes_on_bit_for_bit(
    workers, jobsite, tmp_path, two_domains, world
):
    overrides = (two_domains, *ADAPTIVE, "train.tokens=1500")
    run_of(workers, jobsite, tmp_path / "through", *overrides, world=world)
    decided = ledger(tmp_path / "through", "weights")
    assert len(decided) >= 3 and decided[0]["by"] == "data.adaptive"
    assert decided[-1]["weights"]["domain"] > 1.5 * decided[-1]["weights"]["same"]
    assert all(line["weights"]["replay"] == pytest.approx(0.2) for line in decided)

    (tmp_path / "cut").mkdir()
    for _ in range(3):
        (tmp_path / "cut" / "STOP").touch()
        assert run_of(workers, jobsite, tmp_path / "cut", *overrides, world=world)[0] == "preempted"
    assert run_of(workers, jobsite, tmp_path / "cut", *overrides, world=world)[0] == "finished"
    runs = [metrics(tmp_path / name, "train") for name in ("through", "cut")]
    assert [[line["loss"], line["tokens_by_source"]] for line in runs[0]] == [
        [line["loss"], line["tokens_by_source"]] for line in runs[1]
    ]
    assert [line["weights"] for line in ledger(tmp_path / "cut", "weights")] == [line["weights"] for line in decided]
    assert seen(tmp_path / "cut") == seen(tmp_path / "through")


def test_every_step_can_be_told_as_it_was(workers, jobsite, tmp_path):
    """Rows by the ledger give the tokens that each source is said to have had; documents are found again where they were."""
    run = tmp_path / "run"
    run_of(workers, jobsite, run)
    replay, before = Replay(run), {}
    for line in metrics(run, "train"):
        rows = replay.rows_of(line["step"])
        now = dict(before)
        for row in rows:
            now[row.source] = now.get(row.source, 0) + sum(piece.length for piece in row.pieces)
            assert sum(row.packed.doc_lengths) == 32
        assert now == {name: tokens for name, tokens in line["tokens_by_source"].items() if tokens}
        before = now
    third = replay.rows_of(3)[5]
    found = list(replay.when_seen(third.source, third.pieces[0].document))
    assert (3, 5, third.pieces[0]) in found
    for step, place, piece in found:
        assert piece in replay.rows_of(step)[place].pieces


def assert_tokens_are_those_of_the_metrics(run):
    """Of each step's rows as they are told: what the run itself counted when it drew them."""
    replay, before = Replay(run), {}
    for line in metrics(run, "train"):
        gained = {name: tokens - before.get(name, 0) for name, tokens in line["tokens_by_source"].items()}
        told = dict.fromkeys(gained, 0)
        for row in replay.rows_of(line["step"]):
            told[row.source] += sum(piece.length for piece in row.pieces)
        assert told == gained, line["step"]
        before = line["tokens_by_source"]


@pytest.mark.parametrize("world", [1, 2])
def test_decisions_after_a_source_was_read_out_are_told_too(workers, jobsite, tmp_path, two_domains, world):
    """Those of the losses give it no share again."""
    limits = ("data.max_epochs=0.6", "data.at_max_epochs=drop", "train.tokens=4000")
    run_of(workers, jobsite, tmp_path / "run", two_domains, *ADAPTIVE, *limits, world=world)
    lines = ledger(tmp_path / "run", "weights")
    dropped = [line["dropped"] for line in lines if "dropped" in line]
    assert dropped and len(set(dropped)) == len(dropped)
    later = lines[[line.get("dropped") for line in lines].index(dropped[0]) + 1 :]
    assert any("weights" in line for line in later)
    assert all(line["weights"][dropped[0]] == 0 for line in later if "weights" in line)
    assert_tokens_are_those_of_the_metrics(tmp_path / "run")


def test_what_was_seen_is_told_the_same_from_the_ledger_alone(workers, jobsite, tmp_path):
    """The lines of the metrics only make it quick; also where a source was read out, stopped and went on."""
    run, overrides = tmp_path / "run", ("data.max_epochs=1.2", "data.at_max_epochs=drop", "train.tokens=4000")
    run.mkdir()
    for _ in range(3):
        (run / "STOP").touch()
        run_of(workers, jobsite, run, *overrides)
    run_of(workers, jobsite, run, *overrides)
    (drop,) = ledger(run, "weights")
    places = [line for line in ledger(run, "data") if line["step"] == drop["step"]]
    assert drop["dropped"] == "domain" and places[-1]["state"]["dropped"] == ["domain"]

    def told():
        replay = Replay(run)
        documents = [(name, number) for name in ("domain", "replay") for number in (0, 7, 59)]
        return seen(run), replay.last_step, [list(replay.when_seen(*document)) for document in documents]

    quick = told()
    assert quick[1] == metrics(run, "train")[-1]["step"] and sum(map(len, quick[2])) > 6
    assert_tokens_are_those_of_the_metrics(run)
    (run / "metrics.jsonl").unlink()
    assert told() == quick


def test_the_tool_tells_it(workers, jobsite, tmp_path):
    run_of(workers, jobsite, tmp_path / "run")

    def tool(*words):
        command = [sys.executable, str(TOOL), "--run", str(tmp_path / "run"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    rows = Replay(tmp_path / "run").rows_of(2)
    told = json.loads(tool("--step", "2", "--json").stdout)["rows"]
    assert [(row["source"], row["row"]) for row in told] == [(row.source, row.row) for row in rows]
    first, packed = told[0]["documents"], rows[0].packed
    assert [token for document in first for token in document["ids"]] == packed.ids[: 32 - told[0]["padding"]].tolist()
    assert [flag for document in first for flag in document["mask"]] == packed.loss_mask[
        : 32 - told[0]["padding"]
    ].tolist()
    name = f"{rows[0].source}:{first[0]['document']}"
    seen = json.loads(tool("--document", name, "--json").stdout)["seen"]
    assert {"step": 2, "place": 0, **{key: first[0][key] for key in ("document", "start", "length")}} in seen
    assert "which the run has not finished" in tool("--step", "9").stdout
    text = tool("--step", "2").stdout
    assert "step 2 of" in text and f"row 0: row {rows[0].row} of {rows[0].source}" in text
    assert "tokens" in tool("--document", name).stdout.splitlines()[1]
    for words, message in (
        (["--step", "0"], "--step = 0"),
        ([], "add --step K, or --document SOURCE:I"),
        (["--document", "17"], "give SOURCE:I"),
        (["--document", "domain:x"], "--document = 'x': give a number"),
    ):
        refused = tool(*words)
        assert refused.returncode == 2 and message in refused.stderr


def test_excluded_rows_are_not_seen_and_the_others_stay_in_order(workers, jobsite, tmp_path):
    run_of(workers, jobsite, tmp_path / "plain")
    plain = [ref for step in seen(tmp_path / "plain") for ref in step]
    bad = [row for source, row in plain[8:12] if source == "domain"]
    run_of(workers, jobsite, tmp_path / "without", f"data.exclude={{domain: {bad}}}")
    stepped = [ref for step in seen(tmp_path / "without") for ref in step]
    assert bad and not {("domain", row) for row in bad} & set(stepped)
    restored = ledger(tmp_path / "without", "restore")
    more = ("train.tokens=1200", "restore.accept=[train.tokens]")
    run_of(workers, jobsite, tmp_path / "without", *more)
    rows = {item: note for item, _, note in ledger(tmp_path / "without", "restore")[len(restored)]["rows"]}
    assert rows["data.exclude.domain"] == f"{len(bad)} rows stay excluded, 0 more from here on"
    assert not {("domain", row) for row in bad} & {ref for step in seen(tmp_path / "without") for ref in step}
    expected = [ref for ref in plain if ref[0] == "domain" and ref[1] not in bad]
    assert [ref for ref in stepped if ref[0] == "domain"][: len(expected)] == expected


@pytest.mark.parametrize("world", [1, 2])
def test_odd_rows_are_written_down_once_with_their_documents(workers, jobsite, tmp_path, world):
    random = np.random.default_rng(0)
    odd = [[7] * 20 + [0]] * 12
    write_documents(tmp_path / "mixed", [*odd, *random.integers(1, 301, (30, 31)).tolist()])
    source = f"data.sources=[{{name: mixed, path: {tmp_path}/mixed, role: domain}}]"
    run_of(workers, jobsite, tmp_path / "run", source, "data.row_checks={action: skip, max_run: 15}", world=world)
    hits = ledger(tmp_path / "run", "odd_row")
    assert hits and all(hit["documents"][0] < len(odd) and hit["action"] == "skip" for hit in hits)
    assert {hit["problem"] for hit in hits} == {"the same token 20 times in a row"}
    trained = Replay(tmp_path / "run")
    for step in range(1, trained.last_step + 1):
        assert all(piece.document >= len(odd) for row in trained.rows_of(step) for piece in row.pieces)
    passed = [hit["documents"][0] for hit in hits]
    assert len(passed) >= len(odd) / 2 and len({(hit["step"], hit["row"]) for hit in hits}) == len(hits)


def test_a_source_that_came_later_is_found_and_torn_lines_are_passed_over(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    run_of(workers, jobsite, run)
    more = "data.sources=" + yaml.safe_dump(
        [
            {"name": name, "path": f"{jobsite.folder}/{path}", "role": role}
            for name, path, role in (
                ("domain", "domain", "domain"),
                ("replay", "replay", "replay"),
                ("new", "domain.heldout", "domain"),
            )
        ],
        default_flow_style=True,
        width=10**6,
    )
    with open(run / "ledger.jsonl", "a") as stream:
        stream.write('{"kind": "da')  # killed there
    run_of(workers, jobsite, run, more.strip(), "train.tokens=2000", "restore.accept=[data.sources, train.tokens]")
    replay = Replay(run)
    last = [row for row in replay.rows_of(replay.last_step) if row.source == "new"][0]
    assert replay.last_step in [step for step, _, _ in replay.when_seen("new", last.pieces[0].document)]
    assert all(row.source != "new" for row in replay.rows_of(2))
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"kind": "tra')
    assert Replay(run).last_step == replay.last_step


def test_what_cannot_be_told_is_said(workers, jobsite, tmp_path):
    run_of(workers, jobsite, tmp_path / "run")
    replay = Replay(tmp_path / "run")
    with pytest.raises(InputError, match="--step = 0: this folder's run begins with step 1"):
        replay.rows_of(0)
    with pytest.raises(InputError, match="no such source; its sources are domain, replay"):
        list(replay.when_seen("x", 0))
    with pytest.raises(InputError, match="holds documents 0 to 59"):
        list(replay.when_seen("domain", 60))
    with pytest.raises(InputError, match="name the run.dir of a run"):
        Replay(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.curriculum=[{tokens: 0, weights: {x: 1}}]", "data.curriculum weights = 'x': no such source"),
        ("data.exclude={domain: [99999]}", "excluded row of domain = 99999"),
        ("data.exclude={x: [1]}", "excluded source = 'x'"),
    ],
)
def test_what_does_not_fit_the_sources_is_refused_before_the_run(workers, jobsite, tmp_path, override, message):
    with pytest.raises(JobFailed, match=message):
        run_of(workers, jobsite, tmp_path / "run", override)


def test_a_curriculum_and_the_losses_do_not_both_decide(workers, jobsite, tmp_path):
    with pytest.raises(JobFailed, match="leave one of data.curriculum and data.adaptive out"):
        run_of(workers, jobsite, tmp_path / "run", CURRICULUM, *ADAPTIVE)

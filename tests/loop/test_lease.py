"""One owner of a run folder: who is refused, who takes over and when, and what an owner does that has lost it."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest

from cpt_mega.loop import lease as module
from cpt_mega.loop.lease import LEASE, Lease, LeaseHeld, Owner, holder
from cpt_mega.loop.run_folder import RunFolder
from tests.helpers.jobsite import metrics

ROOT = Path(__file__).resolve().parent.parent.parent
TAKE = "import sys; from pathlib import Path; from cpt_mega.loop.lease import *; lease = Lease.take(Path(sys.argv[1]))"


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    monkeypatch.setattr(module, "STILL_S", 0.4)
    monkeypatch.setattr(module, "LOOK_S", 0.02)


@pytest.fixture
def at_once(monkeypatch):
    """Nobody is waited for."""

    def waits(place, content, other):
        raise AssertionError(f"waits for {other}")

    monkeypatch.setattr(module, "_watch", waits)


def _elsewhere(**changes) -> Owner:
    return replace(Owner.here(), **({"host": "elsewhere"} | changes))


def _ended() -> Owner:
    """A process of this host that is no more: another has its pid."""
    here = Owner.here()
    return replace(here, started=here.started - 1)


def _put(folder: Path, owner: Owner) -> Owner:
    (folder / LEASE).write_bytes(owner.document(0))
    return owner


def _start(code: str, *words: object) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, text=True, **pipes)


def _until(condition, limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def test_a_lease_says_whose_it_is_and_ends_without_a_trace(tmp_path):
    lease = Lease.take(tmp_path)
    found = json.loads((tmp_path / LEASE).read_text())
    here = Owner.here()
    assert (found["host"], found["pid"], found["boot"]) == (here.host, os.getpid(), here.boot)
    assert found["started"] == here.started and found["pid_namespace"] == here.pid_namespace
    assert os.listdir(tmp_path) == [LEASE]
    lease.release()
    assert os.listdir(tmp_path) == []
    Lease.take(tmp_path).release()


def test_the_heartbeat_moves_and_the_file_is_always_whole(tmp_path):
    lease = Lease.take(tmp_path)
    seen = set()

    def has_moved():
        content = (tmp_path / LEASE).read_bytes()
        assert Owner.parse(content) is not None
        seen.add(json.loads(content)["heartbeat"])
        return len(seen) > 3

    _until(has_moved)
    lease.release()


def test_a_living_owner_on_this_host_is_not_disturbed(tmp_path, at_once):
    with _start(f"{TAKE}; print('taken', flush=True); sys.stdin.read()", tmp_path) as owner:
        assert owner.stdout.readline() == "taken\n"
        before = (tmp_path / LEASE).read_bytes()
        said = RunFolder(tmp_path, writes=True).claim()
        assert said == (
            f"another run is writing here (pid {owner.pid} on {Owner.here().host}); "
            "wait for it, or name another run.dir"
        )
        assert (tmp_path / LEASE).read_bytes() == before and os.listdir(tmp_path) == [LEASE]


@pytest.mark.parametrize("waited_for", [True, False])
def test_a_killed_owner_on_this_host_is_succeeded_at_once(tmp_path, at_once, waited_for):
    owner = _start(f"{TAKE}; print('taken', flush=True); sys.stdin.read()", tmp_path)
    assert owner.stdout.readline() == "taken\n"
    owner.kill()
    if waited_for:
        owner.wait()
    else:  # it stays in the table of processes
        _until(lambda: module._state(owner.pid)[0] == "Z")
    Lease.take(tmp_path).release()
    assert os.listdir(tmp_path) == []
    owner.communicate()


@pytest.mark.parametrize("changes", [{"boot": "before"}, {"started": 1}], ids=["another boot", "pid has a new process"])
def test_an_owner_that_cannot_be_alive_is_succeeded_at_once(tmp_path, at_once, changes):
    _put(tmp_path, replace(Owner.here(), **changes))
    Lease.take(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_process_of_another_user_that_proc_hides_is_alive(tmp_path, at_once, monkeypatch):
    _put(tmp_path, replace(Owner.here(), pid=4321))
    here, state = os.getpid(), module._state

    def kill(pid, number):
        raise PermissionError(errno.EPERM, "")

    def only_mine(pid):
        if pid != here:
            raise FileNotFoundError
        return state(pid)

    monkeypatch.setattr(module.os, "kill", kill)
    monkeypatch.setattr(module, "_state", only_mine)
    with pytest.raises(LeaseHeld, match="pid 4321 on"):
        Lease.take(tmp_path)


FOREIGN = [{"host": "elsewhere"}, {"machine": "another"}, {"pid_namespace": "pid:[1]"}]


@pytest.mark.parametrize("changes", FOREIGN, ids=lambda changes: next(iter(changes)))
def test_an_owner_elsewhere_is_succeeded_when_it_stays_still(tmp_path, capfd, changes):
    """Even one whose pid is that of no process here, or which was started under another boot: that says nothing of it."""
    _put(tmp_path, _elsewhere(**{"host": Owner.here().host, "boot": "other", "pid": 2**22 + 1} | changes))
    begin = time.monotonic()
    Lease.take(tmp_path).release()
    assert time.monotonic() - begin >= module.STILL_S
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"pid {2**22 + 1} on" in said and "waiting up to 0.4 s" in said
    assert os.listdir(tmp_path) == []


def test_an_owner_elsewhere_is_let_be_as_soon_as_its_heartbeat_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 600.0)
    owner = _put(tmp_path, _elsewhere(pid=7))

    def beat():
        with open(tmp_path / LEASE, "r+b") as stream:
            stream.write(owner.document(1))

    timer = threading.Timer(0.2, beat)
    timer.start()
    with pytest.raises(LeaseHeld, match="pid 7 on elsewhere"):
        Lease.take(tmp_path)
    timer.join()
    assert (tmp_path / LEASE).read_bytes() == owner.document(1) and os.listdir(tmp_path) == [LEASE]


def test_a_heartbeat_after_the_last_look_still_counts(tmp_path, monkeypatch):
    owner, judge, beats = _put(tmp_path, _elsewhere()), module._judge, iter([1])

    def judge_and_beat(place, content, mine):
        judge(place, content, mine)
        for count in beats:
            (tmp_path / LEASE).write_bytes(owner.document(count))

    monkeypatch.setattr(module, "_judge", judge_and_beat)
    monkeypatch.setattr(module, "STILL_S", 0.1)
    lease = Lease.take(tmp_path)  # it was judged anew, and was still from then on
    assert next(beats, None) is None
    lease.release()
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_given_up_while_one_waits_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 600.0)
    _put(tmp_path, _elsewhere())
    timer = threading.Timer(0.2, (tmp_path / LEASE).unlink)
    timer.start()
    begin = time.monotonic()
    Lease.take(tmp_path).release()
    timer.join()
    assert time.monotonic() - begin < 60 and os.listdir(tmp_path) == []


def test_one_elsewhere_that_died_while_it_took_over_is_succeeded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 0.1)
    owner = _put(tmp_path, _elsewhere())
    (tmp_path / f"{LEASE}.after-{owner.nonce}").write_bytes(_elsewhere().document(0))
    lease = Lease.take(tmp_path)
    assert os.listdir(tmp_path) == [LEASE]
    lease.release()


def _changed(**changes) -> bytes:
    return json.dumps(json.loads(Owner.here().document(0)) | changes).encode()


CORRUPT = {
    "empty": b"",
    "cut": b'{"host": "el',
    "no text": b"\xff\xfe\x00",
    "no object": b"[1, 2]",
    "deep": b"[" * 4000,
    "a field is missing": b'{"host": "elsewhere"}',
    "pid is a word": _changed(pid="1"),
    "pid is a truth": _changed(pid=True),
    "pid is a group": _changed(pid=-1),
    "pid is large": _changed(pid=10**30),
    "nonce is a path": _changed(nonce="../../../x"),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
def test_what_is_no_lease_is_waited_for_and_succeeded(tmp_path, capfd, content, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 0.1)
    (tmp_path / LEASE).write_bytes(content)
    begin = time.monotonic()
    lease = Lease.take(tmp_path)
    assert time.monotonic() - begin >= 0.1
    assert "a process whose lease cannot be read" in capfd.readouterr().err
    lease.release()
    assert os.listdir(tmp_path) == []


def test_what_is_no_lease_and_changes_is_let_be(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 600.0)
    (tmp_path / LEASE).write_bytes(b"?")
    timer = threading.Timer(0.2, (tmp_path / LEASE).write_bytes, [b"!"])
    timer.start()
    with pytest.raises(LeaseHeld, match="cannot be read"):
        Lease.take(tmp_path)
    timer.join()


def test_who_holds_a_folder_is_told_without_waiting(tmp_path, at_once):
    assert holder(tmp_path) is None
    _put(tmp_path, _ended())
    assert holder(tmp_path) is None
    _put(tmp_path, _elsewhere(pid=7))
    assert holder(tmp_path) == "pid 7 on elsewhere"
    (tmp_path / LEASE).write_text("nothing")
    assert holder(tmp_path) == "a process whose lease cannot be read"


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path):
    (tmp_path / "file").touch()
    assert "cannot be written" in RunFolder(tmp_path / "file" / "run", writes=True).claim()


@pytest.mark.parametrize("before", ["nobody", "ended", "corrupt"])
def test_of_many_threads_one_takes_the_folder(tmp_path, before, monkeypatch):
    monkeypatch.setattr(module, "STILL_S", 0.05)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(30):
            folder = tmp_path / str(turn)
            folder.mkdir()
            if before != "nobody":
                (folder / LEASE).write_bytes(_ended().document(0) if before == "ended" else b"")
            _one_of_many(folder)
    finally:
        sys.setswitchinterval(interval)


def _one_of_many(folder: Path, count: int = 8) -> None:
    barrier, taken, refused = threading.Barrier(count), [], []

    def start():
        barrier.wait()
        try:
            taken.append(Lease.take(folder))
        except LeaseHeld:
            refused.append(True)

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(taken), len(refused)) == (1, count - 1)
    taken[0].beat()
    assert taken[0].lost is None and os.listdir(folder) == [LEASE]
    taken[0].release()
    assert os.listdir(folder) == []


def test_of_many_processes_one_takes_each_folder(tmp_path):
    """They go through the same folders in the same order, and hold what they have taken until all are through."""
    code = """
import sys
from pathlib import Path
from cpt_mega.loop.lease import Lease, LeaseHeld
held = []
print("ready", flush=True)
sys.stdin.readline()
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        held.append((folder.name, Lease.take(folder)))
    except LeaseHeld:
        pass
print(" ".join(name for name, _ in held), flush=True)
sys.stdin.readline()
for _, lease in held:
    lease.release()
"""
    for turn in range(60):
        (tmp_path / f"{turn:02d}").mkdir()
        _put(tmp_path / f"{turn:02d}", _ended())
    processes = [_start(code, tmp_path) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [name for process in processes for name in process.stdout.readline().split()]
    assert sorted(taken) == [f"{turn:02d}" for turn in range(60)]
    for process in processes:
        process.communicate("\n")
    assert [os.listdir(folder) for folder in tmp_path.iterdir()] == [[]] * 60


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "and a third"])
def test_who_is_slow_after_judging_does_not_disturb_who_was_faster(tmp_path, monkeypatch, ends):
    """Between its verdict and its token another takes over; or takes over and ends, and a third starts."""
    _put(tmp_path, _ended())
    judge, faster = module._judge, []

    def judge_slowly(place, content, owner):
        judge(place, content, owner)
        if not faster:
            faster.append(None)
            faster[0] = Lease.take(tmp_path)
            if ends:
                faster[0].release()
                faster[0] = Lease.take(tmp_path)

    monkeypatch.setattr(module, "_judge", judge_slowly)
    with pytest.raises(LeaseHeld):
        Lease.take(tmp_path)
    faster[0].beat()
    assert faster[0].lost is None and os.listdir(tmp_path) == [LEASE]
    faster[0].release()
    assert os.listdir(tmp_path) == []


def test_an_owner_that_ends_while_it_is_succeeded_leaves_the_successor_its_lease(tmp_path, monkeypatch):
    """It was taken for dead and was not: it goes to give its lease up when another has the token already."""
    former = Lease.take(tmp_path)
    linked, calls = module._linked, []
    monkeypatch.setattr(Owner, "has_seen_end", lambda self, other: True)

    def linked_then_former_ends(written, place):
        result = linked(written, place)
        calls.append(place.name)
        if place.name.startswith(f"{LEASE}.after-") and len(calls) == 2:
            former.release()
            assert (tmp_path / LEASE).exists()
        return result

    monkeypatch.setattr(module, "_linked", linked_then_former_ends)
    successor = Lease.take(tmp_path)
    successor.beat()
    assert successor.lost is None
    successor.release()
    assert os.listdir(tmp_path) == []


def test_an_owner_that_ends_after_it_was_succeeded_leaves_the_successor_its_lease(tmp_path, monkeypatch):
    """It was taken for dead, and has looked at its lease for the last time before another has taken over."""
    former = Lease.take(tmp_path)
    linked, successor = module._linked, []

    def taken_over_before(written, place):
        if not successor:
            successor.append(None)
            with monkeypatch.context() as patch:
                patch.setattr(Owner, "has_seen_end", lambda self, other: True)
                patch.setattr(module, "_remove_left_over", lambda folder, owner: None)  # the former one is not dead
                successor[0] = Lease.take(tmp_path)
        return linked(written, place)

    monkeypatch.setattr(module, "_linked", taken_over_before)
    former.release()
    successor[0].beat()
    assert successor[0].lost is None and os.listdir(tmp_path) == [LEASE]
    successor[0].release()
    assert os.listdir(tmp_path) == []


KILLED = """
import os, sys
from pathlib import Path
from cpt_mega.loop.lease import Lease
left = int(sys.argv[2])

def killing(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), 9)
        return function(*arguments, **options)
    return call

for name in ("fsync", "link", "replace", "unlink"):
    setattr(os, name, killing(getattr(os, name)))
Path.unlink = lambda path, missing_ok=False: os.unlink(path) if path.exists() or not missing_ok else None
Lease.take(Path(sys.argv[1])).release()
"""


@pytest.mark.parametrize("before", ["nobody", "ended"])
def test_a_process_killed_at_any_moment_blocks_nobody(tmp_path, before, at_once):
    """Killed before each thing it does to the folder, in a folder of its own and in one that all were killed in."""
    (tmp_path / "all").mkdir()
    for moment in range(1, 40):
        folder = tmp_path / str(moment)
        folder.mkdir()
        codes = []
        for place in (folder, tmp_path / "all"):
            if before == "ended" and not (place / LEASE).exists():
                _put(place, _ended())
            process = _start(KILLED, place, moment)
            _, said = process.communicate()
            codes.append(process.returncode)
            assert process.returncode in (0, -signal.SIGKILL), said
        Lease.take(folder).release()
        assert os.listdir(folder) == []
        if codes[0] == 0:
            break
    assert codes[0] == 0 and moment > 6  # it was killed before, and came through in the end
    Lease.take(tmp_path / "all").release()
    assert os.listdir(tmp_path / "all") == []


@pytest.mark.parametrize("removed", [False, True], ids=["taken over", "removed"])
def test_an_owner_notices_that_the_lease_is_no_longer_its_own(tmp_path, removed):
    folder = RunFolder(tmp_path, writes=True)
    assert folder.claim() is None and folder.writes and folder.lost is None
    folder.open("", [], [], None)
    if removed:
        (tmp_path / LEASE).unlink()
    else:
        other = _elsewhere(pid=7)
        (tmp_path / "new").write_bytes(other.document(3))
        os.replace(tmp_path / "new", tmp_path / LEASE)
    _until(lambda: folder.lost is not None)
    assert folder.lost == ("its .lease was removed" if removed else "pid 7 on elsewhere took it over")
    assert not folder.writes
    folder.metric({"step": 1})
    folder.decide({"kind": "verdict"})
    folder.status("running", "", 1, 1, "", "")
    folder.close()
    assert metrics(tmp_path, "train") == []
    names = {"config.yaml", "ranks.json", "sources.json", "metrics.jsonl"}
    assert set(os.listdir(tmp_path)) == (names if removed else names | {LEASE})
    assert removed or (tmp_path / LEASE).read_bytes() == other.document(3)


def test_a_heartbeat_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    lease, write, failed = Lease.take(tmp_path), os.pwrite, []

    def full(*arguments):
        failed.append(True)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "pwrite", full)
    _until(lambda: len(failed) > 3)
    before = (tmp_path / LEASE).read_bytes()
    assert lease.lost is None
    monkeypatch.setattr(module.os, "pwrite", write)
    _until(lambda: (tmp_path / LEASE).read_bytes() != before)
    lease.release()
    assert os.listdir(tmp_path) == []


def test_a_forked_child_neither_renews_nor_releases(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 600.0)
    lease = Lease.take(tmp_path)
    before = (tmp_path / LEASE).read_bytes()
    child = os.fork()
    if child == 0:
        lease.beat()
        lease.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / LEASE).read_bytes() == before
    lease.beat()
    assert (tmp_path / LEASE).read_bytes() != before and lease.lost is None
    lease.release()


def test_the_thread_ends_at_once_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 600.0)
    folder = RunFolder(tmp_path, writes=True)
    assert folder.claim() is None
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "lease")
    assert thread.daemon
    lease, begin = weakref.ref(folder._lease), time.monotonic()
    folder.close()
    assert not thread.is_alive() and time.monotonic() - begin < 5
    del folder, thread
    assert lease() is None


def test_other_processes_than_the_main_one_leave_the_folder_alone(tmp_path):
    folder = RunFolder(tmp_path / "run", writes=False)
    assert folder.claim() is None and not folder.writes and folder.lost is None
    folder.close()
    assert not (tmp_path / "run").exists()


TRAIN = """
import sys
from cpt_mega.loop import lease
lease.BEAT_S = float(sys.argv[1])
from cpt_mega.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("beat_s", [0.02, 600], ids=["heartbeat", "save"])
def test_a_run_that_lost_its_folder_ends_as_a_fault_and_saves_nothing(jobsite, tmp_path, beat_s):
    """At the step after the heartbeat that finds it; or before a save, whether there was a heartbeat or not."""
    run = tmp_path / "run"
    words = [f"run.dir={run}", "train.tokens=10_000_000", "eval.sets=[]"]
    process = _start(TRAIN, beat_s, "--config", jobsite.config, *words)
    _until(lambda: (run / "metrics.jsonl").is_file() and len(metrics(run, "train")) > 1)
    other = _elsewhere(pid=7)
    (run / "new").write_bytes(other.document(3))
    os.replace(run / "new", run / LEASE)
    if beat_s == 600:
        (run / "STOP").touch()  # which saves at the end
    _, said = process.communicate(timeout=120)
    assert process.returncode == 70, said
    assert re.search("^fault: .*pid 7 on elsewhere took it over", said, re.MULTILINE) and "Traceback" not in said
    assert not (run / "checkpoints").exists()
    assert (run / LEASE).read_bytes() == other.document(3)
    assert json.loads((run / "status.json").read_text())["state"] == "running"  # not this run's any more


def test_all_processes_of_a_run_that_lost_its_folder_say_the_same(workers, jobsite, tmp_path):
    run = tmp_path / "run"
    words = [f"run.dir={run}", "train.tokens=10_000_000", "eval.sets=[]"]
    said = workers(2).run("train_and_lose_the_folder", config=jobsite.config, overrides=words)
    assert (
        said[0]
        == said[1]
        == [
            "FolderLost",
            f"the run folder {run} is no longer this run's: pid 7 on elsewhere took it over; this run saved nothing more there",
        ]
    )
    assert not (run / "checkpoints").exists()


def test_an_interrupted_wait_leaves_the_status_of_the_run_that_goes_on(jobsite, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    _put(run, _elsewhere())
    (run / "status.json").write_text('{"state": "running", "step": 3}')
    process = _start(TRAIN, 10, "--config", jobsite.config, f"run.dir={run}")
    while "waiting up to 60 s" not in process.stderr.readline():
        assert process.poll() is None
    for _ in range(2):  # the second one is impatience
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert json.loads((run / "status.json").read_text()) == {"state": "running", "step": 3}

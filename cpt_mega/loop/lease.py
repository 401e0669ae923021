"""One owner of a run folder at a time, by a lease: a file that says whose the folder is and that its owner keeps renewing.

A lock of the kernel's would end with its process, but between machines that share a file system it cannot be relied on. What
is relied on here: ``link`` fails where the name exists, ``rename`` replaces in one go, and a file that is opened anew has
what another machine has flushed.

A lease is never changed but by its owner, and in place: whoever lost it writes into a file that no longer has the name. It is
ended, by its owner or by one who takes over, only with a token: a file whose name holds the lease's nonce, so that of many
who see the same stale lease one alone can make it. Who has made it looks at the lease once more; if that is what was judged,
nobody else may end it. One who dies with the token has left a file of the same kind, which is judged and succeeded like a
lease. No name is ever taken away from a file that may be alive, so there is nothing to be put back.
"""

import contextlib
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

LEASE = ".lease"
BEAT_S = 10.0  # between two renewals
STILL_S = 60.0  # an owner that cannot be seen and has not renewed for so long has ended
LOOK_S = 1.0  # between two looks at such an owner's lease
_MOST_BYTES = 4096  # a lease has a tenth of that


class LeaseHeld(Exception):
    """Another run owns the folder, or is about to; the message is its process and host."""


class Lease:
    """This process' own lease on a folder, renewed by a thread until it is released or lost. Made by ``take``.

    Attributes:
        lost: who has the folder now, as a part of a sentence; None as long as it is this process'.
    """

    def __init__(self, path: Path, owner: "Owner"):
        self.lost: str | None = None
        self._path, self._owner, self._beats = path, owner, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, folder: Path) -> "Lease":
        """Makes the folder this process' own; may wait ``STILL_S`` for an owner that cannot be seen from here.

        Raises LeaseHeld when it is another's, OSError when the folder cannot be written.
        """
        with _candidate(folder) as (owner, written):
            while not _taken(folder / LEASE, owner, written):
                pass  # what was judged has changed meanwhile: somebody else has got further
        _remove_left_over(folder, owner)
        return cls(folder / LEASE, owner)

    def beat(self) -> None:
        """Renews the lease, or finds it lost. What cannot be written now (a full disk, say) is tried again the next time."""
        if self.lost is not None or os.getpid() != self._owner.pid:  # a forked child's copy is not the owner
            return
        try:
            self.lost = self._renew()
        except FileNotFoundError:
            self.lost = f"its {LEASE} was removed"
        except OSError:
            return

    def release(self) -> None:
        """Stops renewing and gives the folder up, if it is still this process'."""
        if os.getpid() != self._owner.pid:
            return
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # it then stays, until it is seen that this process has ended
            self._remove()

    def _keep(self) -> None:
        """The thread's work: no locks, no imports, no output, because core forks while it goes on."""
        while self.lost is None and not self._stop.wait(BEAT_S):
            self.beat()

    def _renew(self) -> str | None:
        """Overwrites the lease, through one descriptor: if it is another's by now, that one's is not touched."""
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            found = Owner.parse(os.read(descriptor, _MOST_BYTES))
            if found is None or found.nonce != self._owner.nonce:
                return f"{_name(found)} took it over"
            self._beats += 1
            os.pwrite(descriptor, self._owner.document(self._beats), 0)
            os.fsync(descriptor)  # other machines see what was flushed
        finally:
            os.close(descriptor)
        return None

    def _remove(self) -> None:
        content = _content(self._path)
        found = Owner.parse(content)
        if found is None or found.nonce != self._owner.nonce:
            return
        with _candidate(self._path.parent) as (_, written):
            token = _successor(self._path, content)
            if _linked(written, token):  # otherwise another is taking over
                if _content(self._path) == content:
                    self._path.unlink()
                token.unlink()


def holder(folder: Path) -> str | None:
    """Who has a folder, as far as can be told without waiting; None where nobody has, or its owner has visibly ended."""
    content = _content(folder / LEASE)
    if content is None:
        return None
    here, other = Owner.here(), Owner.parse(content)
    has_ended = other is not None and here.can_see(other) and here.has_seen_end(other)
    return None if has_ended else _name(other)


@dataclass(frozen=True)
class Owner:
    """A process, so that it can be told from every other one, and the random name of its lease.

    Attributes:
        host, machine: the host's name, and its ``/etc/machine-id``, empty without one: names may be the same in containers.
        boot: of the kernel; it differs after the machine was started again.
        pid_namespace: in which ``pid`` is a process.
        started: when the process began, in the kernel's ticks: another process that got its pid began later.
    """

    host: str
    machine: str
    boot: str
    pid_namespace: str
    pid: int
    started: int
    nonce: str

    @classmethod
    def here(cls) -> "Owner":
        """This process, with a new nonce. Raises OSError where the kernel does not tell (not Linux)."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid, namespace = os.getpid(), os.readlink("/proc/self/ns/pid")
        return cls(socket.gethostname(), _machine(), boot, namespace, pid, _state(pid)[1], uuid.uuid4().hex)

    @classmethod
    def parse(cls, content: bytes | None) -> "Owner | None":
        """The owner that a lease names, or None where it is no lease."""
        try:
            values = json.loads(content or b"")
            owner = cls(**{field.name: values[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        typed = all(type(getattr(owner, field.name)) is field.type for field in fields(cls))
        # the nonce becomes part of a file's name, and a pid below 1 means a group of processes
        return owner if typed and 0 < owner.pid < 2**31 and re.fullmatch("[0-9a-f]{32}", owner.nonce) else None

    def document(self, beats: int) -> bytes:
        """The lease. The heartbeat has a fixed width: renewing changes digits in place, and half of it is a lease too."""
        return json.dumps(asdict(self) | {"heartbeat": f"{beats:012d}"}).encode() + b"\n"

    def can_see(self, other: "Owner") -> bool:
        """Whether a pid means the same process for both, but for a restart of the machine between them."""
        mine, others = ((o.host, o.machine, o.pid_namespace) for o in (self, other))
        return mine == others

    def has_seen_end(self, other: "Owner") -> bool:
        """Whether another that it can see has ended."""
        return self.boot != other.boot or not _lives(other.pid, other.started)

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


def _taken(lease: Path, owner: Owner, written: Path) -> bool:
    """One try; False when what was judged has changed meanwhile. Raises LeaseHeld."""
    stale: list[tuple[Path, bytes]] = []  # the lease, the token that succeeds it, the token that succeeds that one ...
    place = lease
    while not _linked(written, place):
        content = _content(place)
        if content is None:
            return False
        _judge(place, content, owner)
        stale.append((place, content))
        place = _successor(lease, content)
    if not stale:
        return True
    if any(_content(path) != content for path, content in stale):
        place.unlink()
        return False
    os.replace(place, lease)
    for path, _ in stale[1:]:
        path.unlink(missing_ok=True)
    return True


def _judge(place: Path, content: bytes, owner: Owner) -> None:
    """Returns when whoever wrote this has ended, at once where that can be seen; raises LeaseHeld when not."""
    other = Owner.parse(content)
    if other is None or not owner.can_see(other):
        _watch(place, content, other)
    elif not owner.has_seen_end(other):
        raise LeaseHeld(str(other))


def _watch(place: Path, content: bytes, other: Owner | None) -> None:
    """Waits until it has stayed the same for ``STILL_S`` by this process' own clock; raises LeaseHeld when it changes.

    Clocks of two machines are never compared. One that is gone is as good as still: the caller looks again.
    """
    why = f"{place} is held by {_name(other)}, which cannot be seen from here"
    print(f"{why}: waiting up to {STILL_S:g} s for a sign of life before taking over", file=sys.stderr, flush=True)
    end = time.monotonic() + STILL_S
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        found = _content(place)
        if found is None:
            return
        if found != content:
            raise LeaseHeld(_name(Owner.parse(found)))


def _successor(lease: Path, content: bytes) -> Path:
    """The token with which a lease (or a token) of this content is ended."""
    owner = Owner.parse(content)
    key = hashlib.sha256(content).hexdigest()[:32] if owner is None else owner.nonce
    return lease.with_name(f"{LEASE}.after-{key}")


@contextlib.contextmanager
def _candidate(folder: Path) -> Iterator[tuple[Owner, Path]]:
    """This process, and a file that says so, whole and on disk, to be linked to where it is to count."""
    owner = Owner.here()
    path = folder / f"{LEASE}.new-{owner.nonce}"
    try:
        with open(path, "xb") as stream:
            stream.write(owner.document(0))
            stream.flush()
            os.fsync(stream.fileno())
        yield owner, path
    finally:
        path.unlink(missing_ok=True)


def _linked(written: Path, place: Path) -> bool:
    """Gives a file a second name that nothing has yet; False when something has it."""
    try:
        os.link(written, place)
    except FileExistsError:
        return _content(place) == _content(written)  # NFS may ask twice, and hear that of what it has done itself
    return True


def _content(path: Path) -> bytes | None:
    """What a lease holds, read anew; None when there is none."""
    try:
        with open(path, "rb") as stream:
            return stream.read(_MOST_BYTES)
    except FileNotFoundError:
        return None


def _remove_left_over(folder: Path, owner: Owner) -> None:
    """What processes of this host left that were killed while they took or released a lease that is no more."""

    with contextlib.suppress(OSError):  # they are in nobody's way
        for path in folder.glob(f"{LEASE}.*"):
            other = Owner.parse(_content(path))
            if other is not None and owner.can_see(other) and owner.has_seen_end(other):
                path.unlink(missing_ok=True)


def _lives(pid: int, started: int) -> bool:
    """Whether the process that began then is there still; one that was killed and not waited for is not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, which /proc may hide
    try:
        state, began = _state(pid)
    except OSError:
        return True
    return state not in "ZX" and began == started


def _state(pid: int) -> tuple[str, int]:
    """A process' state and its start in ticks since boot, as /proc has them. Raises OSError."""
    # the second field is the program's name in brackets, which may hold brackets and blanks itself
    words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return words[0], int(words[19])


def _machine() -> str:
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def _name(owner: Owner | None) -> str:
    return "a process whose lease cannot be read" if owner is None else str(owner)

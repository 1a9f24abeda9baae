"""One writer a folder: a lock of the system, and a heartbeat for other machines on a shared disk.

.lease names its owner and counts up every BEAT seconds. On one machine the lock alone decides: it
ends with its process, whatever becomes of the process's number. Locks need not reach other
machines, so what another one left is taken over once it stood still for PATIENCE seconds of our own
clock, or at once where its owner gave it back. Standard library only.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinylm.config import BadInput

BEAT = 5.0
"""seconds between two signs of life"""
PATIENCE = 20.0
"""seconds without one after which another machine's lease is taken over"""
GONE = "was deleted or replaced while this process wrote in it"
LOCKLESS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
SIZE = 512  # of a lease in bytes: written over in place, whole


class Owned(BadInput):
    """Another process holds this folder."""


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold a folder for one writer; Owned says who has it. Ends with the process, however.

    What its last owner left half written is deleted first.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(folder / ".lease", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as fault:
        if fault.errno != errno.EROFS:
            raise
        yield  # nobody writes there; whoever tries is told by the disk
        return
    try:
        locked = _locked(folder, handle)
        mine = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid(),
                "key": secrets.token_hex(8), "beats": 0}
        before = _read(handle)
        foreign = before and not (locked and before.get("machine") == mine["machine"])
        if foreign:
            _outlive(folder, handle, before)
        try:
            _write(handle, mine)
        except OSError as fault:  # which has no name of its own
            raise OSError(fault.errno, fault.strerror, str(folder / ".lease")) from None
        if foreign:  # who else waited has written by now, and the last one has it
            time.sleep(BEAT / 5)
            if (now := _read(handle)).get("key") != mine["key"]:
                raise _owned(folder, now)
        try:
            _sweep_out(folder)
            with _beating(folder, handle, mine):
                yield
        except Exception:
            _check(folder, handle)  # what went wrong began with that
            raise
        else:
            _check(folder, handle)
        finally:
            os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def _locked(folder: Path, handle: int) -> bool:
    """Lock the file; False on a disk that has no locks, Owned where another process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _owned(folder, _read(handle)) from None
    except OSError as fault:
        if fault.errno not in LOCKLESS:
            raise
        return False
    return True


def _outlive(folder: Path, handle: int, before: dict[str, Any]) -> None:
    """Watch another machine's lease; Owned at its first sign of life."""
    print(f"{folder} was last written by {_name(before)}; watching for {PATIENCE:g} s whether it "
          "still is", file=sys.stderr)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(BEAT / 5)
        if (now := _read(handle)) != before and now:
            raise _owned(folder, now)


_held: dict[int, tuple[Path, dict[str, Any]]] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def _beating(folder: Path, handle: int, mine: dict[str, Any]) -> Iterator[None]:
    with _guard:
        _held[handle] = folder, mine
        if not any(t.name == _beat.__name__ for t in threading.enumerate()):
            threading.Thread(target=_beat, name=_beat.__name__, daemon=True).start()
    try:
        yield
    finally:
        with _guard:
            del _held[handle]


def _beat() -> None:
    """Give a sign of life for every lease that this process holds, for as long as it lives.

    A process that slept so long that another machine took a folder over must write no more in it.
    """
    while True:
        time.sleep(BEAT)
        with _guard:
            for handle, (folder, mine) in _held.items():
                if (now := _read(handle)).get("key", mine["key"]) != mine["key"]:
                    _leave(f"{folder} was taken over by {_name(now)} while this process gave no "
                           "sign of life")
                if not _there(folder, handle):
                    _leave(f"{folder} {GONE}")
                mine["beats"] += 1
                with contextlib.suppress(OSError):  # a full disk: no beat, and no harm
                    _write(handle, mine)


def _check(folder: Path, handle: int) -> None:
    if not _there(folder, handle):
        raise OSError(errno.ENOENT, GONE, str(folder)) from None


def _there(folder: Path, handle: int) -> bool:
    """Tell whether the lease's file is still the one in the folder."""
    try:
        return os.path.samestat(os.stat(folder / ".lease"), os.fstat(handle))
    except FileNotFoundError:
        return False
    except OSError:  # a disk that does not answer is no proof
        return True


def _leave(why: str) -> None:
    print(f"failed: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _read(handle: int) -> dict[str, Any]:
    """Read who holds a lease; empty for nobody."""
    try:
        found = json.loads(os.pread(handle, SIZE, 0))
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(handle: int, owner: dict[str, Any]) -> None:
    os.pwrite(handle, json.dumps(owner).encode().ljust(SIZE), 0)


def _owned(folder: Path, owner: dict[str, Any]) -> Owned:
    return Owned(f"{folder} is being written by {_name(owner)}; wait for it or stop it")


def _name(owner: dict[str, Any]) -> str:
    return (f"process {owner.get('process')} on {owner.get('host')}" if owner
            else "another process")


def _machine() -> str:
    """Tell this machine, as long as it runs, from every other; containers on it share its locks."""
    place = Path("/proc/sys/kernel/random/boot_id")
    return place.read_text("utf-8").strip() if place.exists() else socket.gethostname()


DRAFT = re.compile(r"\..+\.\d+\.(tmp|old)")  # as files.py names what it has not finished


def _sweep_out(folder: Path) -> None:
    """Delete what the dead left half written, but not in a folder that has its own lease."""
    for path in folder.iterdir():
        if DRAFT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        elif path.is_dir() and not path.is_symlink() and not (path / ".lease").exists():
            _sweep_out(path)

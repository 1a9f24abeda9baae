"""A disk that fails once: the n-th write, fsync, rename, save or delete of ours goes wrong.

Only what files.py and the checkpoints do is counted, so the same command counts the same each time.
After a crash the disk is frozen: whatever the dying process still tries changes nothing, as if it
had been killed there. A full disk stays full for writes, while renames and deletes go on.
"""

import builtins
import contextlib
import errno
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import orbax.checkpoint as ocp

from tinylm import files
from tinylm.stages import pretrain
from tinylm.train import checkpoint

Kind = Literal["crash", "torn", "full", "broken"]
CODES = {"full": errno.ENOSPC, "broken": errno.EIO}


class Crash(BaseException):
    """The process would be dead by now."""


class Disk:
    """Counts operations; the `at`-th goes wrong in the way of `kind`."""

    def __init__(self, kind: Kind = "crash", at: int = 0):
        self.kind, self.at, self.count, self.names = kind, at, 0, []
        self.dead = self.failed = False

    def op(self, name: str, do: Callable[[], Any], torn: Callable[[], Any] = lambda: None,
           frees: bool = False) -> Any:
        """Do one counted operation, or fail at it; `frees`: it takes no room."""
        if self.dead:
            raise Crash(name)
        self.count += 1
        self.names.append(name)
        full = self.kind == "full" and 0 < self.at <= self.count
        if full and frees:
            return do()
        if full or self.count == self.at:
            if self.kind in CODES:
                self.failed = True
                raise self.fault(name)
            if self.kind == "torn":
                torn()
            self.dead = True
            raise Crash(name)
        return do()

    def fault(self, name: str) -> Exception:
        """Give the error that the system, or for a checkpoint's arrays TensorStore, would give."""
        code = CODES[self.kind]
        if name == "save":
            return ValueError(f"RESOURCE_EXHAUSTED: [os_error_code='{code}'] {os.strerror(code)}")
        return OSError(code, os.strerror(code))

    def alive(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Let an uncounted change of the disk pass unless it is frozen."""
        def change(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Crash(real.__name__)
            return real(*args, **kwargs)
        return change

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open as usual; what is written through it is counted."""
        if not set(mode) & set("wa+"):
            return builtins.open(path, mode, *args, **kwargs)
        if self.dead:
            raise Crash("open")
        return File(builtins.open(path, mode, *args, **kwargs), self)

    def replace(self, old: Any, new: Any) -> None:
        """Rename a file or folder; where that fails both are named, as the system does."""
        try:
            self.op("replace", lambda: os.replace(old, new), frees=True)
        except OSError as fault:
            raise OSError(fault.errno, fault.strerror, str(old), None, str(new)) from None

    def rmtree(self, path: Any, ignore_errors: bool = False) -> None:
        """Delete a folder; torn, only its first file is gone."""
        def first() -> None:
            for one in sorted(Path(path).rglob("*")):
                if one.is_file():
                    os.unlink(one)
                    break

        if not Path(path).exists() and ignore_errors:
            return
        try:
            self.op("rmtree", lambda: shutil.rmtree(path, ignore_errors), first, frees=True)
        except OSError as fault:
            if not ignore_errors:
                raise OSError(fault.errno, fault.strerror, str(path)) from None


class File:
    """A file whose writes are counted; a torn one has half of its bytes."""

    def __init__(self, file: Any, disk: Disk):
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        """Write all, half (torn) or nothing."""
        def half() -> None:
            self.file.write(bytes(data)[:len(bytes(data)) // 2])
            self.file.flush()
        return self.disk.op("write", lambda: self.file.write(data), half)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "File":
        return self

    def __exit__(self, *fault: Any) -> None:
        self.file.close()


class Instead:
    """A module with some of its functions replaced."""

    def __init__(self, module: Any, **own: Any):
        self.__dict__.update(own)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextlib.contextmanager
def failing(disk: Disk) -> Iterator[Disk]:
    """Do everything inside on that disk."""
    save = ocp.AsyncCheckpointer.save

    def saved(self: Any, place: Any, tree: Any) -> None:
        def torn() -> None:
            save(self, place, tree)
            self.wait_until_finished()
            one = max((p for p in Path(place).rglob("*") if p.is_file()),
                      key=lambda p: p.stat().st_size)
            os.truncate(one, one.stat().st_size // 2)
        disk.op("save", lambda: save(self, place, tree), torn)

    system = Instead(os, fsync=lambda handle: disk.op("fsync", lambda: os.fsync(handle)),
                     replace=disk.replace)
    trees = Instead(shutil, rmtree=disk.rmtree)
    unlink, mkdir = pathlib.Path.unlink, pathlib.Path.mkdir
    with (mock.patch.object(files, "open", disk.open, create=True),
          mock.patch.object(files, "os", system), mock.patch.object(files, "shutil", trees),
          mock.patch.object(checkpoint, "shutil", trees),
          mock.patch.object(pretrain, "shutil", trees),
          mock.patch.object(pathlib.Path, "unlink", disk.alive(unlink)),
          mock.patch.object(pathlib.Path, "mkdir", disk.alive(mkdir)),
          mock.patch.object(ocp.AsyncCheckpointer, "save", saved)):
        yield disk

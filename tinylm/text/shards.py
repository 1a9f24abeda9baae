"""A tokenized corpus on disk: uint16 token files, checked by a manifest, mapped into memory.

    train.bin, heldout.bin    each document in order, preceded by <|bos|>
    heldout_documents.json    where each held-out document starts, its tokens, bytes and part
    dataset.json              the ids of what was encoded by what, and counts
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinylm import files
from tinylm.config import digest
from tinylm.text.corpora import Corpus, Document, utf8
from tinylm.text.tokenizer import BOS, Tokenizer

SCHEMA = 1


class Documents(NamedTuple):
    """Where the held-out documents lie in their token file; one entry a document."""

    start: np.ndarray  # int64: the position of the document's <|bos|>
    tokens: np.ndarray  # int64: its tokens, <|bos|> included
    bytes: np.ndarray  # int64: its UTF-8 bytes
    part: list[str]  # the part of the corpus it comes from


@dataclass(frozen=True)
class Dataset:
    """Token files of one corpus under one tokenizer, open for reading."""

    folder: Path
    train: np.ndarray  # uint16[N], mapped
    heldout: np.ndarray  # uint16[N], mapped
    documents: Documents
    id: str  # 16 hex digits over the token files' bytes and the tokenizer
    tokenizer_id: str
    V: int
    bytes_per_token: float  # of the training split, <|bos|> counted as a token
    facts: dict[str, Any]  # dataset.json as written


def write(folder: Path, corpus: Corpus, tokenizer: Tokenizer,
          progress: Callable[[float], None] | None = None) -> Dataset:
    """Encode both splits into a sealed folder and open it; `progress` gets shares up to 1.0.

    Serial: 20 MB take 3 s, less than starting a second process is worth.
    """
    documents, encoded = [*corpus.train, *corpus.heldout], []
    for done, document in enumerate(documents, 1):
        encoded.append(np.concatenate([[BOS], tokenizer.encode(document.text)]).astype("<u2"))
        if progress and (done % 64 == 0 or done == len(documents)):
            progress(done / len(documents))
    train, heldout = encoded[:len(corpus.train)], encoded[len(corpus.train):]
    counts = {"train": _counts(corpus.train, train), "heldout": _counts(corpus.heldout, heldout)}
    whole = counts["train"]["all"]
    facts = {"schema": SCHEMA, "tokenizer_id": tokenizer.id, "corpus_id": corpus.id,
             "V": tokenizer.V, "bytes_per_token": whole["bytes"] / whole["tokens"],
             "counts": counts, "duplicates": corpus.duplicates, "read": corpus.read}
    sizes = [len(a) for a in heldout]
    with files.staged(Path(folder), kind="dataset", tokenizer_id=tokenizer.id,
                      corpus_id=corpus.id) as draft:
        files.write_bytes(draft / "train.bin", memoryview(np.concatenate(train)).cast("B"))
        files.write_bytes(draft / "heldout.bin", memoryview(np.concatenate(heldout)).cast("B"))
        files.write_json(draft / "heldout_documents.json", {
            "start": [int(s) for s in np.cumsum([0, *sizes[:-1]])], "tokens": sizes,
            "bytes": [len(utf8(d.text)) for d in corpus.heldout],
            "part": [d.part for d in corpus.heldout]})
        files.write_json(draft / "dataset.json", facts)
    return open_dataset(folder)


def open_dataset(folder: Path) -> Dataset:
    """Verify a dataset's manifest and map its tokens; Damaged names what is wrong."""
    folder = Path(folder)
    listed = files.verified(folder)["files"]
    facts = files.read_json(folder / "dataset.json")
    try:
        if facts["schema"] > SCHEMA:
            raise files.Damaged(f"{folder} has schema {facts['schema']}, newer than {SCHEMA}; "
                                "use a newer tinylm")
        where = files.read_json(folder / "heldout_documents.json")
        documents = Documents(*(np.array(where[k], np.int64) for k in ("start", "tokens", "bytes")),
                              where["part"])
        shas = [listed[name]["sha256"] for name in ("train.bin", "heldout.bin")]
        train, heldout = (np.memmap(folder / f"{split}.bin", "<u2", "r")
                          for split in ("train", "heldout"))
        return Dataset(folder, train, heldout, documents,
                       digest([*shas, facts["tokenizer_id"]])[:16],
                       facts["tokenizer_id"], facts["V"], facts["bytes_per_token"], facts)
    except (KeyError, TypeError) as bad:
        raise files.Damaged(f"{folder} is not a dataset of ours (no {bad}); "
                            "write it again") from None


def _counts(split: list[Document], encoded: list[np.ndarray]) -> dict[str, dict[str, int]]:
    """Count documents, tokens and bytes of each part, and of "all"."""
    out = {"all": {"documents": 0, "tokens": 0, "bytes": 0}}
    for document, ids in zip(split, encoded, strict=True):
        for name in ("all", document.part):
            count = out.setdefault(name, {"documents": 0, "tokens": 0, "bytes": 0})
            count["documents"] += 1
            count["tokens"] += len(ids)
            count["bytes"] += len(utf8(document.text))
    return out

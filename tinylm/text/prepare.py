"""From a corpus to a tokenizer and token files, once; a folder that is there is verified."""

from collections.abc import Callable
from pathlib import Path

from tinylm import files, leases
from tinylm.config import BadInput
from tinylm.text import shards, tokenizer
from tinylm.text.corpora import Corpus
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer


def prepare(folder: Path, corpus: Corpus, V: int,
            progress: Callable[[float], None] | None = None,
            lower: bool = False) -> tuple[Dataset, Tokenizer]:
    """Train the tokenizer, encode both splits and return both; a finished folder is only read.

    With `lower`, a V that the text cannot fill becomes the largest that it can. A folder made from
    another corpus or with another V raises BadInput.
    """
    folder = Path(folder)
    with leases.hold(folder):
        if not (folder / "tokenizer").exists():
            with files.staged(folder / "tokenizer", asked=V,
                              corpus_id=corpus.id) as draft:
                texts = [d.text for d in corpus.train]
                try:
                    learnt = tokenizer.train(texts, V)
                except tokenizer.TooLarge as refusal:
                    if not lower:
                        raise
                    learnt = tokenizer.train(texts, refusal.largest)
                learnt.save(draft)
        learnt, made = open_tokenizer(folder), files.verified(folder / "tokenizer")
        if (made.get("corpus_id"), made["asked"]) != (corpus.id, V):
            raise BadInput(f"{folder} holds the tokenizer of corpus {made.get('corpus_id')} at "
                           f"V={made['asked']}, this is corpus {corpus.id} at V={V}; choose a new "
                           "folder")
        if not (folder / "tokens").exists():
            shards.write(folder / "tokens", corpus, learnt, progress)
        data = shards.open_dataset(folder / "tokens")
    if (data.facts["corpus_id"], data.tokenizer_id) != (corpus.id, learnt.id):
        raise BadInput(f"{folder} holds tokens of another corpus or tokenizer than its own; delete "
                       "its tokens/ and run again")
    return data, learnt


def open_text(folder: Path) -> tuple[Dataset, Tokenizer]:
    """Verify and open both parts of a prepared folder; tokens of another tokenizer are Damaged."""
    learnt, data = open_tokenizer(folder), shards.open_dataset(Path(folder) / "tokens")
    if data.tokenizer_id != learnt.id:
        raise files.Damaged(f"{folder} holds tokens of tokenizer {data.tokenizer_id} beside "
                            f"tokenizer {learnt.id}; prepare the text again in a new folder")
    return data, learnt


def open_tokenizer(folder: Path) -> Tokenizer:
    """Verify and load the tokenizer of a prepared folder."""
    files.verified(Path(folder) / "tokenizer")
    return tokenizer.load(Path(folder) / "tokenizer")

"""A byte-pair tokenizer of exactly V ids: sentencepiece's pieces behind our own id layer.

    0..5    control ids, which no text can produce: pad, bos, system, user, assistant, end
    6..21   the sixteen half-bytes: a byte no piece covers is two ids, high half then low half
    22..    the learnt pieces, most frequent merges first, single characters last

Sentencepiece's own byte fallback spends 256 rows of which hardly any is used (dropping them gained
1% bits per byte at V=1024); half-bytes keep every text encodable for 16. On the default corpus
they are 0.2% of the held-out ids.
"""

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from tinylm import files
from tinylm.config import BadInput, digest

CONTROL = ("<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, SYSTEM, USER, ASSISTANT, END = range(6)
HALF = len(CONTROL)
FIRST = HALF + 16
LARGEST = 65_536  # token files are uint16
TRAINING_BYTES = 32_000_000
"""Text beyond this is thinned evenly by line; a third of the default corpus, 7 MB, costs 0.02% of
compression at V=784 and 0.1% at V=2048, so nothing is lost here."""

COVERAGE = 0.9995  # of the text's characters; rarer ones are spelt in half-bytes
ROOMY = 256  # from this V on, a large alphabet is spelt in half-bytes rather than refused
_BYTES = 256
# Sentencepiece's marks for a space and the unknown, NUL, and what is not UTF-8.
_UNSAFE = re.compile("([\0\u2581\u2585\ud800-\udfff]+)")
# A space that is no piece would be spelt as sentencepiece's mark for it.
_UNSAFE_SPACE = re.compile("([\0 \u2581\u2585\ud800-\udfff]+)")
_STRAY = "\ufffd".encode()


class TooLarge(BadInput):
    """A vocabulary that the text cannot fill; `largest` is what it can."""

    largest: int


class NoRoom(BadInput):
    """A vocabulary smaller than the text's alphabet."""


class Tokenizer:
    """Text to ids and back; build one with `train` or `load`.

    Every Python string survives `decode(encode(text))`, lone surrogates and NUL included.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._spm = sentencepiece.SentencePieceProcessor(model_proto=model)
        spaced = self._spm.piece_to_id("\u2581") != self._spm.unk_id()
        self._unsafe = _UNSAFE if spaced else _UNSAFE_SPACE
        size = self._spm.get_piece_size()
        names = [self._spm.id_to_piece(i) for i in range(size)]
        bytes_at = [i for i in range(size) if self._spm.is_byte(i)]
        learnt = [i for i in range(1, size) if not self._spm.is_byte(i)]
        self.V = FIRST + len(learnt)
        if len(bytes_at) != _BYTES or self.V > LARGEST:
            raise ValueError("it has no byte fallback or too many pieces")
        self.id = digest([[names[i], self._spm.get_score(i)] for i in learnt])[:16]
        self._pieces = [names[i].replace("\u2581", " ").encode() for i in learnt]
        self._to_id = np.full(size, -1, np.int32)  # the unknown piece never occurs
        self._to_id[learnt] = np.arange(FIRST, self.V)
        self._to_byte = np.full(size, -1, np.int32)
        self._to_byte[bytes_at] = np.arange(_BYTES)
        self.lengths = np.array([0.0] * HALF + [0.5] * 16 + [len(p) for p in self._pieces])
        "float64[V]: the UTF-8 bytes an id stands for; half of one for a half-byte"

    def encode(self, text: str) -> np.ndarray:
        """Give the ids (int32) of any text; none of them is a control id."""
        out = []
        for n, part in enumerate(self._unsafe.split(text)):
            if n % 2:
                out.append(_halves(np.frombuffer(part.encode("utf-8", "surrogatepass"), np.uint8)))
            else:
                out += [self._encode_safe(chunk) for chunk in _chunks(part)]
        return np.concatenate(out) if out else np.zeros(0, np.int32)

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Give the text of ids; control ids are skipped, or shown by name if `control`.

        Half-bytes without a partner and bytes that are not UTF-8 become U+FFFD.
        """
        out: list[bytes] = []
        high = -1
        for i in np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), int).tolist():
            if not 0 <= i < self.V:
                raise BadInput(f"id {i} is not in this tokenizer's 0..{self.V - 1}; "
                               "decode with the tokenizer that encoded")
            if HALF <= i < FIRST:
                if high < 0:
                    high = i - HALF
                else:
                    out.append(bytes([high << 4 | i - HALF]))
                    high = -1
                continue
            if high >= 0:
                out.append(_STRAY)
                high = -1
            if i >= FIRST:
                out.append(self._pieces[i - FIRST])
            elif control:
                out.append(CONTROL[i].encode())
        data = b"".join(out) + (_STRAY if high >= 0 else b"")
        try:
            return data.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return data.decode("utf-8", "replace")

    def piece(self, id: int) -> str:
        """Give a readable name of one id: a control's name, `<half 4>`, or the piece's text."""
        half = HALF <= id < FIRST
        return f"<half {id - HALF:X}>" if half else self.decode([id], control=True)

    def merges(self, text: str) -> list[list[str]]:
        """Give the steps that build a text's pieces, its characters first, its pieces last.

        Each step joins the neighbours whose piece was learnt first, the leftmost of equals. What no
        piece covers stays a character, which `encode` spells in half-bytes.
        """
        parts, steps = list(text), [list(text)]
        while True:
            ranks = [(self._rank(a + b), n) for n, (a, b) in enumerate(itertools.pairwise(parts))]
            rank, at = min(ranks, default=(math.inf, 0))
            if rank == math.inf:
                return steps
            parts[at:at + 2] = ["".join(parts[at:at + 2])]
            steps.append(list(parts))

    def save(self, folder: Path) -> None:
        """Write tokenizer.model (sentencepiece's format) and tokenizer.json (its checks)."""
        files.write_bytes(Path(folder) / "tokenizer.model", self._model)
        files.write_json(Path(folder) / "tokenizer.json", {
            "schema": 1, "id": self.id, "V": self.V, "control": list(CONTROL),
            "model_sha256": files.sha256_of(self._model)})

    def _rank(self, piece: str) -> float:
        """Give how early a piece was learnt; infinity where it is none."""
        at = self._spm.piece_to_id(piece.replace(" ", "\u2581"))
        return math.inf if self._to_id[at] < 0 else float(self._to_id[at])

    def _encode_safe(self, text: str) -> np.ndarray:
        found = np.asarray(self._spm.encode(text, out_type="numpy"))
        ids, byte = self._to_id[found], self._to_byte[found]
        if (byte < 0).all():
            return ids
        out = np.repeat(ids, 1 + (byte >= 0))
        out[out < 0] = _halves(byte[byte >= 0])
        return out


def train(texts: Iterable[str], V: int) -> Tokenizer:
    """Learn the pieces of a V-id tokenizer; the same texts give the same pieces and id.

    Raises BadInput for a V that the text cannot fill (naming the largest), or beyond uint16.
    """
    if not FIRST < V <= LARGEST:
        raise BadInput(f"V={V} is not within {FIRST + 1}..{LARGEST} (ids are stored as uint16); "
                       "choose one such as 1024")
    lines = [line for text in texts for line in _lines(text)]
    total = sum(map(len, lines))
    if total > TRAINING_BYTES:
        keep = TRAINING_BYTES / total
        lines = [s for n, s in enumerate(lines) if int((n + 1) * keep) > int(n * keep)]
    if not lines:
        raise BadInput("the tokenizer got no text; give a corpus with text")
    try:
        return _learn(lines, V, COVERAGE)
    except NoRoom:  # a large alphabet, as in Chinese: half the pieces are its commonest characters
        if V < ROOMY:
            raise
        common = Counter(itertools.chain.from_iterable(lines)).most_common((V - FIRST) // 2)
        rare = dict.fromkeys(map(ord, set().union(*lines) - {c for c, _ in common}))
        return _learn([line.translate(rare) for line in lines], V, 1.0)


def _learn(lines: list[str], V: int, coverage: float) -> Tokenizer:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
            vocab_size=V - FIRST + _BYTES + 1, byte_fallback=True, user_defined_symbols=["\n"],
            unk_id=0, bos_id=-1, eos_id=-1, pad_id=-1, normalization_rule_name="identity",
            split_digits=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, character_coverage=coverage,
            max_sentence_length=16384, num_threads=1, minloglevel=2)
    except RuntimeError as bad:
        raise _explained(str(bad), V) from None
    return Tokenizer(model.getvalue())


def load(folder: Path) -> Tokenizer:
    """Read what `save` wrote; Damaged if a byte differs from what it wrote."""
    folder = Path(folder)
    facts, path = files.read_json(folder / "tokenizer.json"), folder / "tokenizer.model"
    try:
        model = path.read_bytes()
        if files.sha256_of(model) != facts["model_sha256"]:
            raise ValueError("its sha256 is not the one in tokenizer.json")
        tokenizer = Tokenizer(model)
        kept = (facts["id"], facts["V"], facts["control"])
        if (tokenizer.id, tokenizer.V, list(CONTROL)) != kept:
            raise ValueError("its pieces are not those of tokenizer.json")
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as bad:
        reason = str(bad).splitlines()[0] if str(bad) else "empty"
        raise files.Damaged(f"{path} is not a tokenizer of ours ({reason}); "
                            "train it again") from None
    return tokenizer


def _lines(text: str) -> Iterator[str]:
    """Yield trainable lines: under 16 kB, without what encode() spells in half-bytes."""
    for line in _UNSAFE.sub("\n", text).split("\n"):
        for start in range(0, len(line), 4000):
            yield line[start:start + 4000]


def _chunks(text: str, size: int = 65_536) -> Iterator[str]:
    """Cut a long text before newlines, where no piece reaches across, and else anywhere."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start + 1, start + size)
        end = start + size if end < 0 else end
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _halves(data: np.ndarray) -> np.ndarray:
    return (HALF + np.stack([data >> 4, data & 15], -1).astype(np.int32)).ravel()


def _explained(error: str, V: int) -> BadInput:
    ours = FIRST - _BYTES - 1  # from sentencepiece's size to our V
    if high := re.search(r"value <= (\d+)", error):
        largest = int(high[1]) + ours
        refusal = TooLarge(f"V={V} is more than this text can fill; choose at most {largest}")
        refusal.largest = largest
        return refusal
    if low := re.search(r"required_chars\. \d+ vs (\d+)", error):
        least = int(low[1]) + ours
        return NoRoom(f"V={V} has no room for this text's characters; choose at least {least}")
    return BadInput(f"V={V} cannot be trained ({error.splitlines()[0]}); choose another V")

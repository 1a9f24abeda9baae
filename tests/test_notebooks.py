"""The committed notebooks, executed again: they print what is committed, to three digits."""

import json
import re
from pathlib import Path

import pytest

from tinylm.look import notebook

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def printed(book: dict) -> list[str]:
    """The text of every code cell: its printed lines, and a mark for each figure."""
    out = []
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            out.append("".join("".join(o["text"]) if o["output_type"] == "stream" else
                               "<figure>" if "image/png" in o.get("data", {}) else "<other>"
                               for o in cell["outputs"]))
    return out


def differs(one: str, other: str) -> bool:
    """Whether two texts differ in words, or in a number by more than its third digit."""
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (one, other)]
    return (NUMBER.sub("0", one) != NUMBER.sub("0", other)
            or len(numbers[0]) != len(numbers[1])
            or any(abs(a - b) > max(0.0051 * max(abs(a), abs(b)), 0.0011)
                   for a, b in zip(*numbers, strict=True)))


def test_numbers_are_compared_to_three_digits_and_words_exactly():
    assert not differs("loss 3.517, 40 times", "loss 3.518, 40 times")
    assert differs("loss 3.517", "loss 3.571") and differs("loss 3.517", "cost 3.517")
    assert differs("1 2", "1") and differs("0.010", "0.013")


@pytest.mark.slow
@pytest.mark.parametrize("committed", BOOKS, ids=[p.stem for p in BOOKS])
def test_a_notebook_executed_again_prints_what_is_committed(
        committed, tmp_path, request, monkeypatch):
    pytest.importorskip("jupytext")
    if committed.stem == "published_laws":  # of tables that are not ours to commit
        published = request.getfixturevalue("shared") / "published-runs"
        monkeypatch.setenv("TINYLM_PUBLISHED", str(published))
    place = notebook.execute(committed.with_suffix(".py"), ROOT / "experiments/results/laptop",
                             tmp_path / committed.name)
    assert place is not None
    kept, made = (json.loads(path.read_text()) for path in (committed, place))
    sources = [["".join(cell["source"]) for cell in book["cells"]] for book in (kept, made)]
    assert sources[0] == sources[1], "run make notebooks"
    for one, other in zip(printed(kept), printed(made), strict=True):
        assert not differs(one, other), f"committed:\n{one}\nnow:\n{other}"

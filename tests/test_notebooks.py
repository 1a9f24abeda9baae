"""The committed notebooks, executed again: they print what is committed.

What is read from records is the same to the last digit; the numbers of cells tagged `computed`,
which run a model or fit a law, are the same to three digits.
"""

import json
import math
import re
from pathlib import Path

import pytest

from tinylm.look import notebook

ROOT = Path(__file__).parent.parent
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def printed(book: dict) -> list[tuple[bool, str]]:
    """Whether it computes, and the text, of every code cell: printed lines, figures' marks."""
    out = []
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            computes = "computed" in cell["metadata"].get("tags", ())
            out.append((computes, "".join("".join(o["text"]) if o["output_type"] == "stream" else
                               "<figure>" if "image/png" in o.get("data", {}) else "<other>"
                               for o in cell["outputs"])))
    return out


def differs(one: str, other: str) -> bool:
    """Whether two texts differ in words, or in a number by more than half its third digit."""
    numbers = [NUMBER.findall(text) for text in (one, other)]
    return (NUMBER.sub("0", one) != NUMBER.sub("0", other)
            or len(numbers[0]) != len(numbers[1]) or not all(map(near, *numbers)))


def near(one: str, other: str) -> bool:
    """Whether two numbers are equal, or both no whole ones and equal to three digits.

    Of a number that is shown with fewer digits the last may be off by one.
    """
    if one == other or "." not in one or "." not in other:
        return one == other
    found = [float(n) for n in (one, other)]
    third = 0.5 * 10.0 ** (math.floor(math.log10(max(map(abs, found)))) - 2)
    digits, _, exponent = one.partition("e")
    last = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2]))
    return abs(found[0] - found[1]) <= 1.001 * max(third, last)


def test_numbers_are_compared_to_three_digits_and_words_exactly():
    assert not differs("loss 3.517, 40 times", "loss 3.519, 40 times")
    assert not differs("2.41e+13 -0.01", "2.41e+13 -0.02")
    for one, other in (("loss 3.517", "loss 3.524"), ("loss 3.517", "cost 3.517"), ("1 2", "1"),
                       ("0.010", "0.012"), ("45.1%", "45.3%"), ("head 1", "head 2"),
                       ("40 times", "41 times"), ("2.41e+13", "2.43e+13"), ("3.5", "3")):
        assert differs(one, other), (one, other)


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
    for (computes, one), (_, other) in zip(printed(kept), printed(made), strict=True):
        assert one == other or (computes and not differs(one, other)), (
            f"committed:\n{one}\nnow:\n{other}")

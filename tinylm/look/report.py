"""One self-contained HTML file of a study, redrawn from its records."""

import html
from pathlib import Path
from typing import Any

from tinylm import files


def write(folder: Path) -> Path:
    """Write report.html from the study's files; return its path."""
    folder = Path(folder)
    score = files.read_json(folder / "score.json")
    body = [f"<h1>{html.escape(score['name'])}</h1>", _table([score])]
    body.append(_table(files.read_json(folder / "samples.json")))
    page = "<!doctype html><meta charset=utf-8><title>tinylm study</title>" + "\n".join(body)
    files.write_text(folder / "report.html", page)
    return folder / "report.html"


def _table(rows: list[dict[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(k)}</th>" for k in rows[0])
    lines = ["".join(f"<td>{html.escape(str(v))}</td>" for v in row.values()) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"

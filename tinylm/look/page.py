"""Parts of a page: number formats, escaped paragraphs and tables, sections that never fail."""

import html
import math
from collections.abc import Callable, Iterable
from typing import Any

from tinylm.config import BadInput

CSS = """
body{font:16px/1.55 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;
max-width:66rem;padding:1rem 1.2rem 4rem;color-scheme:light}
h1{font-size:1.7rem;line-height:1.25}h2{margin:2.6rem 0 .6rem;border-bottom:1px solid #ccc}
h3{margin:1.6rem 0 .3rem}p{margin:.5rem 0;max-width:44rem}small,caption,figcaption{color:#555}
p,td{overflow-wrap:anywhere}.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.86rem}
caption{text-align:left;padding-bottom:.3rem}td,th{padding:.22rem .6rem;text-align:right;
border-bottom:1px solid #e4e4e4;font-variant-numeric:tabular-nums;white-space:nowrap}
th{background:#f5f5f5;white-space:normal}td:first-child,th:first-child{text-align:left}
table.text *{text-align:left}table.text td{vertical-align:top;white-space:pre-wrap;
min-width:9rem}figure{margin:1rem 0}svg{min-width:34rem;max-width:46rem;width:100%}
.warn{background:#fff4e0;border-left:.3rem solid #d55e00;padding:.1rem 1rem}
.box{background:#f3f6f9;border-left:.3rem solid #0072b2;padding:.1rem 1rem}
.big{font-size:1.25rem}.text span{border-radius:.2rem}
.c0{background:#cfe8fa}.c1{background:#fde9c2}.c2{background:#cdeedd}.c3{background:#f6dcea}
"""
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def scientific(x: float, digits: int = 2) -> str:
    """Write a number as 1.20·10⁹; infinity, a budget that never comes, as never."""
    if not math.isfinite(x):
        return "never" if x > 0 else "unknown"
    mantissa, exponent = f"{x:.{digits}e}".split("e")
    power = str(int(exponent)).translate(RAISED)
    return f"{mantissa}·10{power}"


def shown(text: str) -> str:
    """Make white space and what cannot be printed visible in a label."""
    text = text.replace(" ", "·").replace("\n", "↵")
    return "".join(c if c.isprintable() else "□" for c in text)


def p(text: str, style: str = "") -> str:
    """Give a paragraph of plain text, escaped."""
    return f'<p class="{style}">{html.escape(text)}</p>' if style else f"<p>{html.escape(text)}</p>"


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str = "",
          style: str = "") -> str:
    """Give a table of plain values, all escaped; a wide one scrolls by itself."""
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>"
                    for row in rows)
    names = "".join(f"<th>{html.escape(str(name))}</th>" for name in head)
    return (f'<div class="wide"><table class="{style}"><caption>{html.escape(caption)}</caption>'
            f"<tr>{names}</tr>{lines}</table></div>")


def figure(svg: str, caption: str) -> str:
    """Give a figure with its caption."""
    return (f'<figure><div class="wide">{svg}</div>'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def section(title: str, makers: Iterable[Callable[[Any], str]], study: Any, level: int = 2) -> str:
    """Join what the makers give of a study; one that cannot says why in a sentence."""
    parts = [f"<h{level}>{html.escape(title)}</h{level}>"]
    for make in makers:
        try:
            parts.append(make(study))
        except BadInput as why:
            parts.append(p(f"Not shown: {str(why).replace(f'{study.folder}/', '')}", "warn"))
    return "\n".join(parts)


def whole(title: str, body: str) -> str:
    """Give the HTML file: no script, nothing to fetch."""
    return ('<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width"><title>{html.escape(title)}</title><style>{CSS}</style>'
            f"</head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n")

"""Figures of a study or of anybody's runs, drawn with matplotlib's objects: no global state."""

import html
import io
import itertools
import math
import re
import warnings
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tinylm import files
from tinylm.laws import forecast, isoflop
from tinylm.laws.fit import Fit
from tinylm.laws.runs import Runs
from tinylm.look.depth import Depth
from tinylm.look.heads import Habits
from tinylm.look.page import scientific
from tinylm.look.study import Study
from tinylm.look.tokens import Frequencies
from tinylm.sweep import law

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (  # Okabe and Ito, told apart by all
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
LAWS = {"power law": (BLUE, "-"), "law with floor": (ORANGE, "--")}
REACH = 100.0  # crossings further than this factor beyond the target are left off the figure
STYLE = {"svg.hashsalt": "tinylm", "svg.fonttype": "none", "font.size": 10, "axes.grid": True,
         "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
         "axes.titlesize": 11, "axes.titlelocation": "left", "legend.edgecolor": "none"}


def loss_axis(study: Study) -> Figure:
    """Put baselines, runs, frontier and target on one axis of bits per byte over FLOPs."""
    figure, ax = _axes("training FLOPs", "held-out loss (bits per byte)")
    target, per_nat, levels = study.record("target"), study.bits_per_nat, study.levels()
    aim, runs = target["flops"]["exact"], law.runs_of(study.records("sweep"))[0]
    ax.scatter(runs.flops, runs.loss * per_nat, s=14, color="0.6", label="sweep runs")
    _minima(ax, study, per_nat)
    right = max([aim, *(f for v in levels for f in v.flops.values() if f <= REACH * aim)]) * 1.5
    for name, line in study.frontiers().items():
        x = np.geomspace(runs.flops.min(), right, 200)
        ax.plot(x, line.loss(x) * per_nat, LAWS[name][1], color=LAWS[name][0], label=name)
        at = [(v.flops[name], v.bits) for v in levels if x[0] <= v.flops[name] <= right]
        ax.scatter(*zip(*at, strict=True), marker="x", color=LAWS[name][0]) if at else None
    low, high = ax.get_ylim()
    at = math.inf
    for level in levels:
        at = min(level.bits, at - 0.045 * (high - low))  # names of close levels keep apart
        ax.axhline(level.bits, color=GREEN, lw=0.8, ls=":")
        ax.annotate(level.name, (1.01, at), xycoords=("axes fraction", "data"), va="center",
                    color=GREEN, size=9)
    for record in study.records("position"):
        if record["loss"]:
            ax.scatter(record["flops"]["exact"], record["loss"]["bits_per_byte"], marker="s",
                       color=PURPLE, label="position weights")
    bits = target["loss"]["bits_per_byte"]
    ax.scatter(aim, bits, marker="D", s=45, color=RED, zorder=5, label="held-out run")
    beaten = [v.name for v in levels if v.bits > bits]
    return _done(ax, f"The held-out run ({bits:.3f} bits per byte) beats "
                     + (f"the {beaten[-1]} table" if beaten else "no n-gram table"))


def isoflops(study: Study) -> Figure:
    """Draw the sweep's isoFLOP curves."""
    laws = study.part("law.json")
    found, e = laws["minima"], laws["exponents"]
    refused = sum(not m["bracketed"] for m in found)
    return isoflop_curves(
        law.runs_of(study.records("sweep"))[0], found,
        ("No exponent: too few budgets show a minimum" if "refused" in e else
         f"Best size grows as FLOPs^{e['a']:.2f} (standard error {e['a_se']:.2f})")
        + (f"; refused minima: {refused} (hollow)" if refused else ""))


def isoflop_curves(runs: Runs, found: list[dict[str, Any]], title: str) -> Figure:
    """Draw loss over parameters, a colour a budget, with each parabola and its minimum.

    `found` holds the fields of isoflop.Minimum for each budget, least first.
    """
    figure, ax = _axes("parameters", "loss (nats per token)")
    labels = isoflop.group(runs.flops)
    for n, (label, m) in enumerate(zip(np.unique(labels), found, strict=True)):
        colour = matplotlib.colormaps["viridis"](0.88 * n / max(len(found) - 1, 1))
        here = runs.keep(labels == label)
        name = f"{scientific(m['flops'], 1)} FLOPs"
        ax.scatter(here.params, here.loss, s=20, color=colour, label=name)
        if None not in m["coefficients"]:
            c, u = m["coefficients"], np.linspace(*np.log([min(here.params), max(here.params)]), 60)
            ax.plot(np.exp(u), c[0] + c[1] * u + c[2] * u**2, color=colour, lw=1)
        ax.scatter(m["params"], m["loss"], marker="*", s=150, edgecolor=colour, zorder=4,
                   facecolor=colour if m["bracketed"] else "none")
    return _done(ax, title)


def residuals(runs: Runs, fit: Fit, title: str) -> Figure:
    """Draw a fit's residuals in percent of the loss over compute, coloured by tokens a parameter.

    A law whose form is wrong leaves a bend or a stripe here, whatever its objective.
    """
    figure, ax = _axes("training FLOPs", "measured over fitted loss (percent)")
    ratio = runs.tokens / runs.params
    dots = ax.scatter(runs.flops, 100 * np.expm1(fit.residuals), s=14, c=np.log10(ratio),
                      cmap="viridis", label=f"{len(ratio)} runs")
    ax.axhline(0, color=BLACK, lw=0.8)
    figure.colorbar(dots, label="log10 (tokens per parameter)")
    return _done(ax, title)


def ahead(found: list[isoflop.Minimum], made: list[forecast.Forecast]) -> Figure:
    """Draw a study's minima, and the forecasts of the later ones from the budgets before."""
    figure, ax = _axes("training FLOPs", "least loss (nats per token)")
    at, loss = np.array([(m.flops, m.loss) for m in found]).T
    ax.plot(at, loss, "*", ms=11, color=BLACK, label="isoFLOP minima")
    said = np.array([(f.target_flops, f.predicted, f.low, f.high, f.naive) for f in made]).T
    ax.errorbar(said[0], said[1], [said[1] - said[2], said[3] - said[1]], fmt="o", color=GREEN,
                capsize=5, label="forecast from the budgets before, and its interval")
    ax.plot(said[0], said[4], "x", color=PURPLE, label="naive slope")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")
    truth = loss[-len(made):]
    held = ((said[2] <= truth) & (truth <= said[3])).sum()
    off = np.mean(np.abs(said[1] / truth - 1))
    return _done(ax, f"{held} of {len(made)} later minima lie inside; mean error {off:.2%}")


def coverage(calibration: dict[str, Any]) -> Figure:
    """Draw how often calibrated intervals held each study's minima, itself left out."""
    figure, ax = _axes("share of forecasts inside their 90% interval", "", log=False)
    studies = calibration["studies"]
    shares = [s["coverage"] for s in studies.values()]
    names = [f"{name} ({len(s['factor_error_scale'])})" for name, s in studies.items()]
    ax.barh(names, shares, color=SKY, label="one study (number of forecasts)")
    ax.axvline(0.9, color=BLACK, lw=0.8, ls="--", label="what is promised")
    ax.axvspan(calibration["coverage_low"], calibration["coverage_high"], color=GREEN, alpha=0.2,
               label="mean over studies, 90% interval")
    ax.set_title(f"{calibration['coverage']:.0%} held on average over {len(shares)} studies",
                 loc="left")
    ax.legend(loc="lower left", fontsize=8)
    return figure


def frontier(study: Study) -> Figure:
    """Draw the minima, the laws through them, the forecast with its interval and the outcome."""
    figure, ax = _axes("training FLOPs", "held-out loss (nats per token)")
    f, score = forecast.read(study.folder / "forecast.json"), study.part("score.json")
    _minima(ax, study, 1.0)
    x = np.geomspace(min(m["flops"] for m in study.part("law.json")["minima"]),
                     f.target_flops * 1.5, 200)
    ax.fill_between(x, *_band(study, x), color=BLUE, alpha=0.15, lw=0)
    for name, line in study.frontiers().items():
        ax.plot(x, line.loss(x), LAWS[name][1], color=LAWS[name][0], label=name)
    ax.errorbar(f.target_flops, f.predicted, [[f.predicted - f.low], [f.high - f.predicted]],
                fmt="o", color=GREEN, capsize=6, label="forecast and its interval")
    ax.scatter(f.target_flops, f.naive, marker="x", color=PURPLE, label="naive slope")
    ax.scatter(f.target_flops, score["measured"], marker="D", s=45, color=RED, zorder=5,
               label="measured")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter("{x:.2f}")
    ax.yaxis.set_minor_formatter("{x:.2f}")
    return _done(ax, f"The forecast is off by {score['error_percent']:+.2f}%, the outcome "
                     f"{'inside' if score['inside'] else 'OUTSIDE'} its interval")


def rates(study: Study) -> Figure:
    """Draw the rate check: loss above each size's best over the learning rate."""
    figure, ax = _axes("learning rate (at width 64)", "loss above the best (nats per token)")
    verdicts = study.part("tuning.json")["sizes"]
    for n, v in enumerate(verdicts):
        kept = [(r, x) for r, x in zip(v["rates"], v["losses"], strict=True) if x is not None]
        r, x = np.array(kept).T if kept else np.zeros((2, 0))
        ax.plot(r, x - min(x, default=0), "o-", color=(BLUE, ORANGE, GREEN, PURPLE, RED)[n % 5],
                label=f"width {v['width']}, {v['steps']} steps")
    ends = sum(v["best"] in (min(v["rates"]), max(v["rates"])) for v in verdicts)
    edge = sum(v["at_edge"] for v in verdicts)
    return _done(ax, f"Best at an edge of the rates: {ends} of {len(verdicts)} sizes, {edge} by "
                     "more than a seed")


def calibration(study: Study) -> Figure:
    """Draw how often a study's reward model was right over how sure it was."""
    record = study.part("reward/record.json")
    p, ceiling = record["preferences"], record["config"]["ceiling"]
    figure, ax = _axes("how sure it is of a pair", "share of such pairs it is right on", log=False)
    bins = np.array([(b["thought"], b["right"], b["pairs"]) for b in p["calibration"]]).T
    ax.plot((0.5, 1.0), (0.5, 1.0), color="0.6", lw=0.8, label="as sure as it should be")
    ax.scatter(bins[0], bins[1], s=2 * bins[2], color=BLUE, alpha=0.7,
               label="held-out pairs, by area")
    return _done(ax, f"Right on {p['accuracy']:.1%} of {p['pairs']} held-out pairs"
                     + (f", a perfect judge on {ceiling:.1%}" if ceiling else ""))


def policy(study: Study) -> Figure:
    """Draw a policy's score by its judge over its distance from the tuned model, by rollout."""
    method = study.part("policy/record.json")["kind"].upper()
    rows = files.read_lines(study.folder / "policy/metrics.jsonl")
    kl, score = (np.array([row[f"train/{k}"] for row in rows]) for k in ("kl_nats", "reward"))
    figure, ax = _axes("KL from the tuned model (nats a response)", "mean score by the judge",
                       log=False)
    ax.plot(kl, score, "-", color="0.8", zorder=1)
    ax.scatter(kl, score, c=np.arange(len(kl)), cmap="viridis", s=18, label="rollouts, in order")
    return _done(ax, f"{method}: {score[0]:+.2f} at the start, {score[-1]:+.2f} after {len(kl)} "
                     "rollouts")


def attention(weights: np.ndarray, words: list[str], title: str) -> Figure:
    """Draw one head's weights, T by S: row t shows what token t reads."""
    figure, ax = _axes("token read (key)", "token reading (query)", (7, 6.4), log=False)
    image = ax.pcolormesh(np.ma.masked_equal(np.tril(weights), 0), cmap="Blues", vmin=0, vmax=1)
    for axis, turn in ((ax.xaxis, 90), (ax.yaxis, 0)):
        axis.set_ticks(np.arange(len(words)) + 0.5, words, rotation=turn, parse_math=False,
                       family="monospace", size=8)
    ax.invert_yaxis()
    ax.grid(False)
    figure.colorbar(image, label="attention weight", shrink=0.7)
    ax.set_title(title, loc="left", size=11, parse_math=False)
    return figure


def frequencies(found: Frequencies) -> Figure:
    """Draw how often each id occurs in the training tokens over its rank."""
    kept = found.counts[found.counts > 0]
    figure, ax = _axes("rank", "occurrences")
    ax.plot(np.arange(1, len(kept) + 1), kept, color=BLUE, label=f"{len(kept)} ids")
    ax.set_yscale("log")
    half = int((kept.cumsum() < kept.sum() / 2).sum()) + 1
    return _done(ax, f"Half of the tokens are the {half} most frequent ids")


def habits(found: Habits) -> Figure:
    """Draw how strong each head's three habits are, a panel a habit, layers by heads."""
    names = ("token before", "first token", "induction")
    with matplotlib.rc_context(STYLE):
        figure = Figure((8, 2.2 + 0.3 * len(found.previous)), layout="constrained")
        panels = figure.subplots(1, 3, squeeze=False)[0]
    for ax, name, scores in zip(panels, names, (found.previous, found.first, found.induction),
                                strict=True):
        image = ax.imshow(scores, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for (layer, head), score in np.ndenumerate(scores):
            ax.text(head, layer, f"{score:.2f}", ha="center", va="center", size=8,
                    color="white" if score > 0.6 else BLACK)
        ax.set(xticks=range(scores.shape[1]), xticklabels=range(1, scores.shape[1] + 1),
               yticks=range(len(scores)), yticklabels=range(1, len(scores) + 1), xlabel="head",
               ylabel="layer")
        ax.set_title(name, loc="left", size=10)
        ax.grid(False)
    figure.colorbar(image, ax=panels, label="mean attention weight")
    return figure


def depths(found: Depth, words: list[str], names: list[list[str]]) -> Figure:
    """Draw the likeliest next token after every layer, shaded by its probability."""
    L1, T = found.rank.shape
    figure, ax = _axes("token read", "after layer", (1.6 + 0.9 * T, 1.6 + 0.45 * L1), log=False)
    image = ax.pcolormesh(found.p[:, :, 0], cmap="Blues", vmin=0, vmax=1)
    for (l, t), p in np.ndenumerate(found.p[:, :, 0]):
        ax.text(t + 0.5, l + 0.5, names[l][t], ha="center", va="center", size=8, family="monospace",
                color="white" if p > 0.6 else BLACK, parse_math=False,
                weight="bold" if found.rank[l, t] == 0 else "normal")
    ax.set_xticks(np.arange(T) + 0.5, words, rotation=90, parse_math=False, family="monospace",
                  size=8)
    ax.set_yticks(np.arange(L1) + 0.5, ["embedding", *range(1, L1)])
    ax.grid(False)
    figure.colorbar(image, label="probability")
    ax.set_title("Likeliest next token by depth (bold: the whole model's)", loc="left")
    return figure


def growth(rows: list[dict[str, Any]]) -> Figure:
    """Draw what comes with compute: habits and the gain on a repeat, loss by place and by token.

    `rows` are look/growth's, a run or a checkpoint each.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure((11, 4.3), layout="constrained")
        ax, *panels = figure.subplots(1, 3)
    ax.set(xlabel="training FLOPs", ylabel="attention weight of the strongest head", xscale="log")
    at = [row["FLOPs"] for row in rows]
    for name, colour, mark in (("previous", BLUE, "o"), ("first", ORANGE, "s"),
                               ("induction", GREEN, "^")):
        ax.scatter(at, [row[name] for row in rows], s=20, color=colour, marker=mark, label=name)
    other = ax.twinx()
    other.scatter(at, [row["gain"] for row in rows], s=20, color=RED, marker="x")
    other.set_ylabel("gain on a repeat (nats a token, red crosses)", color=RED)
    other.grid(False)
    for panel, key, name in zip(panels, ("by_position", "by_frequency"),
                                ("tokens read", "occurrences in training"), strict=True):
        edges = [max(group["at_most"], 0.5) for group in rows[0][key]]
        for n, row in enumerate(rows):
            panel.plot(edges, [group["nats"] for group in row[key]], lw=1,
                       color=matplotlib.colormaps["viridis"](0.9 * n / max(len(rows) - 1, 1)),
                       label=f"{scientific(row['FLOPs'], 1)} FLOPs" if n in (0, len(rows) - 1)
                       else None)
        panel.set(xlabel=f"{name}, at most", ylabel="loss (nats per token)", xscale="log")
        panel.set_xticks(edges, [f"{group['at_most']:,}" for group in rows[0][key]], rotation=45,
                         ha="right")
        panel.set_xticks([], minor=True)
        panel.legend(fontsize=8)
    return _done(ax, f"Gain on a repeat: {max(r['gain'] for r in rows):+.2f} nats at most")


def cost(rows: list[dict[str, Any]]) -> Figure:
    """Draw time against FLOPs a token, with each size's share of the best float32 product."""
    figure, ax = _axes("training FLOPs a token", "microseconds a token, whole machine")
    ax.set_yscale("log")
    for compute, colour, mark in (("f32", BLUE, "o"), ("bf16", ORANGE, "s")):
        mine = [r for r in rows if r["compute"] == compute]
        ax.plot([r["flops_per_token"] for r in mine], [1e6 / r["tokens_per_second"] for r in mine],
                marker=mark, color=colour, label=f"{compute} products")
        for r in mine:
            ax.annotate(f"D={r['D']}: {r['utilisation']:.0%}", size=7, color=colour,
                        xy=(r["flops_per_token"], 1e6 / r["tokens_per_second"]),
                        xytext=(4, -9 if compute == "bf16" else 4), textcoords="offset points")
    return _done(ax, "Time a token (share of the best float32 product)")


def overoptimised(rows: list[dict[str, Any]]) -> Figure:
    """Draw gold and proxy over sqrt(KL), a panel a way of optimising and a number of pairs.

    Means over seeds at equal `turns`, each as `gold` and `proxy` say; a colour a reward model's
    size.
    """
    ways, pairs, sizes = (sorted({row[key] for row in rows}) for key in ("way", "pairs", "params"))
    with matplotlib.rc_context(STYLE):
        figure = Figure((3.2 * len(pairs), 3.0 * len(ways)), layout="constrained")
        panels = figure.subplots(len(ways), len(pairs), squeeze=False, sharey="row")
    for (way, count), ax in zip(itertools.product(ways, pairs), panels.flat, strict=True):
        for size, colour in zip(sizes, (SKY, BLUE, GREEN, ORANGE, RED, PURPLE), strict=False):
            some = [r for r in rows if (r["way"], r["pairs"], r["params"]) == (way, count, size)]
            turns = sorted({r["turns"] for r in some})
            kl, gold, proxy = (np.array([np.mean([r[key] for r in some if r["turns"] == turn])
                                         for turn in turns])
                               for key in ("kl_nats", "gold", "proxy"))
            d = np.sqrt(np.maximum(kl, 0.0))
            ax.plot(d, gold, "-", color=colour, label=f"{size / 1e6:.2f}M")
            ax.plot(d, proxy - proxy[0], ":", color=colour)
        ax.set_title(f"{way}, {count:g} pairs", loc="left")
        ax.set_xlabel("sqrt(KL)")
    for ax in panels[:, 0]:
        ax.set_ylabel("gold (line), proxy (dots)")
    panels[0, 0].legend(fontsize=8)
    return figure


def svg(figure: Figure) -> str:
    """Give a figure as inline SVG labelled by its title: no address, the same bytes each time."""
    text, label = standalone(figure), html.escape(figure.axes[0].get_title("left"))
    drawn = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index(" viewBox"):])
    return f'<svg role="img" aria-label="{label}"' + drawn.replace("xlink:href", "href")


def standalone(figure: Figure) -> str:
    """Give a figure as an SVG file, the same bytes each time."""
    text = _saved(figure, "svg").decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def png(figure: Figure) -> bytes:
    """Give a figure as PNG."""
    return _saved(figure, "png")


def _saved(figure: Figure, kind: str) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # rare scripts
        figure.savefig(out, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return out.getvalue()


def _axes(x: str, y: str, size: tuple[float, float] = (7, 4.3),
          log: bool = True) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        ax = figure.subplots()
    ax.set(xlabel=x, ylabel=y, xscale="log" if log else "linear")
    return figure, ax


def _minima(ax: Axes, study: Study, scale: float) -> None:
    kept = [m for m in study.part("law.json")["minima"] if m["bracketed"]]
    ax.errorbar([m["flops"] for m in kept], [m["loss"] * scale for m in kept],
                [m["loss_se"] * scale for m in kept], fmt="*", ms=11, color=BLACK,
                label="isoFLOP minima")


def _band(study: Study, flops: np.ndarray) -> np.ndarray:
    """Give the 5% and 95% quantiles of power laws through minima redrawn within their errors."""
    kept = [m for m in study.part("law.json")["minima"] if m["bracketed"]]
    if len(kept) < 2:
        return np.full((2, len(flops)), np.nan)
    loss, spread = np.array([(m["loss"], m["loss_se"]) for m in kept]).T
    drawn = loss + spread * np.random.default_rng(0).normal(size=(1000, len(kept)))
    lines = np.polyfit(np.log([m["flops"] for m in kept]), np.log(drawn).T, 1)
    return np.exp(np.quantile(np.outer(np.log(flops), lines[0]) + lines[1], (0.05, 0.95), axis=1))


def _done(ax: Axes, title: str) -> Figure:
    """Set the title, the legend, and the labels of a log axis so that they fit."""
    low, high = ax.get_xlim()
    if ax.get_xscale() == "log":
        ax.xaxis.set_major_locator(LogLocator(subs=(1,) if high > 500 * low else (1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: scientific(x, 0))
        ax.xaxis.set_minor_formatter("")
    with matplotlib.rc_context(STYLE):
        ax.set_title(title)
        ax.legend(loc="best", fontsize=8)
    return ax.figure

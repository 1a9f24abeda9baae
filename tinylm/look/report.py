"""One self-contained HTML file of a study, redrawn from its records."""

import math
import re
from pathlib import Path
from typing import Any

from tinylm import files
from tinylm.laws import intervals
from tinylm.look import alignment, page, plots
from tinylm.look.page import p, scientific, table
from tinylm.look.questions import ANSWERS
from tinylm.look.study import Study
from tinylm.look.tokens import pieces, spans
from tinylm.sweep import law
from tinylm.sweep.times import spent, stages
from tinylm.text import prepare
from tinylm.train import run

KINDS = ("sweep", "tuning", "position", ".")  # folders of runs; target and chat lie at the top
SPENT = ("compute", "sample", "compile", "wait", "start", "input", "save", "evaluate")
RESTS_ON = ("baselines.json", "tuning.json", "law.json", "forecast.json", "score.json",
            "growth.json", "samples.json", "alignment.json", "target/record.json",
            "chat/record.json")
PIECES = 90  # tokens of held-out text shown in colours
WORDS = 12  # long words shown in pieces


def write(folder: Path) -> Path:
    """Write report.html from the study's files and return its path; what is missing is said."""
    study = Study(Path(folder))
    parts = [page.section(title, makers, study) for title, makers in SECTIONS.items()]
    place = study.folder / "report.html"
    files.write_text(place, page.whole("A scaling study", "\n".join(parts)))
    files.write_json(study.folder / "report.json", {"files": {
        name: files.sha256(study.folder / name) for name in (place.name, *RESTS_ON)
        if (study.folder / name).exists()}})
    return place


def warnings(study: Study) -> str:
    """List what a reader must know before trusting the numbers."""
    runs = [r for kind in KINDS for r in study.records(kind)]
    said = study.optional("forecast.json", {"warning": ""})["warning"]
    found = [said] if said else []
    found += [f"at width {v['width']} the best rate, {v['best']:.2e}, is the edge of the range "
              "checked, so the rate rule may be off" for v in study.tuning()
              if v["at_edge"] and "edge" not in said]
    found += [f"no minimum at {scientific(m['flops'])} FLOPs: {m['reason']}"
              for m in study.optional("law.json", {"minima": []})["minima"] if not m["bracketed"]]
    found += [f"run {r['id']} ended as {r['status']}" for r in runs if r["status"] != "ok"]
    for place in sorted(study.folder.rglob("failure.json")):
        if run.record(place.parent) is None:
            found.append(f"run {place.parent.name} failed: {files.read_json(place)['reason']}")
    codes = sorted({r["code_id"] for r in runs})
    if len(codes) > 1:
        found.append(f"the runs come from {len(codes)} versions of the code: {', '.join(codes)}")
    most = max((r["epochs"] for r in runs if r["kind"] != "sft"), default=0.0)
    if most > 1:
        found.append(f"a run saw its training text {most:.2f} times")
    return "".join(p(f"Warning: {text}.", "warn") for text in found) or p(
        f"No warnings in {len(runs)} records.")


def headline(study: Study) -> str:
    """Put forecast beside outcome."""
    s, f = study.part("score.json"), study.part("forecast.json")
    line = "best runs of the last two budgets" if "best_runs" in f["laws"] else "last two minima"
    return p(f"Forecast {s['predicted']:.4f} nats per token, measured {s['measured']:.4f}: the "
             f"forecast erred by {s['error_percent']:+.2f}%, and the outcome lies "
             f"{'inside' if s['inside'] else 'OUTSIDE'} its interval, {s['low']:.4f} to "
             f"{s['high']:.4f}.", "big") + p(
        f"Of the interval: {f['coverage']}.") + p(
        f"A straight line through the {line} would have erred by "
        f"{s['naive_error_percent']:+.2f}%. This is the study “{s['name']}”: its held-out run took "
        f"{scientific(s['target_flops'])} FLOPs on {f['target_params']:,.0f} parameters and "
        f"{f['target_tokens']:,.0f} tokens. The forecast came first: the run's config names its "
        f"file's sha256, {s['forecast_sha256']}.")


def growth(study: Study) -> str:
    """Give the exponents."""
    e = study.fitted("exponents")
    return p(f"Best parameters grow as FLOPs^{e['a']:.3f} (standard error {e['a_se']:.3f}), best "
             f"tokens as FLOPs^{e['b']:.3f} ({e['b_se']:.3f}).")


def text(study: Study) -> str:
    """Give the tokenizer's facts, and words cut into coloured pieces."""
    data, tokenizer = prepare.open_text(study.folder / "text")
    f = data.facts

    rows = [(split, part, *(f"{n[k]:,}" for k in ("documents", "tokens", "bytes")),
             f"{n['bytes'] / max(n['tokens'], 1):.3f}")
            for split in ("train", "heldout") for part, n in f["counts"][split].items()]
    words = set(re.findall(r"\w{4,}", tokenizer.decode(data.heldout[:20_000])))
    long = sorted(words, key=lambda w: (-len(w), w))[:WORDS]
    read = "; ".join(f"{r['name']}: {r['documents']:,} documents, {r['bytes']:,} bytes"
                     for r in f["read"])
    return p(f"Read {read}. {f['duplicates']:,} duplicates dropped. The vocabulary has V={f['V']} "
             "ids.") + table(
        ("split", "part", "documents", "tokens", "bytes", "bytes per token"), rows) + (
        '<p>The held-out text begins:</p><p class="text">'
        + spans(pieces(tokenizer, data.heldout[:PIECES])) + '</p>'
        '<p>The longest words near its start:</p><p class="text">'
        + " ".join(spans(pieces(tokenizer, tokenizer.encode(" " + w))) for w in long) + "</p>")


def baselines(study: Study) -> str:
    """Put n-gram tables and transformers into one table and onto one axis."""
    target, per_nat, levels = study.record("target"), study.bits_per_nat, study.levels()
    bits, flops = target["loss"]["bits_per_byte"], target["flops"]["exact"]
    swept, laws = law.runs_of(study.records("sweep"))[0].flops, study.frontiers()

    def crossing(at: float) -> str:
        if not math.isfinite(at):
            return "not crossed"
        where = ("below the sweep" if at < min(swept) else "inside the sweep" if at <= max(swept)
                 else f"beyond it, {at / flops:.3g}×")
        return f"{scientific(at)} ({where})"

    rows = [(v.name, f"{v.bits:.4f}", f"{v.stderr * per_nat:.4f}", f"{v.nats:.4f}",
             f"{v.bits - bits:+.4f}", *(crossing(v.flops[k]) for k in laws)) for v in levels]
    for name, r in [("held-out run", target), *(("position weights*", r)
                                                for r in study.records("position") if r["loss"])]:
        found = r["loss"]
        rows.append((name, f"{found['bits_per_byte']:.4f}", f"{found['stderr'] * per_nat:.4f}",
                     f"{found['nats_per_token']:.4f}", f"{found['bits_per_byte'] - bits:+.4f}",
                     *[""] * len(laws)))
    gaps = [f"The held-out run is {abs(bits - v.bits):.3f} bits per byte "
            f"({abs(bits / v.bits - 1):.1%}) {'worse' if bits > v.bits else 'better'} than the "
            f"{v.name} table." for v in levels if v.name in ("4-gram", "5-gram")]
    return table(("predictor", "bits per byte", "standard error", "nats per token",
                  "minus the held-out run", *(f"FLOPs where the {k} crosses" for k in laws)), rows,
                 "× is against the held-out run's FLOPs") + p(
        " ".join(gaps) + " *Sees the last 8 tokens only.") + page.figure(
        plots.svg(plots.loss_axis(study)), "A cross is where a law comes down to a table; those "
        "over 100 times beyond the held-out run are in the table only.")


def rates(study: Study) -> str:
    """Show the rate check."""
    if not study.tuning():
        return p("This study checked no learning rates: it trusts its rate rule, and a wrong one "
                 "would bend the law.")
    return page.figure(plots.svg(plots.rates(study)),
                       "A best rate at the end of its curve says that the range was too narrow.")


def isoflops(study: Study) -> str:
    """Show the isoFLOP curves and their minima."""
    rows = [(scientific(m["flops"]), f"{m['params']:,.0f}", f"{m['tokens']:,.0f}",
             f"{m['tokens'] / m['params']:.1f}", f"{m['loss']:.4f}",
             *("" if m[k] is None else f"{m[k]:.4f}" for k in ("loss_se", "curvature")),
             m["reason"] or "bracketed") for m in study.part("law.json")["minima"]]
    return page.figure(plots.svg(plots.isoflops(study)),
                       "A star is the bottom of a budget's parabola; a hollow one is refused.") + (
        table(("budget (FLOPs)", "best params", "tokens", "tokens per param", "nats",
               "standard error", "curvature (nats)", "verdict"), rows))


def frontier(study: Study) -> str:
    """Show the frontier, the laws and the forecast."""
    laws, f = study.part("law.json"), study.part("forecast.json")
    rows = []
    for name in ("frontier", "frontier_floor", "surface"):
        found = laws[name]
        numbers = [f"{k} = {v:.5g}" for k, v in found.items()
                   if k not in ("refused", "objective", "certificate")]
        if bound := found.get("certificate", {}).get("at_bound"):
            numbers.append(f"AT ITS LIMIT: {', '.join(bound)}")
        rows.append((name.replace("_", " with "), found.get("refused") or ", ".join(numbers)))
    return page.figure(plots.svg(plots.frontier(study)), "The laws are drawn through the minima "
                       "alone; the band is nine tenths of power laws through minima redrawn within "
                       "their standard errors. The forecast joins the laws named below.") + table(
        ("law", "fitted numbers (nats per token)"), rows, "", "text") + p(
        f"The forecast is the {f['rule']}.")


def forms(study: Study) -> str:
    """Lay out what each law of the forecast said and weighed, and how all rank by forecasts."""
    f = study.part("forecast.json")
    compared = study.part("law.json").get("comparison", {}).get("laws", [])
    measured = study.optional("score.json", {"measured": math.nan})["measured"]
    laws = [(k.replace("_", " "), f"{f['weights'][k]:.1%}", f"{v:.4f}",
             f"{100 * (v / measured - 1):+.2f}%" if measured == measured else "")
            for k, v in sorted(f["laws"].items(), key=lambda law: -f["weights"][law[0]])]
    ranked = [(r["form"], *((r["refused"], "", "", "") if "refused" in r else
                            (f"{r['mean_percent']:.2f}%", f"{r['worst_percent']:.2f}%",
                             f"{r['bias_percent']:+.2f}%", f"{r['forecasts']} from {r['cuts']}")))
              for r in compared]
    return table(("law of the forecast", "weight", "nats per token", "minus measured"), laws) + (
        table(("law", "mean error", "worst", "bias", "forecasts from cuts"), ranked, "fitted below "
              "a budget, asked for the minima above it; few of them, so a rank is a hint", "text")
        if ranked else "")


def certificates(study: Study) -> str:
    """Say of every fit whether it stands at its optimum and what the runs leave open."""
    rows, laws = [], study.part("law.json")
    for name in ("surface", "frontier", "frontier_floor"):
        c = laws[name].get("certificate")
        rows.append((name.replace("_", " with "), *((
            f"{c['agree_share']:.0%} of {c['starts']}", f"{c['moved']:.3g}",
            f"{c['gradient_norm']:.1e}", f"{c['condition']:.3g}",
            ", ".join(c["at_bound"]) or "none") if c else (laws[name].get("refused", ""),))))
    return table(("fit", "starts that agree", "moved from the best start", "gradient", "condition",
                  "at its limit"), rows, "certificates; condition far above 1e3 means that the "
                 "runs do not hold the constants apart")


def exponents(study: Study) -> str:
    """Give the exponents under every convention, and by how much the parabola is off here."""
    laws = study.part("law.json")
    rows = [(name, f"{e['a']:.3f}", f"{e['a_se']:.3f}", f"{e['b']:.3f}", f"{e['b_se']:.3f}")
            for name, e in laws.get("conventions", {}).items() if name != "refused"]
    off = laws.get("bias", {}).get("percent", [])
    largest = max(off, key=lambda b: abs(b["params_percent"]), default=None)
    return (table(("parameters and FLOPs counted as", "params ~ FLOPs^", "standard error",
                   "tokens ~ FLOPs^", "standard error"), rows, "the same minima, counted six ways")
            if rows else "") + (p(
        "On this grid a parabola through losses of the fitted surface misplaces the best size by "
        f"at most {largest['params_percent']:+.2f}% and its loss by {largest['loss_percent']:+.3f}"
        "%.") if largest else "")


def coverage(study: Study) -> str:
    """Show how often intervals of this rule held on studies that did not set them."""
    parts = study.part("forecast.json")["parts"]
    said = ", ".join(f"{k} {100 * v:.2f}%" for k, v in parts.items())
    return page.figure(plots.svg(plots.coverage(intervals.shipped())), "Each study left out of "
                       "its own calibration; one study is one piece of evidence.") + (p(
        f"This interval joins, as standard deviations of the loss: {said}.") if parts else "")


def learnt(study: Study) -> str:
    """Show what heads and tokens gained along the best run of every budget and the held-out run."""
    rows = study.part("growth.json")["rows"]
    return page.figure(plots.svg(plots.growth(rows)), "Left: on random pieces said twice. Middle "
                       "and right: held-out text, a line a run, the lighter the more compute.")


def samples(study: Study) -> str:
    """Lay the first samples of both models side by side."""
    found = study.part("samples.json")["samples"]
    pair = [[s for s in found if s["model"] == m] for m in ("base", "chat")]
    rows = [(b["prompt"], *(s["text"] + (" ∎" if s["ended"] else " …") for s in (b, c)))
            for b, c in zip(*pair, strict=False)]
    return p("All samples of a fixed list of prompts, in order: nobody picked. ∎ ends a turn, … "
             "was cut off.") + table(("prompt", "base", "chat"), rows, "", "text")


def stages_of_chat(study: Study) -> str:
    """Put base, tuned and optimised models side by side on the instruction suite."""
    found = study.optional("alignment.json", {"runs": {}})["runs"]
    if not found:
        return p("This study made no table of instruction tasks.")
    names = [Path(name).name for name in found]
    rows = [(title, *(show(row) for row in found.values())) for title, show in alignment.COLUMNS]
    families = next(iter(found.values()))["exact"]
    rows += [(f"exact: {family}", *(alignment.rate(row["exact"][family])
                                    for row in found.values())) for family in families]
    return table(("", *names), rows, "tasks about words unseen in training (glossary: terms "
                 "asked in other phrases), likeliest answers; rates with 95% intervals; wins and "
                 "KL, of samples of an eighth of the tasks, against the first column")


def questions(study: Study) -> str:
    """Answer the five questions."""
    return "".join(page.section(title, [make], study, 3) for title, make in ANSWERS.items())


def every_run(study: Study) -> str:
    """List every run with its cost and its loss."""
    rows = []
    for place in (q.parent for kind in KINDS
                  for q in sorted((study.folder / kind).glob("*/record.json"))):
        name, r = str(place.relative_to(study.folder)), run.record(place)
        size, loss = r.get("params"), r["loss"]
        params = size["head"] + size["blocks"] if size else math.nan
        cells = (f"{loss[k]:.4f}" for k in ("nats_per_token", "bits_per_byte", "stderr")
                 ) if loss else (r["status"], "", "")
        rows.append((r["flops"]["exact"], name, f"{params:,.0f}" if size else "",
                     f"{r['tokens']:,}", f"{r['tokens'] / params:.1f}" if size else "",
                     scientific(r["flops"]["exact"]), f"{r['config']['optim']['lr']:.2e}", *cells,
                     f"{r['epochs']:.2f}", f"{spent(place)['wall']:.1f}"))
    return table(("run", "params", "tokens", "tokens per param", "FLOPs", "learning rate",
                  "nats per token", "bits per byte", "standard error (nats)", "epochs", "seconds"),
                 [row[1:] for row in sorted(rows)], "seconds of wall time, compilation included")


def times(study: Study) -> str:
    """Say how long each stage took, and on what the processes that trained spent their time."""
    rows = []
    for name in ("tuning", "position", "sweep", "target", "chat", "reward", "policy"):
        seconds = spent(study.folder / name)
        if seconds["wall"]:
            rows.append((name, f"{seconds['wall']:.0f}",
                         *(f"{seconds[k] / seconds['wall']:.1%}" for k in SPENT)))
    minutes = [(name, *(f"{seconds / 60:.1f}" for seconds in both))
               for name, both in stages(study.folder).items()]
    by_stage = table(("stage", "minutes", "processor minutes"), minutes,
                     "of all calls of this study but those that were killed") if minutes else ""
    return by_stage + table(("runs", "seconds", *SPENT), rows, "seconds of all processes "
                            "together; sample is a policy's rollouts, wait is workers starting or "
                            "idle, start is initialising and restoring")


def measured(study: Study) -> str:
    """Say how the numbers were made."""
    r = study.record("target")
    loss = r["loss"]
    rows = [
        ("data", f"{r['data_id']}, tokenizer {r['tokenizer_id']}, evaluation {r['eval_id']}"),
        ("held-out loss", f"{loss['tokens']:,} tokens in disjoint windows of "
         f"{r['config']['model']['T']}; standard error {loss['stderr']:.4f} nats, by document"),
        ("by part, bits/byte", ", ".join(f"{k} {v:.4f}" for k, v in loss["parts"].items())),
        ("FLOPs", f"6 a token and weight of blocks and head, and the causal half of attention: "
         f"{scientific(r['flops']['exact'])} (6ND: {scientific(r['flops']['six_nd'])})"),
        ("parameters", f"blocks and head, {r['params']['blocks']:,} + {r['params']['head']:,}; "
         "an input table of its own is not counted"),
        ("code", r["code_id"]),
        ("versions", ", ".join(f"{k} {v}" for k, v in r["versions"].items())),
        ("plan", ", ".join(f"{k} {v}" for k, v in r["plan"].items()))]
    return f'<div class="box">{table(("what", "of the held-out run"), rows, "", "text")}</div>'


SECTIONS: dict[str, list[Any]] = {
    "Forecast and outcome": [warnings, headline, growth], "The text and its tokens": [text],
    "Baselines and transformers": [baselines], "Learning rates": [rates],
    "Loss at equal compute": [isoflops, exponents], "The frontier and the forecast": [frontier],
    "Which law, and how far to believe it": [forms, certificates, coverage],
    "What comes with compute": [learnt], "Samples": [samples, stages_of_chat],
    "Five questions": [questions], "All runs": [every_run, times],
    "How this was measured": [measured]}

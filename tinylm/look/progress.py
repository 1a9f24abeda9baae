"""What a person sees in the terminal while a study runs: bars, a live table, short tables."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tinylm.laws.forecast import Forecast, Score
from tinylm.laws.plan import Cell, Proposal
from tinylm.text.corpora import Corpus
from tinylm.text.shards import Dataset

console = Console(stderr=True)
if not console.is_terminal:
    console = Console(stderr=True, width=120)
COMPILE_SECONDS = 5.0
"""to start and compile one shape, over two workers"""
SHOWN = 12
"""budgets of a table, of those that it has"""
QUIET_SECONDS = 15.0
"""between two lines of progress where there is no terminal"""


def say(what: Any) -> None:
    """Print text or a table for a person (stderr; stdout is for results)."""
    console.print(what, markup=False)


@contextlib.contextmanager
def bar(title: str, steps: int = 0) -> Iterator[Callable[..., None]]:
    """Show one bar; the yielded function takes (share) or, with `steps`, (step, loss)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
               TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(title, total=steps or 1.0, note="")
        said = time.monotonic()

        def update(done: float, loss: float | None = None) -> None:
            nonlocal said
            note = "" if loss is None else f"loss {loss:.3f}"
            shown.update(task, completed=done, note=note)
            if not console.is_terminal and time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                console.print(f"{title}: {done / (steps or 1.0):.0%} {note}")

        yield update


@contextlib.contextmanager
def live(title: str) -> Iterator[Callable[[Any], None]]:
    """Show a sweep's live table; without a terminal, a line now and then. The last one stays.

    The yielded function takes a sweep/runner.Progress, which is not imported: that needs JAX.
    """
    said, last = 0.0, None
    with Live(console=console, refresh_per_second=2, transient=True) as shown:

        def watch(p: Any) -> None:
            nonlocal said, last
            last = p
            if console.is_terminal:
                shown.update(_sweep_table(title, p))
            elif time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                console.print(_sweep_line(title, p))

        yield watch
    if last is not None:  # runs that were finished before show none
        console.print(_sweep_table(title, last))


def _sweep_line(title: str, p: Any) -> str:
    ended = sum(s not in ("waiting", "running") for s in p.status.values())
    left = p.seconds_left
    eta = "" if left is None else f", about {left / 60:.1f} min left"
    return f"{title}: {ended} of {len(p.status)} runs, {p.flops / p.total:.0%} of the FLOPs{eta}"


def _sweep_table(title: str, p: Any) -> Table:
    table = Table(title=_sweep_line(title, p))
    for column in ("run", "done", "loss", "status"):
        table.add_column(column, justify="right" if column in ("done", "loss") else "left")
    shown = [n for n, s in p.status.items() if s != "waiting"][-14:]
    for name in shown:
        loss = p.losses[name]
        table.add_row(name, f"{p.steps[name] / p.configs[name].steps:.0%}",
                      "" if loss is None else f"{loss:.3f}", p.status[name])
    return table


def expected(runs: dict[str, list[Any]], data: Dataset, rate: float) -> dict[str, Any]:
    """Say of PretrainConfigs by purpose what they will take, at `rate` FLOP/s their seconds.

    A branch's FLOPs are those of the run alone; its seconds, and the sum, are what it takes.
    """
    from tinylm.stages.pretrain import counts
    from tinylm.train.batch import windows

    rows = []
    for purpose, c in ((p, c) for p, part in runs.items() for c in part):
        size = counts(c.model)
        params = size["head"] + size["blocks"]
        epochs = c.tokens / (windows(data.train, c.model.T) * c.model.T)
        rows.append({"for": purpose if c.kind == "pretrain" else c.kind, "width": c.model.D,
                     "params": params, "tokens": c.tokens, "tokens/param": c.tokens / params,
                     "epochs": None if purpose == "chat" else epochs, "FLOPs": c.flops,
                     "lr": c.optim.lr, "seconds": c.spent / rate})
    configs = [c for part in runs.values() for c in part]
    return {"runs": rows, "flops": sum(c.spent for c in configs),
            "seconds_to_compile": COMPILE_SECONDS * len({c.model for c in configs})}


def listing(found: dict[str, Any]) -> Table:
    """Draw what is `expected` as a table."""
    rows, compiling = found["runs"], found["seconds_to_compile"]
    minutes = (sum(row["seconds"] for row in rows) + compiling) / 60
    table = Table(title=f"{len(rows)} runs, {found['flops']:.2e} FLOPs, about {minutes:.1f} min, "
                        f"{compiling:.0f} s to compile")
    formats = {"tokens/param": ".1f", "epochs": ".2f", "FLOPs": ".2e", "lr": ".2e",
               "seconds": ".0f"}
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*("" if v is None else format(v, formats.get(k, "")) for k, v in row.items()))
    return table


def result(record: dict[str, Any]) -> str:
    """Say what a run came to, in a line."""
    if not record["loss"]:
        return f"{record['id']}: {record['status']}"
    loss = record["loss"]
    return (f"{record['id']}: {loss['nats_per_token']:.4f} nats a token (se {loss['stderr']:.4f}), "
            f"{loss['bits_per_byte']:.4f} bits a byte after {record['tokens']} tokens")


def corpus(c: Corpus) -> str:
    """Say what was read."""
    read = ", ".join(f"{r['name']}: {r['documents']} documents, {r['bytes'] / 1e6:.2f} MB"
                     for r in c.read)
    return (f"read {read}; {c.duplicates} duplicates dropped; {len(c.train)} documents to train "
            f"on, {len(c.heldout)} held out")


def baselines(found: dict[str, Any]) -> str:
    """Give the n-gram losses in a line."""
    return "n-gram tables, bits per byte: " + ", ".join(
        f"{order}: {t['bits_per_byte']:.3f}" for order, t in found["tables"].items())


def tuning(verdict: list[dict[str, Any]]) -> str:
    """Say which rates did best."""
    return "\n".join(
        f"rate check at D={v['width']}: best {v['best']:.2e} of "
        + ", ".join(f"{r:.2e}" for r in v["rates"])
        + (" (AT AN EDGE: the rule may be off)" if v["at_edge"] else
           " (an edge, by less than seeds differ)"
           if v["best"] in (min(v["rates"]), max(v["rates"])) else "") for v in verdict)


def law(fitted: dict[str, Any]) -> str:
    """Give the exponents and the frontier in lines."""
    e, f = fitted["exponents"], fitted["frontier"]
    lines = curves(fitted)
    if "refused" in e or "refused" in f:
        return "\n".join(filter(None, [*lines, f.get("refused", "")]))
    lines.append(f"best loss = {f['A']:.3g} C^-{f['gamma']:.4f}")
    if "refused" not in fitted["conventions"]:
        lines.append("exponent by convention: " + ", ".join(
            f"{k} {x['a']:.3f}" for k, x in fitted["conventions"].items()))
    return "\n".join(lines)


def curves(found: dict[str, Any]) -> list[str]:
    """Give the isoFLOP minima, their exponents and the method's bias in lines."""
    e = found["exponents"]
    lines = [f"budget {m['flops']:.3g}: best size {m['params']:.3g} on {m['tokens']:.3g} tokens, "
             f"{m['loss']:.4f} nats" if m["bracketed"] else
             f"budget {m['flops']:.3g}: no minimum, {m['reason']}" for m in found["minima"][:SHOWN]]
    if (more := len(found["minima"]) - SHOWN) > 0:
        lines.append(f"and {more} more budgets")
    if "refused" in e:
        return [*lines, e["refused"]]
    lines.append(f"best size ~ C^{e['a']:.3f} (se {e['a_se']:.3f}), best tokens ~ C^{e['b']:.3f} "
                 f"(se {e['b_se']:.3f})")
    if off := found["bias"].get("percent"):
        worst = max(off, key=lambda b: abs(b["params_percent"]))
        lines.append(f"on this grid the parabola misplaces the best size by up to "
                     f"{worst['params_percent']:+.1f}% (at {worst['flops']:.2e} FLOPs)")
    return lines


def fitted(told: dict[str, Any], first: list[str]) -> str:
    """Give one law's constants, with their errors where resampled, and its certificate."""
    c, spread = told["certificate"], told.get("bootstrap", {}).get("constants", {})
    lines = [*first, f"{told['runs']} runs, objective {told['objective']:.10g}, residuals "
                       f"{told['residual_sd']:.4f} (sd)"]
    for name, value in told["law"].items():
        s = spread.get(name)
        lines.append(f"  {name} = {value:.6g}" + (
            f"  (sd {s['sd']:.4g}, 95% {s['low95']:.4g} to {s['high95']:.4g})" if s else ""))
    lines += [f"POORLY KNOWN: {name}, to {share:.0%} of itself (60 resamples); add runs at other "
              "tokens a parameter" for name, share in told.get("uncertain", {}).items()]
    lines += curves(told["curves"]) if "curves" in told else []
    return "\n".join([*lines, f"{c['agree_share']:.0%} of {c['starts']} starts agree, gradient "
                              f"{c['gradient_norm']:.1e}, condition {c['condition']:.3g}"
                      + (f", AT ITS LIMIT: {', '.join(c['at_bound'])}" if c["at_bound"] else "")])


def ranked(rows: list[dict[str, Any]], first: list[str]) -> str:
    """Give the laws in order of how well they forecast, and why some could not."""
    return "\n".join([*first, *(
        f"{r['form']}: no law {r['refused']}" if "refused" in r else
        f"{r['form']}: {r['mean_percent']:.2f}% off (mean of {r['forecasts']} forecasts from "
        f"{r['cuts']} cuts; worst {r['worst_percent']:.2f}%, bias {r['bias_percent']:+.2f}%)"
        for r in rows)])


def planned(made: Proposal, device: str) -> str:
    """Lay out a plan: its curves, the larger run, the precision to expect, time and cost."""
    curves: dict[float, list[Cell]] = {}
    for c in made.cells:
        curves.setdefault(c.budget, []).append(c)
    lines = [f"{budget:.2e} FLOPs: widths {', '.join(str(c.shape.D) for c in row)} on "
             f"{row[-1].tokens:,} to {row[0].tokens:,} tokens" for budget, row in curves.items()]
    t, e = made.target, made.expected
    lines.append(f"then one run of {t.flops:.2e} FLOPs: width {t.shape.D}, {t.steps:,} steps; loss "
                 f"{e.loss:.3f} if the pilot's law holds, standard error {e.stderr:.4f}, form risk "
                 f"{e.form_risk:.4f} nats (" + ", ".join(f"{k} {v:+.4f}" for k, v in
                                                        e.biases.items()) + ")")
    lines += [f"{what}: {b.flops:.2e} FLOPs, {_hours(b._asdict(), device)}"
              for what, b in (("sweep", made.sweep), ("run", made.run))]
    return "\n".join(lines)


def costed(told: dict[str, Any], device: str) -> str:
    """Lay out what a run takes."""
    p, b = told["params"], told["bill"]
    counted = (f"{p['total']:,} parameters: {p['embedding']:,} embedding, {p['blocks']:,} blocks, "
               f"{p['head']:,} head; laws count {p['law']:,}" if isinstance(p, dict)
               else f"{p:,.0f} parameters")
    lines = [f"{counted}; {told['tokens']:,.0f} tokens", "FLOPs: " + ", ".join(
        f"{k} {v:.4g}" for k, v in told["flops"].items()), _billed(b, device)]
    if "activation_bytes" in told:
        lines.append(f"activations {told['activation_bytes'] / 1e6:,.1f} MB a micro-batch")
    return "\n".join(lines)


def published(rows: list[dict[str, Any]], device: str) -> str:
    """Lay out published models: what their makers state, 6ND beside it, and the bill."""
    def number(value):
        return "not published" if value is None else f"{value:.4g}"

    return "\n".join(
        f"{r['name']}: {number(r['params'])} parameters, {number(r['tokens'])} tokens, "
        f"{number(r['flops'])} FLOPs"
        + (f" (6ND {r['six_nd']:.4g})" if r["six_nd"] else "")
        + (f", {_hours(r['bill'], device)}" if r["bill"] else "")
        + (f"; ESTIMATE, {r['estimate']}" if r["estimate"] else "") + f"; {r['source']}"
        for r in rows)


def _billed(b: dict[str, float], device: str) -> str:
    return (f"{_hours(b, device)}; weights, gradients and optimiser "
            f"{b['state_bytes'] / 1e9:,.4g} GB, on {b['devices']} or more")


def _hours(b: dict[str, float], device: str) -> str:
    paid = f", ${b['dollars']:,.2f}" if b["dollars"] else ""
    return f"{b['device_hours']:,.4g} hours of {device}{paid}"


def forecast(f: Forecast, sha: str) -> str:
    """Say what was forecast, what may spoil it first, and how often such intervals held."""
    lines = [f"WARNING: {f.warning}"] if f.warning else []
    said = (f"forecast for {f.target_flops:.2e} FLOPs, {f.target_params:.0f} parameters: "
            f"{f.predicted:.4f} nats [{f.low:.4f}, {f.high:.4f}], written as {sha[:12]}")
    return "\n".join([*lines, said, *([f.coverage] if f.coverage else [])])


def score(s: Score) -> str:
    """Say how wrong the forecast was."""
    where = "inside" if s.inside else "OUTSIDE"
    return (f"forecast {s.predicted:.4f}, measured {s.measured:.4f} nats: error "
            f"{s.error_percent:+.2f}%, {where} the interval; naive slope "
            f"{s.naive_error_percent:+.2f}%")


def benched(found: dict[str, Any]) -> str:
    """Lay a benchmark's medians out in lines."""
    rates = found.get("tokens_per_second") or found["rates"]
    unit = "tokens/s" if "tokens_per_second" in found else "GFLOP/s"
    return "\n".join(f"{name:>28} {r['median']:12,.1f} {unit}  [{r['low']:,.1f}, {r['high']:,.1f}]"
                     + (f"  {r['ratio']:.2f} x" if "ratio" in r else "")
                     for name, r in rates.items())


def swept(found: dict[str, Any]) -> str:
    """Lay out where a sweep's time went: cold and warm cache, as run and at full length."""
    columns = list(found["cold"]["shares"])
    lines = [f"{found['runs']} runs of {found['shapes']} shapes, {found['scale']:g} of their steps",
             " " * 16 + "".join(f"{name:>10}" for name in (*columns, "tokens/s", "GFLOP/s"))]
    for cache in ("cold", "warm"):
        for length in ("shares", "full_length_shares"):
            one = found[cache]
            rates = (f"{one['tokens_per_second']:10,.0f}{one['flops_per_second'] / 1e9:10,.2f}"
                     if length == "shares" else "")
            lines.append(f"{cache + (', run' if length == 'shares' else ', full'):16}" + "".join(
                f"{one[length][name]:10.1%}" for name in columns) + rates)
    return "\n".join(lines)


def answer(value: dict[str, Any], as_json: bool, words: str) -> None:
    """Show the result to a person, or as one JSON object on the last line of stdout."""
    if as_json:
        print(json.dumps(value))
    else:
        print(words)


def outcome(record: dict[str, Any], as_json: bool, words: str) -> None:
    """Show a run's record so, and exit with 1 where it did not end well."""
    answer(record, as_json, words)
    if record["status"] != "ok":
        say(f"{record['id']} {record['status']}: train it again with a lower rate in a new folder")
        raise SystemExit(1)

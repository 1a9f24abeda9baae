"""Does everything run on this accelerator, as fast and as exactly as it should?

question   Ceiling, populations, a 124M model's utilisation, decoding; is the library's attention
           ours, is a resumed run the same to the bit, does a small model learn?
command    python experiments/device_checks.py --out studies/device
           (--nanogpt CHECKOUT, where torch is: nanoGPT compiled in bf16 beside ours)
cost       under ten minutes on one GPU; with --toy a minute on a CPU
expected   populations 10 times one at a time at D=64 and 3 times at D=256, or a quarter of the
           measured bf16 rate; the 124M model at 45% of it; the same bits after a stop
result     one H200, jax 0.11: the same bits, 124M at .51 of the bf16 rate (441k tokens a second);
           populations of 64 members of 8192 tokens 3.2, 2.8, 1.9 times at D=64, 128, 256 (23% of
           the bf16 rate), of 1024 tokens 16 times at D=64: experiments/results/device.json, by the
           checks as they were, whose time was over before decoding; LOG.md

A check that fails, or that the device has no memory or time for, is a row too; the rest goes on.
"""

import functools
import io
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from tinylm import files, machine

machine.pin()

import jax  # noqa: E402  (JAX must start pinned)
import jax.numpy as jnp  # noqa: E402

from tinylm import bench  # noqa: E402
from tinylm.__main__ import arguments, guarded  # noqa: E402
from tinylm.config import BadInput, require, to_json  # noqa: E402
from tinylm.laws.accounting import flops_per_token  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.model import attention  # noqa: E402
from tinylm.model.decoder import ModelConfig  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig, pretrain, pretrain_population  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.train import checkpoint  # noqa: E402
from tinylm.train.run import Stopped  # noqa: E402

ROOT, PEER = Path(__file__).parents[1], Path(__file__).with_name("peer_nanogpt.py")


@dataclass
class Args:
    """Check one accelerator and write one record."""

    out: Path
    """folder of the small runs"""
    nanogpt: Path | None = None
    """folder of a checkout of github.com/karpathy/nanoGPT"""
    toy: bool = False
    """sizes that a CPU does in a minute"""
    minutes: float = 9.5
    """a check that would begin later is not begun"""
    results: Path = ROOT / "experiments/results"
    """folder for device.json; toy sizes write toy.json"""


class Sizes(NamedTuple):
    """What is measured."""

    compute: str
    members: tuple[int, ...]
    widths: tuple[tuple[int, int, float], ...]  # width, tokens of a member's step, and how many
    # times one at a time at least, or .25 of the bf16 rate
    large: ModelConfig
    share: float  # of the measured bf16 rate that it should reach
    tries: tuple[tuple[int, bool, bool], ...]  # rows, recomputed layers, scanned layers
    shapes: tuple[tuple[str, int], ...]  # decoded, and how many at once
    steps: int  # of the model that must learn
    guess: float  # share of a guess's loss that it must get below
    rounds: int
    seconds: float


GPT2 = ModelConfig(V=50304, D=768, L=12, H=12, F=2048, T=1024, compute="bf16")
FULL = Sizes("bf16", (8, 32, 64), ((64, 8192, 10.0), (128, 8192, 0.0), (256, 8192, 3.0),
                                   (64, 1024, 0.0)), GPT2, 0.45,
             ((16, False, False), (64, False, False)),
             (("s", 1), ("s", 64), ("m", 1), ("m", 64)), 600, 0.75, 3, 0.5)
TOY = Sizes("f32", (2,), ((16, 64, 0.0),), ModelConfig(V=128, D=16, L=2, H=2, T=32, compute="bf16"),
            0.0, ((2, True, True),), (("tiny", 2),), 40, 0.95, 1, 0.01)


class Found(NamedTuple):
    """What a check measured, what it should be, and the rest that is worth keeping."""

    value: float
    unit: str
    target: str = ""
    passed: bool = True
    more: dict[str, Any] = {}


def main(args: Args) -> int:
    """Do every check, print a line each, keep the record of those done; 1 where any failed."""
    if args.nanogpt and not (args.nanogpt / "model.py").exists():
        raise BadInput(f"{args.nanogpt} holds no model.py; give a checkout of nanoGPT")
    require("minutes", args.minutes, 0, 1e6)
    began, rows = time.monotonic(), []
    args.results.mkdir(parents=True, exist_ok=True)  # what cannot be written is told first
    for name, work in checks(args, TOY if args.toy else FULL, rows):
        row = {"check": name, "at_seconds": round(time.monotonic() - began, 1)}
        try:
            if row["at_seconds"] >= 60 * args.minutes:
                raise TimeoutError(f"{args.minutes:g} minutes were over")
            found = work()
            row |= found._asdict()
        except Exception as fault:  # noqa: BLE001  (out of memory comes in many types)
            row |= {"value": None, "unit": "", "target": "", "passed": False, "more": {
                "error": f"{type(fault).__name__}: {fault}".splitlines()[0][:300]}}
        rows.append(row)
        progress.say(told(row))
        keep(args, began, rows, False)
    keep(args, began, rows, passed := all(r["passed"] for r in rows))
    return 0 if passed else 1


def keep(args: Args, began: float, rows: list[dict[str, Any]], passed: bool) -> None:
    """Write the record of the checks that are done; `passed` is of all of them."""
    files.write_json(args.results / ("toy.json" if args.toy else "device.json"), {
        "schema": 1, "what": "device", "toy": args.toy, "versions": machine.versions(),
        "environment": machine.environment(), "seconds": time.monotonic() - began,
        "passed": passed, "checks": rows})


def told(row: dict[str, Any]) -> str:
    """Give one line a check."""
    said = row["more"].get("error") or f"{row['value']:.4g} {row['unit']}"
    return (f"{'ok  ' if row['passed'] else 'FAIL'} {row['check']}: {said}"
            + (f" (target: {row['target']})" if row["target"] else ""))


def checks(args: Args, sizes: Sizes,
           rows: list[dict[str, Any]]) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Give every check's name and work; `rows` are those done: the ceiling is the first."""
    yield "machine", ceiling
    yield "attention", functools.partial(mixing, sizes)
    text = functools.cache(lambda: corpus(args.out))
    yield "resume, one run", lambda: resumed(text().folder / "one", text(), 1)
    yield "resume, a population", lambda: resumed(text().folder / "many", text(), 4)
    yield "learning", lambda: learning(text().folder / "learning", text(), sizes)
    for batch, remat, scanned in sizes.tries:
        name = f"124M, {batch} rows" + ", recomputed" * remat + ", scanned" * scanned
        yield name, functools.partial(large, sizes, batch, remat, scanned, rows)
    yield "124M, best", functools.partial(best, rows, "124M, ", sizes.share)
    for width, tokens, target in sizes.widths:
        yield f"population D={width} of {tokens} tokens", functools.partial(
            population, sizes, width, tokens, target, rows)
    if args.nanogpt:
        first = sizes.tries[0][0]
        yield f"nanoGPT, 124M, {first} rows", functools.partial(
            peer, args, sizes.large, first, rows, f"124M, {first} rows")
        for width, tokens, _ in sizes.widths:
            model = bench.member(width, tokens, sizes.compute)
            yield f"nanoGPT, D={width} of {tokens} tokens", functools.partial(
                peer, args, model, tokens // model.T, rows, f"population D={width} of {tokens} ")
    for shape, batch in sizes.shapes:
        yield f"decode {shape}, {batch} at once", functools.partial(decoding, sizes, shape, batch)


def best(rows: list[dict[str, Any]], prefix: str, target: float) -> Found:
    """Hold the best row of a kind against its target."""
    done = [r for r in rows if r["check"].startswith(prefix) and r["value"] is not None]
    if not done:
        raise RuntimeError("none of these was measured")
    value = max(r["value"] for r in done)
    return Found(value, done[0]["unit"], f"{target:g}", value >= target)


def ceiling() -> Found:
    """Measure the rates that the rest is held against."""
    found = bench.peak(rounds=3)
    return Found(found["best_bf16_gflops"] / 1e3, "bf16 TFLOP/s", more={
        "f32_tflops": found["best_f32_gflops"] / 1e3, "rates": found["rates"],
        "copy_gb_per_second": found["rates"]["copy GB/s"]["median"]})


def mixing(sizes: Sizes) -> Found:
    """Compare the library's attention with ours: output and gradients, relative differences."""
    c, draw = sizes.large, np.random.default_rng(0).standard_normal
    shapes = ((2, c.T, c.H, c.head_width), *[(2, c.groups, c.T, c.head_width)] * 2)
    inputs = tuple(jnp.asarray(draw(s), jnp.float32) for s in shapes)
    visible = np.tri(c.T, dtype=bool)[None]

    def everything(mix: Callable) -> tuple[Any, Any]:
        def value(inputs: Any) -> tuple[Any, Any]:
            mixed = mix(*inputs, visible)
            return jnp.sum(jnp.sin(mixed)), mixed
        return jax.jit(jax.grad(value, has_aux=True))(inputs)

    ours, library = everything(attention.attend), everything(
        lambda *given: attention.by_library(*given, c.dtype))
    off = max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in zip(
        jax.tree.leaves(ours), jax.tree.leaves(library), strict=True))
    return Found(off, "relative difference", "at most .02 (bf16 rounds by .004)", off <= 0.02)


def corpus(out: Path) -> Any:
    """Prepare a small text that is always there: this package's sources, as they are now."""
    rows = "".join(json.dumps({"text": p.read_text("utf-8")}) + "\n"
                   for p in sorted((ROOT / "tinylm").rglob("*.py")))
    files.write_text(out / "sources.jsonl", rows)
    return prepare.prepare(out / f"text-{files.sha256_of(rows.encode())[:16]}",
                           corpora.load([out / "sources.jsonl"]), 384)[0]


def small(data: Any, steps: int, seed: int = 0) -> PretrainConfig:
    """Give a run of a moment."""
    model = ModelConfig(V=data.V, D=16, L=2, H=2, T=32)
    return PretrainConfig(model, steps=steps, batch=256, seed=seed, data_id=data.id)


def brief(size: int) -> machine.Plan:
    """Give the plan of such runs: short chunks, so that a stop lies between checkpoints."""
    plan = machine.plan_for(8, 32, 16, "f32", jax.default_backend(), 1)
    return replace(plan, chunk=4, checkpoint_every=8, population=size)


def resumed(folder: Path, data: Any, size: int) -> Found:
    """Train whole and with a stop; count the bytes of logs and parameters that differ."""
    plan = brief(size)
    members = {f"run-{n}": small(data, 24 - 4 * n, n) for n in range(min(3, size))}

    def train(place: Path, stop_at: int) -> list[bytes]:
        def event(*told: Any) -> None:
            if told[-2] == stop_at:
                raise Stopped("stopped on purpose")

        if size == 1:
            pretrain(place / "run-0", members["run-0"], data, plan, event)
        else:
            pretrain_population(place, members, data, plan, event)
        return [part for name, config in members.items() for part in (
            (place / name / "metrics.jsonl").read_bytes(),
            *(np.asarray(a).tobytes() for a in jax.tree.leaves(
                checkpoint.final_params(place / name, config.model))))]

    whole = train(folder / "whole", 0)
    for at in (12, 0):
        try:
            parts = train(folder / "parts", at)
        except Stopped:
            continue
    differ = sum(len(a) if len(a) != len(b) else int(np.sum(
        np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)))
        for a, b in zip(whole, parts, strict=True))
    return Found(differ, "bytes differ", "none", differ == 0,
                 {"bytes": sum(map(len, whole)), "members": len(members)})


def learning(folder: Path, data: Any, sizes: Sizes) -> Found:
    """Train a small model; its held-out loss must be far below a guess's."""
    record = pretrain(folder, small(data, sizes.steps), data, brief(1))
    loss, guess = record["loss"]["nats_per_token"], math.log(data.V)
    return Found(loss, "nats a token", f"below {sizes.guess:g} of a guess's {guess:.2f}",
                 loss < sizes.guess * guess)


def share(gflops: float, rows: list[dict[str, Any]]) -> float:
    """Give the share of the bf16 rate that the first check measured."""
    return gflops / 1e3 / rows[0]["value"]


def large(sizes: Sizes, batch: int, remat: bool, scanned: bool,
          rows: list[dict[str, Any]]) -> Found:
    """Time the 124M model's step; give its share of the measured bf16 rate."""
    config = sizes.large
    plan = replace(machine.plan_for(batch, config.T, config.D, config.compute,
                                    jax.default_backend(), 1), micro=batch, remat=remat,
                   unroll=not scanned)
    tokens = np.random.default_rng(0).integers(0, config.V, (8, batch, config.T + 1))
    rate = bench.Trainer(config, plan, tokens).rate
    rate(0.0)
    speed = rate(4 * sizes.seconds)
    part = share(speed * flops_per_token(config.shape) / 1e9, rows)
    return Found(part, "of the measured bf16 rate", more={
        "bf16_share": part, "tokens_per_second": speed, "model": to_json(config)})


def population(sizes: Sizes, width: int, tokens: int, target: float,
               rows: list[dict[str, Any]]) -> Found:
    """Time members together against one at a time; hold the best against its target."""
    found = bench.population(sizes.members, (width,), sizes.rounds, sizes.seconds, sizes.compute,
                             tokens)["tokens_per_second"]
    best = max(found.values(), key=lambda r: r["ratio"])
    part = share(best["gflops"], rows)
    return Found(best["ratio"], "times one at a time", f"{target:g}, or .25 of the bf16 rate",
                 best["ratio"] >= target or part >= 0.25, {"bf16_share": part, "rates": found})


def peer(args: Args, model: ModelConfig, batch: int, rows: list[dict[str, Any]],
         prefix: str) -> Found:
    """Time nanoGPT of that size, compiled in bf16; give our best rate over its."""
    path = args.out / f"{model.D}-{batch}.npy"
    held = io.BytesIO()
    np.save(held, np.random.default_rng(0).integers(0, model.V, (8, batch, model.T + 1)))
    files.write_bytes(path, held.getvalue())
    shape = {k: getattr(model, k) for k in ("V", "D", "L", "H", "T")}
    how = {"bf16": True, "compile": True, "micro": 0, "fused": True, "device": "cuda"}
    command = [sys.executable, str(PEER), str(args.nanogpt.resolve()), str(len(machine.cores()))]
    with bench.Crew([command]) as crew:
        ask = functools.partial(crew.ask, "rate", shape, batch, str(path.resolve()), how)
        ask(0.0)
        theirs = statistics.median(ask(2.0) for _ in range(3))
    ours = [fast(r) for r in rows if r["check"].startswith(prefix) and r["value"] is not None]
    return Found(max(ours) / theirs, "times nanoGPT", "ahead of it", max(ours) > theirs,
                 {"tokens_per_second": theirs, "ours": max(ours)})


def fast(row: dict[str, Any]) -> float:
    """Give the tokens a second of a row of ours, a population's all together."""
    more = row["more"]
    return more.get("tokens_per_second") or max(
        (r["median"] for r in more.get("rates", {}).values()), default=0.0)


def decoding(sizes: Sizes, name: str, rows: int) -> Found:
    """Time decoding."""
    config = sizes.large if name == "tiny" else bench.shape(name)[0]
    rate = bench.interleaved({"": bench.decoder(config, rows)}, sizes.rounds)[""]
    return Found(rate.median, "tokens/s", more=rate._asdict())


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))

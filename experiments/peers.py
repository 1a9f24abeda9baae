"""How fast do we train and decode, beside nanoGPT and tuned torch, on this machine?

question   Tokens a second of the whole machine, same shapes, batches and text, in turn; loss after
           equal tokens; decoding from one token to the end of the context. Ours trains in bf16
           (`ratio`) and in f32 (`ratio_f32`: a processor has one that is faster) and decodes in
           f32. `most` is what
           a step of nothing but products, at the best rate of either side, would make.
command    python experiments/peers.py --nanogpt CHECKOUT --out studies/peers
           (--python names one that has torch, where this one has not)
cost       5 to 20 minutes a shape on two cores, most of it torch (--steps 16 at l and xl)
expected   to compiled bf16 at least 2.0, 1.4, 1.15, .95 times at s, m, l, xl; to tuned torch 1.6,
           1.15, 1.0, .9; decoding 12 and 25 times at batch 1 and 64
result     jax 0.12: 3.05, 1.72, 1.41, 1.18 at s, m, l, xl; torch tuned 2.51, 1.71, 1.34, 1.19;
           decoding 93 and 64 at s, 45 and 54 times at m: experiments/results/peers_py312.json,
           and peers_py311.json for jax 0.10; other processors: peers_avx2.json, peers_xeon.json,
           peers_xeon_py311.json, where float32 is the faster type for both and ours is by oneDNN
           and our C: 3.39, 2.42, 2.14, 1.80 over compiled bf16 and 3.34, 2.52, 1.90, 1.80 over
           tuned torch
"""

import dataclasses
import functools
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from tinylm import files, machine

machine.command()

from tinylm import bench  # noqa: E402  (JAX must start pinned)
from tinylm.__main__ import arguments, guarded  # noqa: E402
from tinylm.config import BadInput, to_json  # noqa: E402
from tinylm.laws.accounting import flops_per_token, parameters  # noqa: E402
from tinylm.look import progress  # noqa: E402
from tinylm.model.decoder import ModelConfig  # noqa: E402
from tinylm.stages.pretrain import PretrainConfig, pretrain  # noqa: E402
from tinylm.sweep.presets import LAPTOP  # noqa: E402
from tinylm.text import corpora, prepare  # noqa: E402
from tinylm.text.shards import Dataset  # noqa: E402
from tinylm.train.batch import batch  # noqa: E402
from tinylm.train.optim import OptimConfig  # noqa: E402

PEER = Path(__file__).with_name("peer_nanogpt.py")
RATES = (1e-3, 2e-3, 4e-3)
"""peak rates of which nanoGPT's best loss is taken"""
OURS = {"ours": "bf16", "ours f32": "f32"}
PLAIN = {"bf16": False, "compile": False, "micro": 0, "fused": False}
WAYS = {"nanoGPT eager f32": PLAIN, "nanoGPT eager bf16": {**PLAIN, "bf16": True},
        "nanoGPT compiled f32": {**PLAIN, "compile": True},
        "nanoGPT compiled bf16": {**PLAIN, "compile": True, "bf16": True}}
TUNED = {f"torch tuned, {n} at once": {"bf16": True, "compile": True, "micro": n, "fused": True}
         for n in (4, 8)}
"""two pinned processes"""


@dataclass
class Args:
    """Time a checkout of nanoGPT and ourselves in turn; print ratios."""

    nanogpt: Path
    """folder of a checkout of github.com/karpathy/nanoGPT"""
    out: Path
    """folder of the text, the batches and our runs"""
    python: Path = Path(sys.executable)
    """a Python that has torch"""
    shapes: tuple[str, ...] = ("s", "m", "l", "xl")
    """of tinylm/bench.py"""
    decode: tuple[str, ...] = ("s", "m")
    """shapes to decode with too: nanoGPT keeps no cache and takes minutes for larger ones"""
    corpus: tuple[str, ...] = ()
    """text files; none: the default corpus"""
    rounds: int = 5
    """the median is over these"""
    seconds: float = 2.0
    """a task each round"""
    steps: int = 200
    """optimiser steps for the loss after equal tokens; 0: none"""
    V: int = 0
    """rows of the vocabulary; 0: each shape's own"""
    results: Path | None = None
    """folder for the record"""


def main(args: Args) -> int:
    """Measure every shape and write one record."""
    check_peer(args.nanogpt, args.python)
    record: dict[str, Any] = {"schema": 1, "versions": machine.versions(), "shapes": {}}
    python = "".join(map(str, sys.version_info[:2]))
    place = args.results and args.results / f"peers_py{python}.json"
    old = files.read_json(place) if place and place.exists() else record
    if old["versions"] == record["versions"]:  # shapes measured before stay
        record = old
    for name in args.shapes:
        record["shapes"][name] = measured(args, name)
        progress.say(told(name, record["shapes"][name]))
        if place:
            files.write_json(place, {**record, "environment": machine.environment()})
    return 0


def check_peer(nanogpt: Path, python: Path) -> None:
    """Refuse a folder that is no checkout of nanoGPT, or a Python that cannot run it."""
    if not (nanogpt / "model.py").exists():
        raise BadInput(f"{nanogpt} holds no model.py; give a checkout of nanoGPT")
    if not imports_torch(python):
        raise BadInput(f"{python} cannot import torch; give --python one that can")


def imports_torch(python: Path) -> bool:
    """Tell whether that is a Python which has torch."""
    try:
        return subprocess.run([python, "-c", "import torch"], capture_output=True).returncode == 0
    except OSError:  # no such program, or none that may be run
        return False


def measured(args: Args, name: str) -> dict[str, Any]:
    """Give rates, ratios and losses of one shape."""
    config, rows = bench.shape(name)
    place = args.out / f"text-{args.V or config.V}"
    data, _ = prepare.prepare(place, corpora.load(args.corpus), args.V or config.V)
    model = ModelConfig(V=data.V, D=config.D, L=config.L, H=config.H, T=config.T)
    paths = batches(args.out / name, data, model, rows, max(args.steps, 8))
    shape = {k: getattr(model, k) for k in ("V", "D", "L", "H", "T")}
    best = products(args)
    found = {"rows": rows, "model": to_json(model), **compared(model), "product_gflops": best,
             "most": max(best.values()) * 1e9 / flops_per_token(model.shape),
             "training": training(args, model, shape, rows, paths)}
    if name in args.decode:
        found["decoding"] = decoding(args, model, shape)
    if args.steps:
        found["loss"] = losses(args, name, data, model, shape, rows, paths)
    return found


def compared(model: ModelConfig) -> dict[str, float]:
    """Give our parameters and FLOPs a token over nanoGPT's, whose formula counts causal halves."""
    D, L, V, T = model.D, model.L, model.V, model.T
    theirs = V * D + L * (12 * D * D + 2 * D) + D
    ours = parameters(model.shape)
    flops = 6 * (12 * L * D * D + V * D) + 6 * L * (T + 1) * D
    return {"parameters_ratio": (ours.head + ours.blocks) / theirs,
            "flops_ratio": flops_per_token(model.shape) / flops}


def batches(folder: Path, data: Dataset, model: ModelConfig, rows: int, steps: int) -> list[str]:
    """Write what both sides train on and are scored on: eight batches, all batches, held out."""
    every = np.stack([batch(data.train, 0, t, rows, model.T).tokens for t in range(steps)])
    count = (len(data.heldout) - 1) // model.T
    heldout = data.heldout[np.arange(count)[:, None] * model.T + np.arange(model.T + 1)]
    paths = []
    for name, array in (("few", every[:8]), ("every", every), ("heldout", heldout)):
        paths.append(str((folder / f"{name}.npy").resolve()))
        held = io.BytesIO()
        np.save(held, array.astype(np.uint16))
        files.write_bytes(folder / f"{name}.npy", held.getvalue())
    return paths


def peers(args: Args, models: int) -> list[list[str]]:
    """Give the commands that serve nanoGPT, one over all cores or one a core."""
    start = [str(args.python), str(PEER), str(args.nanogpt)]
    cores = machine.cores()
    if models == 1:
        return [[*start, str(len(cores))]]
    return [[*start, "1", str(core)] for core in cores[:models]]


def products(args) -> dict[str, float]:
    """Give the best rate of a product on all cores, ours (XLA or oneDNN) or torch's, in GFLOP/s."""
    ours = bench.peak(args.rounds)
    with bench.Crew(peers(args, len(machine.cores()))) as theirs:
        return {kind: max(ours[f"best_{kind}_gflops"],
                          *(theirs.ask("product", *shape, kind == "bf16", 0.2)
                            for shape in bench.PRODUCTS)) for kind in ("f32", "bf16")}


def training(args, model, shape, rows, paths) -> dict[str, Any]:
    """Give tokens a second, one model on the machine and one a core; ours in either type over each.

    `ratio` is of ours in bf16, `ratio_f32` of ours in f32.
    """
    few, found = paths[0], {}
    for models in (1, len(machine.cores())):
        ways = {**WAYS, **TUNED} if models > 1 else WAYS
        with bench.Crew(bench.servers(models)) as ours, bench.Crew(peers(args, models)) as theirs:
            tasks = {way: functools.partial(ours.ask, to_json(in_type(model, compute)), rows,
                                            args.seconds, few) for way, compute in OURS.items()}
            tasks |= {way: functools.partial(theirs.ask, "rate", shape, rows, few, how,
                                             args.seconds) for way, how in ways.items()}
            rates = bench.interleaved(tasks, args.rounds)
        found[f"models_{models}"] = {
            "tokens_per_second": {k: r._asdict() for k, r in rates.items()},
            **{key: {k: rates[ours].median / r.median for k, r in rates.items() if k != ours}
               for key, ours in (("ratio", "ours"), ("ratio_f32", "ours f32"))}}
    return found


def decoding(args, model, shape) -> dict[str, Any]:
    """Give tokens a second of T - 1 tokens after one; many rows over all devices, as theirs are."""
    found = {}
    with bench.Crew(peers(args, 1)) as theirs:
        for rows in (1, 64):
            rates = bench.interleaved({
                "ours": bench.decoder(model, rows, seconds=args.seconds),
                "nanoGPT": functools.partial(theirs.ask, "generate", shape, rows, args.seconds),
            }, args.rounds)
            found[f"batch_{rows}"] = {
                "tokens_per_second": {k: r._asdict() for k, r in rates.items()},
                "ratio": rates["ours"].median / rates["nanoGPT"].median}
    return found


def losses(args, name, data, model, shape, rows, paths) -> dict[str, Any]:
    """Give held-out nats a token after the same batches, each side with its own schedule."""
    tokens, ours = args.steps * rows * model.T, {}
    for way, compute in OURS.items():
        config = PretrainConfig(in_type(model, compute), OptimConfig(lr=LAPTOP.rule(tokens)),
                                args.steps, rows * model.T, 0, data.id)
        plan = machine.plan_for(rows, model.T, model.D, compute, *machine.survey())
        record = pretrain(args.out / name / f"run-{args.steps}-{compute}", config, data, plan)
        ours[way] = record["loss"]["nats_per_token"]
    with bench.Crew(peers(args, 1)) as theirs:
        tried = {f"{rate:g}": theirs.ask("loss", shape, rows, *paths[1:],
                                         WAYS["nanoGPT compiled f32"], rate) for rate in RATES}
    return {"tokens": tokens, **ours, "nanoGPT": min(tried.values()), "nanoGPT_by_rate": tried}


def in_type(model: ModelConfig, compute: str) -> ModelConfig:
    """Give the model with its products in that type."""
    return dataclasses.replace(model, compute=compute)


def told(name: str, found: dict[str, Any]) -> str:
    """Lay one shape out in lines."""
    lines = [f"{name}: parameters {found['parameters_ratio']:.3f}, FLOPs a token "
             f"{found['flops_ratio']:.3f} of nanoGPT's; products alone would make "
             f"{found['most']:,.0f} tokens/s"]
    for models, part in found["training"].items():
        for (way, compute), key in zip(OURS.items(), ("ratio", "ratio_f32"), strict=True):
            ours = part["tokens_per_second"][way]["median"]
            lines.append(f"  training in {compute}, {models.replace('_', ' ')}: {ours:,.0f} "
                         "tokens/s; " + ", ".join(f"{ratio:.2f} x {other}" for other, ratio
                                                  in part[key].items()))
    lines += [f"  decoding, {rows.replace('_', ' ')}: "
              f"{part['tokens_per_second']['ours']['median']:,.0f} tokens/s, {part['ratio']:.1f} x "
              "nanoGPT" for rows, part in found.get("decoding", {}).items()]
    if "loss" in found:
        loss = found["loss"]
        lines.append(f"  held-out loss after {loss['tokens']:,} tokens: {loss['ours']:.4f} nats, "
                     f"in f32 {loss['ours f32']:.4f}, nanoGPT {loss['nanoGPT']:.4f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(arguments(lambda: tyro.cli(Args)))))

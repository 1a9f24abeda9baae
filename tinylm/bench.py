"""Time the machine and ourselves: warm-up, interleaved rounds, medians, one JSON record each.

Utilisation refers to what `machine` measures: the best rate of a plain matrix product here.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm import files, machine
from tinylm.config import BadInput, canonical, from_json, require, to_json
from tinylm.laws.accounting import flops_per_token
from tinylm.model.decoder import ModelConfig, init, rebuild
from tinylm.model.generate import decode, prefill
from tinylm.model.product import Arithmetic, product
from tinylm.stages.pretrain import PretrainConfig
from tinylm.sweep import cells, packing, runner
from tinylm.sweep.presets import PRESETS
from tinylm.sweep.times import spent
from tinylm.text import corpora, prepare
from tinylm.train import batch, losses, optim, step
from tinylm.train import population as populations

SHAPES = {
    "s": (ModelConfig(V=1024, D=64, L=2, H=2, T=128), 64),
    "m": (ModelConfig(V=1024, D=128, L=4, H=4, T=256), 32),
    "l": (ModelConfig(V=4096, D=256, L=6, H=8, T=256), 16),
    "xl": (ModelConfig(V=4096, D=384, L=6, H=6, T=256), 16),
}
"""model and sequences a step: the sizes that our peers were measured at"""
PRODUCTS = ((128, 64, 1024), (256, 128, 512), (256, 256, 1024), (512, 512, 512), (1024, 1024, 1024))
LARGE = ((16384, 768, 3072), (4096, 4096, 4096), (8192, 8192, 8192))
"""the products of an accelerator"""


class Rate(NamedTuple):
    """A median over rounds, and its extremes."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(tasks: dict[str, Callable[[], float]], rounds: int) -> dict[str, Rate]:
    """Run every task once unmeasured, then `rounds` times in turn; each returns its rate."""
    require("rounds", rounds, 1, 1e6)
    if not tasks:
        raise BadInput("nothing is asked for; name a shape, size or batch")
    for task in tasks.values():
        task()
    found: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            found[name].append(task())
    return {name: Rate(statistics.median(r), min(r), max(r), rounds) for name, r in found.items()}


def peak(rounds: int = 5) -> dict[str, Any]:
    """Measure matrix products (GFLOP/s, by shape and type) and copying (GB/s) of the machine.

    Every device has a product of its own, all at once: a device alone may use the others' cores.
    """
    tasks, cpu, devices = {}, jax.default_backend() == "cpu", jax.device_count()
    kinds = {"float32": _product, "bfloat16": _product}
    if machine.environment()["onednn"]:
        kinds["float32 by oneDNN"] = _by_onednn
    everywhere, draw = step.by_row(machine.mesh(devices)), np.random.default_rng(0)
    for m, k, n in PRODUCTS if cpu else LARGE:
        for kind, program in kinds.items():  # random: equal numbers cost a GPU less power
            arrays = tuple(everywhere(draw.standard_normal((devices, *s), np.float32).astype(
                kind.split()[0])) for s in ((m, k), (k, n)))
            tasks[f"{m}x{k}x{n} {kind}"] = functools.partial(
                _gflops, _on_each(program, devices), arrays, 2.0 * m * k * n * devices)
    big = everywhere(np.ones((devices, (2**26 if cpu else 2**29) // devices), np.float32))
    tasks["copy GB/s"] = functools.partial(_gflops, _on_each(lambda x: x + 1, devices), (big,),
                                           2.0 * big.nbytes)
    found = interleaved(tasks, rounds)
    best = {short: max(r.median for name, r in found.items() if dtype in name)
            for short, dtype in (("f32", "float32"), ("bf16", "bfloat16"))}
    return {"what": "machine", "devices": devices, **_facts(),
            **{f"best_{k}_gflops": v for k, v in best.items()},
            "rates": {k: r._asdict() for k, r in found.items()}}


def train(shapes: tuple[str, ...], models: int = 1, rounds: int = 5, seconds: float = 2.0,
          compute: str = "f32") -> dict[str, Any]:
    """Measure training, tokens a second of the whole machine.

    `models` 1: one model over all devices; more: as many pinned processes with a model each.
    """
    rates, asked = {}, {name: shape(name, compute) for name in shapes}
    with Crew(servers(models)) as crew:
        found = interleaved({name: functools.partial(crew.ask, to_json(config), rows, seconds, "")
                             for name, (config, rows) in asked.items()}, rounds)
    for name, rate in found.items():
        config, rows = asked[name]
        rates[name] = {**rate._asdict(), "rows": rows, "model": to_json(config),
                       "gflops": rate.median * flops_per_token(config.shape) / 1e9}
    return {"what": "train", "models": models, **_facts(), "tokens_per_second": rates}


def generation(shapes: tuple[str, ...], batches: tuple[int, ...] = (1, 64), rounds: int = 5,
               compute: str = "f32") -> dict[str, Any]:
    """Measure decoding T - 1 tokens from one, tokens a second of one device.

    `ratio` is to the same without a cache: to a whole forward pass for each token.
    """
    kinds = {"": decoder, " without cache": uncached}
    tasks = {f"{name} batch {B}{kind}": make(shape(name, compute)[0], B)
             for name in shapes for B in batches for kind, make in kinds.items()}
    found = interleaved(tasks, rounds)
    rates = {k: r._asdict() for k, r in found.items()}
    for name in rates:
        if name + " without cache" in rates:
            rates[name]["ratio"] = found[name].median / found[name + " without cache"].median
    return {"what": "decode", **_facts(), "tokens_per_second": rates}


def sweep(preset: str, scale: float, corpus: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure where a study's grid spends its time when runs take a share `scale` of their steps.

    It runs twice in a temporary folder, with an empty compilation cache and with what that left.
    The full-length shares let computing and input grow by 1 / scale and leave the rest.
    """
    require("scale", scale, 1e-6, 1.0)
    study, found = PRESETS[preset], {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data, _ = prepare.prepare(folder / "text", corpora.load(corpus), study.base.V, lower=True)
        models = cells.ladder(dataclasses.replace(study.base, V=data.V), study.widths)
        runs = [cells.config(c, models, study.optim, study.rule, study.batch, data.id)
                for c in cells.grid(models, study.budgets, study.per_budget, study.spread,
                                    study.batch)]
        runs = [dataclasses.replace(c, steps=max(1, round(scale * c.steps))) for c in runs]
        for cache in ("cold", "warm"):
            with _cached(folder / "xla"):
                runner.sweep(folder / cache, runs, data.folder)
            found[cache] = _swept(folder / cache, runs, scale)
    return {"what": "sweep", **_facts(), "preset": preset, "scale": scale, "runs": len(runs),
            "shapes": len({c.model for c in runs}), **found}


def population(sizes: tuple[int, ...], widths: tuple[int, ...], rounds: int = 5,
               seconds: float = 1.0, compute: str = "f32", tokens: int = 8192) -> dict[str, Any]:
    """Measure members trained together, tokens a second of them all, against one at a time.

    Each member has 4 layers of that width and takes `tokens` a step. BadInput for a size that the
    estimate (sweep/packing) says does not fit the device.
    """
    rates: dict[str, Any] = {}
    for width in widths:
        config = member(width, tokens, compute)
        tasks = {_members(width, size): functools.partial(
            Trainer(config, *_populated(config, size, tokens)).rate, seconds)
            for size in sorted({1, *sizes})}
        found = interleaved(tasks, rounds)
        alone = found[_members(width, 1)].median
        for name, rate in found.items():
            rates[name] = {**rate._asdict(), "ratio": rate.median / alone,
                           "gflops": rate.median * flops_per_token(config.shape) / 1e9}
    return {"what": "population", "tokens_a_member": tokens, **_facts(),
            "tokens_per_second": rates}


class Crew:
    """Processes that work on request: each reads one JSON line and answers with one number."""

    def __init__(self, commands: list[list[str]]):
        self.commands, self.processes = commands, []

    def __enter__(self) -> "Crew":
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           text=True) for command in self.commands]
        return self

    def __exit__(self, *fault: Any) -> None:
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            process.stdout.close()

    def ask(self, *request: Any) -> float:
        """Give all the same request at once; add their answers up."""
        for process in self.processes:
            with contextlib.suppress(BrokenPipeError):  # its answer will be missing
                process.stdin.write(canonical(request) + "\n")
                process.stdin.flush()
        return sum(self._answer(process) for process in self.processes)

    @staticmethod
    def _answer(process: subprocess.Popen) -> float:
        if line := process.stdout.readline():
            return float(line)
        raise ChildProcessError(f"a benchmark process ended with exit code {process.wait()}")


def servers(models: int) -> list[list[str]]:
    """Give the commands that serve `models` models on this machine (see `serve`)."""
    available = machine.cores()
    if not 1 <= models <= len(available):
        raise BadInput(f"models={models} is not within 1 to the {len(available)} cores")
    if models > 1 and machine.survey()[0] != "cpu":
        raise BadInput(f"models={models}: processes do not share an accelerator; take 1")
    pins = [(1, (core,)) for core in available[:models]] if models > 1 else [(len(available), ())]
    return [[sys.executable, "-c", f"from tinylm import machine; machine.pin{pin}; "
                                   "from tinylm import bench; bench.serve()"] for pin in pins]


class Trainer:
    """A compiled step on batches [n, rows, T + 1] of tokens, ready to be timed.

    A population's plan wants [n, P, rows, T + 1].
    """

    def __init__(self, config: ModelConfig, plan: machine.Plan, batches: np.ndarray,
                 settings: optim.OptimConfig = optim.OptimConfig()):  # noqa: B008
        self.tokens = batches[0, ..., 1:].size
        mesh = machine.mesh(plan.devices)
        tx = optim.optimiser(settings, config, mesh)
        one = step.make_step(losses.next_token(config, settings.z_loss, plan), tx, mesh, plan.micro)
        state = step.start(init(config, jax.random.key(0)), tx, optim.hyper(settings, 10**6))
        if plan.population > 1:
            one = populations.make_step(one, plan.vmap)
            state = populations.stack([state] * plan.population, plan.population)
        self.chunk = step.make_chunk(one)
        self.batches = step.place(mesh, batch.Batch(
            batches.astype(np.int32), np.ones_like(batches[..., 1:], np.float32)), batches.ndim - 2)
        self.state = step.replicate(mesh, state)

    def rate(self, seconds: float) -> float:
        """Train for about that long; give tokens a second."""
        def every() -> None:
            self.state, _ = self.chunk(self.state, self.batches, len(self.batches.tokens))
            jax.block_until_ready(self.state)

        return len(self.batches.tokens) * self.tokens * _times(every, seconds)


def serve() -> None:
    """Train what each line of stdin asks for, [model, rows, seconds, tokens]; print its rate.

    `tokens` names an .npy of batches [n, rows, T + 1]; empty, they are random.
    """
    held: dict[str, Trainer] = {}
    for line in sys.stdin:
        model, rows, seconds, tokens = json.loads(line)
        key = canonical([model, rows, tokens])
        if key not in held:
            config = from_json(ModelConfig, model)
            plan = machine.plan_for(rows, config.T, config.D, config.compute,
                                    jax.default_backend(), jax.device_count())
            drawn = np.load(tokens) if tokens else np.random.default_rng(0).integers(
                0, config.V, (4, rows, config.T + 1))
            held[key] = Trainer(config, plan, drawn)
        print(held[key].rate(seconds), flush=True)


@contextlib.contextmanager
def _cached(folder: Path) -> Iterator[None]:
    """Let the processes that are started inside keep what they compile in a folder."""
    name, usual = "JAX_COMPILATION_CACHE_DIR", os.environ.get("JAX_COMPILATION_CACHE_DIR")
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name) if usual is None else os.environ.update({name: usual})


def _swept(folder: Path, runs: list[PretrainConfig], scale: float) -> dict[str, Any]:
    by, row = spent(folder), files.read_rows(folder / "workers.jsonl")[-1]
    del by["sample"]  # which no run of a sweep does
    wall, full = by.pop("wall"), {k: v / scale if k in ("compute", "input") else v
                                  for k, v in by.items()}
    return {**row, "shares": {k: v / wall for k, v in by.items()},
            "full_length_shares": {k: v / sum(full.values()) for k, v in full.items()},
            "tokens_per_second": sum(c.tokens for c in runs) / row["wall_seconds"],
            "flops_per_second": sum(c.flops for c in runs) / row["wall_seconds"]}


def member(width: int, tokens: int, compute: str) -> ModelConfig:
    """Give the model of a population's member."""
    return ModelConfig(V=1024, D=width, L=4, H=max(1, width // 32), T=min(256, tokens),
                       compute=compute)


def _members(width: int, size: int) -> str:
    return f"D{width} " + ("one at a time" if size == 1 else f"{size} together")


def _populated(config: ModelConfig, size: int, tokens: int) -> tuple[machine.Plan, np.ndarray]:
    """Give the plan and the random batches of a population on one device."""
    asked = PretrainConfig(config, batch=tokens)
    plan = packing.fitting(asked, machine.plan_for(
        asked.rows, config.T, config.D, config.compute, jax.default_backend(), 1), size, _memory())
    if plan.population != size:
        raise BadInput(f"{size} members of width {config.D} do not fit {_memory():.3g} bytes; "
                       "choose fewer")
    members = (size,) if size > 1 else ()
    steps = min(plan.chunk, 16)  # of a call
    return plan, np.random.default_rng(0).integers(
        0, config.V, (steps, *members, asked.rows, config.T + 1), np.int32)


def _memory() -> float:
    """Give the bytes of this process's device (machine.memory asks for a process yet to start)."""
    told = jax.devices()[0].memory_stats() or {}
    return told.get("bytes_limit") or machine.MEMORY


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("nij,njk->nik", a, b, preferred_element_type=jnp.float32)


def _by_onednn(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply the one matrix of a device with its other."""
    return product("btd,df->btf", a, b[0], Arithmetic(onednn=True))


def _on_each(program: Callable, devices: int) -> Callable:
    """Compile a program that every device runs on its rows."""
    rows = jax.sharding.PartitionSpec("data")
    return jax.jit(jax.shard_map(program, mesh=machine.mesh(devices), in_specs=rows,
                                 out_specs=rows, check_vma=False))


def _gflops(program: Callable, arguments: tuple, cost: float, seconds: float = 0.1) -> float:
    ahead = 1 if jax.default_backend() == "cpu" else 16

    def several() -> None:
        for _ in range(ahead):  # an accelerator must not wait for the next call
            done = program(*arguments)
        jax.block_until_ready(done)

    jax.block_until_ready(program(*arguments))
    return ahead * cost * _times(several, seconds) / 1e9


def _times(work: Callable[[], None], seconds: float) -> float:
    """Do it again and again for about that long, once at least; give how often a second."""
    began, times = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds or not times:
        work()
        times += 1
    return times / spent


def decoder(config: ModelConfig, B: int, devices: int = 0,
            seconds: float = 0.5) -> Callable[[], float]:
    """Give a task: decode T - 1 tokens from one, B sequences at once; tokens a second.

    They are spread over `devices`; 0: over as many as divide B, as rollouts are. It is done again
    and again for about `seconds`.
    """
    mesh = machine.mesh(devices or math.gcd(jax.device_count(), B))
    params = step.replicate(mesh, init(config, jax.random.key(0)))
    ready = prefill(config, params, [np.array([config.V - 1])] * B, place=step.by_row(mesh))

    def once() -> None:
        _, out = decode(config, params, ready, config.T - 1, jax.random.key(1), jnp.float32(1.0),
                        ends=0)
        out.block_until_ready()

    return lambda: B * (config.T - 1) * _times(once, seconds)


def uncached(config: ModelConfig, B: int, seconds: float = 0.5) -> Callable[[], float]:
    """Give a task: B sequences' next tokens by a forward pass over T positions; tokens a second.

    They are spread, and it is done again, as by `decoder`.
    """
    mesh = machine.mesh(math.gcd(jax.device_count(), B))
    params = step.replicate(mesh, init(config, jax.random.key(0)))
    tokens = step.by_row(mesh)(np.zeros((B, config.T), np.int32))
    after = jax.jit(lambda params, tokens: rebuild(config, params)(tokens)[:, -1].argmax(-1))

    return lambda: B * _times(lambda: after(params, tokens).block_until_ready(), seconds)


def shape(name: str, compute: str = "f32") -> tuple[ModelConfig, int]:
    """Give a named shape's model, computing in that type, and its sequences a step."""
    if name not in SHAPES:
        raise BadInput(f"shape {name!r} is not one of {', '.join(SHAPES)}; choose one")
    config, rows = SHAPES[name]
    return dataclasses.replace(config, compute=compute), rows


def _facts() -> dict[str, Any]:
    return {"schema": 1, "versions": machine.versions(), "environment": machine.environment()}

"""What must be pinned before JAX starts, the execution plan, devices, mesh and what to record.

The config says what is trained; the plan says how it is executed (design: two things). Bits are
the same for the same config, plan, versions and CPU instruction set. JAX is imported inside the
functions, because `pin` has to run before it.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tinylm.config import BadInput, require
from tinylm.native import library

MEMORY = 8e9
"""bytes of a device to count on where it does not say"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run is executed; written to its folder before the first step and never changed."""

    devices: int = 1
    """devices the batch is split over (the mesh's data axis)"""
    micro: int = 1
    """sequences a device holds at once; few keep a small model's backward pass in cache"""
    chunk: int = 16
    """steps in one call of the compiled program, and between two rows of metrics"""
    unroll: bool = True
    """layers written out one after the other instead of scanned, which compiles faster: a scan
    copies what each layer keeps for the way back"""
    checkpoint_every: int = 512
    """steps between checkpoints, rounded up to whole chunks"""
    population: int = 1
    """members trained by one program at once, padding included; 1 is a run on its own"""
    vmap: bool = False
    """members side by side (accelerators) instead of one after the other"""
    fused: bool = False
    """attention by the library, operands in the model's type, instead of ours in blocks"""
    remat: bool = False
    """a layer's insides are computed again on the way back: less memory, a third more work"""
    onednn: bool = False
    """float32 products of activations with parameters by oneDNN instead of XLA (CPU)"""
    native: bool = False
    """norms, gates, attention and a narrow model's loss by our C (CPU)"""
    kept: tuple[int, ...] = ()
    """steps whose checkpoints stay, to look at afterwards"""


BITS = ("backend", "device", "instructions", "xla_flags", "matmul_precision", "threads",
        "onednn", "native")
"""the facts of an environment that bits depend on; not the number of cores, which `pin` sees to"""

LIBRARIES = ("onednn", "native")
"""those of them that matter to a plan that has a field of the name set"""

BOUND = ("backend", "threads")
"""those that a begun run cannot change: its plan is for the one, what launched it set the other"""

PLAIN = Plan()
"""one model on one device, layers written out: how a loss is evaluated"""


def pin(devices: int = 1, cores: tuple[int, ...] = ()) -> None:
    """Set what the bits and the speed of a process depend on; call before JAX is imported.

    NPROC is the number of XLA's threads: one where the process is pinned to one core, on which two
    take turns and each other's cache (by hand, experiments/LOG.md: 1.04 to 1.26 times the time),
    else two at least. Large products have the same bits for any number from two on, whatever the
    cores, and some have others for one.
    Threefry makes random numbers independent of sharding.
    """
    if "jax" in sys.modules:
        raise RuntimeError("machine.pin must run before jax is imported")
    kept = cache()
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        flags = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if _plugins():
        if "xla_gpu_deterministic_ops" not in flags:  # else sums of many rows race
            flags = f"{flags} --xla_gpu_deterministic_ops=true"
        # else an accelerator rounds the operands of float32 products, unlike a CPU
        os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    os.environ["XLA_FLAGS"] = flags
    os.environ["NPROC"] = str(1 if len(cores) == 1 else max(2, devices))
    os.environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    os.environ.setdefault("JAX_THREEFRY_PARTITIONABLE", "1")
    os.environ.setdefault("JAX_DEFAULT_PRNG_IMPL", "threefry2x32")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(kept / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def cache() -> Path:
    """Give the folder of what can be made again: compiled programs, prepared default text."""
    found = os.environ.get("TINYLM_CACHE") or os.path.expanduser("~/.cache/tinylm")
    if found.startswith("~"):
        raise BadInput("this user has no home folder to keep compiled programs in; set "
                       "TINYLM_CACHE to a folder")
    return Path(found)


def command() -> None:
    """Start a command: pin its process; a signal ends it in a line while libraries are imported.

    Some libraries swallow the exception of a signal that comes while they load.
    """
    def leave(number: int, frame: Any) -> None:
        print("stopped; the same command goes on", file=sys.stderr, flush=True)
        os._exit(75)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, leave)
    try:
        pin(devices_asked())
    except BadInput as bad:
        print(f"error: {bad}", file=sys.stderr)
        sys.exit(2)


def devices_asked() -> int:
    """Give the CPU devices that JAX_NUM_CPU_DEVICES asks for; unset, one a core, at least 2."""
    told = os.environ.get("JAX_NUM_CPU_DEVICES", "")
    if told and not (told.isdecimal() and 1 <= int(told) <= 1024):
        raise BadInput(f"JAX_NUM_CPU_DEVICES={told!r} is no number from 1 to 1024; unset it")
    return int(told or max(2, len(cores())))


def grace() -> float:
    """Give the seconds that TINYLM_GRACE grants from a signal to the end; 0: what it takes."""
    told = os.environ.get("TINYLM_GRACE", "") or "0"
    try:
        seconds = float(told)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e6:
        raise BadInput(f"TINYLM_GRACE={told!r} is no number of seconds from 0; unset it")
    return seconds


def cores() -> list[int]:
    """List the CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def survey() -> tuple[str, int]:
    """Give JAX's backend and its number of devices (a CPU's are its cores)."""
    return _asked()[:2]


def memory() -> float:
    """Give the bytes of one device: a CPU's are the machine's; MEMORY where none are told."""
    backend, _, told = _asked()
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return told or (installed if backend == "cpu" else MEMORY)


@functools.cache
def _asked() -> tuple[str, int, float]:
    """Ask JAX for its backend, number of devices and bytes of one (0 for unknown).

    Where a plugin for an accelerator is installed, a process of its own asks JAX, because asking
    here would start JAX and take a GPU's memory.
    """
    if os.environ.get("JAX_PLATFORMS", "") in ("", "cpu") and not _plugins():
        return "cpu", min(len(cores()), devices_asked()), 0.0
    code = ("import jax; told = jax.devices()[0].memory_stats() or {}; print("
            "jax.default_backend(), jax.device_count(), told.get('bytes_limit', 0))")
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    if done.returncode:
        raise BadInput(f"JAX does not start here: {done.stderr.strip().splitlines()[-1]}")
    backend, count, limit = done.stdout.split()[-3:]
    return (backend, min(len(cores()), devices_asked()) if backend == "cpu" else int(count),
            float(limit))


def _plugins() -> bool:
    """Tell whether JAX could find anything but the CPU (as its own discovery looks for it)."""
    return ("TPU_LIBRARY_PATH" in os.environ or bool(
        importlib.metadata.entry_points(group="jax_plugins")) or any(
            importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu")))


def plan_for(rows: int, T: int, D: int, compute: str, backend: str, count: int,
             devices: int = 0) -> Plan:
    """Give the plan of one run: `rows` sequences of T tokens a step, a model of width D.

    The batch is split over `devices`, or over as many of the `count` at hand as divide it. A CPU
    calls our C and oneDNN where they are at hand. What a device of it holds at once is measured
    (experiments/plan_choice.py, LOG): with our C 512 tokens, 1024 below D=40, half of either in
    bf16 below 80; without it 512 from D=256 on, 256 below and 128 below 40, for the logits of
    narrow models have to stay in the cache. JAX before 0.12 also wants two sequences at once from
    D=40 on (1.15 to 1.25 times the rate of one). An accelerator gets longer
    chunks, members side by side and the library's attention; its layers are written out too
    (scanned, an H200 trains at 67% of the rate: D=768, L=12).
    """
    require("rows", rows, 1, 1e9)
    require("devices", devices, 0, count)
    devices = devices or max(d for d in range(1, count + 1) if rows % d == 0)
    if rows % devices:
        raise BadInput(f"{rows} sequences a step do not divide over {devices} devices; choose "
                       "a divisor")
    cpu = backend == "cpu"
    most, native = 64, cpu and bool(library.compiler(cache()))
    if cpu:
        old = tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 12)
        if native:
            tokens = (1024 if D < 40 else 512) // (2 if D < 80 and compute != "f32" else 1)
        else:
            tokens = 128 if D < 40 else 256 if D < 256 else 512
        most = max(2 if old and D >= 40 else 1, tokens // T)
    micro = max(m for m in range(1, most + 1) if rows // devices % m == 0)
    every = 2048 if cpu and D < 40 else 512  # either is about ten seconds of a core
    return Plan(devices=devices, micro=micro, chunk=16 if cpu else 64, checkpoint_every=every,
                vmap=not cpu, fused=not cpu,
                onednn=cpu and bool(library.onednn(cache())), native=native)


def mesh(devices: int) -> Any:
    """Build the mesh: one data axis over the first `devices` devices."""
    import jax

    if devices > jax.device_count():
        raise BadInput(f"the plan wants {devices} devices and JAX sees {jax.device_count()}; "
                       "start with that many, or in a new folder")
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("data",), axis_types=kinds, devices=jax.devices()[:devices])


def versions() -> dict[str, str]:
    """Name the versions that a run's bits depend on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "sentencepiece", "numpy")
    found = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **found}


def basis(backend: str) -> dict[str, str]:
    """Give what plans are made for and bits depend on; JAX need not have started."""
    cpu = backend == "cpu"
    return {"backend": backend, "instructions": library.instructions(),
            "onednn": library.onednn(cache()) if cpu else "",
            "native": library.compiler(cache()) if cpu else ""}


def environment() -> dict[str, Any]:
    """Describe the host for environment.json, which no hash covers; bits depend on BITS of it."""
    import jax

    device = jax.devices()[0]
    return {"platform": platform.platform(), "processor": library.cpuinfo("model name"),
            "cores": len(cores()),
            "device": device.device_kind, "devices": jax.device_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
            "matmul_precision": str(jax.config.jax_default_matmul_precision or ""),
            "threads": "one" if os.environ.get("NPROC") == "1" else "several",
            **basis(jax.default_backend())}

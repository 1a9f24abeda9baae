"""Compile this room's C once, hand it oneDNN where that is installed, and give both to JAX.

oneDNN is a package that pip installs on Linux (x86); XLA's own float32 products reach four fifths
of its rate. Attention, norms, gates and a narrow model's loss are ours, each one pass that stays in
the cache (experiments/LOG.md). All is compiled for this processor and the installed jaxlib and kept
with the compiled programs. Where a C compiler is missing, or oneDNN is, XLA does that part.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE, DNNL = "onednn-cpu-gomp", "libdnnl.so.3"
ROOM = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-shared", "-fPIC")
PRODUCTS = ("plain", "right_turned", "left_turned")
"""a b, a b' and a' b, by oneDNN"""
OURS = ("mix", "mix_back", "norm", "norm_back", "gate", "gate_back", "entropy",
        "bf16_mix", "bf16_mix_back", "bf16_entropy")

_FAULTS = (importlib.metadata.PackageNotFoundError, OSError, subprocess.SubprocessError,
           AttributeError)  # the last: a library without that function


@functools.cache
def compiler(kept: Path) -> str:
    """Give the version of the C compiler that OURS were compiled with, "" where there is none.

    What was compiled is kept under `kept`; JAX need not have started.
    """
    try:
        return ctypes.c_char_p.in_dll(_load(kept), "compiler").value.decode()
    except (*_FAULTS, ValueError):
        return ""


@functools.cache
def onednn(kept: Path) -> str:
    """Give the version of oneDNN to multiply with, "" where there is none or nothing calls it."""
    try:
        files = importlib.metadata.files(PACKAGE) or ()
        found = [f.locate() for f in files if f.name == DNNL]
        if not found:
            return ""
        library, threads = ctypes.CDLL(str(found[0])), ctypes.CDLL("libgomp.so.1")
        _load(kept).hand_over(*(ctypes.cast(f, ctypes.c_void_p)
                                for f in (library.dnnl_sgemm, threads.omp_set_num_threads)))
        return importlib.metadata.version(PACKAGE)
    except _FAULTS:
        return ""


@functools.cache
def register(kept: Path, name: str) -> bool:
    """Let XLA call a function of PRODUCTS or OURS as "tinylm_" + name; False where it cannot."""
    if not (onednn if name in PRODUCTS else compiler)(kept):
        return False
    import jax

    jax.ffi.register_ffi_target(f"tinylm_{name}", jax.ffi.pycapsule(getattr(_load(kept), name)),
                                platform="cpu")
    return True


def instructions() -> str:
    """Name the vector instructions of the CPU, on which XLA's and our choice of code depends."""
    return " ".join(sorted(name for name in (cpuinfo("flags") or cpuinfo("Features")).split()
                           if name.startswith(("avx", "fma", "amx", "asimd", "sve", "bf16"))))


def cpuinfo(key: str) -> str:
    """Give a line of what Linux tells of the processor."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text("utf-8").splitlines() if info.exists() else []:
        if line.startswith(key):
            return line.split(":", 1)[1].strip()
    return platform.processor() if key == "model name" else ""


@functools.cache
def _load(kept: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(_built(kept)))


def _built(kept: Path) -> Path:
    """Compile where that has not been done for these sources, this jaxlib and this processor.

    The file's name ends with its own hash: one that lost its end would kill whoever loads it.
    """
    spec = importlib.util.find_spec("jaxlib")
    headers = Path(spec.origin).parent / "include" if spec and spec.origin else Path()
    sources = sorted(ROOM.glob("*.c"))
    parts = *sources, *sorted(ROOM.glob("*.h")), headers / "xla/ffi/api/c_api.h"
    folder = kept / "native"
    name = _hash(b"".join(part.read_bytes() for part in parts)
                 + " ".join((*FLAGS, instructions())).encode())
    for place in folder.glob(f"{name}-*.so"):
        if place.stem == f"{name}-{_hash(place.read_bytes())}":
            return place
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        made = Path(room) / "made.so"
        subprocess.run([compiler, *FLAGS, f"-I{headers}", *map(str, sources), "-o", str(made),
                        "-lm"], check=True, capture_output=True, timeout=60)
        place = folder / f"{name}-{_hash(made.read_bytes())}.so"
        os.replace(made, place)
    return place


def _hash(told: bytes) -> str:
    return hashlib.sha256(told).hexdigest()[:16]

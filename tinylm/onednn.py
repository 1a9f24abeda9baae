"""oneDNN's float32 product for XLA's CPU: found, its caller compiled once, given to JAX.

XLA's own products reach four fifths of its rate (experiments/LOG.md). The library is a package
that pip installs on Linux (x86); the C between the two is compiled for the installed jaxlib and
kept with the compiled programs. Where the package or a C compiler is missing, XLA multiplies.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PACKAGE, LIBRARY = "onednn-cpu-gomp", "libdnnl.so.3"
SOURCE = Path(__file__).with_suffix(".c")
WAYS = ("plain", "right_turned", "left_turned")
"""a b, a b' and a' b"""


@functools.cache
def version(kept: Path) -> str:
    """Give the version of oneDNN to multiply with, "" where there is none or nothing calls it.

    The caller is kept under `kept`; JAX need not have started.
    """
    try:
        _load(kept)
        return importlib.metadata.version(PACKAGE)
    except (importlib.metadata.PackageNotFoundError, OSError, subprocess.SubprocessError,
            AttributeError):  # the last: a library without that function
        return ""


@functools.cache
def register(kept: Path) -> bool:
    """Let XLA call oneDNN by the names of WAYS after "tinylm_"; False where it cannot."""
    if not version(kept):
        return False
    import jax

    for way in WAYS:
        jax.ffi.register_ffi_target(f"tinylm_{way}", jax.ffi.pycapsule(getattr(_load(kept), way)),
                                    platform="cpu")
    return True


@functools.cache
def _load(kept: Path) -> ctypes.CDLL:
    found = [f.locate() for f in importlib.metadata.files(PACKAGE) or () if f.name == LIBRARY]
    if not found:
        raise FileNotFoundError(f"{PACKAGE} without {LIBRARY}")
    library, threads = ctypes.CDLL(str(found[0])), ctypes.CDLL("libgomp.so.1")
    caller = ctypes.CDLL(str(_built(kept)))
    caller.hand_over(*(ctypes.cast(f, ctypes.c_void_p)
                       for f in (library.dnnl_sgemm, threads.omp_set_num_threads)))
    return caller


def _built(kept: Path) -> Path:
    """Compile the caller where that has not been done for this source and this jaxlib.

    Its name ends with its own hash: a file that lost its end would kill whoever loads it.
    """
    found = importlib.util.find_spec("jaxlib")
    headers = Path(found.origin).parent / "include" if found and found.origin else Path()
    told = SOURCE.read_bytes() + (headers / "xla/ffi/api/c_api.h").read_bytes()
    folder, name = kept / "onednn", _hash(told)
    for place in folder.glob(f"{name}-*.so"):
        if place.stem == f"{name}-{_hash(place.read_bytes())}":
            return place
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as room:
        made = Path(room) / "made.so"
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", f"-I{headers}", str(SOURCE), "-o",
                        str(made)], check=True, capture_output=True, timeout=60)
        place = folder / f"{name}-{_hash(made.read_bytes())}.so"
        os.replace(made, place)
    return place


def _hash(told: bytes) -> str:
    return hashlib.sha256(told).hexdigest()[:16]

"""Four simulated devices for every test, pinned before JAX starts; shapes checked at call.

Tests compile many programs and run each for a moment, so XLA is told not to optimise them, and to
emit them as it used to while it still can: a training step compiles in 1.3 instead of 10 seconds of
a slow core. The smoke study (test_experiments_study.py) runs as a user's does.
"""

import importlib.metadata
import os
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "tinylm"
os.environ.setdefault("TINYLM_CACHE", str(CACHE))
QUICK = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones do not know the flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)

from tinylm import machine  # noqa: E402

machine.pin(devices=4)

from jaxtyping import install_import_hook  # noqa: E402

HOOK = install_import_hook(["tinylm.model", "tinylm.train.losses", "tinylm.train.rewards",
                            "tinylm.evaluate.rates"], "beartype.beartype")


def pytest_addoption(parser):
    """Let `make faults` inject all of them."""
    parser.addoption("--long", default="", metavar="FILE",
                     help="inject every fault, not a sample; append a row a test to this file")
    parser.addoption("--draw", type=int, default=0, metavar="SEED",
                     help="which faults a sample holds")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of published runs and fixtures beside the repository, where there is one."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.exists():
        pytest.skip("../shared is not beside this clone; its sibling test on our own data ran")
    return folder

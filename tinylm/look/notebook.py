"""Execute a notebook's py:percent source against a study, outputs kept; show figures in one."""

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from tinylm import files, machine
from tinylm.config import BadInput, from_json
from tinylm.evaluate import heldout
from tinylm.look import plots, progress
from tinylm.look.study import Study
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text import corpora, prepare
from tinylm.text.shards import Dataset
from tinylm.text.tokenizer import Tokenizer
from tinylm.train import checkpoint

SECONDS = 120  # the longest a cell may take


def execute(source: Path, folder: Path, place: Path | None = None) -> Path | None:
    """Run `source` on the study in `folder` into `place`, study.ipynb there unless given.

    Without the `notebooks` extra, or where it fails, that is said and None returned.

    The kernel is the running interpreter, whatever kernels are installed, and keeps its own files
    in a temporary folder; the notebook finds the study through TINYLM_STUDY.
    """
    try:
        import jupytext
        import nbformat
        from jupyter_client.kernelspec import KernelSpecManager
        from nbclient import NotebookClient
        from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
        from zmq import ZMQError
    except ImportError as missing:
        progress.say(f"no notebook: {missing.name} is not installed; "
                     "pip install 'tinylm[notebooks]'")
        return None
    book = jupytext.read(Path(source), fmt="py:percent")
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"  # the same notebook from the same records
    with tempfile.TemporaryDirectory() as own:
        places = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
        env = {**os.environ, **dict.fromkeys(places, own),
               "TINYLM_STUDY": str(Path(folder).absolute()), "PYTHONPATH": os.pathsep.join(
                   [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
        client = NotebookClient(book, kernel_name="python3", timeout=SECONDS, record_timing=False,
                                resources={"metadata": {"path": own}})
        kernel = client.create_kernel_manager()
        kernel.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # python3 is then ours
        kernel.transport = "ipc" if len(own) < 80 else "tcp"  # a socket's path has 107 bytes
        kernel.connection_file = str(Path(own) / "kernel.json")
        try:
            _run(client, kernel, env)
        except (CellExecutionError, CellTimeoutError, DeadKernelError, RuntimeError,
                ZMQError) as fault:
            progress.say(f"no notebook: {str(fault).strip().splitlines()[-1]}")
            return None
    place = place or Path(folder) / "study.ipynb"
    files.write_text(place, nbformat.writes(book) + "\n")
    return place


class Opened(NamedTuple):
    """A finished run of a study, ready to be looked into."""

    config: ModelConfig
    params: Params
    data: Dataset
    tokenizer: Tokenizer


def opened(study: Study, name: str) -> Opened:
    """Open a run of a study by its folder's name, with the study's text.

    Records that are kept without their token files have the default corpus's, prepared again.
    """
    record = study.record(name)
    place = study.folder / "text"
    if not (place / "tokens").exists():
        V = files.verified(place / "tokenizer")["asked"]
        place = machine.cache() / f"text-{record['tokenizer_id']}"
        prepare.prepare(place, corpora.load(), V)
    data, learnt = prepare.open_text(place)
    if learnt.id != record["tokenizer_id"]:
        raise BadInput(f"{place} has tokenizer {learnt.id} and {study.folder / name} has "
                       f"{record['tokenizer_id']}; prepare the text that it was trained on")
    config = from_json(ModelConfig, record["config"]["model"], "model")
    return Opened(config, checkpoint.final_params(study.folder / name, config), data, learnt)


def scored(study: Study, name: str) -> np.ndarray:
    """Score the study's held-out text with one of its runs, token by token, nats."""
    found = opened(study, name)
    return heldout.each(found.config, found.params, found.data)


def draw(figure: Figure) -> None:
    """Display a figure in a notebook."""
    from IPython.display import Image, display

    display(Image(plots.png(figure)))


def show(study: Study, make: Callable[[Study], Figure]) -> None:
    """Display a figure of the study in a notebook, or say what the study lacks for it."""
    try:
        draw(make(study))
    except BadInput as why:
        print("not drawn:", str(why).replace(f"{study.folder}/", ""))


def _run(client: Any, kernel: Any, env: dict[str, str]) -> None:
    """Execute in a thread, where the client cannot put its signal handlers in place of ours."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        done = thread.submit(asyncio.run, client.async_execute(env=env))
        try:
            done.result()
        except KeyboardInterrupt:
            with contextlib.suppress(AttributeError, ProcessLookupError):  # not started, or gone
                os.kill(kernel.provisioner.pid, signal.SIGKILL)
            raise
        finally:
            thread.shutdown()
            atexit.unregister(client._cleanup_kernel)  # which asserts a kernel

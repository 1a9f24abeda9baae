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
from typing import Any

from matplotlib.figure import Figure

from tinylm import files
from tinylm.config import BadInput
from tinylm.look import plots, progress
from tinylm.look.study import Study

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


def show(study: Study, make: Callable[[Study], Figure]) -> None:
    """Display a figure of the study in a notebook, or say what the study lacks for it."""
    from IPython.display import Image, display

    try:
        display(Image(plots.png(make(study))))
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

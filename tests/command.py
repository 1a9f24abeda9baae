"""Whole commands inside this process, which has imported JAX already: seconds less each."""

import contextlib
import io
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tinylm import __main__, machine

ROOT = Path(__file__).parent.parent


def tinylm(*args: object, said: str = "") -> subprocess.CompletedProcess:
    """Run `tinylm` with these arguments, `said` on its stdin."""
    with _called("tinylm", args, said) as ended:
        return ended(__main__.main)


def experiment(name: str, *args: object) -> subprocess.CompletedProcess:
    """Run an experiment; its sweeps have one worker."""
    script = str(ROOT / f"experiments/{name}.py")
    path = [str(ROOT / "experiments"), *sys.path]
    with (_called(script, args) as ended, mock.patch.object(machine, "cores", lambda: [0]),
          mock.patch.object(sys, "path", path)):
        return ended(lambda: runpy.run_path(script, run_name="__main__"))


@contextlib.contextmanager
def loaded(name: str) -> Iterator[dict]:
    """Give an experiment's functions by name, without running it."""
    script = str(ROOT / f"experiments/{name}.py")
    with _called(script, ()):
        yield runpy.run_path(script)


@contextlib.contextmanager
def _called(name: str, args: tuple, said: str = "") -> Iterator[Callable]:
    argv, out, err = [name, *map(str, args)], io.StringIO(), io.StringIO()

    def ended(main: Callable[[], object]) -> subprocess.CompletedProcess:
        try:
            code = main()
        except SystemExit as end:
            code = end.code or 0
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    with (mock.patch.object(sys, "argv", argv), mock.patch.object(sys, "stdin", io.StringIO(said)),
          mock.patch.object(machine, "pin"), mock.patch.object(signal, "signal"),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        yield ended

"""Train small language models, fit their scaling laws, forecast, tune, talk; VERB --help says how.

This module is the only reader of argv in tinylm/.
"""

import contextlib
import errno
import functools
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

from tinylm import machine
from tinylm.config import BadInput
from tinylm.verbs import VERBS, load

PLACES = ("--out", "--text", "--results", "--ledger", "--runs", "--reward", "--tuning")
MISNAMED = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def guarded(action: Callable[[], int]) -> int:
    """Run an action; turn what users and machines do wrong into one line and an exit code.

    0 done, 1 failed (disk, memory), 2 bad input, 75 stopped by a signal and resumable.
    """
    from tinylm.train.run import Stopped

    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"),
                           (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        return action()
    except BadInput as bad:
        print(f"error: {bad}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(str(stop), file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 75
    except MemoryError as fault:
        print(f"failed: out of memory ({str(fault) or 'Python'}); nothing that was finished is "
              "lost; a smaller model, batch or file needs less", file=sys.stderr)
        return 1
    except RuntimeError as fault:
        if "RESOURCE_EXHAUSTED" in str(fault):
            print(f"failed: {str(fault).splitlines()[0]}; nothing that was finished is lost; a "
                  "smaller model or batch needs less", file=sys.stderr)
            return 1
        if "Unable to initialize backend" not in str(fault):
            raise
        print(f"error: JAX does not start here: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:
        if fault.errno in MISNAMED:
            print(f"error: {fault}; choose another path", file=sys.stderr)
            return 2
        print(f"failed: {fault}; nothing that was finished is lost", file=sys.stderr)
        return 1


def arguments(parse: Callable[[], Any]) -> Any:
    """Let tyro read argv; what it refuses becomes one line (BadInput) instead of a box.

    From here on a signal raises KeyboardInterrupt, for `guarded` to tell.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.argv[:] = map(_read, sys.argv)
    look = sys.argv[1:2] == ["look"]  # whose --text is read, and may be empty
    places = [place for place in PLACES if not (look and place == "--text")]
    for flag, after in itertools.pairwise([*sys.argv, "--"]):
        if (flag in places and not after) or flag in {f"{place}=" for place in places}:
            raise BadInput(f"{flag.rstrip('=')} is empty; name a place, . for this folder")
    for flag, after in itertools.pairwise([*sys.argv, "--"]):
        if flag in ("--corpus", "--data") and after.startswith("--"):
            raise BadInput(f"{flag} names no file; name one or more, or leave {flag} out for the "
                           "default")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse()
    except SystemExit:
        lines = [line.strip("│ ") for line in said.getvalue().splitlines()[1:]]  # without its title
        if not lines:
            raise
        words = " ".join(line if re.search(r"\w", line) else ";" for line in lines)
        raise BadInput(re.sub(r"\s*;", ";", words).strip("; ")) from None


def main() -> int:
    """Start the verb named in argv."""
    machine.command()

    def start() -> int:
        import tyro

        chosen = next((word for word in sys.argv[1:] if word in VERBS), None)
        verbs = {name: _bound(verb) for name, verb in load(chosen).items()}
        arguments(lambda: tyro.extras.subcommand_cli_from_dict(
            verbs, prog="tinylm", description=__doc__.splitlines()[0]))()
        return 0

    return guarded(start)


def _read(word: str) -> str:
    """Read a word of argv as UTF-8 whatever the locale; a path that is there stays as it is."""
    try:
        return word if os.path.exists(word) else os.fsencode(word).decode()
    except UnicodeDecodeError as fault:
        raise BadInput(f"{word!r} is no UTF-8 (byte {fault.start}); write it as UTF-8") from None


def _bound(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """Give a verb that, called, only keeps its arguments: parse first, then run."""
    @functools.wraps(verb)
    def keep(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return functools.partial(verb, *args, **kwargs)
    return keep


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `tinylm <verb>`; the only reader of argv in tinylm/."""

import os
import sys
from collections.abc import Callable

from tinylm import machine
from tinylm.config import BadInput


def guarded(action: Callable[[], int]) -> int:
    """Run an action; turn what users and machines do wrong into one line and an exit code.

    0 done, 1 failed (disk, memory), 2 bad input, 75 stopped by a signal and resumable.
    """
    from tinylm.train.run import Stopped

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
    except OSError as fault:
        print(f"failed: {fault}; nothing that was finished is lost", file=sys.stderr)
        return 1


def main() -> int:
    """Start the verb named in argv."""
    machine.pin(devices=int(os.environ.get("JAX_NUM_CPU_DEVICES", max(2, len(machine.cores())))))

    def start() -> int:
        import tyro

        from tinylm.verbs import VERBS

        tyro.extras.subcommand_cli_from_dict(VERBS, prog="tinylm", description=__doc__)
        return 0

    return guarded(start)


if __name__ == "__main__":
    sys.exit(main())

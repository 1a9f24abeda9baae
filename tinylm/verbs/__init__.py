"""The verbs of the command line: each a thin call of library functions with the same defaults."""

import ast
import functools
import importlib
from collections.abc import Callable
from pathlib import Path

VERBS = {
    "tokenizer": "runs.tokenizer", "train": "runs.train", "sweep": "runs.sweep", "fit": "laws.fit",
    "forecast": "plans.forecast", "plan": "plans.plan", "cost": "plans.cost", "check": "laws.check",
    "sft": "runs.sft", "reward": "align.reward", "dpo": "align.dpo", "ppo": "align.ppo",
    "grpo": "align.grpo", "best-of-n": "align.best_of_n",
    "eval": "runs.evaluate", "sample": "talk.sample", "chat": "talk.chat", "bench": "care.bench",
    "look": "see.look", "lens": "see.lens", "serve": "http.serve",
    "report": "care.report", "verify": "care.verify", "replay": "again.replay",
    "adopt": "care.adopt", "slim": "care.slim",
}


def load(chosen: str | None) -> dict[str, Callable[..., None]]:
    """Import the chosen verb; a stand-in with its summary serves for every other in `--help`.

    JAX and its libraries take seconds to import, and not every verb needs them.
    """
    found = {}
    for name, place in VERBS.items():
        module, function = place.split(".")
        if name == chosen:
            found[name] = getattr(importlib.import_module(f"tinylm.verbs.{module}"), function)
        else:
            found[name] = _stand_in(Path(__file__).parent / f"{module}.py", function)
    return found


def _stand_in(source: Path, function: str) -> Callable[[], None]:
    node = next(n for n in _parsed(source).body
                if isinstance(n, ast.FunctionDef) and n.name == function)

    def verb() -> None:
        raise AssertionError(f"{function} was not imported")

    verb.__doc__ = ast.get_docstring(node).splitlines()[0]
    return verb


@functools.cache
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text("utf-8"))

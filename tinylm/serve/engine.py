"""Many requests on few models: one thread owns the device and decodes them in waves.

Requests that wait are read together and form a wave; all waves take turns, a few tokens each, so a
new request waits for a turn and not for the answers before it. What a request draws depends on its
own seed and text. Each hears of its tokens through a callback that must not block.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.config import BadInput
from tinylm.model import generate
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.tokenizer import Tokenizer

EVERY = 8
"""tokens of a turn"""
WAVES = 2
"""waves that take turns at once; further requests wait and are read together"""
SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""rows of a wave, rounded up to one of these, so that few programs are compiled"""


@dataclass(frozen=True)
class Model:
    """A finished run that answers."""

    name: str
    folder: Path
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    tuned: bool
    """it knows the chat template"""


class Part(NamedTuple):
    """What one turn added to a request."""

    tokens: np.ndarray  # int32[n]
    logp: np.ndarray  # float32[n], nats
    top: np.ndarray  # int32[n, k]
    top_logp: np.ndarray  # float32[n, k]


@dataclass(eq=False)
class Request:
    """What to continue, how, and who is told; `told(None)` is the end, an exception a failure."""

    model: str
    ids: np.ndarray
    count: int
    temperature: float
    top_p: float
    seed: int
    told: Callable[[Part | None | Exception], None]
    cancelled: bool = False
    made: int = field(default=0, init=False)


class Wave(NamedTuple):
    """Requests that are decoded together, and where they are; rows beyond them are padding."""

    model: Model
    requests: list[Request]
    state: generate.Decoding
    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class Engine:
    """Serve models by name until closed; use as a context manager."""

    def __init__(self, models: dict[str, Model]):
        self.models = models
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._asked.put(None)
        self._thread.join()

    def warm(self) -> None:
        """Answer a first request of every model, so that a client does not wait for XLA."""
        for name in self.models:
            said: queue.SimpleQueue[Part | None | Exception] = queue.SimpleQueue()
            self.ask(Request(name, np.ones(1, np.int32), EVERY, 1.0, 1.0, 0, said.put))
            while isinstance(said.get(), Part):
                pass

    def ask(self, request: Request) -> None:
        """Take a request of 1 to T - 1 ids; BadInput for one that does not fit."""
        T = self.models[request.model].config.T
        if not 1 <= len(request.ids) < T:
            raise BadInput(f"the prompt has {len(request.ids)} tokens and the model's context is "
                           f"T={T}; give 1 to {T - 1}")
        request.count = min(request.count, T - len(request.ids))
        self._asked.put(request)

    def _run(self) -> None:
        waiting: list[Request] = []
        waves: list[Wave] = []
        while True:
            while not self._asked.empty() or not (waves or waiting):
                if (request := self._asked.get()) is None:
                    return
                waiting.append(request)
            while waiting and len(waves) < WAVES:
                name = waiting[0].model
                taken = [r for r in waiting if r.model == name][:SIZES[-1]]
                waiting = [r for r in waiting if r not in taken]
                taken = [r for r in taken if not r.cancelled]
                if taken:
                    waves += _or_told(lambda taken=taken, name=name: [
                        _begun(self.models[name], taken)], taken)
            waves = [w for wave in waves for w in _or_told(lambda wave=wave: _turn(wave),
                                                           wave.requests)]


def _or_told(do: Callable[[], list[Wave]], requests: list[Request]) -> list[Wave]:
    """Do it; what goes wrong is told to those it was for, and the others go on."""
    try:
        return do()
    except Exception as fault:
        for request in requests:
            request.told(fault)
        return []


def _begun(model: Model, requests: list[Request]) -> Wave:
    """Read the prompts, padded to a quarter of the context or all of it."""
    rows = next(size for size in SIZES if size >= len(requests))
    filled = requests + requests[-1:] * (rows - len(requests))
    longest, T = max(len(r.ids) for r in requests), model.config.T
    width = -(-longest // generate.BUCKET) * generate.BUCKET if longest <= T // 4 else T
    state = generate.prefill(model.config, model.params, [r.ids for r in filled], width, T + width)
    padding = jnp.arange(rows) >= len(requests)
    return Wave(model, requests, state._replace(stopped=state.stopped | padding),
                jax.vmap(jax.random.key)(jnp.array([r.seed for r in filled], jnp.uint32)),
                jnp.array([r.temperature for r in filled], jnp.float32),
                jnp.array([r.top_p for r in filled], jnp.float32))


def _turn(wave: Wave) -> list[Wave]:
    """Decode a few tokens of a wave; give it back unless all its requests are answered."""
    before = np.asarray(wave.state.stopped)
    state, said = generate.advance(wave.model.config, wave.model.params, wave.state, EVERY,
                                   wave.keys, wave.temperature, wave.top_p)
    arrays, stopped = [np.asarray(a) for a in said], np.array(state.stopped)
    for row, request in enumerate(wave.requests):
        if before[row]:
            continue
        ends = np.flatnonzero(arrays[0][row] < generate.CONTROL)
        size = min(EVERY, request.count - request.made, *(ends[:1] + 1))
        request.made += size
        request.told(Part(*(a[row, :size] for a in arrays)))
        if stopped[row] or request.made >= request.count or request.cancelled:
            stopped[row] = True
            request.told(None)
    return [] if stopped.all() else [wave._replace(state=state._replace(
        stopped=jnp.asarray(stopped)))]

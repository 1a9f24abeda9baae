"""Many requests on few models: one thread owns the device and keeps a running batch a model.

A request joins the batch at the next turn and leaves it when answered; a turn is a few tokens for
all. Rows stop by themselves, so the device is given the next turn before it ends the last, whose
tokens are told meanwhile. The rows write the same slot of their caches, which are rings: the cache
of a row that joins is turned to where the others are. What a request draws depends on its own seed
and text. Each hears of its tokens through a callback that must not block.
"""

import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tinylm.config import BadInput
from tinylm.model import generate
from tinylm.model.attention import KeyValue
from tinylm.model.decoder import ModelConfig, Params
from tinylm.text.tokenizer import Tokenizer

EVERY = 8
"""tokens of a turn"""
LINGER = 0.01
"""seconds, at most, in which those who were just answered may ask again and join the next turn"""
TOLD = 300
"""times a second that requests are told, in all, so that telling does not take a core"""
SIZES = (1, 4, 8, 32, 64)
"""rows of a batch, and of those that join it, rounded up to one of these: few programs"""
LIKELIEST = 5
"""tokens told beside each drawn one, where a request asks for any"""


@dataclass(frozen=True, eq=False)  # one is itself: views keep what they found of each
class Model:
    """A finished run that answers."""

    name: str
    folder: Path
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    tuned: bool
    """it knows the chat template"""
    tokens: Path | None = None
    """the token files of its training text, to count in"""


class Part(NamedTuple):
    """What one turn, or a few, added to a request."""

    tokens: np.ndarray  # int32[n]
    logp: np.ndarray  # float32[n], nats
    top: np.ndarray  # int32[n, k]; k = 0 where the request does not ask for them
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
    likeliest: bool = True
    """the likeliest tokens are told beside each drawn one"""
    cancelled: bool = False
    made: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)
    """the end, or a failure, was told"""
    held: list[Part] = field(default_factory=list, init=False)
    """made and not told yet"""
    due: float = field(default=0.0, init=False)
    """when it is told again"""

    @property
    def limit(self) -> int:
        """Give its tokens when it ends at the latest, prompt included."""
        return len(self.ids) + self.count


class Rows(NamedTuple):
    """What the device holds of a batch; rows without a request have stopped."""

    state: generate.Decoding
    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    limit: jax.Array


class Engine:
    """Serve models by name until closed; use as a context manager."""

    def __init__(self, models: dict[str, Model]):
        self.models = models
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._preparing: threading.Thread | None = None
        self._closed = threading.Event()

    def __enter__(self) -> "Engine":
        self._thread.start()
        return self

    def __exit__(self, *fault: object) -> None:
        self._closed.set()
        self._asked.put(None)
        self._thread.join()
        if self._preparing:
            self._preparing.join()

    def warm(self) -> None:
        """Answer a first request of every model, so that a client does not wait for XLA."""
        for name in self.models:
            said: queue.SimpleQueue[Part | None | Exception] = queue.SimpleQueue()
            self.ask(Request(name, np.ones(1, np.int32), EVERY, 1.0, 1.0, 0, said.put, False))
            while isinstance(said.get(), Part):
                pass

    def prepare(self) -> None:
        """Compile, on a thread of its own, what batches of other sizes will need.

        A stream does not then wait for a program that a request beside it needs first.
        """
        def every() -> None:
            for model, size in itertools.product(self.models.values(), SIZES):
                for width in _widths(model.config.T):
                    if not self._closed.is_set():
                        _rehearse(model, 0, size, min(width, model.config.T - 1))
                for joining in SIZES[: SIZES.index(size)]:
                    if not self._closed.is_set():
                        _rehearse(model, size - joining, joining, 1)

        self._preparing = threading.Thread(target=every, daemon=True)
        self._preparing.start()

    def ask(self, request: Request) -> None:
        """Take a request of 1 to T - 1 ids; BadInput for one that does not fit."""
        T = self.models[request.model].config.T
        if not 1 <= len(request.ids) < T:
            raise BadInput(f"the prompt has {len(request.ids)} tokens and the model's context is "
                           f"T={T}; give 1 to {T - 1}")
        request.count = min(request.count, T - len(request.ids))
        self._asked.put(request)

    def _run(self) -> None:
        batches: dict[str, Batch] = {}
        until = 0.0
        while True:
            while not (self._asked.empty() and batches and time.monotonic() >= until):
                try:
                    request = self._asked.get(
                        timeout=max(0.0, until - time.monotonic()) if batches else None)
                except queue.Empty:
                    break
                if request is None:
                    return
                name = request.model
                batches.setdefault(name, Batch(self.models[name])).waiting.append(request)
            began = time.monotonic()
            for name, batch in list(batches.items()):
                batch.turn()
                if batch.idle:
                    del batches[name]
            now = time.monotonic()
            until = now + min(LINGER, (now - began) / 2)


class Batch:
    """The requests of one model: those that wait, and those that are decoded together."""

    def __init__(self, model: Model):
        self.model = model
        self.waiting: list[Request] = []
        self.seats: list[Request | None] = []
        """who has which row"""
        self.rows: Rows | None = None
        self._underway: tuple[generate.Said, list[Request | None]] | None = None

    @property
    def live(self) -> list[Request]:
        """List the requests that are being answered."""
        return [r for r in self.seats if r is not None]

    @property
    def idle(self) -> bool:
        """Tell whether nothing waits, is decoded or is still to be told."""
        return not (self.waiting or self.live or self._underway)

    def turn(self) -> None:
        """Let those in that wait, begin a few tokens of all, tell what the turn before came to."""
        joining = [r for r in self.waiting if not r.cancelled][:SIZES[-1] - len(self.live)]
        self.waiting = [r for r in self.waiting if not r.cancelled and r not in joining]
        if joining:
            self._or_told(lambda: self._join(joining), joining)
        before, self._underway = self._underway, None
        if self.live:
            self._or_told(self._begin, self.live)
        if before:
            self._or_told(lambda: self._tell(*before), [r for r in before[1] if r is not None])

    def _or_told(self, do: Callable[[], None], requests: list[Request]) -> None:
        """Do it; what goes wrong is told to those it was for, and the others go on."""
        try:
            do()
        except Exception as fault:
            logging.getLogger(__name__).exception("%s failed", self.model.name)
            for request in requests:
                self._end(request, fault)

    def _end(self, request: Request, why: Exception | None) -> None:
        """Tell the end of a request, once, and free its row."""
        if not request.ended:
            request.ended = True
            request.told(why)
        self.seats = [None if r is request else r for r in self.seats]
        if not self.live:
            self.seats, self.rows = [], None

    def _join(self, requests: list[Request]) -> None:
        """Read the prompts, padded to a quarter of the context or all of it, and seat them."""
        c, longest, size = self.model.config, max(len(r.ids) for r in requests), _size(requests)
        filled = requests + requests[-1:] * (size - len(requests))
        width = next(width for width in _widths(c.T) if longest <= width)
        state = generate.prefill(c, self.model.params, [r.ids for r in filled], width)
        if self.rows is None:
            self.rows, self.seats = _blank(state, size), [None] * size
        if self.seats.count(None) < len(requests):
            self._resize(_size([*self.live, *requests]))
        free = [n for n, r in enumerate(self.seats) if r is None][:len(requests)]
        places = np.array(free + free[-1:] * (size - len(free)), np.int32)
        self.rows = _seated(self.rows, state, places, *(
            np.array([getattr(r, name) for r in filled], dtype) for name, dtype in (
                ("seed", np.uint32), ("temperature", np.float32), ("top_p", np.float32),
                ("limit", np.int32))))
        for n, request in zip(free, requests, strict=True):
            self.seats[n] = request

    def _resize(self, size: int) -> None:
        kept = [n for n, r in enumerate(self.seats) if r is not None]
        order = np.array(kept + kept[:1] * (size - len(kept)), np.int32)
        self.rows = _taken(self.rows, order, np.arange(size) >= len(kept))
        self.seats = [self.seats[n] for n in kept] + [None] * (size - len(kept))

    def _begin(self) -> None:
        """Give the device a turn of all rows, in fewer of them where most are free."""
        size = _size(self.live)
        if not self.waiting and size < len(self.seats) >= 2 * len(self.live):
            self._resize(size)
        k = LIKELIEST if any(r.likeliest for r in self.live) else 0
        state, said = generate.advance(self.model.config, self.model.params, self.rows.state,
                                       EVERY, *self.rows[1:], k=k)
        self.rows = self.rows._replace(state=state)
        self._underway = said, list(self.seats)

    def _tell(self, said: generate.Said, seats: list[Request | None]) -> None:
        """Tell the tokens of a turn that those in these rows had, and who has ended by them."""
        arrays = [np.asarray(a) for a in said]
        for row, request in enumerate(seats):
            if request is None or request.ended:
                continue
            ends = np.flatnonzero(arrays[0][row] < generate.CONTROL)
            size = min(EVERY, request.count - request.made, *(ends[:1] + 1))
            request.made += size
            last = ends.size or request.made >= request.count or request.cancelled
            k = LIKELIEST * request.likeliest
            request.held.append(Part(*(a[row, :size] for a in arrays[:2]),
                                     *(a[row, :size, :k] for a in arrays[2:])))
            if last or time.monotonic() >= request.due:
                request.due = time.monotonic() + len(self.live) / TOLD
                request.told(Part(*map(np.concatenate, zip(*request.held, strict=True))))
                request.held.clear()
            if last:
                self._end(request, None)


def _rehearse(model: Model, seated: int, joining: int, length: int) -> None:
    """Answer dummies of so many ids: some are seated when the others come, if any are to be.

    Long ones ask for the likeliest tokens too.
    """
    batch, T = Batch(model), model.config.T
    for count in filter(None, (seated, joining)):
        batch.waiting = [Request(model.name, np.ones(length, np.int32), T - length, 1.0, 1.0, 0,
                                 lambda part: None, length > 1) for _ in range(count)]
        batch.turn()
    for request in batch.live:
        request.cancelled = True
    while not batch.idle:
        batch.turn()


def _widths(T: int) -> list[int]:
    """Give the lengths that prompts are padded to: up to a quarter of the context, or all of it."""
    step = generate.BUCKET
    return [*(width for width in range(step, max(T // 4, step) + 1, step) if width < T), T]


def _size(requests: Sequence[Request]) -> int:
    return next(size for size in SIZES if size >= len(requests))


@functools.partial(jax.jit, static_argnums=1)
def _blank(like: generate.Decoding, size: int) -> Rows:
    """Give rows without requests."""
    cache = jax.tree.map(lambda a: jnp.zeros((size, *a.shape[1:])), like.cache)
    begin, stopped = jnp.zeros(size, jnp.int32), jnp.ones(size, bool)
    logits = jnp.zeros((size, like.logits.shape[1]))
    return Rows(generate.Decoding(cache, logits, like.slot, begin, stopped),
                jax.vmap(jax.random.key)(jnp.zeros(size, jnp.uint32)), jnp.ones(size),
                jnp.ones(size), jnp.zeros(size, jnp.int32))


@jax.jit
def _taken(rows: Rows, order: Int[Array, "B"], stopped: Bool[Array, "B"]) -> Rows:
    """Give these rows in this order, the masked ones stopped."""
    taken = jax.tree.map(lambda a: a[order] if a.ndim else a, rows)
    return taken._replace(state=taken.state._replace(stopped=stopped | taken.state.stopped))


@functools.partial(jax.jit, donate_argnums=0)
def _seated(rows: Rows, fresh: generate.Decoding, places: Int[Array, "b"], seeds: Int[Array, "b"],
            temperature: Float[Array, "b"], top_p: Float[Array, "b"],
            limit: Int[Array, "b"]) -> Rows:
    """Write fresh rows over those at these places, their caches turned to the others' slot."""
    by = rows.state.slot - fresh.slot
    cache = tuple(KeyValue(jnp.roll(c.k, by, 2), jnp.roll(c.v, by, 2), c.last)
                  for c in fresh.cache)
    turned = Rows(fresh._replace(cache=cache, begin=fresh.begin + by),
                  jax.vmap(jax.random.key)(seeds), temperature, top_p, limit)

    def seat(n: Int[Array, ""], rows: Rows) -> Rows:
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(
            old, new[n], places[n], 0) if old.ndim else old, rows, turned)

    return jax.lax.fori_loop(0, len(places), seat, rows)

"""Many requests on few models: one thread owns the device and keeps a running batch a model.

A request joins the batch at the next turn and leaves it when answered; a turn is a few tokens for
all. The rows write the same slot of their caches, which are rings: the cache of a row that joins is
turned to where the others are. What a request draws depends on its own seed and text. Each hears of
its tokens through a callback that must not block.
"""

import functools
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
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

EVERY = 16
"""tokens of a turn"""
SIZES = (1, 4, 8, 32, 64)
"""rows of a batch, and of those that join it, rounded up to one of these: few programs"""
LIKELIEST = 5
"""tokens told beside each drawn one, where a request asks for any"""


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
    tokens: Path | None = None
    """the token files of its training text, to count in"""


class Part(NamedTuple):
    """What one turn added to a request."""

    tokens: np.ndarray  # int32[n]
    logp: np.ndarray  # float32[n], nats
    top: np.ndarray  # int32[n, k]; k = 0 unless some request of the batch asks for them
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

    @property
    def length(self) -> int:
        """Give its tokens so far, prompt included."""
        return len(self.ids) + self.made


class Rows(NamedTuple):
    """What the device holds of a batch; rows without a request have stopped."""

    state: generate.Decoding
    keys: jax.Array
    temperature: jax.Array
    top_p: jax.Array


class Engine:
    """Serve models by name until closed; use as a context manager."""

    def __init__(self, models: dict[str, Model]):
        self.models = models
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._news = News()
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
            self.ask(Request(name, np.ones(1, np.int32), EVERY, 1.0, 1.0, 0, said.put, False))
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
        batches: dict[str, Batch] = {}
        while True:
            if not batches:
                self._news.tell()
            while not self._asked.empty() or not batches:
                if (request := self._asked.get()) is None:
                    self._news.tell()
                    return
                name = request.model
                batch = batches.setdefault(name, Batch(self.models[name], self._news))
                batch.waiting.append(request)
            for name, batch in list(batches.items()):
                batch.turn()
                if not (batch.waiting or batch.live):
                    del batches[name]


class News:
    """What requests are to be told, kept until the device is at work on the next turn.

    Telling wakes other threads, and none may keep the device waiting.
    """

    def __init__(self):
        self._untold: list[tuple[Request, Part | None | Exception]] = []

    def add(self, request: Request, what: Part | None | Exception) -> None:
        """Keep what a request is to be told, in its order."""
        self._untold.append((request, what))

    def tell(self) -> None:
        """Tell everything that is kept."""
        untold, self._untold = self._untold, []
        for request, what in untold:
            request.told(what)


class Batch:
    """The requests of one model: those that wait, and those that are decoded together."""

    def __init__(self, model: Model, news: News):
        self.model, self.news = model, news
        self.waiting: list[Request] = []
        self.seats: list[Request | None] = []
        """who has which row"""
        self.rows: Rows | None = None

    @property
    def live(self) -> list[Request]:
        """List the requests that are being answered."""
        return [r for r in self.seats if r is not None]

    def turn(self) -> None:
        """Let those in that wait and decode a few tokens of all."""
        joining = [r for r in self.waiting if not r.cancelled][:SIZES[-1] - len(self.live)]
        self.waiting = [r for r in self.waiting if not r.cancelled and r not in joining]
        if joining:
            self._or_told(lambda: self._join(joining), joining)
        if self.live:
            self._or_told(self._decode, self.live)

    def _or_told(self, do: Callable[[], None], requests: list[Request]) -> None:
        """Do it; what goes wrong is told to those it was for, and the others go on."""
        try:
            do()
        except Exception as fault:
            logging.getLogger(__name__).exception("%s failed", self.model.name)
            for request in requests:
                self.news.add(request, fault)
            self.news.tell()
            self._seat(None if r in requests else r for r in self.seats)

    def _seat(self, seats: Iterable[Request | None]) -> None:
        self.seats = list(seats)
        if not self.live:
            self.seats, self.rows = [], None

    def _join(self, requests: list[Request]) -> None:
        """Read the prompts, padded to a quarter of the context or all of it, and seat them."""
        c, longest, size = self.model.config, max(len(r.ids) for r in requests), _size(requests)
        filled = requests + requests[-1:] * (size - len(requests))
        width = -(-longest // generate.BUCKET) * generate.BUCKET if longest <= c.T // 4 else c.T
        state = generate.prefill(c, self.model.params, [r.ids for r in filled], width)
        if self.rows is None:
            self.rows, self.seats = _blank(state, size), [None] * size
        if self.seats.count(None) < len(requests):
            self._resize(_size([*self.live, *requests]))
        free = [n for n, r in enumerate(self.seats) if r is None][:len(requests)]
        places = np.array(free + free[-1:] * (size - len(free)), np.int32)
        self.rows = _seated(self.rows, state, places, *(
            np.array([getattr(r, name) for r in filled], dtype) for name, dtype in (
                ("seed", np.uint32), ("temperature", np.float32), ("top_p", np.float32))))
        for n, request in zip(free, requests, strict=True):
            self.seats[n] = request

    def _resize(self, size: int) -> None:
        kept = [n for n, r in enumerate(self.seats) if r is not None]
        order = np.array(kept + kept[:1] * (size - len(kept)), np.int32)
        self.rows = _taken(self.rows, order, np.arange(size) >= len(kept))
        self.seats = [self.seats[n] for n in kept] + [None] * (size - len(kept))

    def _decode(self) -> None:
        """Decode a turn, keep its tokens to be told, free the rows of those that are answered."""
        k = LIKELIEST if any(r.likeliest for r in self.live) else 0
        state, said = generate.advance(self.model.config, self.model.params, self.rows.state,
                                       EVERY, *self.rows[1:], k=k)
        self.news.tell()
        arrays, stopped = [np.asarray(a) for a in said], np.array(state.stopped)
        for row, request in enumerate(self.seats):
            if request is None:
                continue
            ends = np.flatnonzero(arrays[0][row] < generate.CONTROL)
            size = min(EVERY, request.count - request.made, *(ends[:1] + 1))
            request.made += size
            self.news.add(request, Part(*(a[row, :size] for a in arrays)))
            if stopped[row] or request.made >= request.count or request.cancelled:
                stopped[row], self.seats[row] = True, None
                self.news.add(request, None)
        self.rows = self.rows._replace(state=state._replace(stopped=jnp.asarray(stopped)))
        self._seat(self.seats)
        size = _size(self.live) if self.live else 0
        if not self.waiting and size < len(self.seats) >= 2 * len(self.live):
            self._resize(size)


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
                jnp.ones(size))


@jax.jit
def _taken(rows: Rows, order: Int[Array, "B"], stopped: Bool[Array, "B"]) -> Rows:
    """Give these rows in this order, the masked ones stopped."""
    taken = jax.tree.map(lambda a: a[order] if a.ndim else a, rows)
    return taken._replace(state=taken.state._replace(stopped=stopped | taken.state.stopped))


@functools.partial(jax.jit, donate_argnums=0)
def _seated(rows: Rows, fresh: generate.Decoding, places: Int[Array, "b"], seeds: Int[Array, "b"],
            temperature: Float[Array, "b"], top_p: Float[Array, "b"]) -> Rows:
    """Write fresh rows over those at these places, their caches turned to the others' slot."""
    by = rows.state.slot - fresh.slot
    cache = tuple(KeyValue(jnp.roll(c.k, by, 2), jnp.roll(c.v, by, 2), c.last)
                  for c in fresh.cache)
    turned = Rows(fresh._replace(cache=cache, begin=fresh.begin + by),
                  jax.vmap(jax.random.key)(seeds), temperature, top_p)

    def seat(n: Int[Array, ""], rows: Rows) -> Rows:
        return jax.tree.map(lambda old, new: jax.lax.dynamic_update_index_in_dim(
            old, new[n], places[n], 0) if old.ndim else old, rows, turned)

    return jax.lax.fori_loop(0, len(places), seat, rows)

"""N-gram tables: what counting alone predicts, the bar a trained model has to clear.

Interpolated modified Kneser-Ney (Chen and Goodman 1999), numpy only. With a(c, w) how often w
follows the context c, A(c) its sum over w, and c' the context without its oldest token,

    p(w | c) = max(a - D(a), 0) / A(c) + r(c) p(w | c'),   r(c) = sum_w D(a) / A(c),   p(w) = 1 / V

below the unigram. At the longest context a counts occurrences; at shorter ones, the different
tokens seen before (c, w). D(1), D(2), D(3 and more) are the closed form of that paper times one
factor per order, chosen on a held-back slice of the training tokens.

A table of order k is sorted keys `context * V + token`; a key's index is its gram's number, which
is the context's number in the table of order k + 1: a context is one integer whatever its length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tinylm.config import BadInput

FACTORS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
SLICE_TOKENS, SLICES = 4096, 20  # one slice of so many is held back
MISS = -1


class Counts(NamedTuple):
    """The distinct grams of one order, in the order of their keys."""

    keys: np.ndarray  # uint64[grams]: context * V + token
    seen: np.ndarray  # int32[grams]: occurrences
    before: np.ndarray  # int32[grams]: different tokens seen before the gram
    suffix: np.ndarray  # int64[grams]: the gram less its oldest token, in the next shorter table


class Table(NamedTuple):
    """The probabilities of one order."""

    p: np.ndarray  # float64[grams]: p(token | context), interpolated
    rest: np.ndarray  # float64[contexts]: r(context), the share left to the shorter context


@dataclass(frozen=True)
class NGram:
    """An n-gram model; every token has p > 0 after every context."""

    order: int
    V: int
    factor: float  # what the closed-form discounts were multiplied by
    tables: list[Table]  # one per order, shortest first
    grams: list[Counts]  # the counts behind them

    @classmethod
    def fit(cls, tokens: np.ndarray, order: int, V: int) -> "NGram":
        """Count one model of `order` (1 = unigram); see fit_orders."""
        return fit_orders(tokens, [order], V)[order]

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """Give -ln p (float64) of each token after the order - 1 before it (fewer at the start)."""
        places = _places(self.grams, _checked(tokens, self.V), self.V)
        return -np.log(_probability(self.tables, places, self.V))

    def counts(self, context: Sequence[int] | np.ndarray,
               k: int) -> list[tuple[int, int, float]]:
        """List the k likeliest tokens seen after a context as (id, occurrences, probability).

        The context is cut to its last order - 1 tokens, then shortened until it has been seen.
        """
        context = [int(t) for t in _checked(np.asarray(context, np.int64), self.V)]
        context = context[max(0, len(context) - self.order + 1):]
        for start in range(len(context) + 1):
            level, found = len(context) - start, 0
            for n, token in enumerate(context[start:]):
                found = int(_find(self.grams[n].keys, np.array([found * self.V + token]))[0])
                if found == MISS:
                    break
            if found != MISS:
                keys = self.grams[level].keys
                first, last = np.searchsorted(keys, np.array([found, found + 1], np.uint64)
                                              * np.uint64(self.V))
                if last > first:
                    break
        top = first + np.argsort(-self.tables[level].p[first:last], kind="stable")[:k]
        return [(int(keys[i] % np.uint64(self.V)), int(self.grams[level].seen[i]),
                 float(self.tables[level].p[i])) for i in top]


def fit_orders(tokens: np.ndarray, orders: Sequence[int], V: int) -> dict[int, NGram]:
    """Count models of several orders at once, each with its own discount factor.

    The factor is chosen on blocks of 4,096 tokens spread evenly over the training tokens (their
    end alone would be one part of a corpus kept in order), then everything is counted again.
    """
    tokens = _checked(tokens, V)
    top = max(orders, default=0)
    if min(orders, default=0) < 1 or len(tokens) < 2 * top:
        raise BadInput(f"orders={list(orders)} do not fit {len(tokens)} tokens; choose orders from "
                       "1 up to half as many as there are tokens")
    factors = dict.fromkeys(orders, 1.0)
    held = _spread(len(tokens))
    if held.any() and (~held).sum() >= 2 * top:
        grams = _count(tokens[~held], top, V)
        places = _places(grams, tokens[held], V)
        scores = {o: [] for o in orders}
        for factor in FACTORS:
            for order, tables in _tables(grams, orders, V, factor):
                scores[order].append(-np.log(_probability(tables, places, V)).mean())
        factors = {o: FACTORS[int(np.argmin(scores[o]))] for o in orders}
    grams = _count(tokens, top, V)
    return {order: NGram(order, V, factor, tables, grams[:order])
            for factor in set(factors.values())
            for order, tables in _tables(grams, [o for o in orders if factors[o] == factor], V,
                                         factor)}


def _spread(n: int) -> np.ndarray:
    return (np.arange(n) // min(SLICE_TOKENS, max(1, n // 200))) % SLICES == SLICES - 1


def _count(tokens: np.ndarray, top: int, V: int) -> list[Counts]:
    """Count all grams of order 1..top, one sort an order."""
    out: list[Counts] = []
    context = shorter = np.zeros(len(tokens), np.uint64)
    for order in range(1, top + 1):
        key = context * np.uint64(V) + tokens[order - 1:].astype(np.uint64)
        keys, first, gram, seen = np.unique(
            key, return_index=True, return_inverse=True, return_counts=True)
        suffix = np.zeros(len(keys), np.int64)
        if out:
            suffix = shorter[1:][first]
            out[-1] = out[-1]._replace(
                before=np.bincount(suffix, minlength=len(out[-1].keys)).astype(np.int32))
        out.append(Counts(keys, seen.astype(np.int32), np.zeros(len(keys), np.int32), suffix))
        shorter, context = gram, gram[:-1].astype(np.uint64)
    return out


def _tables(grams: list[Counts], orders: Sequence[int], V: int,
            factor: float) -> Iterator[tuple[int, list[Table]]]:
    """Yield (order, tables) for each order, sharing the shorter contexts' tables."""
    below: list[Table] = []
    for n, counted in enumerate(grams[:max(orders, default=0)]):
        contexts = len(grams[n - 1].keys) if n else 1
        lower = below[-1].p[counted.suffix] if n else np.full(len(counted.keys), 1 / V)
        context = (counted.keys // np.uint64(V)).astype(np.int64)
        if n + 1 in orders:
            yield n + 1, [*below, _table(counted.seen, context, contexts, lower, factor)]
        if n + 1 < max(orders):
            below.append(_table(counted.before, context, contexts, lower, factor))


def _table(a: np.ndarray, context: np.ndarray, contexts: int, lower: np.ndarray,
           factor: float) -> Table:
    n1, n2, n3, n4 = (int((a == j).sum()) for j in (1, 2, 3, 4))
    y = n1 / max(1, n1 + 2 * n2)
    closed = [j - (j + 1) * y * more / max(1, n) if n1 else 0
              for j, n, more in ((1, n1, n2), (2, n2, n3), (3, n3, n4))]
    # Kept above 0.1 so that something is left for unseen tokens, and at most the count itself.
    discount = np.array([0, *(min(max(factor * d, 0.1), j) for j, d in enumerate(closed, 1))])
    taken = discount[np.minimum(a, 3)]
    whole = np.bincount(context, a, contexts)
    left = np.bincount(context, taken, contexts)
    rest = np.divide(left, whole, out=np.ones(contexts), where=whole > 0)
    return Table((a - taken) / np.maximum(whole, 1)[context] + rest[context] * lower, rest)


def _places(grams: list[Counts], tokens: np.ndarray, V: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Find (context, gram) of every position in each order; MISS where not counted."""
    out = []
    context = np.zeros(len(tokens), np.int64)
    for counted in grams:
        gram = _find(counted.keys, context * V + tokens)
        gram[context == MISS] = MISS
        out.append((context, gram))
        context = np.concatenate([[MISS], gram[:-1]])
    return out


def _find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, wanted.astype(np.uint64)), len(keys) - 1)
    return np.where(keys[at] == wanted.astype(np.uint64), at, MISS)


def _probability(tables: list[Table], places: list, V: int) -> np.ndarray:
    p = np.full(len(places[0][0]), 1 / V)
    for table, (context, gram) in zip(tables, places, strict=False):
        p = np.where(gram != MISS, table.p[gram],
                     np.where(context != MISS, table.rest[context], 1) * p)
    return p


def _checked(tokens: np.ndarray, V: int) -> np.ndarray:
    tokens = np.asarray(tokens).astype(np.int64).ravel()
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < V:
        raise BadInput(f"token ids reach from {tokens.min()} to {tokens.max()}, beyond "
                       f"0..{V - 1}; use the tokenizer's own V={V}")
    return tokens

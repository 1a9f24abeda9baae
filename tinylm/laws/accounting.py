"""Count parameters and training FLOPs of a decoder: the only place with this arithmetic.

A matrix product costs 2 FLOPs a multiply-add; the backward pass costs twice the forward pass.
Counted: the blocks' matrices, the head, attention's scores and values. Not counted: elementwise
work (norms, softmax, activations, rotations) and the embedding's table look-up.
"""

from typing import NamedTuple


class Shape(NamedTuple):
    """The sizes that decide a decoder's cost, in the project's letters."""

    V: int  # vocabulary
    D: int  # width
    L: int  # layers
    H: int  # query heads
    G: int  # key/value heads
    K: int  # head width
    F: int  # mlp width; gated, so three matrices
    T: int  # context, tokens
    tied: bool  # the head shares the embedding's table


class Parameters(NamedTuple):
    """Exact parameter counts; a tied table is counted once, as the head."""

    embedding: int
    head: int
    blocks: int  # with the final norm's gain

    @property
    def total(self) -> int:
        """Give every parameter that is stored."""
        return self.embedding + self.head + self.blocks

    @property
    def law(self) -> int:
        """Give the count that laws are fitted to: blocks and head, without the input table."""
        return self.blocks + self.head


def parameters(shape: Shape) -> Parameters:
    """Count the parameters, norm gains included (two a block, one each on q and k, one final)."""
    s = shape
    gains = 2 * s.D + 2 * s.K
    table = s.V * s.D
    return Parameters(0 if s.tied else table, table, s.L * (_block_matrices(s) + gains) + s.D)


def flops_per_token(shape: Shape) -> float:
    """Give training FLOPs a token when masked positions are skipped: the causal half.

    A token at position t attends to t + 1 keys, (T + 1) / 2 on average.
    """
    return _flops(shape, (shape.T + 1) / 2)


def flops_per_token_full(shape: Shape) -> float:
    """Give training FLOPs a token when scores are computed in full, T keys for every query.

    This is what a compiler counts that does not skip the mask.
    """
    return _flops(shape, float(shape.T))


def six_nd(params: float, tokens: float) -> float:
    """Give the usual estimate of training FLOPs, 6 params tokens (arXiv 2001.08361)."""
    return 6.0 * params * tokens


def _block_matrices(s: Shape) -> int:
    queries_and_output = 2 * s.D * s.H * s.K
    keys_and_values = 2 * s.D * s.G * s.K
    return queries_and_output + keys_and_values + 3 * s.D * s.F


def _flops(s: Shape, keys: float) -> float:
    scores_and_values = 2 * s.H * s.K * keys
    forward = 2.0 * (s.L * (_block_matrices(s) + scores_and_values) + s.V * s.D)
    return 3.0 * forward

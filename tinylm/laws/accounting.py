"""Count parameters and training FLOPs of a decoder: the only place with this arithmetic.

A matrix product costs 2 FLOPs a multiply-add; the backward pass costs twice the forward pass.
Counted: the blocks' matrices, the head, attention's scores and values. Not counted: elementwise
work (norms, softmax, activations, rotations) and the embedding's table look-up.
"""

import math
from typing import NamedTuple

from tinylm.config import require

STATE_BYTES = 16  # a parameter, under Adam: f32 weight, gradient and two moments, or the same in
# mixed precision with an f32 copy (arXiv 1910.02054, section 3.1)


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
    smear: bool = False  # a share by channel of the key before, in each layer's keys


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


class Device(NamedTuple):
    """An accelerator by its maker's data sheet."""

    name: str
    flops_per_second: float  # dense, bf16 (V100: f16), at peak
    memory_bytes: float


class Bill(NamedTuple):
    """What a training run takes."""

    flops: float
    device_hours: float
    dollars: float
    state_bytes: float  # weights, gradients and optimiser, without activations
    devices: int  # that hold the state between them, at least


class Reference(NamedTuple):
    """A published model. A number that was not published is NaN unless `estimate` says whose."""

    name: str
    params: float  # stored; for a mixture of experts, those that one token uses
    tokens: float  # seen in training
    flops: float  # of training, as the source states them
    estimate: str  # which numbers are not the makers' own; empty if none
    source: str


DEVICES = (Device("V100", 125e12, 32e9), Device("A100", 312e12, 80e9),
           Device("H100", 989e12, 80e9), Device("H200", 989e12, 141e9),
           Device("TPU v4", 275e12, 32e9))
REFERENCES = (
    Reference("GPT-1", 116_534_784, math.nan, 8.2e19, "flops: 8 P600 of 12e12 for 30 days at 33%",
              "Radford et al. 2018; the makers' hardware estimate, AI and Compute"),
    Reference("GPT-2", 1_557_611_200, math.nan, math.nan, "", "Radford et al. 2019; the weights"),
    Reference("GPT-3", 174.6e9, 300e9, 3.14e23, "", "arXiv 2005.14165, table D.1"),
    Reference("GPT-4", 280e9, 13e12, 2.15e25, "all: leaked, 1.8e12 params of which 280e9 are used",
              "SemiAnalysis 2023"),
    Reference("Chinchilla", 70e9, 1.4e12, 5.76e23, "", "arXiv 2203.15556, tables 3 and 4"),
    Reference("Llama 3 405B", 405e9, 15.6e12, 3.8e25, "", "arXiv 2407.21783, section 3"),
)


def parameters(shape: Shape) -> Parameters:
    """Count the parameters, norm gains (two a block, one each on q and k, one final) included."""
    s = shape
    gains = 2 * s.D + 2 * s.K + s.smear * s.G * s.K
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


def flops_by_convention(shape: Shape, tokens: float) -> dict[str, float]:
    """Give training FLOPs as they are commonly counted, the smallest habit first.

    6ND of blocks (Kaplan), of blocks and head, of all (Hoffmann's estimate); all with attention
    in full (Chowdhery et al., arXiv 2204.02311, appendix B); ours, causal and in full.
    """
    count, attention = parameters(shape), 12 * shape.L * shape.H * shape.K * shape.T
    return {"6nd blocks": six_nd(count.blocks, tokens), "6nd law": six_nd(count.law, tokens),
            "6nd all": six_nd(count.total, tokens),
            "palm": (6.0 * count.total + attention) * tokens,
            "exact": flops_per_token(shape) * tokens,
            "exact full": flops_per_token_full(shape) * tokens}


def bill(params: float, tokens: float, device: Device, dollars_per_hour: float = 0.0,
         utilisation: float = 0.4, flops: float | None = None) -> Bill:
    """Give what a run takes at a share of the device's peak; FLOPs are 6ND unless given.

    Published runs reach a utilisation of .3 to .45; ours on small models are far below.
    """
    require("utilisation", utilisation, 1e-6, 1.0)
    require("params", params, 1.0, 1e30)
    require("dollars_per_hour", dollars_per_hour, 0.0, 1e9)
    flops = six_nd(params, tokens) if flops is None else flops
    require("flops", flops, 1.0, 1e40)
    hours = flops / (device.flops_per_second * utilisation) / 3600
    state = STATE_BYTES * params
    return Bill(flops, hours, hours * dollars_per_hour, state,
                math.ceil(state / device.memory_bytes))


def activation_bytes(shape: Shape, tokens: float) -> float:
    """Give the bytes that backward keeps for `tokens` of a 16-bit step, scores not recomputed.

    Per token and layer: the matrices' inputs, the gated pair and its product, q, k, v, the scores
    before and after softmax (full T) and two norms' inputs; and the logits in f32.
    """
    s = shape
    inner = 4 * s.D + 3 * s.F + 2 * s.H * s.K + 2 * s.G * s.K + 2 * s.H * s.T
    return tokens * (2.0 * s.L * inner + 4.0 * s.V)


def _block_matrices(s: Shape) -> int:
    queries_and_output = 2 * s.D * s.H * s.K
    keys_and_values = 2 * s.D * s.G * s.K
    return queries_and_output + keys_and_values + 3 * s.D * s.F


def _flops(s: Shape, keys: float) -> float:
    scores_and_values = 2 * s.H * s.K * keys
    forward = 2.0 * (s.L * (_block_matrices(s) + scores_and_values) + s.V * s.D)
    return 3.0 * forward

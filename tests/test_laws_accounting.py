"""Parameters and FLOPs against counts made another way."""

import pytest

from tinylm.laws.accounting import (
    Shape,
    flops_per_token,
    flops_per_token_full,
    parameters,
    six_nd,
)

SMALL = Shape(V=11, D=6, L=2, H=3, G=1, K=4, F=10, T=5, tied=False)


def matrices(s: Shape) -> list[tuple[int, int]]:
    """List every weight matrix of the blocks."""
    one = [(s.D, s.H * s.K), (s.D, s.G * s.K), (s.D, s.G * s.K), (s.H * s.K, s.D),
           (s.D, s.F), (s.D, s.F), (s.F, s.D)]
    return one * s.L


def test_parameters_are_the_sum_over_every_tensor():
    gains = [6, 6, 4, 4] * 2 + [6]
    blocks = sum(a * b for a, b in matrices(SMALL)) + sum(gains)
    got = parameters(SMALL)
    assert got == (66, 66, blocks)
    assert (got.total, got.law, got.blocks) == (132 + blocks, 66 + blocks, blocks)


def test_a_tied_table_is_counted_once_and_as_the_head():
    tied, untied = parameters(SMALL._replace(tied=True)), parameters(SMALL)
    assert (tied.embedding, tied.head) == (0, 66)
    assert tied.law == untied.law and tied.total == untied.total - 66


@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_of_a_walk_over_every_position(causal):
    s, total = SMALL, 0
    for t in range(s.T):
        total += sum(2 * a * b for a, b in matrices(s)) + 2 * s.D * s.V
        keys = t + 1 if causal else s.T
        total += s.L * s.H * keys * (2 * s.K + 2 * s.K)  # scores, then values
    count = flops_per_token if causal else flops_per_token_full
    assert count(s) * s.T == 3 * total


def test_six_nd_is_the_limit_of_wide_models_with_short_context():
    wide = Shape(V=64, D=4096, L=4, H=32, G=32, K=128, F=8192, T=1, tied=True)
    assert flops_per_token(wide) == pytest.approx(six_nd(parameters(wide).law, 1), rel=1e-3)

"""Parameters and FLOPs against counts made another way."""

import math

import pytest

from tinylm.config import BadInput
from tinylm.laws.accounting import (
    DEVICES,
    REFERENCES,
    Shape,
    activation_bytes,
    bill,
    flops_by_convention,
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


def gpt(V, D, L, T, final=True) -> int:
    """Count a GPT of the first kind: biases, layer norms with two vectors, learnt positions."""
    one = (3 * D * D + 3 * D) + (D * D + D) + (4 * D * D + 4 * D) + (4 * D * D + D) + 4 * D
    return V * D + T * D + L * one + 2 * D * final


REFERENCE = {r.name: r for r in REFERENCES}


@pytest.mark.parametrize("name, count, tolerance", [
    ("GPT-1", gpt(40478, 768, 12, 512, final=False), 0),
    ("GPT-2", gpt(50257, 1600, 48, 1024), 0),
    ("GPT-3", gpt(50257, 12288, 96, 2048), 3e-4),
    ("Chinchilla", 80 * 13 * 8192**2 + 32000 * 8192, 3e-3),  # 12 and one for relative positions
    ("Llama 3 405B", parameters(Shape(V=128256, D=16384, L=126, H=128, G=8, K=128, F=53248,
                                      T=8192, tied=False)).total, 3e-3),
])
def test_published_parameter_counts_follow_from_published_sizes(name, count, tolerance):
    assert abs(REFERENCE[name].params / count - 1) <= tolerance


@pytest.mark.parametrize("name, tolerance", [
    ("GPT-3", 2e-3), ("GPT-4", 0.02), ("Chinchilla", 0.025), ("Llama 3 405B", 3e-3)])
def test_published_training_flops_are_six_params_tokens(name, tolerance):
    model = REFERENCE[name]
    assert abs(six_nd(model.params, model.tokens) / model.flops - 1) < tolerance


def test_what_nobody_published_is_marked():
    assert REFERENCE["GPT-1"].flops == pytest.approx(8 * 12e12 * 0.33 * 30 * 86400, rel=2e-3)
    assert [r.name for r in REFERENCES if r.estimate] == ["GPT-1", "GPT-4"]
    assert [r.name for r in REFERENCES if math.isnan(r.tokens)] == ["GPT-1", "GPT-2"]
    assert all(r.source for r in REFERENCES)


def test_the_device_hours_of_llama_3_are_those_reported_at_its_utilisation():
    device = {d.name: d for d in DEVICES}["H100"]
    model = REFERENCE["Llama 3 405B"]
    got = bill(model.params, model.tokens, device, 2.0, utilisation=0.346)
    assert got.device_hours == pytest.approx(30.84e6, rel=5e-3)  # the model card's
    assert got.dollars == 2 * got.device_hours
    assert (got.state_bytes, got.devices) == (16 * 405e9, 81)
    assert bill(1e6, 2e6, device, flops=1e15).flops == 1e15
    for bad in ({"utilisation": 0.0}, {"utilisation": 40}, {"flops": -1.0}):
        with pytest.raises(BadInput, match="is not within"):
            bill(1e6, 2e6, device, **bad)


def test_flops_by_convention_differ_by_what_each_leaves_out():
    got = flops_by_convention(SMALL, 7)
    gains, attention = 46, 12 * 2 * 3 * 4 * 5
    assert got["6nd all"] - got["6nd law"] == got["6nd law"] - got["6nd blocks"] == 6 * 66 * 7
    assert got["palm"] - got["6nd all"] == attention * 7
    assert got["exact full"] == got["6nd law"] - 6 * gains * 7 + attention * 7
    assert got["exact full"] - got["exact"] == pytest.approx(attention * 7 * 2 / 5)


def test_activations_are_the_sum_over_every_tensor_that_backward_reads():
    s = SMALL
    kept = [s.D, s.D, s.D, s.D,  # into norm, attention, norm and mlp
            s.H * s.K, s.G * s.K, s.G * s.K,  # q, k, v
            s.H * s.T, s.H * s.T, s.H * s.K,  # scores, weights, values into the output
            s.F, s.F, s.F]  # gate, up, product
    assert activation_bytes(s, 10) == 10 * (s.L * 2 * sum(kept) + 4 * s.V)

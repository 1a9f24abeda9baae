"""Data is a function of (seed, step)."""

import numpy as np
import pytest

from tinylm.config import BadInput
from tinylm.train.batch import batch, permute, windows


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 65, 1000])
@pytest.mark.parametrize("seed", [0, 5])
def test_the_permutation_is_one_to_one_for_every_count(count, seed):
    index = np.arange(count)
    assert sorted(permute(index, count, seed, 0)) == list(range(count))


def test_every_window_is_seen_once_an_epoch_in_another_order_each_time():
    T, rows = 5, 3
    tokens = np.arange(5 * 21 + 1, dtype=np.uint16)
    steps = windows(tokens, T) // rows
    orders = []
    for epoch in range(3):
        seen = [batch(tokens, 7, epoch * steps + t, rows, T).tokens for t in range(steps)]
        firsts = np.concatenate(seen)[:, 0]
        assert sorted(firsts) == list(range(0, 105, 5))
        orders.append(tuple(firsts))
    assert len(set(orders)) == 3


def test_targets_are_the_next_tokens_and_windows_share_one_token():
    got = batch(np.arange(101, dtype=np.uint16), 0, 0, 4, 10).tokens
    assert got.shape == (4, 11) and (np.diff(got, axis=1) == 1).all()


def test_a_step_needs_no_history():
    tokens = np.arange(1000, dtype=np.uint16)
    again = [batch(tokens, 3, 11, 4, 7).tokens for _ in range(2)]
    assert (again[0] == again[1]).all()
    assert (batch(tokens, 4, 11, 4, 7).tokens != again[0]).any()


def test_a_split_shorter_than_a_window_is_refused_with_the_tokens_needed():
    with pytest.raises(BadInput, match="holds 8 tokens and a window of T=8 needs 9"):
        batch(np.zeros(8, np.uint16), 0, 0, 1, 8)

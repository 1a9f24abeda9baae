"""The execution plan always fits the batch, and says so where it cannot."""

import itertools

import pytest

from tinylm import machine
from tinylm.config import BadInput
from tinylm.train.step import check_rows


def test_every_plan_divides_its_batch_and_uses_the_devices_that_can():
    for rows, T, D, (backend, count) in itertools.product(
            (1, 3, 4, 7, 16, 512), (32, 128, 256), (8, 40, 512), (("cpu", 2), ("gpu", 4))):
        plan = machine.plan_for(rows, T, D, backend, count)
        check_rows(rows, plan.devices, plan.micro)
        assert not [d for d in range(plan.devices + 1, count + 1) if rows % d == 0]
        assert backend == "gpu" or plan.micro == 1 or plan.micro * T <= 256


@pytest.mark.parametrize(("rows", "devices", "words"), [
    (4, 3, "devices=3 is not within"), (3, 2, "3 sequences a step do not divide over 2"),
    (0, 0, "rows=0")])
def test_an_impossible_plan_is_refused_in_words(rows, devices, words):
    with pytest.raises(BadInput, match=words):
        machine.plan_for(rows, 128, 64, "cpu", 2, devices)

"""The execution plan always fits the batch, and says so where it cannot."""

import itertools
import os
import subprocess
import sys

import pytest

from tinylm import machine
from tinylm.config import BadInput
from tinylm.native import library
from tinylm.train.step import check_rows


def test_every_plan_divides_its_batch_and_uses_the_devices_that_can():
    for rows, T, D, (backend, count) in itertools.product(
            (1, 3, 4, 7, 16, 512), (32, 128, 256), (8, 40, 512), (("cpu", 2), ("gpu", 4))):
        plan = machine.plan_for(rows, T, D, "f32", backend, count)
        check_rows(rows, plan.devices, plan.micro)
        assert not [d for d in range(plan.devices + 1, count + 1) if rows % d == 0]
        assert backend == "gpu" or plan.micro <= 2 or plan.micro * T <= 1024


@pytest.mark.parametrize("native", ["", "12.2.0"])
@pytest.mark.parametrize(("jax", "D", "T", "at_once"), [
    ("0.12.0.1", 24, 128, (1, 4, 8)), ("0.12.0.1", 64, 128, (2, 2, 4)),
    ("0.12.0.1", 96, 128, (2, 4, 4)), ("0.12.0.1", 128, 256, (1, 2, 2)),
    ("0.12.0.1", 384, 256, (2, 2, 2)), ("0.10.2", 24, 128, (1, 4, 8)),
    ("0.10.2", 64, 128, (2, 2, 4)), ("0.10.2", 128, 256, (2, 2, 2)),
    ("0.10.2", 384, 256, (2, 2, 2)), ("0.10.2", 64, 1024, (2, 2, 2))])
def test_a_cpu_holds_as_many_sequences_at_once_as_were_fastest(monkeypatch, jax, D, T, at_once,
                                                               native):
    monkeypatch.setattr(machine.importlib.metadata, "version", {"jax": jax}.get)
    monkeypatch.setattr(library, "compiler", lambda kept: native)
    monkeypatch.setattr(library, "onednn", lambda kept: "")
    for compute in ("f32", "bf16"):
        plan = machine.plan_for(32, T, D, compute, "cpu", 2)
        assert plan.micro == at_once[bool(native) * (2 if compute == "f32" else 1)]
        assert plan.native == bool(native)


@pytest.mark.parametrize(("rows", "devices", "words"), [
    (4, 3, "devices=3 is not within"), (3, 2, "3 sequences a step do not divide over 2"),
    (0, 0, "rows=0")])
def test_an_impossible_plan_is_refused_in_words(rows, devices, words):
    with pytest.raises(BadInput, match=words):
        machine.plan_for(rows, 128, 64, "f32", "cpu", 2, devices)


@pytest.mark.parametrize(("told", "devices"), [("", 3), ("1", 1), ("2", 2), ("64", 3)])
def test_a_cpu_has_as_many_devices_as_are_asked_for_and_cores(monkeypatch, told, devices):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", told)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(machine, "cores", lambda: [0, 1, 2])
    monkeypatch.setattr(machine, "_plugins", lambda: False)
    machine._asked.cache_clear()
    assert machine.survey() == ("cpu", devices)
    machine._asked.cache_clear()


@pytest.mark.parametrize(("plugins", "told", "precision"), [
    (True, None, "highest"), (True, "default", "default"), (False, None, None)])
def test_an_accelerator_multiplies_float32_as_float32_and_adds_in_one_order(
        plugins, told, precision):
    code = (f"import os; from tinylm import machine; machine._plugins = lambda: {plugins}; "
            "machine.pin(); print(os.environ.get('JAX_DEFAULT_MATMUL_PRECISION'), "
            "'deterministic_ops=true' in os.environ['XLA_FLAGS'])")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    env |= {"JAX_DEFAULT_MATMUL_PRECISION": told} if told else {}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == [str(precision), str(plugins)]


START = """
import os, sys
{odd}
from tinylm import machine
machine.command()
{then}
"""


@pytest.mark.parametrize(("odd", "then", "code", "words"), [
    ("os.environ['JAX_NUM_CPU_DEVICES'] = 'abc'", "", 2, "error: JAX_NUM_CPU_DEVICES='abc' is no"),
    ("os.path.expanduser = lambda path: path", "", 2, "error: this user has no home folder"),
    ("", "os.kill(os.getpid(), 2); import time; time.sleep(9)", 75, "stopped; the same command"),
    ("", "os.kill(os.getpid(), 15); import time; time.sleep(9)", 75, "stopped; the same command")])
def test_what_goes_wrong_before_a_command_begins_is_one_line(odd, then, code, words):
    env = {k: v for k, v in os.environ.items() if k != "TINYLM_CACHE"}
    heeding = "import signal; signal.signal(2, signal.default_int_handler)\n"  # if started with &
    done = subprocess.run([sys.executable, "-c", heeding + START.format(odd=odd, then=then)],
                          env=env, capture_output=True, text=True)
    line, = done.stderr.splitlines()
    assert done.returncode == code and line.startswith(words)


@pytest.mark.parametrize(("pinned", "threads"), [
    ("1, (CORE,)", ["1", "one"]), ("1", ["2", "several"]), ("2", ["2", "several"]),
    ("4", ["4", "several"])])
def test_a_process_of_one_core_has_one_thread(pinned, threads):
    code = ("import os; from tinylm import machine; "
            f"machine.pin({pinned.replace('CORE', str(machine.cores()[0]))}); "
            "print(os.environ['NPROC'], machine.environment()['threads'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == threads

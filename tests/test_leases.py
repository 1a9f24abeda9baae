"""One writer a folder: on one machine by a lock, between machines by signs of life."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from tinylm import leases


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT", 0.05)
    monkeypatch.setattr(leases, "PATIENCE", 0.4)


def abroad(folder, beats: int = 0) -> None:
    """Leave the lease of a process on another machine."""
    owner = {"machine": "other", "host": "far", "process": 7, "key": "k", "beats": beats}
    place = folder / ".lease"
    place.write_bytes(json.dumps(owner).encode().ljust(leases.SIZE))


def test_the_loser_of_a_lease_is_told_who_holds_it_and_the_dead_hold_nothing(tmp_path):
    code = ("import sys, time; from tinylm import leases\n"
            f"with leases.hold({str(tmp_path)!r}):\n print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with (pytest.raises(leases.Owned, match=f"process {other.pid} on"),
              leases.hold(tmp_path)):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    (tmp_path / ".x.1.tmp").write_bytes(b"litter of the dead")
    began = time.monotonic()
    with leases.hold(tmp_path):
        assert not (tmp_path / ".x.1.tmp").exists()
    assert time.monotonic() - began < leases.PATIENCE  # the lock tells that it is dead


def test_another_machine_s_lease_is_taken_over_once_it_stands_still(tmp_path, capsys):
    abroad(tmp_path)
    began = time.monotonic()
    with leases.hold(tmp_path):
        assert time.monotonic() - began >= leases.PATIENCE
        assert "process 7 on far; watching" in capsys.readouterr().err
    assert (tmp_path / ".lease").read_bytes() == b""  # given back: the next one need not watch
    with leases.hold(tmp_path):
        assert "watching" not in capsys.readouterr().err


def test_another_machine_s_lease_that_beats_is_its_own(tmp_path):
    abroad(tmp_path)
    over = threading.Event()

    def live() -> None:
        beats = 0
        while not over.wait(0.05):
            abroad(tmp_path, beats := beats + 1)

    beating = threading.Thread(target=live)
    beating.start()
    try:
        with pytest.raises(leases.Owned, match="process 7 on far; wait for it"), \
                leases.hold(tmp_path):
            pass
    finally:
        over.set()
        beating.join()


def test_who_holds_a_lease_gives_signs_of_life_and_a_clock_set_back_changes_nothing(
        tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with leases.hold(tmp_path):
        seen = set()
        until = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < until:
            seen.add(json.loads((tmp_path / ".lease").read_text())["beats"])
            time.sleep(0.02)
        assert len(seen) == 3


def test_a_disk_without_locks_has_signs_of_life(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(leases.LOCKLESS[0], "no locks")

    monkeypatch.setattr(leases.fcntl, "flock", none)
    with leases.hold(tmp_path), pytest.raises(leases.Owned, match=f"process {os.getpid()} on"), \
            leases.hold(tmp_path):
        pass


def test_a_process_that_lost_its_folder_while_it_slept_writes_no_more(tmp_path):
    code = ("import sys, time; from tinylm import leases\nleases.BEAT = .05\n"
            f"with leases.hold({str(tmp_path)!r}):\n print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    abroad(tmp_path)
    said = other.communicate(timeout=20)[1]
    assert other.returncode == 1 and "was taken over by process 7 on far" in said


@pytest.mark.parametrize("text", [b"", b"process 3 on old", b"[1]", b"\xff\xfe"])
def test_what_is_no_lease_is_nobody_s(tmp_path, text):
    (tmp_path / ".lease").write_bytes(text)
    with leases.hold(tmp_path):
        pass

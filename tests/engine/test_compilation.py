"""Locks of compilations: one that nobody holds does not hold up anybody, one that is held is waited for and said."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest
from processes import running
from torch.utils.file_baton import FileBaton

from dpdmd.engine import compilation
from dpdmd.engine.compilation import compiling, holder


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "build_folder", lambda library: tmp_path)
    monkeypatch.setattr(compilation, "LOOK", 0.01)
    monkeypatch.setattr(compilation, "UNHELD", 0.05)
    return tmp_path / "lock"


def wait_as_torch_does(lock):
    """What torch's loader does where another process compiles."""
    baton = FileBaton(str(lock), wait_seconds=0.01)
    if baton.try_acquire():
        baton.release()
        return "compiled"
    baton.wait()
    return "waited"


def test_a_lock_that_a_killed_process_left_is_removed(lock, capsys):
    lock.touch()
    with compiling("async_io", "the library"):
        assert wait_as_torch_does(lock) == "waited"
    assert f"{lock} was left by a process that has ended: removed" in capsys.readouterr().err


HOLD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.readline()
"""


def test_a_lock_that_is_held_is_waited_for_until_its_holder_dies(lock, capfd):
    with running(sys.executable, "-c", HOLD, lock) as other:
        assert other.stdout.readline() == "held\n"
        assert holder(lock) == other.pid
        said = f"waiting for process {other.pid}, which is compiling the library into {lock.parent}"
        errors = []

        def kill_when_said():
            while said not in "".join(errors):
                errors.append(capfd.readouterr().err)
                time.sleep(0.01)
            assert lock.exists()
            other.kill()

        killer = threading.Thread(target=kill_when_said)
        killer.start()
        with compiling("async_io", "the library"):
            assert wait_as_torch_does(lock) == "waited"
        killer.join()
    assert not lock.exists()


def test_what_is_compiled_here_is_said(lock, capfd):
    baton = FileBaton(str(lock))
    errors = []
    with compiling("async_io", "the library"):
        assert baton.try_acquire() and holder(lock) == os.getpid()
        while f"compiling the library into {lock.parent}" not in "".join(errors):
            errors.append(capfd.readouterr().err)
            time.sleep(0.01)
        assert lock.exists()
        baton.release()


def test_a_lock_on_a_disk_that_machines_share_is_named(lock, monkeypatch, capfd):
    monkeypatch.setattr(compilation, "_shared_with_other_machines", lambda folder: True)
    lock.touch()
    errors = []
    with compiling("async_io", "the library"):
        while f"waiting for {lock}: if no other machine is compiling the library, delete" not in "".join(errors):
            errors.append(capfd.readouterr().err)
            time.sleep(0.01)
        assert lock.exists()


def test_nobody_holds_what_is_not_there(tmp_path):
    assert holder(tmp_path / "lock") is None
    assert not compilation._shared_with_other_machines(tmp_path)

"""Users of boxes: each box has its own, whoever made it."""

import os
import signal
import subprocess
import sys

import pytest

from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Mechanism
from magistral_jax.verify.sandbox.users import claimed_user

CLAIM = """
import sys
from magistral_jax.verify.sandbox.users import claimed_user
with claimed_user() as uid:
    print(uid, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_process():
    """Another process that holds a user, and which one."""
    with subprocess.Popen([sys.executable, "-c", CLAIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline().decode().strip()
        process.kill()


def test_no_two_processes_have_one_user_and_that_of_a_dead_one_is_free(other_process):
    process, theirs = other_process
    if os.geteuid() != 0:
        assert theirs == "None"
        return
    with claimed_user() as first, claimed_user() as second:
        assert len({first, second, int(theirs)}) == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claimed_user() as first, claimed_user() as second, claimed_user() as third:
        assert min(uid for uid in (first, second, third) if uid) <= int(theirs)


def test_two_boxes_run_as_two_users(mechanism):
    source = b"import os; print(os.getuid())"
    with Box(mechanism, python=True) as one, Box(mechanism, python=True) as other:
        assert one.uid is None or one.uid != other.uid
        for box in (one, other):
            box.load_python(source)
            expected = os.geteuid() if box.uid is None else box.uid
            assert int(box.run_python().stdout) == expected


def test_without_a_sandbox_programs_are_who_we_are():
    with Box(Mechanism.UNSAFE, python=True) as box:
        assert box.uid is None


def test_when_all_users_are_taken_it_is_said(monkeypatch):
    if os.geteuid() != 0:
        monkeypatch.setattr("magistral_jax.verify.sandbox.privileges.can_become", lambda uid: True)
    monkeypatch.setattr("magistral_jax.verify.sandbox.users._NUM_UIDS", 0)
    with pytest.raises(OSError, match="taken by other boxes"), claimed_user():
        pass

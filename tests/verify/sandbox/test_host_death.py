"""Whoever kills the host, the boxes die with it: also a compiler's family, also in the middle of a program."""

import os
import signal
import subprocess
import sys

import pytest

from magistral_jax.verify.sandbox.execution import Mechanism

HOST = """
import sys
from magistral_jax.verify.sandbox.box import Box
from magistral_jax.verify.sandbox.execution import Limits, Mechanism
mechanism, binaries, program, mark = sys.argv[1:]
with Box(Mechanism(mechanism), readable={"/box": binaries}) as box:
    box.run([box.path("/box/programs"), program, mark], limits=Limits(wall_seconds=100.0, may_fork=program != "sleep"))
"""


@pytest.mark.parametrize("mechanism", Mechanism, ids=lambda mechanism: mechanism.value)
@pytest.mark.parametrize("program", ["sleep", "family_waits"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_host(mechanism, program, how, binaries, find_processes, wait_until):
    mark = f"host-death-{os.getpid()}-{how}"
    num_processes = {"sleep": 1, "family_waits": 5}[program]
    arguments = [mechanism.value, binaries, program, mark]
    with subprocess.Popen([sys.executable, "-c", HOST, *arguments], process_group=0) as host:
        wait_until(lambda: len(set(find_processes(mark)) - {host.pid}) >= num_processes)
        host.send_signal(how)
        host.wait()
    wait_until(lambda: not find_processes(mark) and not find_processes(f'"host_pid": {host.pid},'))


def test_a_box_that_is_closed_in_the_middle_of_a_program(mechanism, binaries, find_processes, wait_until):
    """As by an exception in another thread: the socket goes, and all that runs."""
    mark = f"closed-{os.getpid()}"
    with subprocess.Popen([sys.executable, "-c", HOST, mechanism.value, binaries, "sleep", mark]) as host:
        wait_until(lambda: len(find_processes(mark)) >= 2)
        host.send_signal(signal.SIGINT)
        assert host.wait() != 0
    assert not find_processes(mark)

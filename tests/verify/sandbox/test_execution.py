"""From what the runner saw to a status."""

import pytest

from magistral_jax.verify.sandbox.execution import Cause, Execution, Limits, Status, judge

LIMITS = Limits(cpu_seconds=2.0, memory_mib=100)


def execution(exit_code=0, stderr=b"", cpu=0.1, peak=10.0):
    return Execution(Status.OK, exit_code, b"", stderr, cpu, cpu, peak)


@pytest.mark.parametrize(
    ("cause", "result", "status"),
    [
        (Cause.EXITED, execution(), Status.OK),
        (Cause.EXITED, execution(peak=99.0), Status.OK),
        (Cause.EXITED, execution(exit_code=3), Status.RUNTIME_ERROR),
        (Cause.EXITED, execution(exit_code=-11), Status.RUNTIME_ERROR),
        (Cause.EXITED, execution(exit_code=-11, peak=81.0), Status.MEMORY_LIMIT),
        (Cause.EXITED, execution(exit_code=-6, stderr=b"...'std::bad_alloc'\n  what()"), Status.MEMORY_LIMIT),
        (Cause.EXITED, execution(exit_code=-6, stderr=b"'std::out_of_range'"), Status.RUNTIME_ERROR),
        (Cause.EXITED, execution(exit_code=1, stderr=b"Traceback\n  x\nMemoryError\n"), Status.MEMORY_LIMIT),
        (Cause.EXITED, execution(exit_code=1, stderr=b"MemoryError\nValueError\n"), Status.RUNTIME_ERROR),
        (Cause.EXITED, execution(cpu=2.1), Status.TIMEOUT),  # finished, but too late
        (Cause.EXITED, execution(exit_code=-9, cpu=3.0), Status.TIMEOUT),  # by the kernel's limit
        (Cause.CPU, execution(exit_code=-9), Status.TIMEOUT),
        (Cause.WALL, execution(exit_code=-9, peak=99.0), Status.TIMEOUT),
        (Cause.OUTPUT, execution(exit_code=-9, cpu=3.0), Status.OUTPUT_LIMIT),
        (Cause.IMAGE, execution(exit_code=-11), Status.MEMORY_LIMIT),
    ],
)
def test_status(cause, result, status):
    assert judge(cause, LIMITS, result) is status

"""A trainer of two processes: its step against that of one process, and what becomes of it when one dies."""

import pathlib
import runpy
import socket
import subprocess
import sys

import numpy as np

WORKER = pathlib.Path(__file__).with_name("step_worker.py")


def free_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run_together(commands: list[list[str]], folder: pathlib.Path, *, expect: int):
    """Run a process for each command to its end; what each had to say, on standard error."""
    paths = [folder / f"{i}.log" for i in range(len(commands))]
    processes = []
    for command, path in zip(commands, paths, strict=True):
        with path.open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [path.read_text() for path in paths]
    assert codes == [expect] * len(commands), [text[-2000:] for text in said]
    return said


def test_two_processes_of_four_devices_give_the_loss_and_gradient_of_one_process(tmp_path: pathlib.Path):
    address = free_address()
    outputs = [tmp_path / f"{i}.npz" for i in range(2)]
    commands = [[sys.executable, str(WORKER), address, "2", str(i), "4", str(outputs[i])] for i in range(2)]
    run_together(commands, tmp_path, expect=0)
    worker = runpy.run_path(str(WORKER))
    loss, gradient = worker["step_on"](worker["MeshConfig"]())  # one device
    for output in outputs:
        with np.load(output) as got:
            np.testing.assert_allclose(float(got["loss"]), loss, rtol=1e-5)
            for i, expected in enumerate(gradient):
                np.testing.assert_allclose(got[f"arr_{i}"], expected, rtol=1e-3, atol=3e-6)

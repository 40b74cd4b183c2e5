"""`train` started twice: the parameters of one process, in a checkpoint that Orbax reads, and a death that is seen."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp

from magistral_jax.policy.hf_folder import load_params

# Each process has two devices; the mesh lies over both: parameters are split across processes, rows within one.
START = """
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)
from magistral_jax.main import main
main()
"""
LONGEST = 300.0  # seconds, on a busy machine


def start_both(tiny, folder: pathlib.Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "run.folder": folder,
        "mesh.fsdp": 2,
        "mesh.sequence": 2,
        "schedule.num_steps": 1000,
        "schedule.checkpoint_every": 1,
        "distributed.coordinator": address,
        "distributed.num_processes": 2,
        "distributed.heartbeat_seconds": 20,
    }
    for process_id in range(2):
        words = tiny.flags(settings | {"distributed.process_id": process_id})
        with (folder.parent / f"{process_id}.log").open("w") as log:
            yield subprocess.Popen([sys.executable, "-c", START, "train", *words], stdout=log, stderr=log)


def wait_until(is_true: Callable[[], bool], processes: list[subprocess.Popen]):
    end = time.monotonic() + LONGEST
    while not is_true():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_two_processes_train_as_one_does_and_do_not_outlive_each_other(tiny, tmp_path: pathlib.Path):
    folder, copy = tmp_path / "run", tmp_path / "checkpoint"
    processes = list(start_both(tiny, folder))
    try:
        wait_until((folder / "checkpoints" / "1").exists, processes)
        shutil.copytree(folder / "checkpoints" / "1", copy)
        os.kill(processes[1].pid, signal.SIGKILL)
        assert processes[0].wait(timeout=60) == 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = [line for line in (tmp_path / "0.log").read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "process 1 of the trainer has died" in said[0]
    assert "--resume" in said[0]

    # One process on one device samples the same first batch, so its step is the same. Orbax alone reads the other's.
    tiny.run("train", {"run.folder": tmp_path / "alone", "schedule.num_steps": 1})
    expected = load_params(tmp_path / "alone" / "policy", tiny.config)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=place, global_shape=x.shape, dtype=x.dtype), target)
    item = ocp.args.PyTreeRestore({"params": target}, restore_args={"params": args}, partial_restore=True)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        params = checkpointer.restore(copy / "state", args=item)["params"]
    start = load_params(tiny.model(), tiny.config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), expected, start)
    assert max(jax.tree.leaves(moved)) > 5e-4
    # Adam's first step is ± the learning rate wherever there is a gradient: rounding decides its sign where it is 0.
    differing = jax.tree.map(lambda a, b: int((np.abs(np.asarray(a) - b) > 2e-5).sum()), params, expected)
    assert sum(jax.tree.leaves(differing)) <= 0.01 * sum(x.size for x in jax.tree.leaves(params))

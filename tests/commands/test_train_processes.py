"""`train` and `sft` in two processes: they do what one does, Orbax reads what they save, and a death is seen."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from magistral_jax.metrics import read_json_lines
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


def start_both(tiny, command: str, folder: pathlib.Path, settings: dict[str, Any]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = settings | {
        "run.folder": folder,
        "mesh.fsdp": 2,
        "mesh.sequence": 2,
        "distributed.coordinator": address,
        "distributed.num_processes": 2,
        "distributed.heartbeat_seconds": 20,
    }
    for process_id in range(2):
        words = tiny.flags(settings | {"distributed.process_id": process_id})
        with (folder.parent / f"{process_id}.log").open("w") as log:
            yield subprocess.Popen([sys.executable, "-c", START, command, *words], stdout=log, stderr=log)


def wait_until(is_true: Callable[[], bool], processes: list[subprocess.Popen]):
    end = time.monotonic() + LONGEST
    while not is_true():
        assert time.monotonic() < end
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def test_two_processes_train_as_one_does_and_do_not_outlive_each_other(tiny, tmp_path: pathlib.Path):
    folder, copy = tmp_path / "run", tmp_path / "checkpoint"
    endless = {"schedule.num_steps": 1000, "schedule.checkpoint_every": 1}
    processes = list(start_both(tiny, "train", folder, endless))
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


def test_two_processes_fine_tune_as_one_does(tiny, tmp_path: pathlib.Path):
    settings = {
        "policy.lora_rank": 2,
        "optimizer.learning_rate": 1e-2,
        "generation.max_new_tokens": 40,
        "sft.num_updates": 4,
        "sft.batch_size": 8,
        "sft.validation_share": 0.1,
        "sft.validate_every": 2,
        "sft.checkpoint_every": 2,
    }
    processes = list(start_both(tiny, "sft", tmp_path / "two", settings))
    try:
        codes = [process.wait(timeout=LONGEST) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], [(tmp_path / f"{i}.log").read_text()[-2000:] for i in range(2)]
    tiny.run("sft", settings | {"run.folder": tmp_path / "one"})
    one, two = (list(read_json_lines(tmp_path / name / "metrics.jsonl")) for name in ("one", "two"))
    assert [line["step"] for line in two] == [line["step"] for line in one] == [2, 4]
    for alone, together in zip(one, two, strict=True):
        for metric in ("loss", "entropy", "grad_norm", "validation_loss"):
            assert together[metric] == pytest.approx(alone[metric], rel=1e-3)
    # Four Adam updates of 0.01, merged: where a gradient is nearly 0 its sign, and so a step, is a matter of rounding.
    policies = [load_params(tmp_path / name / "policy", tiny.config) for name in ("one", "two")]
    gaps = jax.tree.map(lambda a, b: np.abs(a - b).mean(), *policies)
    assert max(jax.tree.leaves(gaps)) < 1e-4
    moved = jax.tree.map(lambda a, b: np.abs(a - b).mean(), policies[1], load_params(tiny.model(), tiny.config))
    assert moved["layers"]["attn"]["q"]["kernel"] > 1e-3

"""Weights inside one `jax.distributed` job, between two real processes with two devices each."""

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magistral_jax.publish.cross_host import check_cuts
from magistral_jax.publish.manifest import WeightsRefusedError

PROGRAM = """
import json, sys
rank, job, mine = int(sys.argv[1]), sys.argv[2], sys.argv[3]
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cross_host_transfer_socket_address", mine)
jax.config.update("jax_enable_preemption_service", False)  # else SIGTERM is ignored
jax.distributed.initialize(job, 2, rank, initialization_timeout=120)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.publish.cross_host import cross_host_copy
mesh = lambda process: Mesh(
    np.array([d for d in jax.devices() if d.process_index == process]), ("tensor",), axis_types=(AxisType.Auto,)
)
specs = {"a": P("tensor"), "b": P()}
sources, targets = ({k: NamedSharding(mesh(p), spec) for k, spec in specs.items()} for p in (0, 1))
shapes = {"a": (64, 3), "b": (5,)}
for version in range(2):
    if rank == 0:
        make = lambda k: np.random.default_rng(version).normal(size=shapes[k]).astype(np.float32)
        params = {k: jax.device_put(make(k), sources[k]) for k in specs}
    else:
        params = {k: jax.ShapeDtypeStruct(shapes[k], jnp.float32) for k in specs}
    moved = jax.block_until_ready(cross_host_copy(params, sources, targets))
    held = params if rank == 0 else moved
    print(json.dumps({k: fingerprint(held[k]) for k in specs}), flush=True)
jax.distributed.shutdown()  # waits for the other: what is on its way must arrive
"""


def free_address() -> str:
    """Below the ports that the system hands out by itself: between now and its use nobody takes it by chance."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as server,
        ):
            return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_other_process_holds_what_the_trainer_sent():
    job = free_address()
    commands = [[sys.executable, "-c", PROGRAM, str(rank), job, free_address()] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        (sent, sent_errors), (held, held_errors) = (process.communicate(timeout=180.0) for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], sent_errors + held_errors
    read = lambda text: [json.loads(line) for line in text.splitlines() if line.startswith("{")]  # Gloo speaks, too
    versions = read(sent)
    assert len(versions) == 2
    assert versions[0] != versions[1]
    assert read(held) == versions


def shardings(first: int, spec: PartitionSpec) -> Any:
    mesh = Mesh(np.array(jax.devices()[first : first + 2]), ("tensor",), axis_types=(AxisType.Auto,))
    return {"w": NamedSharding(mesh, spec)}


def test_another_cut_is_refused_before_anything_is_sent():
    params = {"w": jax.ShapeDtypeStruct((4, 6), jnp.float32)}
    whole, rows, columns = PartitionSpec(), PartitionSpec("tensor"), PartitionSpec(None, "tensor")
    check_cuts(params, shardings(0, rows), shardings(2, rows))
    check_cuts(params, shardings(0, whole), shardings(2, whole))
    sentence = "leaf ['w'] is cut into [((0, 2), (0, 6)), ((2, 4), (0, 6))] at the trainer, into [((0, 4), (0, 3)), "
    with pytest.raises(WeightsRefusedError, match=re.escape(sentence)):
        check_cuts(params, shardings(0, rows), shardings(2, columns))

"""Weights inside one `jax.distributed` job, between two real processes with two devices each."""

import contextlib
import json
import pathlib
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

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "publish.md"


def free_address() -> str:
    """Below the ports that the system hands out by itself: between now and its use nobody takes it by chance."""
    while True:
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", random.randrange(20_000, 32_000))) as server,
        ):
            return f"127.0.0.1:{server.getsockname()[1]}"


def test_the_documented_program_samples_in_one_process_from_what_the_other_has_sent(tmp_path: pathlib.Path):
    (program,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    script, job = tmp_path / "both_roles.py", free_address()
    script.write_text(program)
    commands = [[sys.executable, str(script), job, str(rank), free_address()] for rank in range(2)]
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
    assert [version["version"] for version in versions] == [0, 1]
    assert versions[0]["fingerprint"] != versions[1]["fingerprint"]
    assert read(held) == versions
    sampled = re.findall(r"^sampled \[.+\] by version \[(\d)", held, re.MULTILINE)
    assert sampled == ["0", "1"]


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

"""The soak benchmark at a size for every day; what its figures mean stands in its own text."""

import json
import os
import pathlib
import subprocess
import sys

SOAK = pathlib.Path(__file__).parents[2] / "benchmarks" / "soak_verify.py"


def test_nothing_is_lost_or_doubled_in_a_storm():
    command = [sys.executable, str(SOAK), "--num-items=300", "--kill-every=1.5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOAK.parents[1]), *sys.path])}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["lost"], found["doubled"], found["differing"], found["left_running"]) == (0, 0, 0, 0)
    assert sum(found["kills"].values()) >= 2
    assert found["hit_twice"] <= sum(found["kills"].values()) / 2
    assert {"correct", "wrong", "timeout", "sandbox_error"} <= found["verdicts"].keys()
    for first, last in (found["memory"]["storm"][name] for name in ("parent_mib", "zygote_mib", "open_files")):
        assert last <= 1.5 * first

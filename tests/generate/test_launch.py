"""What a generator's process is told of the machine."""

import os

import pytest

from magistral_jax.generate.launch import worker_environment


@pytest.mark.parametrize(
    ("num_cores", "num_generators", "threads"), [(8, 1, "8"), (8, 2, "4"), (8, 3, "2"), (2, 2, "1"), (2, 5, "1")]
)
def test_generators_share_the_cores(monkeypatch: pytest.MonkeyPatch, num_cores: int, num_generators: int, threads: str):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    assert worker_environment(0, num_generators, "") == {"PJRT_NPROC": threads}


def test_what_the_user_says_of_the_threads_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PJRT_NPROC", "5")
    assert worker_environment(0, 4, "")["PJRT_NPROC"] == "5"


def test_devices_are_dealt_out_in_turn():
    dealt = [worker_environment(number, 3, "2, 3")["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert dealt == ["2", "3", "2"]

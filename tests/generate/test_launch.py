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


def test_an_engine_on_several_devices_gets_as_many(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    dealt = [worker_environment(number, 2, "0,1,2,3", 2) for number in range(2)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in dealt] == ["0,1", "2,3"]
    assert {environment["JAX_NUM_CPU_DEVICES"] for environment in dealt} == {"2"}
    # A CPU that the user has split in the older way is left as it is: jax refuses both at once.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert "JAX_NUM_CPU_DEVICES" not in worker_environment(0, 2, "", 2)

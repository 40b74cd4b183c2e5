"""Where the engine of a run lies, beside its trainer; and what of the devices a resume may change."""

import dataclasses
import pathlib
from typing import Any

import jax
import pytest

from magistral_jax.commands import setup
from magistral_jax.commands.setup import load_model, make_batcher, open_run, place_engine
from magistral_jax.config import Config, dump, load
from magistral_jax.policy import paged_attention
from magistral_jax.policy.config import MeshConfig
from magistral_jax.policy.sharding import make_mesh
from magistral_jax.records import MagistralError


@pytest.fixture
def config(tiny: Any) -> Config:
    return load(tiny.flags({}))


def with_tensor(config: Config, tensor: int) -> Config:
    return dataclasses.replace(config, generation=dataclasses.replace(config.generation, tensor=tensor))


@pytest.mark.parametrize(
    ("trainer", "tensor", "chosen"),
    [
        (MeshConfig(), 1, [1]),
        (MeshConfig(fsdp=2, tensor=2), 1, [4]),
        (MeshConfig(fsdp=2, tensor=2), 2, [4, 5]),
        (MeshConfig(data=7), 2, [0, 1]),
    ],
)
def test_the_engine_takes_devices_that_the_trainer_leaves_free(
    config: Config, capsys: pytest.CaptureFixture[str], trainer: MeshConfig, tensor: int, chosen: list[int]
):
    config, mesh = with_tensor(config, tensor), make_mesh(trainer)
    batcher = make_batcher(config, load_model(config), mesh)
    assert batcher.reader.mesh is not None
    assert [device.id for device in batcher.reader.mesh.devices.flat] == chosen
    said = capsys.readouterr().err
    assert f"on {', '.join(str(jax.devices()[number]) for number in chosen)}" in said
    assert ("shared with the trainer" in said) == (0 in chosen)


def test_one_device_that_nobody_leaves_free_is_shared_and_needs_no_mesh(
    config: Config, capsys: pytest.CaptureFixture[str]
):
    model = load_model(config)
    assert place_engine(config, model, make_mesh(MeshConfig(fsdp=4, tensor=2))) == (None, None)
    assert place_engine(config, model) == (None, None)
    batcher = make_batcher(config, model, make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert batcher.reader.mesh is None
    assert f"on {jax.devices()[0]}, shared with the trainer" in capsys.readouterr().err


def test_a_cpu_without_our_kernel_says_why(
    config: Config, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    narrow = dataclasses.replace(config, generation=dataclasses.replace(config.generation, kv_dtype="int8"))
    make_batcher(narrow, load_model(narrow))
    assert "read by `xla` (generation.attention = auto)" in (said := capsys.readouterr().err)
    assert "; `native` is not used, as its kernel" in said
    for module in (setup, paged_attention):
        monkeypatch.setattr(module, "why_no_native_pages", lambda *_: "there is no C++ compiler `c++`")
    make_batcher(config, load_model(config))
    assert "; `native` is not used, as there is no C++ compiler `c++`" in capsys.readouterr().err


def test_a_resume_may_have_other_devices_and_no_other_numbers(tiny: Any, tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(dump(load(tiny.flags({"run.folder": tmp_path}))))
    resume = lambda settings: open_run(load(tiny.flags({"run.folder": tmp_path} | settings, "--resume")))
    assert resume({"generation.tensor": 2, "mesh.fsdp": 4, "generation.where": "process"}) == tmp_path
    with pytest.raises(MagistralError, match=r"started with other settings of generation\.kv_dtype\.$"):
        resume({"generation.kv_dtype": "bfloat16", "generation.tensor": 2})

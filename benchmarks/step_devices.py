"""The train step on 1, 2, 4 and 8 simulated devices: what of it is cut over them, and what is not.

    python benchmarks/step_devices.py --axes fsdp sequence tensor

One batch, one microbatch, on ever more devices of one axis of the mesh. Bytes are those of one device: of parameters,
optimizer state and batch by their shardings, of temporaries as the compiler plans them. `whole` is what of the state
every device has a full copy of. If all were cut evenly, `at best` of n devices would be the first row's sum over n.
Seconds are those of all threads together: simulated devices share the cores, so at best they stay as they are.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import machine
import optax
import tunix_peer
import tyro
from jax.sharding import Mesh
from rich.table import Table

from magistral_jax.policy.config import MeshConfig, ModelConfig, PolicyConfig
from magistral_jax.policy.sharding import make_mesh
from magistral_jax.policy.transformer import init_params
from magistral_jax.pytrees import Batch, TrainState
from magistral_jax.train.config import LossConfig
from magistral_jax.train.footprint import abstract_batch, abstract_state, bytes_of
from magistral_jax.train.step import grpo_objective, init_sharded, make_train_step

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Args(tunix_peer.Sizes):
    """Sizes; the defaults are those of the documented figures."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    axes: tuple[Literal["data", "fsdp", "sequence", "tensor"], ...] = ("fsdp", "sequence", "tensor", "data")
    rows: int = 8
    """Rows of the microbatch, over all devices."""
    row_tokens: int = 256
    """Tokens of a row, over all devices."""
    logprob_chunk: int = 256
    """Tokens of logits at one time, on each device."""
    repeats: int = 5
    """Timed steps, after one more; the fastest counts."""


def main(args: Args) -> None:
    """Measure and print."""
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    rows = []
    for axis in args.axes:
        for count in args.devices:
            rows.append({"axis": axis, "devices": count} | measure(args, MeshConfig(**{axis: count})))
            machine.console.print(rows[-1])
    show(args, rows)
    setting = machine.setting(machine.gemm_peak())
    print(json.dumps({"benchmark": "step_devices", **setting, "sizes": dataclasses.asdict(args), "rows": rows}))


def measure(args: Args, config: MeshConfig) -> dict[str, float]:
    """MiB of one device, and seconds of a step."""
    model, mesh, optimizer = args.model(), make_mesh(config), optax.adamw(1e-5)
    policy = PolicyConfig(logprob_chunk=args.logprob_chunk)
    step = make_train_step(model, policy, grpo_objective(LossConfig()), optimizer, mesh=mesh)
    state = abstract_state(model, mesh, optimizer, jnp.dtype("float32"))
    batch = abstract_batch(mesh, rows=args.rows, row_tokens=args.row_tokens)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = {"compile_s": round(time.perf_counter() - began, 1)}
    planned: Any = compiled.memory_analysis()
    num_bytes = {
        "parameters": bytes_of(state.params),
        "optimizer": bytes_of(state.opt_state),
        "batch": bytes_of(batch),
        "temporaries": planned.temp_size_in_bytes,
        "whole": bytes_of([leaf for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]),
    }
    seconds |= time_steps(args.repeats, compiled, make_state(model, mesh, optimizer), make_batch(args, batch))
    return {name: round(value / _MIB, 2) for name, value in num_bytes.items()} | seconds


def make_state(model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation) -> TrainState:
    """A state on the mesh."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, mesh, optimizer, jnp.dtype("float32")).params)
    params = jax.jit(init_params, static_argnums=0, out_shardings=shardings)(model, jax.random.key(0))
    return init_sharded(params, model, mesh, optimizer)


def make_batch(args: Args, shapes: Batch) -> Batch:
    """Every row one sequence that fills it, placed as `shapes` are."""
    place = jnp.broadcast_to(jnp.arange(args.row_tokens), (1, args.rows, args.row_tokens))
    ones = jnp.ones(place.shape)
    is_trained = place > 0
    batch = Batch(
        tokens=jax.random.randint(jax.random.key(1), place.shape, 0, args.vocab),
        positions=place,
        segment_ids=ones.astype(jnp.int32),
        loss_mask=is_trained,
        behavior_logprob=-jnp.log(args.vocab) * ones,
        advantage=ones,
        loss_weight=is_trained.astype(jnp.float32),
        staleness=jnp.zeros_like(place),
    )
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, shapes)


def time_steps(repeats: int, step: Callable[..., Any], state: TrainState, batch: Batch) -> dict[str, float]:
    """Least seconds of a step."""

    def run() -> None:
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    best = machine.time_side_by_side({"step": run}, repeats)["step"]
    return {"wall_s": round(best.wall, 3), "cpu_s": round(best.cpu, 3)}


def show(args: Args, rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title=f"train step, {args.rows} rows of {args.row_tokens} tokens: MiB of each device, seconds of all")
    parts = ("parameters", "optimizer", "batch", "temporaries")
    columns = ("axis", "", "param", "optim", "batch", "temp", "sum", "at best", "whole", "wall s", "cpu s")
    for column in columns:
        table.add_column(column, justify="left" if column == "axis" else "right")
    for row in rows:
        total = lambda found: sum(found[part] for part in parts)
        alone = next(other for other in rows if other["axis"] == row["axis"])
        best = total(alone) * alone["devices"] / row["devices"]
        sizes = [row[part] for part in parts] + [total(row), best, row["whole"]]
        seconds = [row[name] for name in ("wall_s", "cpu_s")]
        cells = [f"{x:,.1f}" for x in sizes] + [f"{x:.2f}" for x in seconds]
        table.add_row(row["axis"], str(row["devices"]), *cells)
    machine.console.print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

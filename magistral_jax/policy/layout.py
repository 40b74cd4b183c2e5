"""Who holds what on a mesh: the one table of axis names, and what a device does with its part.

Four mesh axes. `data` holds copies of the parameters. `fsdp` and `sequence` cut the parameters, and each of their
devices has tokens of its own: `fsdp` (like `data`) other rows, `sequence` another stretch of the same rows. `tensor`
cuts heads, feed-forward width and vocabulary, and its devices have the same tokens.

Over the first three the training step is written as one device sees it (`jax.shard_map`), so that its collectives are
those written here: a layer's weights are gathered when they are needed, their gradients come back reduced and
scattered, attention trades tokens for heads. `tensor` is left to the compiler, but for attention.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

MESH_AXES = ("data", "fsdp", "sequence", "tensor")
TOKEN_AXES = ("data", "fsdp", "sequence")
"""Axes whose devices have tokens of their own."""

RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "embed": ("fsdp", "sequence"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    # activations and batches
    "rows": ("data", "fsdp"),
    "tokens": ("sequence",),
}
"""Mesh axes of each logical axis; what is not named here stays whole."""

# [B T H E], [B T K E], [B T K E], whatever else it needs -> [B T H E]
Mix = Callable[..., Array]
Scores = tuple[Float[Array, "B T"], Float[Array, "B T"]]


def mesh_spec(names: Iterable[str | None], sizes: Sequence[int], mesh: Mesh) -> P:
    """The placement of one array; mesh axes that do not divide an axis evenly, or that the mesh lacks, are left out."""

    def axes(name: str | None, size: int) -> tuple[str, ...] | str | None:
        chosen: tuple[str, ...] = ()
        for axis in RULES.get(name or "", ()):
            num = mesh.shape.get(axis, 1)
            if num > 1 and size % (num * math.prod(mesh.shape[a] for a in chosen)) == 0:
                chosen += (axis,)
        return chosen if len(chosen) > 1 else (chosen[0] if chosen else None)

    placed = [axes(name, size) for name, size in zip(names, sizes, strict=True)]
    while placed and placed[-1] is None:  # as compiled programs write it: else their results look like another layout
        placed.pop()
    return P(*placed)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What one device needs to know to compute with its part of the parameters and tokens, inside `shard_map`."""

    mesh: Mesh
    specs: Any
    """A PartitionSpec over `TOKEN_AXES` for each parameter."""

    def gather(self, params: Any, specs: Any) -> Any:
        """Whole parameters from everybody's parts; in the backward pass, everybody's part of the summed gradient."""

        def whole(leaf: Array, spec: P) -> Array:
            for dim, axes in enumerate(spec):
                if axes is not None:
                    leaf = _all_gather(leaf, axes, dim)
            return leaf

        return jax.tree.map(whole, params, specs)

    def gather_layer(self, layer: Any) -> Any:
        """The same for one layer of the stacked ones."""
        is_spec = lambda leaf: isinstance(leaf, P)
        return self.gather(layer, jax.tree.map(lambda spec: P(*spec[1:]), self.specs["layers"], is_leaf=is_spec))

    def sum_gradients(self, gradients: Any) -> Any:
        """Add up what `gather` has not: over the axes along which a parameter has copies."""

        def total(leaf: Array, spec: P) -> Array:
            cut = {axis for axes in spec if axes for axis in ((axes,) if isinstance(axes, str) else axes)}
            copies = tuple(axis for axis in TOKEN_AXES if axis not in cut and self.mesh.shape[axis] > 1)
            return jax.lax.psum(leaf, copies) if copies else leaf

        return jax.tree.map(total, gradients, {name: self.specs[name] for name in gradients})

    def whole_rows(self, x: Shaped[Array, "B T_part"]) -> Shaped[Array, "B T"]:
        """Rows put together from their stretches."""
        return jax.lax.all_gather(x, "sequence", axis=1, tiled=True) if self.mesh.shape["sequence"] > 1 else x

    def attend(self, mix: Mix, q: Array, k: Array, v: Array, *context: Any) -> Array:
        """`mix` over whole rows, each device of `tensor` and `sequence` with its share of the heads.

        Between the projections a device of `sequence` holds all heads of its tokens; for the mixing they trade, so that
        it holds all tokens of some heads. Where there are fewer key-value heads than devices, they are repeated.

        Args:
          mix: Attention of whole rows.
          q: [B, T/sequence, H, E], as are `k` and `v` with K heads.
          k: Keys.
          v: Values.
          *context: What else `mix` takes: trees of arrays of whole rows, the same for all heads.
        """
        num_tensor, num_sequence = self.mesh.shape["tensor"], self.mesh.shape["sequence"]

        def share(q: Array, k: Array, v: Array, *context: Any) -> Array:
            if num_sequence == 1:
                return mix(q, k, v, *context)
            k, v = (_repeat_heads(x, num_sequence) for x in (k, v))
            trade = lambda x: jax.lax.all_to_all(x, "sequence", split_axis=2, concat_axis=1, tiled=True)
            mixed = mix(trade(q), trade(k), trade(v), *context)
            return jax.lax.all_to_all(mixed, "sequence", split_axis=1, concat_axis=2, tiled=True)

        if num_tensor == 1:
            return share(q, k, v, *context)
        heads = P(None, None, "tensor", None)
        specs = (heads,) * 3 + (P(),) * len(context)
        split = jax.shard_map(share, in_specs=specs, out_specs=heads, axis_names={"tensor"}, check_vma=False)
        return split(q, _repeat_heads(k, num_tensor), _repeat_heads(v, num_tensor), *context)

    def score(
        self,
        score: Callable[[Float[Array, "B N D"], Int[Array, "B N"]], Scores],
        hidden: Float[Array, "B T D"],
        tokens: Int[Array, "B T"],
    ) -> Scores:
        """`score(hidden, tokens)`, which predicts each token from the state before it, on this stretch of the rows.

        The first token of the next stretch is scored here, where the state before it is, and the score handed on.
        """
        num = self.mesh.shape["sequence"]
        if num == 1:
            return score(hidden, tokens)
        backward = [((i + 1) % num, i) for i in range(num)]
        forward = [(i, (i + 1) % num) for i in range(num)]
        following = jax.lax.ppermute(tokens[:, :1], "sequence", backward)
        scores = score(jnp.pad(hidden, ((0, 0), (0, 1), (0, 0))), jnp.concatenate([tokens, following], axis=1))

        def align(x: Array) -> Array:
            return jnp.concatenate([jax.lax.ppermute(x[:, -1:], "sequence", forward), x[:, 1:-1]], axis=1)

        return align(scores[0]), align(scores[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _all_gather(x: Shaped[Array, "*part"], axes: str | tuple[str, ...], dim: int) -> Shaped[Array, "*whole"]:
    """Parts put together along one axis; gradients are summed in float32, whatever the precision of the computation."""
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True)


def _gather_forward(x: Array, axes: str | tuple[str, ...], dim: int) -> tuple[Array, None]:
    return _all_gather(x, axes, dim), None


def _gather_backward(axes: str | tuple[str, ...], dim: int, _: None, gradient: Array) -> tuple[Array]:
    total = jax.lax.psum_scatter(gradient.astype(jnp.float32), axes, scatter_dimension=dim, tiled=True)
    return (total.astype(gradient.dtype),)


_all_gather.defvjp(_gather_forward, _gather_backward)


def _repeat_heads(x: Float[Array, "B T K E"], num_devices: int) -> Float[Array, "B T N E"]:
    """Key-value heads, each as often as it takes for every device to have one."""
    return jnp.repeat(x, num_devices // math.gcd(x.shape[2], num_devices), axis=2)

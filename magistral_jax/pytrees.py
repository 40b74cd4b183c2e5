"""Records that live on devices: Batch, TrainState, WeightedSum, and the decorator that makes them pytrees."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls: type[T]) -> type[T]:
    """Freeze `cls` as a dataclass and register it as a pytree whose unflatten skips `__init__`.

    `jax.tree_util.register_dataclass` and `flax.struct` call `__init__` on unflatten; under a shape-checking import
    hook that breaks every `tree.map` to something that is not an array (specs, shapes, shardings).

    A `static_field` is no leaf but part of the structure: hashable, and known when tracing.
    """
    data_cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(data_cls)  # pyright: ignore[reportArgumentType]
    names = tuple(f.name for f in fields if not f.metadata.get("static"))
    static_names = tuple(f.name for f in fields if f.metadata.get("static"))
    static_of = lambda record: tuple(getattr(record, n) for n in static_names)

    def flatten_with_keys(record: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        return tuple((jax.tree_util.GetAttrKey(n), getattr(record, n)) for n in names), static_of(record)

    def flatten(record: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(getattr(record, n) for n in names), static_of(record)

    def unflatten(static: tuple[Any, ...], children: Any) -> T:
        record = object.__new__(data_cls)
        for name, child in zip(names + static_names, (*children, *static), strict=True):
            object.__setattr__(record, name, child)
        return record

    jax.tree_util.register_pytree_with_keys(data_cls, flatten_with_keys, unflatten, flatten)
    return data_cls


def static_field(default: Any) -> Any:
    """A field of a pytree dataclass that is part of its structure."""
    return dataclasses.field(default=default, metadata={"static": True})


@pytree_dataclass
class WeightedSum:
    """A sum with its weight. Sums add up over microbatches and hosts; the one division comes last."""

    total: Float[Array, ""]
    weight: Float[Array, ""]

    def __add__(self, other: "WeightedSum") -> "WeightedSum":
        """Sum of both parts."""
        return WeightedSum(self.total + other.total, self.weight + other.weight)

    def mean(self) -> Float[Array, ""]:
        """`total / weight`, and 0 where there is no weight."""
        return jax.numpy.where(self.weight == 0, 0.0, self.total / jax.numpy.where(self.weight == 0, 1.0, self.weight))


@pytree_dataclass
class Batch:
    """One minibatch, packed into rows: M microbatches of B rows of T tokens.

    `segment_ids` is 0 on padding and counts the sequences of a row from 1; `positions` restart at 0 in each.
    Position t holds what concerns the *prediction of* `tokens[t]` from its predecessor: `loss_mask[t]` is True where
    `tokens[t]` was sampled by the policy, the stop token included, and the first token of a segment is never trained.
    `loss_weight` is a token's share in the loss, 0 where masked: the loss is Σ weight · token loss ÷ Σ weight.
    `staleness` counts the publishes between the weights that sampled a token and those being trained.
    """

    tokens: Int[Array, "M B T"]
    positions: Int[Array, "M B T"]
    segment_ids: Int[Array, "M B T"]
    loss_mask: Bool[Array, "M B T"]
    behavior_logprob: Float[Array, "M B T"]
    advantage: Float[Array, "M B T"]
    loss_weight: Float[Array, "M B T"]
    staleness: Int[Array, "M B T"]


@pytree_dataclass
class TrainState:
    """All that an update changes: parameters, optimizer state, and the number of updates done."""

    params: Any
    opt_state: Any
    num_updates: Int[Array, ""]

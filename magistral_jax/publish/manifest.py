"""What a set of weights is as bytes: where each leaf lies, its shape and type, and a checksum of what was written.

Whoever receives weights knows from its own model what must come; what differs is refused, and the leaf is named.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_ALIGNMENT = 64  # bytes; what XLA wants of a buffer


class WeightsRefusedError(Exception):
    """Weights that were not taken: another layout, or other bytes than were sent."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of the parameters in a block of bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    checksum: int = 0  # of its bytes, or of its elements: the plane says how

    @property
    def num_bytes(self) -> int:
        """Bytes without the gap that follows."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def layout(self) -> str:
        """Type and shape, for messages."""
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A version of the weights, leaf by leaf."""

    version: int
    leaves: tuple[Leaf, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes up to the end of the last leaf."""
        return num_bytes(self.leaves)

    def to_fields(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"version": self.version, "leaves": [list(dataclasses.astuple(leaf)) for leaf in self.leaves]}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Manifest":
        """The inverse of `to_fields`."""
        leaves = (Leaf(path, tuple(shape), dtype, *rest) for path, shape, dtype, *rest in fields["leaves"])
        return cls(fields["version"], tuple(leaves))


def lay_out(params: Any) -> tuple[Leaf, ...]:
    """Places for all leaves of a tree of arrays, or of their shapes, one after the other."""
    leaves: list[Leaf] = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        offset = -(-num_bytes(leaves) // _ALIGNMENT) * _ALIGNMENT
        leaves.append(Leaf(jax.tree_util.keystr(path), tuple(leaf.shape), str(leaf.dtype), offset))
    return tuple(leaves)


def num_bytes(leaves: Sequence[Leaf]) -> int:
    """Bytes up to the end of the last leaf."""
    return leaves[-1].offset + leaves[-1].num_bytes if leaves else 0


def check_layout(manifest: Manifest, expected: Sequence[Leaf]) -> None:
    """Compare what was sent with what the receiver's model has.

    Raises:
      WeightsRefusedError: Names the first leaf that is missing, too many, or of another shape, type or place.
    """
    sent = {leaf.path: leaf for leaf in manifest.leaves}
    wanted = {leaf.path: leaf for leaf in expected}
    where = f"weights of version {manifest.version}"
    for path, leaf in wanted.items():
        if path not in sent:
            raise WeightsRefusedError(f"{where}: leaf {path} is missing, expected {leaf.layout}")
        if sent[path].layout != leaf.layout:
            raise WeightsRefusedError(f"{where}: leaf {path} is {sent[path].layout}, expected {leaf.layout}")
        if sent[path].offset != leaf.offset:
            raise WeightsRefusedError(f"{where}: leaf {path} lies at {sent[path].offset}, expected {leaf.offset}")
    for path in sent:
        if path not in wanted:
            raise WeightsRefusedError(f"{where}: leaf {path} is not part of the generator's model")

"""How weights come from the trainer's process to another one: the contract that every data plane meets.

    write (once a version) → hold → order (once a receiver) ⇢ control channel ⇢ receive → release

The order goes over the control channel, with the manifest; the bytes go the plane's own way. A receiver checks the
layout before it takes anything, the content before it hands anything on, and has a deadline of its own: it answers
with parameters or with one sentence, and never hangs.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params, unstack
from magistral_jax.publish.manifest import Manifest

_LEAST_SPEED = 1e8  # bytes a second; what is slower than that is taken for stuck


@dataclasses.dataclass(frozen=True)
class Published:
    """A version that may be sent. What `content` is, only its plane knows."""

    manifest: Manifest
    content: Any


@dataclasses.dataclass(frozen=True)
class Order:
    """What one receiver needs to fetch a version, beside the manifest; good for this receiver, and once."""

    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    descriptor: int | None = None
    """Of memory to be mapped; the order only lends it."""
    payload: Any = None
    """Bytes that follow the order on the control channel."""


@dataclasses.dataclass(frozen=True)
class Delivery:
    """An order as it arrived."""

    manifest: Manifest
    fields: Mapping[str, Any]
    descriptor: int | None
    """The receiver's own, which it closes."""
    payload_size: int
    read_payload: Callable[[memoryview], None]
    """Fills a buffer of `payload_size` bytes; to be called once, unless the size is 0."""
    peer: str
    """Who sent it, for messages."""


@runtime_checkable
class Sender(Protocol):
    """The trainer's end of a plane. Any thread may call it."""

    def write(self, params: Any, version: int) -> None:
        """Make a version ready to be sent; nobody is waited for.

        Args:
          params: In the layout of decoding. They are read until a newer version is written, and not to be donated.
          version: Above all before it.

        Raises:
          MagistralError: There is no room for it.
        """
        ...

    def hold(self) -> Published:
        """The newest version, which stays as it is until it is released."""
        ...

    def order(self, published: Published) -> Order:
        """What to tell one receiver."""
        ...

    def release(self, published: Published, *, was_taken: bool) -> None:
        """Say that a receiver is done; it may have refused or died, and then not all was fetched."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@runtime_checkable
class Receiver(Protocol):
    """A generator's end of a plane."""

    def receive(self, delivery: Delivery) -> Any:
        """Parameters on the device, in memory of their own.

        Raises:
          WeightsRefusedError: They did not come in time, or are not what was announced, or not what is wanted.
          OSError: The control channel itself failed.
        """
        ...


def wanted_params(model: ModelConfig, dtype: jnp.dtype, shardings: Any = None) -> Any:
    """What a generator's model consists of: a tree of `jax.ShapeDtypeStruct`.

    Args:
      model: Shape of the model.
      dtype: Precision in which the generator computes.
      shardings: Tree of the same structure that says where each array goes; None is the first device.
    """
    shapes = jax.eval_shape(lambda: unstack(init_params(model, jax.random.key(0)), model))
    want = lambda leaf, sharding=None: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)
    return jax.tree.map(want, shapes) if shardings is None else jax.tree.map(want, shapes, shardings)


def allowance(deadline: float, num_bytes: int) -> float:
    """Seconds in which so many bytes have to come: `deadline`, and their time at 100 MB/s."""
    return deadline + num_bytes / _LEAST_SPEED

"""The data planes by name. The choice is explicit in the configuration; `auto` takes what always works.

| plane | bytes go | between |
| --- | --- | --- |
| `shared_memory` | once into memory that all generators map | processes of one host |
| `tcp` | behind the manifest, on each generator's own connection | any hosts |
| `transfer` | from device to device, by `jax.experimental.transfer` | independent jobs, on any hosts |

A fourth, inside one `jax.distributed` job, is `cross_host`: its ends fail together, so no fleet is built on it.
"""

from typing import Any

from magistral_jax.publish.plane import Receiver, Sender
from magistral_jax.publish.shared_memory import SharedMemoryReader, SharedWeights
from magistral_jax.publish.tcp import StreamedWeights, StreamReader
from magistral_jax.publish.transfer import TransferReader, TransferWeights


def choose_plane(plane: str, where: str) -> str:
    """The plane that a setting means.

    Args:
      plane: `auto`, or a name.
      where: Where the generators are, as in `generation.where`.
    """
    if plane != "auto":
        return plane
    return "tcp" if where == "remote" else "shared_memory"


def make_sender(plane: str, host: str = "127.0.0.1") -> Sender:
    """The trainer's end.

    Args:
      plane: A name.
      host: Address of this host at which generators reach it.

    Raises:
      MagistralError: The system does not have what the plane needs.
    """
    match plane:
        case "shared_memory":
            return SharedWeights()
        case "tcp":
            return StreamedWeights()
        case "transfer":
            return TransferWeights(host)
    raise ValueError(f"no such plane: {plane}")


def make_receiver(plane: str, wanted: Any, deadline: float) -> Receiver:
    """A generator's end.

    Args:
      plane: A name.
      wanted: Tree of `jax.ShapeDtypeStruct`: the generator's own parameters, and where they go.
      deadline: Seconds for which nothing may come.
    """
    match plane:
        case "shared_memory":
            return SharedMemoryReader(wanted)
        case "tcp":
            return StreamReader(wanted)
        case "transfer":
            return TransferReader(wanted, deadline)
    raise ValueError(f"no such plane: {plane}")

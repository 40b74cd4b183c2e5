"""Programs over several devices are enqueued one at a time, from whichever thread they come.

A device runs programs in the order in which it got them, and a collective waits for all devices of its program. Where
two threads enqueue at the same time, one device may get the trainer's step first and another the engine's block: each
waits for the other, for ever. With one turn after the other there is one order everywhere, as with a single thread. A
turn is as long as the call, which returns long before its program has run.
"""

import contextlib
import threading

from jax.sharding import Mesh

_TURN = threading.RLock()


def turn(*meshes: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """The turn to enqueue programs on these meshes; of those on a single device there is nothing to wait for."""
    return _TURN if any(mesh is not None and mesh.size > 1 for mesh in meshes) else contextlib.nullcontext()

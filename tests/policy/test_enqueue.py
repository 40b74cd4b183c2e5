"""Turns of enqueueing: two threads with programs over several devices never enqueue at the same time."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from magistral_jax.policy.enqueue import turn

SOON = 60.0  # seconds


def mesh_of(num_devices: int):
    return Mesh(np.array(jax.devices()[:num_devices]), ("tensor",), axis_types=(AxisType.Auto,))


def enter(*meshes: Mesh | None):
    """A thread that takes a turn, and what is set once it has it."""
    has_turn = threading.Event()

    def run():
        with turn(*meshes):
            has_turn.set()

    threading.Thread(target=run, daemon=True).start()
    return has_turn


@pytest.mark.parametrize("meshes", [(mesh_of(2),), (mesh_of(1), mesh_of(4)), (None, mesh_of(2))])
def test_who_has_several_devices_waits_for_its_turn(meshes: tuple[Mesh | None, ...]):
    with turn(mesh_of(8)), turn(mesh_of(2)):  # a turn within a turn is the same one
        waiting = enter(*meshes)
        assert not waiting.wait(0.2)
    assert waiting.wait(SOON)


@pytest.mark.parametrize("meshes", [(), (None,), (mesh_of(1), None)])
def test_a_single_device_never_waits(meshes: tuple[Mesh | None, ...]):
    with turn(mesh_of(8)):
        assert enter(*meshes).wait(SOON)

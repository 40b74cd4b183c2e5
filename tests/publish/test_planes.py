"""What every data plane promises, both ends in one process; `tests/generate/test_plane_faults.py` kills real ones."""

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params, unstack
from magistral_jax.publish.manifest import Manifest, WeightsRefusedError
from magistral_jax.publish.plane import Delivery, Order, Receiver, Sender, allowance, wanted_params
from magistral_jax.publish.planes import choose_plane, make_receiver, make_sender
from magistral_jax.publish.transfer import TransferWeights

MODEL = ModelConfig(vocab_size=13, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=8)
PLANES = ("shared_memory", "tcp", "transfer")


def make_params(seed: int, model: ModelConfig = MODEL) -> Any:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: unstack(init_params(model, jax.random.key(0)), model))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def deliver(manifest: Manifest, order: Order) -> Delivery:
    """What a control channel makes of an order."""

    def read_payload(buffer: memoryview) -> None:
        buffer[:] = order.payload

    descriptor = None if order.descriptor is None else os.dup(order.descriptor)
    size = 0 if order.payload is None else len(order.payload)
    fields = json.loads(json.dumps(dict(order.fields)))
    return Delivery(manifest, fields, descriptor, size, read_payload, "the trainer")


def spoil(plane: str, sender: Sender) -> None:
    """Change one bit of the newest version, behind its manifest's back."""
    published = sender.hold()
    if plane == "transfer":
        published.content[0] = published.content[0].at[0].add(1e-3)
    else:
        published.content.memory[3] ^= 1
    sender.release(published, was_taken=False)


@pytest.fixture(params=PLANES)
def plane(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def sender(plane: str) -> Iterator[Sender]:
    sender = make_sender(plane)
    yield sender
    sender.close()


@pytest.fixture
def receiver(plane: str) -> Receiver:
    return make_receiver(plane, wanted_params(MODEL, jnp.dtype("float32")), 5.0)


def fetch(sender: Sender, receiver: Receiver) -> Any:
    published = sender.hold()
    params = None
    try:
        params = receiver.receive(deliver(published.manifest, sender.order(published)))
    finally:
        sender.release(published, was_taken=params is not None)
    return params


def test_each_version_arrives_as_it_was_written(sender: Sender, receiver: Receiver):
    for version in range(3):
        sender.write(make_params(version), version)
        jax.tree.map(np.testing.assert_array_equal, fetch(sender, receiver), make_params(version))


def test_several_receivers_fetch_one_version(plane: str, sender: Sender):
    sender.write(make_params(0), 0)
    for _ in range(3):
        receiver = make_receiver(plane, wanted_params(MODEL, jnp.dtype("float32")), 5.0)
        jax.tree.map(np.testing.assert_array_equal, fetch(sender, receiver), make_params(0))


def test_what_is_held_stays_while_newer_versions_are_written(sender: Sender, receiver: Receiver):
    sender.write(make_params(0), 0)
    published = sender.hold()
    for version in range(1, 4):
        sender.write(make_params(version), version)
    found = receiver.receive(deliver(published.manifest, sender.order(published)))
    jax.tree.map(np.testing.assert_array_equal, found, make_params(0))
    sender.release(published, was_taken=True)
    assert sender.hold().manifest.version == 3


def test_another_model_is_refused_by_the_name_of_the_leaf_and_the_next_version_comes(
    sender: Sender, receiver: Receiver
):
    sender.write(make_params(0, dataclasses.replace(MODEL, d_ff=16)), 0)
    with pytest.raises(
        WeightsRefusedError, match=r"version 0: leaf \['layers'\]\[0\].* is float32\[.*16.*\], expected"
    ):
        fetch(sender, receiver)
    sender.write(make_params(1), 1)
    jax.tree.map(np.testing.assert_array_equal, fetch(sender, receiver), make_params(1))


def test_other_values_than_were_written_are_refused_by_the_name_of_the_leaf(
    plane: str, sender: Sender, receiver: Receiver
):
    sender.write(make_params(0), 0)
    spoil(plane, sender)
    with pytest.raises(
        WeightsRefusedError, match=r"version 0: the (bytes|elements) of leaf \['embed'\].* have checksum"
    ):
        fetch(sender, receiver)
    sender.write(make_params(1), 1)
    jax.tree.map(np.testing.assert_array_equal, fetch(sender, receiver), make_params(1))


def test_weights_go_where_the_generators_mesh_has_them(plane: str, sender: Sender):
    if plane == "transfer":  # from device to device: what is cut there must be cut here
        mesh = Mesh(np.array(jax.devices()[:2]), ("tensor",), axis_types=(AxisType.Auto,))
        whole = NamedSharding(mesh, PartitionSpec())
        params = jax.tree.map(lambda leaf: jax.device_put(leaf, whole), make_params(0))
    else:
        params = make_params(0)
    mesh = Mesh(np.array(jax.devices()[2:4]), ("tensor",), axis_types=(AxisType.Auto,))
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), params)
    if plane != "transfer":
        shardings["head"]["kernel"] = NamedSharding(mesh, PartitionSpec("tensor"))
    receiver = make_receiver(plane, wanted_params(MODEL, jnp.dtype("float32"), shardings), 5.0)
    sender.write(params, 0)
    found = fetch(sender, receiver)
    jax.tree.map(np.testing.assert_array_equal, found, make_params(0))
    assert found["head"]["kernel"].sharding == shardings["head"]["kernel"]


# --- device to device ------------------------------------------------------------------------------------------------


def transfer_order(params: Any) -> tuple[TransferWeights, Manifest, Order]:
    sender = TransferWeights()
    sender.write(params, 4)
    published = sender.hold()
    return sender, published.manifest, sender.order(published)


def refusal(manifest: Manifest, order: Order, deadline: float = 0.5) -> tuple[str, float]:
    """The sentence, and the seconds that it took."""
    receiver = make_receiver("transfer", wanted_params(MODEL, jnp.dtype("float32")), deadline)
    began = time.monotonic()
    with pytest.raises(WeightsRefusedError) as refused:
        receiver.receive(deliver(manifest, order))
    return str(refused.value), time.monotonic() - began


def test_another_cut_is_refused_before_anything_is_pulled():
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",), axis_types=(AxisType.Auto,))
    params = make_params(0)
    kernel = jax.device_put(params["head"]["kernel"], NamedSharding(mesh, PartitionSpec("a")))  # [8, 13]
    sender, manifest, order = transfer_order(params | {"head": {"kernel": kernel}})
    sentence, _ = refusal(manifest, order)
    assert sentence == (
        "weights of version 4: leaf ['head']['kernel'] is cut into the shards [[[0, 4], [0, 13]], [[4, 8], [0, 13]]], "
        "expected [[[0, 8], [0, 13]]]"
    )
    sender.close()


def test_a_dead_address_is_named_at_once():
    sender, manifest, order = transfer_order(make_params(0))
    with socket.create_server(("127.0.0.1", 0)) as dead:
        address = f"127.0.0.1:{dead.getsockname()[1]}"
    order = dataclasses.replace(order, fields={**order.fields, "address": address})
    sentence, seconds = refusal(manifest, order, deadline=60.0)
    expected = f"weights of version 4 from {address} (the trainer): nobody answers there (Connection refused)"
    assert sentence == expected
    assert seconds < 30.0
    sender.close()


def test_one_that_accepts_and_says_nothing_is_given_up():
    sender, manifest, order = transfer_order(make_params(0))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        sentence, seconds = refusal(manifest, Order({**order.fields, "address": address}))
    assert sentence.startswith(f"weights of version 4 from {address} (the trainer): nothing came for 0.5")
    assert seconds > 0.5
    sender.close()


def test_what_is_not_on_offer_is_given_up_and_its_thread_ends_with_a_late_offer(monkeypatch: pytest.MonkeyPatch):
    sender, manifest, order = transfer_order(make_params(0))
    sentence, _ = refusal(manifest, Order({**order.fields, "offers": [17]}))
    assert "(the trainer): nothing came for 0.5" in sentence
    (left,) = (thread for thread in threading.enumerate() if thread.name == "weights-transfer")
    assert left.daemon
    monkeypatch.setattr(secrets, "randbits", lambda count: 17)
    sender.order(sender.hold())
    left.join(60.0)
    assert not left.is_alive()
    sender.close()


def test_offers_that_were_not_taken_are_freed_once_no_transfer_is_under_way():
    sender = TransferWeights()
    sender.write(make_params(0), 0)
    first, second = sender.hold(), sender.hold()
    addresses = {sender.order(published).fields["address"] for published in (first, second)}
    sender.release(first, was_taken=False)
    addresses.add(sender.order(second).fields["address"])
    assert len(addresses) == 1  # others still fetch from this server
    sender.release(second, was_taken=True)
    third = sender.hold()
    assert sender.order(third).fields["address"] not in addresses
    sender.close()


# --- the choice ------------------------------------------------------------------------------------------------------


def test_auto_takes_what_always_works_and_a_name_stands():
    assert choose_plane("auto", "process") == "shared_memory"
    assert choose_plane("auto", "remote") == "tcp"
    assert [choose_plane(plane, "remote") for plane in PLANES] == list(PLANES)


def test_large_weights_get_the_time_of_their_bytes():
    assert allowance(10.0, 0) == 10.0
    assert allowance(10.0, 48_000_000_000) == 490.0

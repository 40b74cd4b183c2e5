"""Weights from device to device between independent jobs, by `jax.experimental.transfer`.

The library moves bytes and promises little: a pull that asks for another layout gets wrong values, one from a dead
address or of something that was never offered waits for ever, and what is offered and not pulled stays in memory. So

- the receiver compares shapes, types and the index map of every shard before it pulls anything, and checks the values
  after it, with a checksum for each leaf that is computed on the device;
- it first knocks at the address, then pulls in a thread that it leaves behind when the time is over;
- an offer is for one receiver; where one was not taken, the server is replaced as soon as no transfer is under way,
  which frees the offer;
- the offered arrays are kept until the receiver has answered.

Over sockets and through host memory on every platform so far (no NVLink or ICI). Run on CPU; not yet on GPU or TPU.
The server has no password: whoever reaches its port and guesses a 62-bit number can read weights.
"""

import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import transfer
from jax.sharding import SingleDeviceSharding

from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.publish.manifest import Leaf, Manifest, WeightsRefusedError, check_layout, lay_out
from magistral_jax.publish.plane import Delivery, Order, Published, allowance

_BUCKET = 2**26  # bytes that are pulled at one time: each bucket has the deadline anew


class TransferWeights:
    """The trainer's side.

    Args:
      host: Address of this host at which receivers reach it.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host
        self._lock = threading.Lock()
        self._server: Any = None
        self._newest: Published | None = None
        self._num_held = 0
        self._has_stale_offers = False

    def write(self, params: Any, version: int) -> None:
        """Keep the arrays, and compute what receivers check them with."""
        leaves = (
            Leaf(leaf.path, leaf.shape, leaf.dtype, leaf.offset, fingerprint(array))
            for leaf, array in zip(lay_out(params), jax.tree.leaves(params), strict=True)
        )
        published = Published(Manifest(version, tuple(leaves)), jax.tree.leaves(params))
        with self._lock:
            self._newest = published

    def hold(self) -> Published:
        """The newest version."""
        with self._lock:
            if self._newest is None:
                raise ValueError("no weights yet: `write` comes before `hold`")
            self._num_held += 1
            return self._newest

    def order(self, published: Published) -> Order:
        """Offer all buckets to one receiver, and say where."""
        with self._lock:
            self._server = self._server or _start_server(self._host)
            offers = []
            for bucket in _buckets(published.manifest.leaves):
                uuid = secrets.randbits(62)
                self._server.await_pull(uuid, published.content[bucket])
                offers.append(uuid)
            shards = [_index_map(array.sharding, array.shape) for array in published.content]
            return Order({"address": self._server.address(), "offers": offers, "shards": shards})

    def release(self, published: Published, *, was_taken: bool = True) -> None:
        """Say that a receiver is done; what it left is freed when no other is at work."""
        with self._lock:
            self._num_held -= 1
            self._has_stale_offers |= not was_taken
            if self._has_stale_offers and self._num_held == 0:
                self._server, self._has_stale_offers = None, False

    def close(self) -> None:
        """Free the server and the arrays."""
        with self._lock:
            self._server = self._newest = None


class TransferReader:
    """A generator's side.

    Args:
      wanted: Tree of `jax.ShapeDtypeStruct`: the generator's own parameters, and where they go.
      deadline: Seconds for which nothing may come.
    """

    def __init__(self, wanted: Any, deadline: float) -> None:
        place = lambda leaf: leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        self._wanted = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)) for leaf in jax.tree.leaves(wanted)
        ]
        self._leaves, self._structure = lay_out(wanted), jax.tree.structure(wanted)
        self._deadline = deadline
        self._server: Any = None

    def receive(self, delivery: Delivery) -> Any:
        """Parameters on the device; see `plane.Receiver`."""
        manifest, address = delivery.manifest, delivery.fields["address"]
        check_layout(manifest, self._leaves)
        self._check_shards(manifest, delivery.fields["shards"])
        where = f"weights of version {manifest.version} from {address} ({delivery.peer})"
        _knock(address, self._deadline, where)
        arrays: list[jax.Array] = []
        connection = self._connect(address, where)
        for bucket, uuid in zip(_buckets(self._leaves), delivery.fields["offers"], strict=True):
            wanted = self._wanted[bucket]
            size = sum(leaf.num_bytes for leaf in self._leaves[bucket])
            arrays += _in_time(
                lambda uuid=uuid, wanted=wanted: jax.block_until_ready(connection.pull(uuid, wanted)),
                allowance(self._deadline, size),
                where,
            )
        _check_values(manifest, self._leaves, arrays)
        return jax.tree.unflatten(self._structure, arrays)

    def _connect(self, address: str, where: str) -> Any:
        if self._server is None:
            self._server = _start_server("127.0.0.1" if address.startswith("127.") else "0.0.0.0")
        return _in_time(lambda: self._server.connect(address), self._deadline, where)

    def _check_shards(self, manifest: Manifest, sent: Sequence[Any]) -> None:
        for leaf, struct, shards in zip(self._leaves, self._wanted, sent, strict=True):
            ours = _index_map(struct.sharding, struct.shape)
            if shards != ours:
                raise WeightsRefusedError(
                    f"weights of version {manifest.version}: leaf {leaf.path} is cut into the shards {shards}, "
                    f"expected {ours}"
                )


def _start_server(host: str) -> Any:
    # With the default, no transport addresses, a pull by another process takes the offering one down with it.
    client = jax.devices()[0].client
    return transfer.start_transfer_server(client, f"{host}:0", [f"{host}:0"])


def _buckets(leaves: Sequence[Leaf]) -> Iterator[slice]:
    """Runs of leaves with about `_BUCKET` bytes; both sides cut alike."""
    start = size = 0
    for i, leaf in enumerate(leaves):
        if i > start and size + leaf.num_bytes > _BUCKET:
            yield slice(start, i)
            start, size = i, 0
        size += leaf.num_bytes
    if leaves:
        yield slice(start, len(leaves))


def _index_map(sharding: Any, shape: tuple[int, ...]) -> list[list[list[int]]]:
    """First and last element of each shard along each axis, in the order of the devices."""
    indices = sharding.devices_indices_map(shape).values()
    return [[[*part.indices(size)[:2]] for part, size in zip(index, shape, strict=True)] for index in indices]


def _knock(address: str, deadline: float, where: str) -> None:
    """See that somebody listens: a pull would wait for ever."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), deadline).close()
    except OSError as error:
        raise WeightsRefusedError(f"{where}: nobody answers there ({error.strerror or error})") from error


def _in_time(work: Any, seconds: float, where: str) -> Any:
    """The result of a call that may hang; the thread that runs it is left behind then."""
    results: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="weights-transfer", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        sentence = str(errors[0]).splitlines()[0]
        raise WeightsRefusedError(f"{where}: the transfer failed: {sentence}") from errors[0]
    if not results:
        raise WeightsRefusedError(f"{where}: nothing came for {seconds:g} s")
    return results[0]


def _check_values(manifest: Manifest, leaves: Sequence[Leaf], arrays: Sequence[jax.Array]) -> None:
    sent = {leaf.path: leaf.checksum for leaf in manifest.leaves}
    for leaf, array in zip(leaves, arrays, strict=True):
        if (checksum := fingerprint(array)) != sent[leaf.path]:
            raise WeightsRefusedError(
                f"weights of version {manifest.version}: the elements of leaf {leaf.path} have checksum "
                f"{checksum:#010x}, the trainer's have {sent[leaf.path]:#010x}"
            )

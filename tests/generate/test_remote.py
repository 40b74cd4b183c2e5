"""Joining over TCP: who knows the token gets in, everybody else gets one sentence, and nobody hangs."""

import hmac
import pathlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

import magistral_jax
from magistral_jax.generate.address import format_address, is_loopback, is_wildcard, parse_address
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.remote import Listener, RemoteWorker, join, read_token
from magistral_jax.records import MagistralError

Answer = Callable[[], None] | str


class Door:
    """A listener, and who came through."""

    def __init__(self, token: str) -> None:
        self.joined: queue.SimpleQueue[RemoteWorker] = queue.SimpleQueue()
        self.answer: str | None = None
        self.listener = Listener("127.0.0.1:0", token, self.decide)
        self.address = self.listener.address
        self.listener.start()

    def decide(self, worker: RemoteWorker) -> Answer:
        return self.answer or (lambda: self.joined.put(worker))


@pytest.fixture
def door() -> Iterator[Door]:
    door = Door("open sesame")
    yield door
    door.listener.close()


def refusal(address: str, token: str) -> str:
    with pytest.raises(MagistralError) as refused:
        join(address, token)
    return str(refused.value)


def test_who_knows_the_token_is_connected(door: Door):
    channel = join(door.address, "open sesame")
    worker = door.joined.get(timeout=60.0)
    assert worker.name.startswith(f"{socket.gethostname()}, 127.0.0.1:")
    Channel(worker.connection).send(Frame("hello", {"x": 1}))
    frame = channel.receive(60.0)
    assert frame is not None
    assert (frame.kind, frame.fields) == ("hello", {"x": 1})
    worker.kill()
    assert channel.receive(60.0) is None
    assert worker.describe_end(None) == "is gone: its connection has ended"
    assert worker.describe_end("sent no sign of life") == "sent no sign of life"
    worker.connection.close()
    channel.close()


@pytest.mark.parametrize("token", ["", "open", "Open sesame"])
def test_a_wrong_token_is_refused_in_one_sentence(door: Door, token: str):
    assert refusal(door.address, token) == (
        f"The trainer at {door.address} does not let this generator in: its token is not that of the run (--token-file "
        "here, generation.token_file there)."
    )
    assert door.joined.empty()


def test_who_does_not_know_the_token_cannot_play_the_trainer():
    """A false trainer lets everybody in, but cannot prove that it knows what it asks for."""

    def let_in(server: socket.socket) -> None:
        channel = Channel(server.accept()[0])
        channel.send(Frame("challenge", {"nonce": "00"}))
        channel.receive(60.0)
        channel.send(Frame("welcome", {"proof": "00"}))
        channel.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        false_trainer = threading.Thread(target=let_in, args=[server])
        false_trainer.start()
        address = format_address(*server.getsockname())
        assert refusal(address, "open sesame") == f"Who answers at {address} does not know the token of the run."
        false_trainer.join()


def test_another_version_of_the_package_is_turned_away(door: Door):
    channel = Channel(socket.create_connection(parse_address(door.address)))
    challenge = channel.receive(60.0)
    assert challenge is not None
    proof = hmac.digest(b"open sesame", f"generator:{challenge.fields['nonce']}:ab".encode(), "sha256").hex()
    channel.send(Frame("join", {"proof": proof, "nonce": "ab", "version": "0.0.1", "jax": "0", "host": "old"}))
    answer = channel.receive(60.0)
    assert answer is not None
    assert answer.fields["reason"] == f"it runs magistral-jax 0.0.1, the trainer {magistral_jax.__version__}"
    channel.close()


def test_one_too_many_is_told_so(door: Door):
    door.answer = "all 2 places are taken (generation.num_generators)"
    sentence = refusal(door.address, "open sesame")
    assert sentence.endswith("does not let this generator in: all 2 places are taken (generation.num_generators).")


def test_strangers_do_not_keep_others_out(door: Door):
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(12)):
        with socket.create_connection(parse_address(door.address)) as stranger:
            stranger.sendall(words)
    with socket.create_connection(parse_address(door.address)):  # says nothing, and stays
        channel = join(door.address, "open sesame")
        door.joined.get(timeout=60.0).connection.close()
    channel.close()


def test_a_dead_address_is_named():
    with socket.create_server(("127.0.0.1", 0)) as dead:
        address = f"127.0.0.1:{dead.getsockname()[1]}"
    assert refusal(address, "") == f"No trainer answers at {address}: Connection refused."


def test_an_address_that_is_in_use_is_named(door: Door):
    with pytest.raises(MagistralError, match=rf"cannot listen at {door.address}: Address already in use"):
        Listener(door.address, "", door.decide)


def test_after_the_end_nobody_is_let_in():
    door = Door("")
    door.listener.close()
    assert refusal(door.address, "") == f"No trainer answers at {door.address}: Connection refused."


def test_the_token_is_read_without_its_line_end(tmp_path: pathlib.Path):
    path = tmp_path / "token"
    path.write_text("open sesame\n")
    assert read_token(str(path)) == "open sesame"
    assert read_token("") == ""
    path.write_text("\n")
    with pytest.raises(MagistralError, match="is empty; expected a secret"):
        read_token(str(path))
    with pytest.raises(MagistralError, match="cannot read the token: No such file"):
        read_token(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [("127.0.0.1:0", "127.0.0.1", 0), ("gpu7:29500", "gpu7", 29500), ("[::1]:65535", "::1", 65535)],
)
def test_addresses(address: str, host: str, port: int):
    assert parse_address(address) == (host, port)
    assert format_address(host, port) == address


@pytest.mark.parametrize("address", ["", "gpu7", "gpu7:", ":29500", "gpu7:http", "gpu7:65536", "gpu7:-1"])
def test_what_is_no_address(address: str):
    with pytest.raises(MagistralError, match="is no address; expected HOST:PORT"):
        parse_address(address)


@pytest.mark.parametrize(
    ("host", "loopback", "wildcard"),
    [
        ("127.0.0.1", True, False),
        ("127.8.8.8", True, False),
        ("::1", True, False),
        ("localhost", True, False),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("10.0.0.1", False, False),
        ("gpu7", False, False),
    ],
)
def test_what_an_address_is_open_to(host: str, loopback: bool, wildcard: bool):
    assert (is_loopback(host), is_wildcard(host)) == (loopback, wildcard)

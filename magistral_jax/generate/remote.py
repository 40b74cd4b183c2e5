"""Generators on other hosts: they join over TCP, prove that they know the run's token, and are then like processes.

    generator connects → challenge → join (proof, versions) → welcome (proof) or refused (one sentence) → as a process

Each side proves the token to the other by an HMAC over both sides' random numbers; it is never sent. What follows is
not encrypted: use it inside a trusted network, or through a tunnel.
"""

import hmac
import pathlib
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

import jax

import magistral_jax
from magistral_jax.generate.address import format_address, parse_address
from magistral_jax.generate.frames import Channel, Frame, ProtocolError
from magistral_jax.records import MagistralError

_HANDSHAKE_SECONDS = 10.0
_BACKLOG = 64


class RemoteWorker:
    """A generator that has joined: an `Endpoint`.

    Args:
      connection: To it.
      name: Its host and address, for messages.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection, self.name = connection, name

    @property
    def is_local(self) -> bool:
        """Taken not to be, even where it is."""
        return False

    def kill(self) -> None:
        """End the connection, at which the generator ends itself."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # it has ended already
            return

    def wait(self, seconds: float) -> None:
        """Nothing to wait for: the process is somebody else's."""

    def describe_end(self, reason: str | None) -> str:
        """Why it was given up, or that it has gone."""
        return reason or "is gone: its connection has ended"


class Listener:
    """Where generators join.

    Args:
      address: HOST:PORT to listen at; port 0 takes a free one.
      token: What a generator must know.
      on_join: Receives each generator that knows the token; returns what to do once it has been welcomed, or why it is
        turned away. Called from a thread of its own for each.

    Raises:
      MagistralError: The address cannot be listened at.
    """

    def __init__(self, address: str, token: str, on_join: Callable[[RemoteWorker], Callable[[], None] | str]) -> None:
        self._token, self._on_join = token, on_join
        host, port = parse_address(address)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=_BACKLOG)
        except OSError as error:
            raise MagistralError(f"`generation.listen`: cannot listen at {address}: {error.strerror}.") from error
        self.address = format_address(host, self._socket.getsockname()[1])

    def start(self) -> None:
        """Let generators in."""
        threading.Thread(target=self._accept, name="generators-join", daemon=True).start()

    def close(self) -> None:
        """Let nobody in any more."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        except OSError:
            return
        finally:
            self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._socket.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._let_in, args=(connection, address), daemon=True).start()

    def _let_in(self, connection: socket.socket, address: Any) -> None:
        channel = Channel(connection)
        try:
            reason = self._examine(channel, connection, format_address(*address[:2]))
            if reason is not None:
                channel.send(Frame("refused", {"reason": reason}))
                channel.close()
        except (OSError, ProtocolError, KeyError, TypeError):  # no generator of ours, or one that left
            channel.close()

    def _examine(self, channel: Channel, connection: socket.socket, address: str) -> str | None:
        """Shake hands; why the other side is not let in, if it is not."""
        nonce = secrets.token_hex(32)
        channel.send(Frame("challenge", {"nonce": nonce}))
        frame = channel.receive(_HANDSHAKE_SECONDS)
        if frame is None:
            raise ConnectionResetError
        fields = frame.fields
        if frame.kind != "join" or not _is_proof(fields["proof"], self._token, "generator", nonce, fields["nonce"]):
            return "its token is not that of the run (--token-file here, generation.token_file there)"
        if fields["version"] != magistral_jax.__version__:
            return f"it runs magistral-jax {fields['version']}, the trainer {magistral_jax.__version__}"
        answer = self._on_join(RemoteWorker(connection, f"{fields['host']}, {address}"))
        if isinstance(answer, str):
            return answer
        try:
            channel.send(Frame("welcome", {"proof": _proof(self._token, "trainer", fields["nonce"], nonce)}))
        finally:
            answer()  # where it has left already, that is noticed as for any other
        return None


def join(address: str, token: str) -> Channel:
    """A generator's part of the handshake.

    Raises:
      MagistralError: Nobody answers there, or it is not let in.
    """
    try:
        connection = socket.create_connection(parse_address(address), _HANDSHAKE_SECONDS)
    except OSError as error:
        raise MagistralError(f"No trainer answers at {address}: {error.strerror or error}.") from error
    channel = Channel(connection)
    try:
        _introduce(channel, address, token)
    except BaseException:
        channel.close()
        raise
    return channel


def _introduce(channel: Channel, address: str, token: str) -> None:
    challenge, nonce = _answer(channel, address, "challenge"), secrets.token_hex(32)
    fields = {
        "proof": _proof(token, "generator", challenge["nonce"], nonce),
        "nonce": nonce,
        "version": magistral_jax.__version__,
        "jax": jax.__version__,
        "host": socket.gethostname(),
    }
    channel.send(Frame("join", fields))
    welcome = _answer(channel, address, "welcome")
    if not _is_proof(welcome["proof"], token, "trainer", nonce, challenge["nonce"]):
        raise MagistralError(f"Who answers at {address} does not know the token of the run.")


def read_token(path: str) -> str:
    """The secret in a file; an empty path is no secret.

    Raises:
      MagistralError: The file cannot be read, or is empty.
    """
    if not path:
        return ""
    try:
        token = pathlib.Path(path).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise MagistralError(f"{path}: cannot read the token: {error.strerror}.") from error
    if not token:
        raise MagistralError(f"{path} is empty; expected a secret on one line.")
    return token


def _proof(token: str, role: str, *nonces: str) -> str:
    return hmac.digest(token.encode(), ":".join([role, *nonces]).encode(), "sha256").hex()


def _is_proof(proof: str, token: str, role: str, *nonces: str) -> bool:
    return hmac.compare_digest(proof.encode(), _proof(token, role, *nonces).encode())


def _answer(channel: Channel, address: str, kind: str) -> dict[str, Any]:
    try:
        frame = channel.receive(_HANDSHAKE_SECONDS)
    except (TimeoutError, ProtocolError) as error:
        raise MagistralError(f"What answers at {address} is no trainer.") from error
    if frame is None:
        raise MagistralError(f"The trainer at {address} closed the connection.")
    if frame.kind == "refused":
        raise MagistralError(f"The trainer at {address} does not let this generator in: {frame.fields['reason']}.")
    if frame.kind != kind:
        raise MagistralError(f"What answers at {address} is no trainer.")
    return frame.fields

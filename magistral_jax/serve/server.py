"""The socket, the signals and the end of a service."""

import asyncio
import contextlib
import socket
import time
import types
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette

from magistral_jax.records import MagistralError
from magistral_jax.serve.async_engine import AsyncEngine

_GRACE = 10  # seconds for answers that are complete to reach their clients


def bind(host: str, port: int) -> socket.socket:
    """A socket with that address; nobody can connect before the server listens.

    Raises:
      MagistralError: The address is taken, or not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as on_error:
            bound = on_error.enter_context(socket.socket(family, kind, protocol))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            on_error.pop_all()
    except OSError as error:
        raise MagistralError(f"cannot listen on `serve.host` {host}, `serve.port` {port}: {error}.") from None
    return bound


def address_of(bound: socket.socket) -> str:
    """The service's URL."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if bound.family == socket.AF_INET6 else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which on the first Ctrl-C lets running requests end before it stops listening.

    Args:
      app: The application.
      engine: Its engine.
      drain_seconds: How long it waits for them, if no second Ctrl-C comes before.
      max_connections: Open connections beyond which a request is answered with 503.
      request_seconds: After how long without a whole request a connection is closed.
      say: Called with a line for the person at the console.
      ready: What to say once it listens.
    """

    def __init__(
        self,
        app: Starlette,
        engine: AsyncEngine,
        *,
        drain_seconds: float,
        max_connections: int,
        request_seconds: float,
        say: Callable[[str], None],
        ready: str,
    ) -> None:
        settings = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=_GRACE,
            limit_concurrency=max_connections + 1,  # uvicorn refuses the one that reaches its limit
        )
        super().__init__(settings)
        self._engine, self._drain_seconds, self._say = engine, drain_seconds, say
        self._request_seconds, self._ready = request_seconds, ready
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and to watch the engine."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._tasks.append(asyncio.create_task(self._watch()))
        self._tasks.append(asyncio.create_task(self._close_slow()))
        self._say(self._ready)

    @property
    def failure(self) -> Exception | None:
        """What the engine ended with, if it failed."""
        return self._engine.failure

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """A signal: the first lets running requests end, the second gives them up."""
        if self._loop is None:
            self.should_exit = True
        elif not self._is_ending:
            self._is_ending = True
            self._say("ending: running requests go on, new ones are refused; press Ctrl-C again to give them up")
            self._loop.call_soon_threadsafe(self._begin_drain)
        else:
            self._loop.call_soon_threadsafe(self._engine.give_up)

    def _begin_drain(self) -> None:
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        await self._engine.drain(self._drain_seconds)
        self.should_exit = True

    async def _watch(self) -> None:
        await self._engine.has_failed.wait()
        self.should_exit = True

    async def _close_slow(self) -> None:
        """Close connections that wait for their client for too long: uvicorn waits for a first request for ever."""
        waiting: dict[Any, tuple[Any, float]] = {}  # connection -> the latest request on it, and since when
        while True:
            now = time.monotonic()
            latest = {connection: connection.cycle for connection in self.server_state.connections}  # pyright: ignore[reportAttributeAccessIssue]
            waiting = {
                connection: old if (old := waiting.get(connection)) and old[0] is request else (request, now)
                for connection, request in latest.items()
                if request is None or request.response_complete or request.more_body
            }
            for connection, (_, since) in waiting.items():
                if now - since > self._request_seconds:
                    connection.transport.close()
            await asyncio.sleep(min(1.0, self._request_seconds / 4))

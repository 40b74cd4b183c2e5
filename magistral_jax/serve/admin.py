"""Routes for the owner of a service: pause, resume, weights, stats; all behind a bearer token."""

import asyncio
import dataclasses
import hmac
import json
import pathlib
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.records import MagistralError
from magistral_jax.serve.async_engine import AsyncEngine
from magistral_jax.serve.bodies import read_body
from magistral_jax.serve.errors import ApiError, bad_request

_MAX_BYTES = 2**16


class Admin:
    """The admin routes.

    Args:
      engine: What they steer.
      token: What a request must bring; empty refuses all of them.
      load_weights: Reads a model folder of the served shape into the engine's layout.
    """

    def __init__(self, engine: AsyncEngine, token: str, load_weights: Callable[[pathlib.Path], Any]) -> None:
        self._engine, self._token, self._load_weights = engine, token, load_weights
        self._loading = asyncio.Lock()

    def routes(self) -> list[Route]:
        """For the app."""
        return [
            Route("/admin/pause", self.pause, methods=["POST"]),
            Route("/admin/resume", self.resume, methods=["POST"]),
            Route("/admin/weights", self.weights, methods=["POST"]),
            Route("/admin/stats", self.stats, methods=["GET"]),
        ]

    async def pause(self, request: Request) -> Response:
        """Stop sampling after the running step; what runs keeps its place."""
        self._check(request)
        await self._engine.pause(True)
        return await self.stats(request)

    async def resume(self, request: Request) -> Response:
        """Go on."""
        self._check(request)
        await self._engine.pause(False)
        return await self.stats(request)

    async def stats(self, request: Request) -> Response:
        """Counts of the engine."""
        self._check(request)
        return JSONResponse(dataclasses.asdict(self._engine.stats))

    async def weights(self, request: Request) -> Response:
        """Take the weights of a folder into use as the next version, in the midst of completions."""
        self._check(request)
        path = await _read_path(request)
        if self._loading.locked():
            raise ApiError(409, "Weights are being loaded already; try again when that is done.", retry_after=5)
        async with self._loading:
            try:
                params = await asyncio.to_thread(self._load_weights, path)
            except MagistralError as error:
                raise bad_request(str(error), param="path") from None
            checksum = await asyncio.to_thread(fingerprint, params)
            version, is_active = await self._engine.set_weights(params)
        return JSONResponse({"version": version, "fingerprint": checksum, "is_active": is_active})

    def _check(self, request: Request) -> None:
        if not self._token:
            raise ApiError(403, "This service has no admin token: start it with `serve.admin_token_file`.")
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._token.encode()):
            raise ApiError(401, "The admin routes want the header `Authorization: Bearer TOKEN` with the right token.")


async def _read_path(request: Request) -> pathlib.Path:
    try:
        body = json.loads(await read_body(request, _MAX_BYTES))
    except ValueError:
        body = None
    if not isinstance(body, dict) or body.keys() != {"path"} or not isinstance(body["path"], str):
        raise bad_request('The body must be a JSON object {"path": FOLDER}, the folder one of the service\'s machine.')
    return pathlib.Path(body["path"])

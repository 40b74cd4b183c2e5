"""The ASGI application: which route answers what, and in which shape it fails."""

import contextlib
import time
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from magistral_jax.serve.admin import Admin
from magistral_jax.serve.errors import ApiError
from magistral_jax.serve.meters import Meters
from magistral_jax.serve.routes import Service

_GONE = 499  # nginx's number for a client that hung up; nobody reads the answer


def make_app(service: Service, admin: Admin) -> Starlette:
    """The application; its engine runs from the start of the server to its end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    started = int(time.time())

    async def models(request: Request) -> Response:
        model = {"id": service.model_name, "object": "model", "created": started, "owned_by": "magistral-jax"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request: Request) -> Response:
        refusal = service.engine.refusal
        if refusal is not None:
            raise refusal
        return JSONResponse({"status": "paused" if service.engine.stats.is_paused else "ok"})

    async def metrics(request: Request) -> Response:
        return Response(service.meters.text(), media_type=service.meters.content_type)

    return Starlette(
        routes=[
            Route("/v1/completions", service.completions, methods=["POST"]),
            Route("/v1/chat/completions", service.chat, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/metrics", metrics),
            *admin.routes(),
        ],
        middleware=[Middleware(_Count, meters=service.meters)],
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            ClientDisconnect: _gone,
            Exception: _failure,
        },
        lifespan=lifespan,
    )


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentences = {
        404: f"There is no route {request.url.path} here.",
        405: f"The route {request.url.path} does not take {request.method}.",
    }
    failure = ApiError(error.status_code, sentences.get(error.status_code, error.detail))
    return JSONResponse(failure.body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)


async def _failure(request: Request, error: Exception) -> Response:
    # Starlette raises the error again once this is sent, and the server logs it with its traceback.
    return JSONResponse(ApiError(500, "The service has failed; its log says how.").body, 500)


class _Count:
    """Counts requests by route and status."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self._app, self._meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _GONE

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception:
            status = 500
            raise
        finally:
            route = scope.get("route")  # set by the router: paths that do not exist are not counted one by one
            self._meters.requests.labels(route.path if route else "none", str(status)).inc()

"""The two routes that sample: read the body, order, and answer whole or as a stream of events."""

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.serve.answers import CHAT, COMPLETION, Answer, Shape
from magistral_jax.serve.async_engine import AsyncEngine, Job
from magistral_jax.serve.bodies import Body, ChatBody, CompletionBody, parse_body, read_body
from magistral_jax.serve.choice import Choice, Piece, echo, join
from magistral_jax.serve.errors import ApiError
from magistral_jax.serve.meters import Meters
from magistral_jax.serve.orders import Limits, Order, order_chat, order_completion

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Service:
    """What the routes share."""

    engine: AsyncEngine
    tokenizer: Tokenizer
    model_name: str
    limits: Limits
    think_tags: tuple[str, str]
    meters: Meters

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = await self._read(request, CompletionBody)
        # Tokenising a long text takes a while, and the loop has other clients.
        order = await asyncio.to_thread(order_completion, body, self.tokenizer, self.limits)
        return await self._answer(request, COMPLETION, order)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await self._read(request, ChatBody)
        order = await asyncio.to_thread(order_chat, body, self.tokenizer, self.limits, self.think_tags)
        return await self._answer(request, CHAT, order)

    async def _read(self, request: Request, kind: type[Body]) -> Body:
        body = parse_body(kind, await read_body(request, self.limits.max_body_bytes))
        if body.model != self.model_name:
            raise ApiError(
                404,
                f"There is no model `{body.model}` here; this service has `{self.model_name}`.",
                param="model",
                code="model_not_found",
            )
        return body

    async def _answer(self, request: Request, shape: Shape, order: Order) -> Response:
        answer = Answer(shape, order, self.tokenizer, self.model_name)
        job = self.engine.open(
            order.prompts, order.sampling, order.random_ids, with_scores=order.with_logprobs and bool(order.texts)
        )
        pieces = self._pieces(order, job, time.monotonic())
        if order.is_streamed:
            return _EventStream(_events(answer, pieces), lambda: self.engine.close(job))
        try:
            return JSONResponse(await _unless_gone(request, _whole(answer, order, pieces)))
        finally:
            self.engine.close(job)

    async def _pieces(self, order: Order, job: Job, began: float) -> AsyncIterator[tuple[int, Piece]]:
        """(number of the choice, piece) as they come, until every choice has ended."""
        scores = await job.scores() or [None] * len(order.prompts)
        choices = []
        for index in range(order.num_choices):
            which = index // order.num_each
            offset = 0
            if order.texts:
                text = order.texts[which]
                piece = echo(self.tokenizer, order.prompts[which], text, order.num_added, scores[which])
                yield index, piece if order.random_ids else dataclasses.replace(piece, finish="length")
                offset = len(text)
            choices.append(Choice(self.tokenizer, order.stops, offset))
        unfinished = set(range(order.num_choices)) if order.random_ids else set()
        is_first = True
        while unfinished:
            index, delta = await job.next()
            if is_first:
                self.meters.first_token.observe(time.monotonic() - began)
                is_first = False
            if index in unfinished:
                piece = choices[index].feed(delta)
                if piece.finish is not None:
                    unfinished.discard(index)
                    self.engine.end_choice(job, index)  # a stop text is news to the engine
                yield index, piece
        self.meters.duration.observe(time.monotonic() - began)


async def _whole(answer: Answer, order: Order, pieces: AsyncIterator[tuple[int, Piece]]) -> dict[str, Any]:
    parts: list[list[Piece]] = [[] for _ in range(order.num_choices)]
    async for index, piece in pieces:
        parts[index].append(piece)
    return answer.whole([join(part) for part in parts])


async def _events(answer: Answer, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[str]:
    """Server-sent events; a failure after the first of them is an event too, since the status has been sent."""
    num_tokens = 0
    seen: set[int] = set()
    try:
        for event in answer.opening():
            yield _event(event)
        async for index, piece in pieces:
            num_tokens += len(piece.completion)
            for event in answer.chunk(index, piece, is_first=index not in seen):
                seen.add(index)
                yield _event(event)
        for event in answer.closing(num_tokens):
            yield _event(event)
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _EventStream(StreamingResponse):
    """Server-sent events with an end that always comes, whether the client stays or goes."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is given up when the client hangs up.

    Raises:
      ClientDisconnect: It did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leave(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()


async def _leave(request: Request) -> None:
    with contextlib.suppress(ClientDisconnect):
        while (await request.receive())["type"] != "http.disconnect":
            pass

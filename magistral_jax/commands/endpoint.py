"""A chat endpoint with OpenAI's interface, as `translate` asks it; in: Orders, out: their records.

The official client does what is hard to get right: pauses after a 429 that grow or are what the server asks for, and
retries of what may be sent again. Here it is decided what a failure means: that of one request is the problem's, that
of the address, the key or the model ends the command.
"""

import asyncio
import pathlib
import types
import urllib.parse
from collections.abc import Sequence
from typing import Any

import openai

from magistral_jax.curate.config import TranslateConfig
from magistral_jax.curate.translation import CUT, EMPTY, Order
from magistral_jax.records import MagistralError

ENDPOINT_ERROR, REFUSED = "endpoint error", "refused"
"""Reasons for which there is no answer: a failure that stayed in spite of retries; a 4xx for this very request."""


class Endpoint:
    """A context: one event loop and one pool of connections, for as long as it is entered."""

    def __init__(self, settings: TranslateConfig, run_seed: int) -> None:
        """Looks at the settings; nothing is sent.

        Raises:
          MagistralError: The address is none, or the key cannot be read.
        """
        self._settings = settings
        self._run_seed = run_seed
        self._runner = asyncio.Runner()
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._model = settings.model
        parts = urllib.parse.urlsplit(settings.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise MagistralError(
                f"`translate.endpoint` is `{settings.endpoint}`; expected an address such as http://127.0.0.1:8000/v1."
            )
        self._client = openai.AsyncOpenAI(
            base_url=settings.endpoint,
            api_key=_read_key(settings.key_file),
            timeout=settings.timeout,
            max_retries=settings.retries,
        )

    def __enter__(self) -> "Endpoint":
        self._runner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._runner.run(self._client.close())
        self._runner.__exit__(kind, error, trace)

    def find_model(self) -> str:
        """Ask what models there are, before anything is written, and return the one that is meant.

        Raises:
          MagistralError: Nobody answers there, the key is refused, or it is not clear which model is meant.
        """
        names = self._runner.run(self._list_models())
        if not self._model and (names is None or len(names) != 1):
            found = f"the endpoint lists {', '.join(names)}" if names else "the endpoint lists none"
            raise MagistralError(f"`translate.model` is empty and {found}; expected the name of one.")
        self._model = self._model or (names or [""])[0]
        return self._model

    async def _list_models(self) -> list[str] | None:
        try:
            page = await self._client.with_options(max_retries=0).models.list()
            return [model.id for model in page.data]
        except (openai.APIConnectionError, openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._sentence(error) from error
        except (openai.APIError, AttributeError, TypeError, ValueError):  # some endpoints have no such list
            return None

    def translate(self, orders: Sequence[Order]) -> list[dict[str, Any]]:
        """A record for each order, in their order: `id`, `language`, `statement`, and the `reason` where there is none.

        Raises:
          MagistralError: Nobody answers any more, or the key or the model is refused.
        """
        return self._runner.run(self._translate(orders))

    async def _translate(self, orders: Sequence[Order]) -> list[dict[str, Any]]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._translate_one(order)) for order in orders]
        except ExceptionGroup as errors:  # several requests at a time may meet the same dead endpoint
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _translate_one(self, order: Order) -> dict[str, Any]:
        statement, reason = "", ""
        async with self._slots:
            for attempt in range(self._settings.attempts):
                reply, reason = await self._ask(order, attempt)
                if not reason:
                    statement, reason = order.accept(reply)
                if not reason or reason == REFUSED:  # the same request would be refused again
                    break
        return {"id": order.problem.id, "language": order.language, "statement": statement, "reason": reason}

    async def _ask(self, order: Order, attempt: int) -> tuple[str, str]:
        """(reply, "") or ("", reason)."""
        try:
            answer = await self._client.chat.completions.create(
                model=self._model,
                messages=order.messages,  # pyright: ignore[reportArgumentType] (its own typed dictionaries)
                temperature=self._settings.temperature,
                max_tokens=self._settings.max_tokens,
                seed=order.seed(attempt, self._run_seed),
            )
            choice = answer.choices[0]
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError):
            return "", ENDPOINT_ERROR
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise self._sentence(error) from error
        except openai.APIConnectionError as error:
            raise self._sentence(error) from error
        except openai.APIStatusError:
            return "", REFUSED
        except (openai.APIError, AttributeError, IndexError, TypeError, ValueError):  # an answer that is no completion
            return "", ENDPOINT_ERROR
        if choice.finish_reason == "length":
            return "", CUT
        return (choice.message.content, "") if choice.message.content else ("", EMPTY)

    def _sentence(self, error: openai.APIError) -> MagistralError:
        where = self._settings.endpoint
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return MagistralError(
                f"{where} refuses the key ({error.status_code}); expected one in the file `translate.key_file` "
                f"(`{self._settings.key_file}`)."
            )
        if isinstance(error, openai.NotFoundError):
            return MagistralError(
                f"{where} has no chat completions by `{self._model}` (404); expected the name of a model in "
                "`translate.model` and an address that ends before /chat/completions."
            )
        cause = error.__cause__ or error
        return MagistralError(f"nobody answers at {where} ({cause}); expected `translate.endpoint` to be up.")


def _read_key(path: str) -> str:
    if not path:
        return "none"  # the client wants one; an endpoint without keys does not look at it
    try:
        return pathlib.Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MagistralError(f"`translate.key_file` is `{path}`, which cannot be read: {error}.") from None

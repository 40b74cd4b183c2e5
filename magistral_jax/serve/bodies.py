"""What clients send: the bodies of both routes, checked by pydantic; in: bytes, out: a body or one sentence.

A parameter that this service does not know is an error that names it, unless its value asks for nothing.
"""

import json
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field
from starlette.requests import Request

from magistral_jax.serve.errors import ApiError, bad_request

# Parameters that are known and not supported, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "ignore_eos": (False,),
    "skip_special_tokens": (False,),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # say who asks; no sample depends on them

TokenIds = list[int]
Count = Annotated[int, Field(ge=1)]


class _Record(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        return {name: v for name, v in values.items() if v is not None} if isinstance(values, dict) else values


class StreamOptions(_Record):
    """Of a streamed answer."""

    include_usage: bool = False


class TextPart(_Record):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(_Record):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class SamplingBody(pydantic.BaseModel):
    """What both routes take. A description completes the sentence "`name` must be …"."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")  # `parse_body` has looked at what is unknown

    model: str = Field(description="the name of the model")
    n: Count = Field(1, description="a whole number of at least 1")
    seed: int | None = Field(None, description="a whole number")
    stop: (
        Annotated[str, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=16)]
    ) = Field([], description="a text of 1 to 256 characters or a list of at most 16 of them")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and up to 1")
    top_k: int = Field(0, ge=-1, le=2**31 - 1, description="a whole number; 0 and -1 switch it off")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description="an object such as {include_usage: true}")
    return_token_ids: bool = Field(False, description="true or false")

    @property
    def stops(self) -> list[str]:
        """The texts that end a completion."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionBody(SamplingBody):
    """Of `/v1/completions`."""

    prompt: str | TokenIds | list[str] | list[TokenIds] = Field(
        description="a text, token ids, or a list of texts or of lists of token ids"
    )
    max_tokens: int = Field(16, ge=0, description="a whole number of at least 0")
    logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")
    echo: bool = Field(False, description="true or false")
    add_special_tokens: bool = Field(True, description="true or false")


class ChatBody(SamplingBody):
    """Of `/v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        description="a list of {role, content}, the role one of system, developer, user and assistant, "
        "the content a text or a list of text parts, and nothing else beside them",
    )
    max_tokens: Count | None = Field(None, description="a whole number of at least 1")
    max_completion_tokens: Count | None = Field(None, description="a whole number of at least 1")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(0, ge=0, le=20, description="a whole number from 0 to 20")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body of a request.

    Raises:
      ApiError: Status 413: it is larger than `max_bytes`.
    """
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > max_bytes:
            raise ApiError(413, f"The body is larger than {max_bytes} bytes, the limit of this service.")
    return bytes(data)


Body = TypeVar("Body", CompletionBody, ChatBody)


def parse_body(kind: type[Body], data: bytes) -> Body:
    """The body of a request; parameters that are null count as not given.

    Raises:
      ApiError: Status 400, with what is wrong and what was expected.
    """
    try:
        values = json.loads(data.decode())
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}.") from None
    if b"\\u" in data:  # escapes may spell half a character, which no answer could repeat
        values = json.loads(json.dumps(values, ensure_ascii=False).encode(errors="replace"))
    if not isinstance(values, dict):
        raise bad_request(f"The body must be a JSON object, not {_short(values)}.")
    values = {name: value for name, value in values.items() if value is not None and name not in _LABELS}
    for name in values.keys() - kind.model_fields.keys():
        if values[name] not in _NEUTRAL.get(name, ()):
            raise bad_request(f"`{name}` ({_short(values[name])}) is not supported by this service.", param=name)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        expected = kind.model_fields[name].description
        given = f"not {_short(values[name])}" if name in values else "and is missing"
        raise bad_request(f"`{name}` must be {expected}, {given}.", param=name) from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"

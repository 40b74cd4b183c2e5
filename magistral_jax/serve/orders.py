"""From a body to what the engine is asked for; in: CompletionBody or ChatBody, out: Order."""

import dataclasses
import hashlib
import secrets

import numpy as np
from jaxtyping import Int32

from magistral_jax.data.chat import encode_conversation
from magistral_jax.data.tokenizer import Tokenizer
from magistral_jax.records import MagistralError, SamplingParams
from magistral_jax.serve.bodies import ChatBody, CompletionBody, SamplingBody
from magistral_jax.serve.errors import ApiError, bad_request


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    max_prompt_tokens: int
    max_new_tokens: int
    max_choices: int
    max_body_bytes: int
    vocab_size: int
    max_top_logprobs: int


@dataclasses.dataclass(frozen=True)
class Order:
    """A request in the engine's terms: a completion of each prompt for each of `random_ids`."""

    prompts: list[Int32[np.ndarray, " _"]]
    sampling: SamplingParams
    random_ids: list[int]
    stops: list[str]
    with_logprobs: bool
    num_top_logprobs: int
    with_token_ids: bool
    is_streamed: bool
    with_usage: bool
    texts: list[str] = dataclasses.field(default_factory=list)  # of the prompts, where they are echoed
    num_added: int = 0  # tokens at the beginning of a prompt that are not in its text

    @property
    def num_each(self) -> int:
        """Choices of each prompt; one where nothing is sampled and the prompt is only echoed."""
        return max(1, len(self.random_ids))

    @property
    def num_choices(self) -> int:
        """Choices of all prompts."""
        return len(self.prompts) * self.num_each


def order_completion(body: CompletionBody, tokenizer: Tokenizer, limits: Limits) -> Order:
    """What a body of `/v1/completions` asks for.

    A text is the client's own prompt: control tokens in it are control tokens, and it begins with the model's `bos`.

    Raises:
      ApiError: Status 400: out of the limits, or nothing asked for.
    """
    many = _list_prompts(body)
    if not many:
        raise bad_request("`prompt` is an empty list; expected at least one prompt.", param="prompt")
    if len(many) * body.n > limits.max_choices:  # before any of them is tokenised
        raise _too_many(len(many), body.n, limits)
    if body.max_tokens == 0 and not (body.echo and body.n == 1):
        raise bad_request("`max_tokens` is 0, which goes with `echo` and `n` 1 only.", param="max_tokens")
    _check_top("logprobs", body.logprobs or 0, limits)
    bos = [tokenizer.bos_id] if body.add_special_tokens and tokenizer.bos_id is not None else []
    is_text = isinstance(many[0], str)
    prompts = [
        np.asarray([*bos, *tokenizer.encode(prompt, allow_special=True)] if isinstance(prompt, str) else prompt)
        for prompt in many
    ]
    for prompt in prompts:
        if len(prompt) and not (prompt.min() >= 0 and prompt.max() < limits.vocab_size):
            raise bad_request(f"`prompt`: token ids go from 0 to {limits.vocab_size - 1}.", param="prompt")
    prompts = [prompt.astype(np.int32) for prompt in prompts]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in many] if body.echo else []
    return dataclasses.replace(
        _order(body, prompts, body.max_tokens, limits),
        with_logprobs=body.logprobs is not None,
        num_top_logprobs=body.logprobs or 0,
        texts=texts,
        num_added=len(bos) if is_text else 0,
    )


def _list_prompts(body: CompletionBody) -> list[str | list[int]]:
    if isinstance(body.prompt, str):
        return [body.prompt]
    single = [item for item in body.prompt if isinstance(item, int)]
    return [single] if single else [item for item in body.prompt if not isinstance(item, int)]


def order_chat(body: ChatBody, tokenizer: Tokenizer, limits: Limits, think_tags: tuple[str, str]) -> Order:
    """What a body of `/v1/chat/completions` asks for.

    Raises:
      ApiError: Status 400: out of the limits, or a conversation that the model's template refuses.
    """
    if body.n > limits.max_choices:
        raise _too_many(1, body.n, limits)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", param="top_logprobs")
    _check_top("top_logprobs", body.top_logprobs, limits)
    messages = [
        {"role": "system" if message.role == "developer" else message.role, "content": message.text}
        for message in body.messages
    ]
    try:
        prompt = encode_conversation(messages, tokenizer, think_tags)
    except MagistralError as error:
        raise bad_request(f"`messages`: {error}", param="messages") from None
    max_tokens = body.max_completion_tokens or body.max_tokens or limits.max_new_tokens
    return dataclasses.replace(
        _order(body, [prompt], max_tokens, limits), with_logprobs=body.logprobs, num_top_logprobs=body.top_logprobs
    )


def _order(body: SamplingBody, prompts: list[np.ndarray], max_tokens: int, limits: Limits) -> Order:
    for prompt in prompts:
        if not 1 <= len(prompt) <= limits.max_prompt_tokens:
            raise bad_request(
                f"The prompt has {len(prompt)} tokens; expected 1 to {limits.max_prompt_tokens}.",
                param="messages" if isinstance(body, ChatBody) else "prompt",
                code="context_length_exceeded",
            )
    if max_tokens > limits.max_new_tokens:
        raise bad_request(f"`max_tokens` is {max_tokens}; the limit is {limits.max_new_tokens}.", param="max_tokens")
    return Order(
        prompts,
        SamplingParams(body.temperature, body.top_p, max(body.top_k, 0), max_tokens),
        [random_id(body.seed, index) for index in range(body.n)] if max_tokens else [],
        body.stops,
        with_logprobs=False,
        num_top_logprobs=0,
        with_token_ids=body.return_token_ids,
        is_streamed=body.stream,
        with_usage=body.stream_options.include_usage,
    )


def _check_top(name: str, wanted: int, limits: Limits) -> None:
    if wanted > limits.max_top_logprobs:
        raise bad_request(
            f"`{name}` is {wanted}; this service reports at most {limits.max_top_logprobs} (`serve.max_top_logprobs`).",
            param=name,
        )


def random_id(seed: int | None, index: int) -> int:
    """Name of the random numbers of a prompt's completion `index`: of the seed where there is one, else drawn."""
    if seed is None:
        return secrets.randbits(32)
    return int.from_bytes(hashlib.blake2s(f"{seed}/{index}".encode(), digest_size=4).digest(), "big")


def _too_many(num_prompts: int, n: int, limits: Limits) -> ApiError:
    return bad_request(
        f"{num_prompts} prompts times `n` {n} are {num_prompts * n} completions; the limit is {limits.max_choices}.",
        param="n",
    )

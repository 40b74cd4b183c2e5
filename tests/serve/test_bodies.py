"""Every wrong body is one sentence that names the parameter; what asks for nothing is let through."""

import json
from typing import Any

import pytest

from magistral_jax.serve.bodies import ChatBody, CompletionBody, parse_body
from magistral_jax.serve.errors import ApiError

PROMPT = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def refusal(kind: Any, data: Any) -> ApiError:
    with pytest.raises(ApiError) as error:
        parse_body(kind, data if isinstance(data, bytes) else json.dumps(data).encode())
    assert error.value.status in (400, 413)
    json.dumps(error.value.body, ensure_ascii=False).encode()
    return error.value


FORMS = "`prompt` must be a text, token ids, or a list of texts or of lists of token ids, "
STOPS = "`stop` must be a text of 1 to 256 characters or a list of at most 16 of them, "
JSON = "The body is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"{", JSON),
        ([1], "The body must be a JSON object, not [1]."),
        ({"prompt": "x"}, "`model` must be the name of the model, and is missing."),
        ({"model": "m"}, FORMS + "and is missing."),
        (PROMPT | {"prompt": [1, "a"]}, FORMS + 'not [1, "a"].'),
        (PROMPT | {"prompt": True}, FORMS + "not true."),
        (PROMPT | {"n": 0}, "`n` must be a whole number of at least 1, not 0."),
        (PROMPT | {"n": "2"}, '`n` must be a whole number of at least 1, not "2".'),
        (PROMPT | {"temperature": 3}, "`temperature` must be a number from 0 to 2, not 3."),
        (PROMPT | {"temperature": float("nan")}, "`temperature` must be a number from 0 to 2, not NaN."),
        (PROMPT | {"top_p": 0}, "`top_p` must be a number above 0 and up to 1, not 0."),
        (PROMPT | {"top_k": 2**40}, "`top_k` must be a whole number; 0 and -1 switch it off, not 1099511627776."),
        (PROMPT | {"stop": [""]}, STOPS + 'not [""].'),
        (PROMPT | {"stop": ["x"] * 17}, STOPS + "not " + json.dumps(["x"] * 17)[:57] + "…."),
        (PROMPT | {"logprobs": 21}, "`logprobs` must be a whole number from 0 to 20, not 21."),
        (
            PROMPT | {"stream_options": {"x": 1}},
            '`stream_options` must be an object such as {include_usage: true}, not {"x": 1}.',
        ),
        (PROMPT | {"max_tokens": 2.5}, "`max_tokens` must be a whole number of at least 0, not 2.5."),
        (PROMPT | {"best_of": 3}, "`best_of` (3) is not supported by this service."),
        (PROMPT | {"frequency_penalty": 0.5}, "`frequency_penalty` (0.5) is not supported by this service."),
        (PROMPT | {"temprature": 1}, "`temprature` (1) is not supported by this service."),
        (PROMPT | {"messages": []}, "`messages` ([]) is not supported by this service."),
    ],
)
def test_a_wrong_completion_body_is_one_sentence(data: Any, sentence: str):
    assert refusal(CompletionBody, data).message == sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}]},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 21},
        {"logprobs": 1},
        {"model": 3},
        {"half \ud800": 1},
    ],
)
def test_a_wrong_chat_body_names_the_parameter(changes: Any):
    error = refusal(ChatBody, CHAT | changes)
    (name,) = (name.replace("\ud800", "?") for name in changes)
    assert error.param == name
    assert f"`{name}`" in error.message
    assert "\n" not in error.message


def test_what_asks_for_nothing_is_let_through():
    nothing = {
        "best_of": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": None,
        "logit_bias": {},
        "tools": [],
        "response_format": {"type": "text"},
        "user": "somebody",
        "metadata": {"a": "b"},
        "temperature": None,
        "seed": None,
    }
    assert parse_body(ChatBody, json.dumps(CHAT | nothing).encode()) == parse_body(ChatBody, json.dumps(CHAT).encode())


def test_messages_may_be_parts_and_may_carry_the_nulls_of_an_answer():
    body = CHAT | {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None},
        ]
    }
    assert [message.text for message in parse_body(ChatBody, json.dumps(body).encode()).messages] == ["ab", "c"]


@pytest.mark.parametrize("prompt", ["x", [1, 2], ["x", "y"], [[1], [2, 3]]])
def test_prompts_come_in_four_forms(prompt: Any):
    assert parse_body(CompletionBody, json.dumps(PROMPT | {"prompt": prompt}).encode()).prompt == prompt

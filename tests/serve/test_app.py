"""The other routes, and errors in the shape that clients read."""

from typing import Any

import openai
import pytest


def refusal(answer: Any) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return answer.status_code, error["message"]


def test_the_one_model_is_listed(service: Any):
    (model,) = service.openai.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "magistral-jax")


def test_health_and_metrics(service: Any):
    service.text("abc", max_tokens=5, seed=1)
    assert service.http.get("/health").json() == {"status": "ok"}
    answer = service.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    values = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
    assert float(values["magistral_slots"]) == 8
    assert float(values["magistral_pages"]) == float(values["magistral_pages_free"])
    assert float(values["magistral_sampled_tokens_total"]) >= 5
    assert float(values['magistral_requests_total{route="/v1/completions",status="200"}']) >= 1
    assert float(values["magistral_time_to_first_token_seconds_count"]) >= 1


@pytest.mark.parametrize(
    ("changes", "status", "sentence"),
    [
        ({"model": "other"}, 404, "There is no model `other` here; this service has `tiny`."),
        ({"prompt": "x" * 200}, 400, "The prompt has 201 tokens; expected 1 to 160."),
        ({"prompt": ""}, None, None),  # the `bos` alone
        ({"prompt": "", "add_special_tokens": False}, 400, "The prompt has 0 tokens; expected 1 to 160."),
        ({"prompt": []}, 400, "`prompt` is an empty list; expected at least one prompt."),
        ({"prompt": [[]]}, 400, "The prompt has 0 tokens; expected 1 to 160."),
        ({"prompt": [264]}, 400, "`prompt`: token ids go from 0 to 263."),
        ({"prompt": [2**80]}, 400, "`prompt`: token ids go from 0 to 263."),
        ({"prompt": [-1]}, 400, "`prompt`: token ids go from 0 to 263."),
        ({"n": 13}, 400, "1 prompts times `n` 13 are 13 completions; the limit is 12."),
        ({"n": 10**20}, 400, f"1 prompts times `n` {10**20} are {10**20} completions; the limit is 12."),
        ({"prompt": ["a"] * 7, "n": 2}, 400, "7 prompts times `n` 2 are 14 completions; the limit is 12."),
        ({"max_tokens": 801}, 400, "`max_tokens` is 801; the limit is 800."),
        (
            {"logprobs": 2},
            400,
            "`logprobs` is 2; this service reports at most 1 (`serve.max_top_logprobs`).",
        ),
        ({"max_tokens": 0}, 400, "`max_tokens` is 0, which goes with `echo` and `n` 1 only."),
        ({"presence_penalty": 1}, 400, "`presence_penalty` (1) is not supported by this service."),
    ],
)
def test_what_cannot_be_served_is_one_sentence(service: Any, changes: Any, status: int | None, sentence: str | None):
    answer = service.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2} | changes)
    if status is None:
        assert answer.status_code == 200
    else:
        assert refusal(answer) == (status, sentence)


def test_a_conversation_that_cannot_be_served_is_one_sentence(service: Any):
    messages = [{"role": "user", "content": "x"}]
    ask = lambda changes: service.http.post(
        "/v1/chat/completions", json={"model": "tiny", "messages": messages} | changes
    )
    assert refusal(ask({"messages": [{"role": "user", "content": "x" * 200}]}))[1].startswith("The prompt has 2")
    assert refusal(ask({"top_logprobs": 1})) == (400, "`top_logprobs` needs `logprobs` to be true.")
    assert refusal(ask({"max_tokens": 801})) == (400, "`max_tokens` is 801; the limit is 800.")
    assert refusal(ask({"n": 13}))[0] == 400


def test_routes_methods_and_bodies_that_do_not_exist(service: Any):
    assert refusal(service.http.get("/v2")) == (404, "There is no route /v2 here.")
    assert refusal(service.http.get("/v1/completions")) == (405, "The route /v1/completions does not take GET.")
    assert refusal(service.http.post("/v1/completions", content=b"{"))[0] == 400
    large = service.http.post("/v1/completions", json={"model": "tiny", "prompt": "x" * 2**20})
    assert refusal(large) == (413, "The body is larger than 1048576 bytes, the limit of this service.")


def test_openais_client_raises_its_own_errors(service: Any):
    with pytest.raises(openai.NotFoundError, match="There is no model `gpt`"):
        service.openai.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="not supported"):
        service.openai.completions.create(model="tiny", prompt="x", best_of=4)


def test_half_a_character_in_a_prompt_does_no_harm(service: Any):
    body = b'{"model": "tiny", "prompt": "a\\ud800b \\ud83d\\ude00", "max_tokens": 0, "echo": true}'
    answer = service.http.post("/v1/completions", content=body)
    assert answer.json()["choices"][0]["text"] == "a?b \U0001f600"
    assert refusal(service.http.post("/v1/completions", content=b'{"model": "\xed\xa0\x80"}'))[0] == 400

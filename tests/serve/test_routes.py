"""Completions and chats as OpenAI's own client sees them, and that they are what the engine samples."""

import concurrent.futures
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from magistral_jax.commands.setup import load_model, make_batcher
from magistral_jax.data.chat import encode_conversation
from magistral_jax.data.tokenizer import load_tokenizer
from magistral_jax.generate.batching import GenerationRequest
from magistral_jax.policy.transformer import unstack
from magistral_jax.records import Rollout, SamplingParams
from magistral_jax.serve.orders import random_id

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "<think>.</think>4"},
    {"role": "user", "content": "And a <|im_end|>?"},
]
PROMPT = "What is 2 + 2? 數 é"


@pytest.fixture(scope="module")
def directly(service: Any) -> Callable[..., Rollout]:
    """The same request to an engine of the same configuration, without any service."""
    model = load_model(service.config)
    batcher = make_batcher(service.config, model)
    batcher.set_weights(unstack(model.params, model.config), 0)

    def run(prompt_ids: Any, sampling: SamplingParams, name: int = 0) -> Rollout:
        batcher.submit(GenerationRequest(0, np.asarray(prompt_ids, np.int32), sampling, name))
        rollouts: list[Rollout] = []
        while not rollouts:
            rollouts = batcher.step()
        return rollouts[0]

    return run


@pytest.fixture(scope="module")
def tokenizer(models: Any) -> Any:
    return load_tokenizer(models(0))


# ---- completions ----------------------------------------------------------------------------------------------------


def test_a_completion_is_what_the_engine_samples(service: Any, directly: Any, tokenizer: Any):
    ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
    cases = [
        ({"temperature": 0}, SamplingParams(0.0, 1.0, 0, 40), 0),
        ({"seed": 5}, SamplingParams(1.0, 1.0, 0, 40), 5),
        ({"seed": 5, "top_p": 0.5, "temperature": 1.5}, SamplingParams(1.5, 0.5, 0, 40), 5),
        ({"seed": -1, "top_k": 3}, SamplingParams(1.0, 1.0, 3, 40), -1),
    ]
    for settings, sampling, seed in cases:
        got = service.complete(PROMPT, max_tokens=40, logprobs=0, return_token_ids=True, **settings)
        (choice,) = got["choices"]
        rollout = directly(ids, sampling, random_id(seed, 0))
        assert choice["prompt_token_ids"] == ids
        assert choice["token_ids"] == rollout.completion_ids.tolist()
        assert choice["weight_versions"] == [0] * len(rollout.completion_ids)
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], rollout.behavior_logprob, atol=1e-5)
        assert choice["finish_reason"] == ("length" if rollout.truncated else "stop")
        shown = rollout.completion_ids if rollout.truncated else rollout.completion_ids[:-1]
        assert choice["text"] == tokenizer.decode(shown)
        assert got["usage"] == {
            "prompt_tokens": len(ids),
            "completion_tokens": len(rollout.completion_ids),
            "total_tokens": len(ids) + len(rollout.completion_ids),
        }


def test_a_prompt_may_be_text_or_ids_alone_or_in_a_list(service: Any, tokenizer: Any):
    ids = [tokenizer.bos_id, *tokenizer.encode("abc")]
    ids = [int(i) for i in ids]
    alone = service.text("abc", temperature=0, max_tokens=8)
    assert service.text(ids, temperature=0, max_tokens=8) == alone
    assert service.text("<s>abc", temperature=0, max_tokens=8, add_special_tokens=False) == alone
    several = service.complete(["abc", "other", "abc"], temperature=0, max_tokens=8)["choices"]
    assert [choice["index"] for choice in several] == [0, 1, 2]
    assert [several[0]["text"], several[2]["text"]] == [alone, alone]
    assert [c["text"] for c in service.complete([ids, ids], temperature=0, max_tokens=8)["choices"]] == [alone] * 2


def test_a_seed_gives_the_same_samples_whatever_else_runs(service: Any):
    ask = lambda: service.openai.completions.create(model="tiny", prompt="abc", max_tokens=60, n=3, seed=11)
    texts = lambda answer: [choice.text for choice in answer.choices]
    alone = texts(ask())
    assert len(set(alone)) == 3
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        noise = [pool.submit(service.text, f"noise {i}", max_tokens=100) for i in range(4)]
        among = pool.submit(lambda: texts(ask()))
        assert among.result() == alone
        for future in noise:
            future.result()
    assert service.text("abc", max_tokens=60, seed=11) == alone[0]
    assert service.text("abc", max_tokens=60, seed=12) != alone[0]
    assert service.text("abc", max_tokens=60) != service.text("abc", max_tokens=60)


def test_a_stop_text_ends_the_completion_before_it(service: Any):
    whole = service.text("abc", seed=2, max_tokens=200)
    stop = next(whole[at : at + 3] for at in range(20, len(whole)) if "\ufffd" not in whole[at : at + 3])
    for stops in (stop, ["never in it", stop]):
        got = service.complete("abc", seed=2, max_tokens=200, stop=stops, logprobs=0)
        (choice,) = got["choices"]
        assert choice["text"] == whole.split(stop)[0]
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["tokens"]) == got["usage"]["completion_tokens"] < 200
    stream = service.openai.completions.create(
        model="tiny", prompt="abc", seed=2, max_tokens=200, stop=stop, stream=True
    )
    pieces = [event.choices[0] for event in stream]
    assert "".join(piece.text for piece in pieces) == whole.split(stop)[0]
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]


def test_a_stream_adds_up_to_the_whole_answer(service: Any):
    settings = {"model": "tiny", "prompt": ["abc", "d"], "max_tokens": 50, "n": 2, "seed": 4, "logprobs": 1}
    whole = service.openai.completions.create(**settings)
    stream = service.openai.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    *events, last = list(stream)
    assert last.choices == []
    assert last.usage == whole.usage
    assert len(events) > 8
    for choice in whole.choices:
        mine = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            together = [entry for piece in mine for entry in getattr(piece.logprobs, field)]
            assert together == getattr(choice.logprobs, field)
        assert [piece.finish_reason for piece in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == choice.finish_reason


def test_a_stream_of_token_ids_is_the_record(service: Any):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "seed": 4, "return_token_ids": True}
    (whole,) = service.http.post("/v1/completions", json=settings).json()["choices"]
    with service.http.stream("POST", "/v1/completions", json=settings | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        *lines, end = [line for line in answer.iter_lines() if line]
    assert end == "data: [DONE]"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert [choice.get("prompt_token_ids") for choice in choices] == [whole["prompt_token_ids"]] + [None] * (
        len(choices) - 1
    )


def test_an_echoed_prompt_has_the_log_probs_of_its_tokens(service: Any, directly: Any, tokenizer: Any):
    """As lm_eval asks: the prompt's tokens, then one that is sampled; a sampled text scores as it was sampled."""
    ids = [int(i) for i in tokenizer.encode("abc")]
    rollout = directly(ids, SamplingParams(0.0, 1.0, 0, 100))
    sequence = [*ids, *rollout.completion_ids.tolist()]
    (choice,) = service.complete(sequence, echo=True, logprobs=1, max_tokens=1, temperature=0)["choices"]
    scores = choice["logprobs"]
    assert len(scores["tokens"]) == len(sequence) + 1
    assert (scores["token_logprobs"][0], scores["top_logprobs"][0]) == (None, None)
    mine = slice(len(ids), len(sequence))
    np.testing.assert_allclose(scores["token_logprobs"][mine], rollout.behavior_logprob, atol=2e-5)
    is_greedy = [
        token == max(best.values())
        for token, best in zip(scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True)
    ]
    assert all(is_greedy[len(ids) - 1 :])  # greedy sampling took the best one each time
    assert not all(is_greedy[: len(ids) - 1])
    assert choice["text"].startswith(tokenizer.decode(sequence))
    assert scores["text_offset"][len(ids)] == 3


def test_an_echo_without_sampling_only_scores(service: Any):
    got = service.complete(["abc", "a"], echo=True, logprobs=0, max_tokens=0)
    assert [choice["text"] for choice in got["choices"]] == ["abc", "a"]
    assert [choice["logprobs"]["tokens"] for choice in got["choices"]] == [["<s>", "a", "b", "c"], ["<s>", "a"]]
    assert got["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 2]
    assert got["choices"][0]["finish_reason"] == "length"
    assert got["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}
    long = service.complete([5] * 160, echo=True, logprobs=0, max_tokens=0)  # several chunks
    assert len(long["choices"][0]["logprobs"]["token_logprobs"]) == 160


# ---- chat -----------------------------------------------------------------------------------------------------------


def test_a_conversation_goes_through_the_template(service: Any, directly: Any, tokenizer: Any):
    ids = encode_conversation(MESSAGES, tokenizer)
    answer = service.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=30, temperature=0, logprobs=True, top_logprobs=1
    )
    (choice,) = answer.choices
    rollout = directly(ids, SamplingParams(0.0, 1.0, 0, 30))
    entries = choice.logprobs.content
    np.testing.assert_allclose([entry.logprob for entry in entries], rollout.behavior_logprob, atol=1e-5)
    assert choice.message.role == "assistant"
    assert choice.message.content == tokenizer.decode(
        rollout.completion_ids if rollout.truncated else rollout.completion_ids[:-1]
    )
    for entry in entries:
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
    assert answer.usage.prompt_tokens == len(ids)


def test_a_streamed_chat_adds_up(service: Any):
    settings = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 40, "n": 2, "seed": 9}
    whole = service.openai.chat.completions.create(**settings)
    events = list(service.openai.chat.completions.create(**settings, stream=True))
    assert {event.object for event in events} == {"chat.completion.chunk"}
    for choice in whole.choices:
        deltas = [event.choices[0] for event in events if event.choices[0].index == choice.index]
        assert deltas[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in deltas) == choice.message.content
        assert [part.finish_reason for part in deltas if part.finish_reason] == [choice.finish_reason]


def test_a_chat_ends_where_the_model_ends_it(service: Any):
    """Without `max_tokens` it may take all that the engine allows."""
    answer = service.openai.chat.completions.create(model="tiny", messages=MESSAGES, seed=1)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 16 < answer.usage.completion_tokens <= 800
    if answer.choices[0].finish_reason == "stop":
        assert not answer.choices[0].message.content.endswith("<|im_end|>")


def test_who_gives_way_for_want_of_pages_streams_on_as_if_nothing_had_been(start: Any, service: Any):
    settings = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "n": 8, "seed": 5, "return_token_ids": True}
    expected = service.http.post("/v1/completions", json=settings).json()["choices"]
    with start(generation__num_pages=125) as tight:
        with tight.http.stream("POST", "/v1/completions", json=settings | {"stream": True}) as answer:
            *lines, _ = [line for line in answer.iter_lines() if line]
        stats = tight.admin("stats")
    assert stats["num_preempted"] > 0
    assert stats["free_pages"] == stats["num_pages"] == 125
    got: dict[int, list[int]] = {index: [] for index in range(8)}
    for line in lines:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        got[choice["index"]] += choice["token_ids"]
    assert [got[choice["index"]] for choice in expected] == [choice["token_ids"] for choice in expected]


# ---- who goes away, and who has to wait -----------------------------------------------------------------------------


def test_a_client_that_hangs_up_frees_what_it_held(service: Any):
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 800, "n": 8, "stream": True}
    with service.http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: without it httpx hangs up
        next(lines)
        stats = service.admin("pause")
        assert stats["num_running"] > 0
        assert stats["free_pages"] < stats["num_pages"]
    service.wait_for(lambda: service.admin("stats")["num_running"] == 0)  # while the engine stands still
    stats = service.admin("stats")
    assert stats["free_pages"] == stats["num_pages"]
    service.admin("resume")
    assert 'route="/v1/completions",status="200"' in service.http.get("/metrics").text


def test_a_client_that_gives_up_waiting_frees_its_place(service: Any):
    service.admin("pause")
    body = {"model": "tiny", "prompt": "abc", "echo": True, "logprobs": 1}
    with pytest.raises(httpx.ReadTimeout):
        service.http.post("/v1/completions", json=body, timeout=0.5)
    service.wait_for(lambda: service.admin("stats")["num_waiting"] == service.admin("stats")["num_scoring"] == 0)
    service.admin("resume")
    assert service.text("abc", max_tokens=2) is not None
    assert 'status="499"' in service.http.get("/metrics").text


def test_too_many_requests_are_sent_away_and_those_who_wait_are_served(service: Any):
    service.admin("pause")
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "n": 8}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(service.http.post, "/v1/completions", json=body) for _ in range(2)]
        service.wait_for(lambda: service.admin("stats")["num_waiting"] == 16)
        refused = service.http.post("/v1/completions", json=body | {"n": 1})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "too_many_pending"
        service.admin("resume")
        for future in waiting:
            assert future.result().status_code == 200
    assert service.text("abc", max_tokens=2) is not None


# ---- alternatives ---------------------------------------------------------------------------------------------------


def test_the_most_probable_tokens_stand_beside_what_was_sampled(start: Any, service: Any):
    with start(serve__max_top_logprobs=3) as running:
        settings = {"model": "tiny", "prompt": "abc", "max_tokens": 30, "seed": 6}
        (choice,) = running.openai.completions.create(**settings, logprobs=3).choices
        # Looking for them changes no sample.
        assert choice.text == service.text("abc", max_tokens=30, seed=6)
        for token, logprob, top in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert len(top) in (3, 4)  # what was sampled stands there too, if it is none of them
            assert logprob in top.values() or token in top
            assert sorted(list(top.values())[:3], reverse=True) == list(top.values())[:3]
            assert sum(np.exp(list(top.values()))) <= 1 + 1e-5
        streamed = [
            event.choices[0] for event in running.openai.completions.create(**settings, logprobs=3, stream=True)
        ]
        pieces = [entry for piece in streamed for entry in piece.logprobs.top_logprobs]
        assert pieces == choice.logprobs.top_logprobs

        greedy = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "temperature": 0, "logprobs": True}
        (chat,) = running.openai.chat.completions.create(**greedy, top_logprobs=2).choices
        for entry in chat.logprobs.content:
            first, second = entry.top_logprobs
            assert (first.token, first.bytes) == (entry.token, entry.bytes)
            assert first.logprob == pytest.approx(entry.logprob, abs=1e-6)
            assert second.logprob <= first.logprob
        refused = running.http.post("/v1/completions", json=settings | {"logprobs": 4})
        assert refused.status_code == 400
        assert "at most 3" in refused.json()["error"]["message"]

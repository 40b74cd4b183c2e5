"""The end of a service: whoever is served is served to the end, and whoever comes late is told."""

import concurrent.futures
import socket
from typing import Any

import httpx
import openai
import pytest

from magistral_jax.generate import engine
from magistral_jax.records import MagistralError
from magistral_jax.serve.server import address_of, bind


def test_running_requests_end_and_new_ones_are_refused(start: Any):
    with start() as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running.admin("pause")
        text = pool.submit(running.text, "abc", max_tokens=100, seed=1)
        running.wait_for(lambda: running.admin("stats")["num_waiting"] == 1)
        running.server.handle_exit(2, None)
        running.wait_for(lambda: running.http.get("/health").status_code == 503)
        late = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert late.status_code == 503
        assert int(late.headers["retry-after"]) > 0
        assert late.json()["error"]["message"] == "The service is shutting down."
        running.admin("resume")
        assert len(text.result()) > 0
        running.wait_until_ended()
    assert running.server.failure is None


@pytest.mark.parametrize(("drain_seconds", "num_signals"), [(0.2, 1), (1000, 2)])
def test_requests_that_do_not_end_are_given_up(start: Any, drain_seconds: float, num_signals: int):
    with start(serve__drain_seconds=drain_seconds) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running.admin("pause")
        whole = pool.submit(running.http.post, "/v1/completions", json={"model": "tiny", "prompt": "x"})
        running.wait_for(lambda: running.admin("stats")["num_waiting"] == 1)
        stream = running.openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert next(stream).choices[0].delta.role == "assistant"  # the status was sent: what fails now is an event
        running.wait_for(lambda: running.admin("stats")["num_waiting"] == 2)
        for _ in range(num_signals):
            running.server.handle_exit(2, None)
        assert whole.result().status_code == 503
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        running.wait_until_ended()


def test_an_engine_that_fails_ends_the_service_with_an_error_for_everybody(start: Any, monkeypatch: pytest.MonkeyPatch):
    with start() as running:

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine, "decode_block", fail)
        answer = running.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_failed"
        running.wait_until_ended()
        assert str(running.server.failure) == "out of memory"


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MagistralError, match=rf"cannot listen on `serve.host` 127.0.0.1, `serve.port` {port}: "):
            bind("127.0.0.1", port)
    with pytest.raises(MagistralError, match=r"cannot listen on `serve.host` no.such.host.invalid"):
        bind("no.such.host.invalid", 0)


def test_the_address_is_one_to_connect_to():
    with bind("127.0.0.1", 0) as bound:
        assert address_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_connections_beyond_the_bound_are_answered_with_503(start: Any):
    with start(serve__max_connections=2) as running:
        running.http.close()  # its connection counts as well
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        status = lambda: httpx.get(f"{running.url}/health", timeout=60).status_code
        with socket.create_connection(address), socket.create_connection(address):
            running.wait_for(lambda: status() == 503)
        running.wait_for(lambda: status() == 200)


def test_a_client_that_does_not_send_its_request_is_not_waited_for(start: Any):
    with start(serve__request_seconds=0.2) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running.admin("pause")
        text = pool.submit(running.text, "abc", max_tokens=2)  # who waits for the service is another matter
        address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
        half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"
        for sent in (b"", b"GET /hea", half):
            with socket.create_connection(address, timeout=60) as silent:
                silent.sendall(sent)
                assert silent.recv(1) == b""
        running.admin("resume")
        assert isinstance(text.result(), str)

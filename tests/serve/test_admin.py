"""The owner's routes: nobody else gets in, and what they do to running completions."""

import concurrent.futures
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from magistral_jax.commands.setup import load_model
from magistral_jax.config import load
from magistral_jax.policy.fingerprint import fingerprint
from magistral_jax.policy.transformer import unstack

ROUTES = [("POST", "/admin/pause"), ("POST", "/admin/resume"), ("POST", "/admin/weights"), ("GET", "/admin/stats")]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_without_the_token_nobody_gets_in(service: Any, method: str, path: str):
    for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "Basic open sesame"}):
        answer = service.http.request(method, path, headers=headers, json={"path": "x"})
        assert answer.status_code == 401
        assert "Bearer TOKEN" in answer.json()["error"]["message"]
    assert not service.admin("stats")["is_paused"]


def test_a_paused_engine_stands_still_and_goes_on_where_it_was(service: Any):
    expected = service.text("abc", max_tokens=300, seed=6)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        before = service.admin("pause")
        assert before["is_paused"]
        assert service.http.get("/health").json() == {"status": "paused"}
        text = pool.submit(service.text, "abc", max_tokens=300, seed=6)
        service.wait_for(lambda: service.admin("stats")["num_waiting"] == 1)
        assert service.admin("stats")["num_steps"] == before["num_steps"]
        for _ in range(5):  # a few steps at a time
            service.admin("resume")
            service.admin("pause")
        service.admin("resume")
        assert text.result() == expected
    assert service.http.get("/health").json() == {"status": "ok"}


def test_weights_change_in_the_midst_of_completions(start: Any, models: Callable[[int], pathlib.Path]):
    with start() as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        old = running.text("abc", max_tokens=20, temperature=0)
        running.admin("pause")
        whole = pool.submit(running.complete, "abc", max_tokens=800, n=8, seed=3, return_token_ids=True)
        running.wait_for(lambda: running.admin("stats")["num_waiting"] == 8)
        running.admin("resume")
        running.wait_for(lambda: running.admin("stats")["num_running"] == 8)
        running.admin("pause")
        receipt = running.admin("weights", {"path": str(models(1))})
        running.admin("resume")
        versions = [choice["weight_versions"] for choice in whole.result()["choices"]]
        model = load_model(load([f"--policy.path={models(1)}"]))
        assert receipt == {
            "version": 1,
            "fingerprint": fingerprint(unstack(model.params, model.config)),
            "is_active": True,
        }
        assert any(set(choice) == {0, 1} for choice in versions)  # both, within one completion
        assert all(choice == sorted(choice) for choice in versions)
        assert running.text("abc", max_tokens=20, temperature=0) != old
        assert running.admin("weights", {"path": str(models(0))})["version"] == 2  # nobody has to pause for it
        assert running.text("abc", max_tokens=20, temperature=0) == old
        assert running.admin("stats")["version"] == 2


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve_on(
    service: Any, models: Callable[[int], pathlib.Path], tmp_path: pathlib.Path
):
    before = service.admin("stats")
    other = tmp_path / "other"
    shutil.copytree(models(1), other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 56}))
    damaged = tmp_path / "damaged"
    shutil.copytree(models(1), damaged)
    (damaged / "model.safetensors").write_bytes(b"no tensors")
    headers = {"Authorization": "Bearer open sesame"}
    for body, part in [
        ({"path": str(other)}, "describes another architecture than the model that is served"),
        ({"path": str(damaged)}, "truncated or damaged"),
        ({"path": str(tmp_path / "nowhere")}, "nowhere"),
        ({"path": 3}, 'must be a JSON object {"path": FOLDER}'),
        ({}, 'must be a JSON object {"path": FOLDER}'),
    ]:
        answer = service.http.post("/admin/weights", json=body, headers=headers)
        assert answer.status_code == 400
        assert part in answer.json()["error"]["message"]
    assert service.admin("stats")["version"] == before["version"]
    assert service.text("abc", max_tokens=2) is not None


def test_a_drained_swap_says_that_it_waits(start: Any, models: Callable[[int], pathlib.Path]):
    with start(generation__on_publish="drain") as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        running.admin("pause")
        text = pool.submit(running.complete, "abc", max_tokens=800, n=8, seed=3, return_token_ids=True)
        running.wait_for(lambda: running.admin("stats")["num_waiting"] == 8)
        running.admin("resume")
        running.wait_for(lambda: running.admin("stats")["num_running"] > 0)
        running.admin("pause")
        first = running.admin("weights", {"path": str(models(1))})
        second = running.admin("weights", {"path": str(models(1))})
        assert [(r["version"], r["is_active"]) for r in (first, second)] == [(1, False), (2, False)]
        assert running.admin("stats")["version"] == 0
        running.admin("resume")
        assert {v for choice in text.result()["choices"] for v in choice["weight_versions"]} == {0}
        running.wait_for(lambda: running.admin("stats")["version"] == 2)  # nobody has to ask for anything more


def test_a_service_without_a_token_has_no_admin(start: Any):
    with start(serve__admin_token_file="") as running:
        for method, path in ROUTES:
            answer = running.http.request(method, path, headers={"Authorization": "Bearer x"})
            assert answer.status_code == 403
            assert answer.json()["error"]["message"] == (
                "This service has no admin token: start it with `serve.admin_token_file`."
            )
        assert running.text("abc", max_tokens=30)

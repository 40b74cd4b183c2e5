"""Requests, rollouts and settings arrive as they were."""

import socket

import numpy as np
import pytest

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.handle import Intake
from magistral_jax.generate.messages import (
    EngineSettings,
    hello_frame,
    intake_frame,
    intake_of,
    requests_of,
    rollout_frame,
    rollout_of,
    settings_of,
    submit_frame,
)
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.records import Rollout, SamplingParams


def sent(frame: Frame) -> Frame:
    """The frame after a way through a socket."""
    ours, theirs = map(Channel, socket.socketpair())
    ours.send(frame)
    received = theirs.receive(timeout=60.0)
    ours.close()
    theirs.close()
    assert received is not None
    return received


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192)])
def test_settings(scaling: RopeScaling | None):
    model = ModelConfig(20, 16, 1, 2, 1, 8, 16, norm_eps=1e-6, sliding_window=5, rope_scaling=scaling)
    settings = EngineSettings(model, GenerationConfig(top_p=0.9, on_publish="drain"), (0, 7), 2**32 - 1, "bfloat16")
    frame = sent(hello_frame(settings, {"jax_platforms": None}))
    assert settings_of(frame) == settings
    assert frame.fields["jax"] == {"jax_platforms": None}


def test_requests():
    sampling = SamplingParams(temperature=0.1 + 0.2, top_p=1 / 3, top_k=5, max_new_tokens=9)
    requests = [GenerationRequest(2**32 - 1 - n, np.arange(n + 1, dtype=np.int32), sampling) for n in range(3)]
    found = requests_of(sent(submit_frame(requests)))
    assert [(r.request_id, r.prompt_ids.tolist(), r.sampling) for r in found] == [
        (r.request_id, r.prompt_ids.tolist(), r.sampling) for r in requests
    ]


@pytest.mark.parametrize("truncated", [True, False])
def test_rollouts(truncated: bool):
    prompt = np.array([4, 5], np.int32)
    logprob = np.array([-0.1, -1e-30, -87.25], np.float32)
    rollout = Rollout(
        12, prompt, np.array([1, 2, 3], np.int32), logprob, np.array([7, 7, 8], np.int32), truncated, engine_step=4
    )
    frame = sent(rollout_frame(rollout, {"busy": 1.5}))
    found = rollout_of(frame, prompt)
    assert (found.request_id, found.truncated, found.engine_step) == (12, truncated, 4)
    assert found.prompt_ids is prompt
    for name in ("completion_ids", "behavior_logprob", "weight_version"):
        assert getattr(found, name).dtype == getattr(rollout, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(rollout, name))
    assert frame.fields["usage"] == {"busy": 1.5}


@pytest.mark.parametrize("intake", [Intake(3, request_ids=(8, 9)), Intake(0, version=2)])
def test_intakes(intake: Intake):
    assert intake_of(sent(intake_frame(intake))) == intake

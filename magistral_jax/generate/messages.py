"""What the trainer's process and a generator's say to each other, as frames.

To the generator: hello (settings), submit (requests), weights (manifest, and the order how to fetch them), bound, hold
and advance (of a replay), stop. From it: ready, intake (what its engine took in), rollout, loaded or refused
(weights), receipt (of a swap), heartbeat, failure.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from magistral_jax.generate.config import GenerationConfig
from magistral_jax.generate.frames import Channel, Frame
from magistral_jax.generate.handle import Intake
from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.policy.config import ModelConfig, RopeScaling
from magistral_jax.publish.manifest import Manifest
from magistral_jax.publish.plane import Delivery, Order
from magistral_jax.records import Rollout, SamplingParams

BEAT_SECONDS = 1.0
"""Between two heartbeats of a generator."""


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """What an engine is made of."""

    model: ModelConfig
    generation: GenerationConfig
    stop_ids: tuple[int, ...]
    seed: int
    dtype: str
    """Precision of its weights."""


def hello_frame(settings: EngineSettings, jax_settings: dict[str, Any]) -> Frame:
    """The first word: what to build, and how jax is set up on the trainer's side."""
    return Frame("hello", {"engine": dataclasses.asdict(settings), "jax": jax_settings})


def settings_of(frame: Frame) -> EngineSettings:
    """What `hello_frame` was made of."""
    engine = frame.fields["engine"]
    model = dict(engine["model"])
    if model["rope_scaling"] is not None:
        model["rope_scaling"] = RopeScaling(**model["rope_scaling"])
    return EngineSettings(
        ModelConfig(**model),
        GenerationConfig(**engine["generation"]),
        tuple(engine["stop_ids"]),
        engine["seed"],
        engine["dtype"],
    )


def submit_frame(requests: Sequence[GenerationRequest]) -> Frame:
    """Requests to be queued."""
    fields = [{"id": r.request_id, "sampling": dataclasses.asdict(r.sampling)} for r in requests]
    return Frame("submit", {"requests": fields}, [r.prompt_ids for r in requests])


def requests_of(frame: Frame) -> list[GenerationRequest]:
    """What `submit_frame` was made of."""
    return [
        GenerationRequest(fields["id"], prompt_ids, SamplingParams(**fields["sampling"]))
        for fields, prompt_ids in zip(frame.fields["requests"], frame.arrays, strict=True)
    ]


def weights_frame(manifest: Manifest, order: Order) -> Frame:
    """A version to be fetched, and how."""
    fields = {"manifest": manifest.to_fields(), "order": dict(order.fields)}
    return Frame("weights", fields, (), order.descriptor, order.payload)


def delivery_of(frame: Frame, channel: Channel, peer: str) -> Delivery:
    """What `weights_frame` was made of; its payload is still on the channel."""
    manifest = Manifest.from_fields(frame.fields["manifest"])
    return Delivery(manifest, frame.fields["order"], frame.descriptor, frame.payload_size, channel.read_payload, peer)


def rollout_frame(rollout: Rollout, usage: dict[str, Any]) -> Frame:
    """A finished completion, with a reading of the meter; its prompt is known at the other end."""
    fields = {
        "id": rollout.request_id,
        "truncated": rollout.truncated,
        "step": rollout.engine_step,
        "usage": usage,
    }
    return Frame("rollout", fields, [rollout.completion_ids, rollout.behavior_logprob, rollout.weight_version])


def rollout_of(frame: Frame, prompt_ids: Int32[np.ndarray, " T"]) -> Rollout:
    """What `rollout_frame` was made of."""
    fields = frame.fields
    return Rollout(fields["id"], prompt_ids, *frame.arrays, truncated=fields["truncated"], engine_step=fields["step"])


def intake_frame(intake: Intake) -> Frame:
    """What an engine took in; which engine it is, the other end knows."""
    return Frame("intake", {"step": intake.step, "ids": intake.request_ids, "version": intake.version})


def intake_of(frame: Frame) -> Intake:
    """What `intake_frame` was made of."""
    return Intake(frame.fields["step"], tuple(frame.fields["ids"]), frame.fields["version"])

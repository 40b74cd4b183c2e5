"""What the loop holds of groups that have not ended: prompts, completions and rewards, by the ids of the schedule.

in: actions of the machine, which speak of ids; out: requests for the engine, items for the verifiers, whole groups.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import numpy as np

from magistral_jax.generate.sequences import GenerationRequest
from magistral_jax.records import Graded, Prompt, Reward, Rollout, SamplingParams, Verdict
from magistral_jax.verify.pool import VerifyItem

Group = tuple[Prompt, list[Graded]]


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What is asked for with a group: a prompt, how its completions are drawn, and how their length is judged."""

    prompt: Prompt
    sampling: SamplingParams
    length_cache: int | None = None  # l_cache of Eq. 1 in tokens; None: that of the settings


class Holdings:
    """Assignments, rollouts and rewards of the groups that are on their way, ready, or in the trainer.

    Args:
      group_size: G, completions of a group.
      assign: Assignment of a group, by its id; always the same.
      decode: Text of a completion.
    """

    def __init__(
        self,
        group_size: int,
        assign: Callable[[int], Assignment],
        decode: Callable[[np.ndarray], str],
    ) -> None:
        self._group_size, self._assign, self._decode = group_size, assign, decode
        self._assigned: dict[int, Assignment] = {}
        self.rollouts: dict[int, Rollout] = {}
        self.rewards: dict[int, Reward] = {}

    def requests(self, group_id: int) -> list[GenerationRequest]:
        """Begin a group: what the engine is asked for."""
        self._assigned[group_id] = self._assign(group_id)
        return [self.request(i) for i in self._members(group_id)]

    def request(self, request_id: int) -> GenerationRequest:
        """One request, of a group that need not have been begun."""
        group_id = request_id // self._group_size
        assigned = self._assigned.get(group_id) or self._assign(group_id)
        return GenerationRequest(request_id, assigned.prompt.token_ids, assigned.sampling)

    def item(self, request_id: int) -> VerifyItem:
        """What the verifiers are given of a finished completion."""
        rollout, group_id = self.rollouts[request_id], request_id // self._group_size
        assigned = self._assigned[group_id]
        return VerifyItem(
            request_id=request_id,
            problem=assigned.prompt.problem,
            completion=self._decode(rollout.completion_ids),
            num_tokens=len(rollout.completion_ids),
            max_length=assigned.sampling.max_new_tokens,
            length_cache=assigned.length_cache,
            truncated=rollout.truncated,
            group=group_id,
            group_size=self._group_size,
            test_seed=group_id,
        )

    def look(self, group_id: int) -> Group:
        """All that is held of a complete group."""
        prompt = self._assigned[group_id].prompt
        return prompt, [Graded(self.rollouts[i], self.rewards[i]) for i in self._members(group_id)]

    def take(self, group_id: int) -> Group:
        """Remove and return all that is held of a complete group."""
        group = self.look(group_id)
        self._forget(group_id)
        return group

    def keep_only(self, group_ids: Iterable[int]) -> None:
        """Forget all other groups: after a resume they are sampled anew."""
        for group_id in self._assigned.keys() - set(group_ids):
            self._forget(group_id)

    def pack(self, group_ids: Iterable[int]) -> bytes:
        """Complete groups as bytes, for a checkpoint; their numbers keep every bit."""
        packer = msgpack.Packer()
        return b"".join(packer.pack(_to_plain(graded)) for group_id in group_ids for graded in self.look(group_id)[1])

    def unpack(self, packed: bytes) -> None:
        """Take up the groups that `pack` packed."""
        unpacker = msgpack.Unpacker(max_buffer_size=max(len(packed), 1))
        unpacker.feed(packed)
        for plain in unpacker:
            request_id = plain[0]
            group_id = request_id // self._group_size
            if group_id not in self._assigned:
                self._assigned[group_id] = self._assign(group_id)
            graded = _from_plain(plain, self._assigned[group_id].prompt)
            self.rollouts[request_id], self.rewards[request_id] = graded.rollout, graded.reward

    def _members(self, group_id: int) -> range:
        return range(group_id * self._group_size, (group_id + 1) * self._group_size)

    def _forget(self, group_id: int) -> None:
        self._assigned.pop(group_id, None)
        for request_id in self._members(group_id):
            self.rollouts.pop(request_id, None)
            self.rewards.pop(request_id, None)


def _to_plain(graded: Graded) -> list[Any]:
    rollout, reward = graded.rollout, graded.reward
    arrays = (rollout.completion_ids, rollout.behavior_logprob, rollout.weight_version)
    return [
        rollout.request_id,
        *(array.tobytes() for array in arrays),
        [rollout.truncated, rollout.engine, rollout.engine_step],
        {**dataclasses.asdict(reward), "verdict": reward.verdict.value},
    ]


def _from_plain(plain: list[Any], prompt: Prompt) -> Graded:
    request_id, ids, logprob, versions, rest, reward = plain
    ids, versions = (np.frombuffer(data, np.int32) for data in (ids, versions))
    rollout = Rollout(request_id, prompt.token_ids, ids, np.frombuffer(logprob, np.float32), versions, *rest)
    return Graded(rollout, Reward(**{**reward, "verdict": Verdict(reward["verdict"])}))

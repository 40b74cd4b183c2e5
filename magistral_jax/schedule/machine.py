"""The asynchronous schedule as a pure state machine: `step(state, event) -> (state, actions)`.

It knows prompts, versions and rewards as numbers, and nothing of arrays, threads or clocks: the live driver, a replay
and a simulation run the same code. A group's id is its place in the endless order of prompts, and its completions are
requests `id · G … id · G + G − 1`, so that no request is ever ambiguous.

Every dispatched sequence ends in exactly one counter: trained, filtered (zero variance), or dropped with a reason.

An event costs O(G + S + log n), whatever number n of groups is on its way, S being the versions that these were
dispatched under: the maps are persistent (a change shares all the rest with the state before), and what admission asks
for is counted along. A batch costs O(n log n) once, to find its oldest groups; so does each group that is dispatched
again after a stop.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeVar, get_args

from magistral_jax.schedule.state import Pending, Rules, State, from_saved, to_saved

# ---- events: what happened ----


@dataclasses.dataclass(frozen=True)
class Started:
    """The generator holds weights; sampling may begin."""


@dataclasses.dataclass(frozen=True)
class Resumed:
    """The run stood still, whatever ended it, and goes on: what was on its way is dispatched again, whole groups."""


@dataclasses.dataclass(frozen=True)
class GeneratorJoined:
    """A generator holds weights and takes requests."""

    generator: int


@dataclasses.dataclass(frozen=True)
class GeneratorLost:
    """A generator died. Its requests are still on their way: others, or its replacement, sample them anew."""

    generator: int


@dataclasses.dataclass(frozen=True)
class Generated:
    """A completion ended."""

    request_id: int


@dataclasses.dataclass(frozen=True)
class Verified:
    """A completion was graded; `reward` None means that the verifier itself failed, retries included."""

    request_id: int
    reward: float | None


@dataclasses.dataclass(frozen=True)
class Trained:
    """The batch in the trainer is done."""


@dataclasses.dataclass(frozen=True)
class StageBegan:
    """The next stage of the curriculum: its rules hold from now on, and its pool for what is dispatched from now on."""

    stage: int
    pool: str  # of problems, as `data.pool` writes it; the machine only hands it on


@dataclasses.dataclass(frozen=True)
class PoolDrawn:
    """The pool of the stage was drawn anew."""

    pool: str


@dataclasses.dataclass(frozen=True)
class StopRequested:
    """The user, or a failed role, asks for an orderly end."""


Event = (
    Started
    | Resumed
    | GeneratorJoined
    | GeneratorLost
    | Generated
    | Verified
    | Trained
    | StageBegan
    | PoolDrawn
    | StopRequested
)

# ---- actions: what is to be done ----


@dataclasses.dataclass(frozen=True)
class OpenPool:
    """Take the prompts of groups from `first_group` on out of this pool; batches from number `first_step` on follow."""

    first_group: int
    first_step: int
    stage: int
    pool: str


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Sample a group."""

    group_id: int


@dataclasses.dataclass(frozen=True)
class Verify:
    """Grade a completion."""

    request_id: int


@dataclasses.dataclass(frozen=True)
class Discard:
    """Forget a group's data; it ended as `reason`."""

    group_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Train:
    """Update on these groups."""

    step: int
    group_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Publish:
    """Send the trainer's weights to the generators."""

    version: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Save the run as it stands after `step` batches."""

    step: int


@dataclasses.dataclass(frozen=True)
class Finish:
    """The loop is over."""


Action = OpenPool | Dispatch | Verify | Discard | Train | Publish | Checkpoint | Finish


def step(rules: Rules, state: State, event: Event) -> tuple[State, list[Action]]:
    """What an event changes, and what is to be done about it.

    Raises:
      ValueError: The event speaks of something that is not on its way: a result lost its owner or came twice.
    """
    if state.is_finished and not isinstance(event, Resumed):
        return state, []
    actions: list[Action] = []
    match event:
        case Started():
            pass
        case Resumed():
            state = from_saved(to_saved(state))
        case GeneratorJoined(generator) | GeneratorLost(generator):
            state = _count_generators(state, generator, joins=isinstance(event, GeneratorJoined))
        case Generated(request_id):
            return _end_completion(rules, state, request_id)  # admission counts what is graded
        case Verified(request_id, reward):
            state, actions = _grade(rules, state, request_id, reward)
        case Trained():
            state, actions = _finish_batch(rules, state)
        case StageBegan() | PoolDrawn():
            state, actions = _open_pool(rules, state, event)
        case StopRequested():
            state = dataclasses.replace(state, is_stopping=True)
    rules = rules.at(state.stage)
    for advance in (_end, _train, _dispatch):
        state, more = advance(rules, state)
        actions += more
    return state, actions


Limit = Literal["num_async", "ready_batches", "max_staleness"]
LIMITS: tuple[Limit, ...] = get_args(Limit)


def limit(rules: Rules, state: State) -> Limit | None:
    """The setting of `ScheduleConfig` that keeps the generators from more work; None where none does."""
    rules = rules.at(state.stage)
    if state.num_in_flight + rules.group_size > rules.num_async:
        return "num_async"
    if len(state.ready) * rules.group_size >= rules.max_ready:
        return "ready_batches"
    # A group dispatched now has its turn when all those before it are trained: that must not be too late.
    num_before = len(state.pending) + len(state.ready)
    if bool(state.training) + num_before * rules.group_size // rules.batch_size > rules.max_staleness:
        return "max_staleness"
    return None


def is_at_bound(rules: Rules, state: State) -> bool:
    """Whether admission, and nothing else, keeps the generator from more work."""
    return limit(rules, state) is not None


def _count_generators(state: State, generator: int, *, joins: bool) -> State:
    known = state.generators or frozenset()
    if joins == (generator in known):
        raise ValueError(f"generator {generator} {'joined twice' if joins else 'is lost, and was not there'}")
    return dataclasses.replace(state, generators=known ^ {generator})


def _open_pool(rules: Rules, state: State, event: StageBegan | PoolDrawn) -> tuple[State, list[Action]]:
    """What is on its way stays what it was; what is ready counts for a batch of the new size."""
    if isinstance(event, StageBegan):
        if not 0 <= event.stage < len(rules.stages):
            raise ValueError(f"stage {event.stage} began, and there are {len(rules.stages)}")
        state = dataclasses.replace(state, stage=event.stage)
    first_step = state.num_done + bool(state.training)
    return state, [OpenPool(state.next_group, first_step, state.stage, event.pool)]


def _member(rules: Rules, state: State, request_id: int) -> tuple[int, int, Pending]:
    group_id, member = divmod(request_id, rules.group_size)
    group = state.pending.get(group_id)
    if group is None or member in group.rewards:
        raise ValueError(f"request {request_id} of group {group_id} is not on its way")
    return group_id, member, group


def _end_completion(rules: Rules, state: State, request_id: int) -> tuple[State, list[Action]]:
    group_id, member, group = _member(rules, state, request_id)
    if member in group.ended:
        raise ValueError(f"request {request_id} of group {group_id} ended twice")
    group = Pending(group.version, group.rewards, group.ended | {member})
    return dataclasses.replace(state, pending=state.pending.set(group_id, group)), [Verify(request_id)]


def _grade(rules: Rules, state: State, request_id: int, reward: float | None) -> tuple[State, list[Action]]:
    group_id, member, group = _member(rules, state, request_id)
    rewards = {**group.rewards, member: reward}
    is_complete = len(rewards) == rules.group_size
    state = dataclasses.replace(
        state,
        num_in_flight=state.num_in_flight - 1,
        pending=state.pending.delete(group_id)
        if is_complete
        else state.pending.set(group_id, Pending(group.version, rewards, group.ended)),
    )
    if not is_complete:
        return state, []
    known = [value for value in rewards.values() if value is not None]
    if len(known) < rules.group_size:
        return _discard(rules, state, group_id, group.version, "verifier_failed")
    if rules.filter_zero_variance and max(known) - min(known) < 1e-6:
        return _discard(rules, state, group_id, group.version, "zero_variance")
    return dataclasses.replace(
        state,
        ready=state.ready.set(group_id, group.version),
        num_ready_by_version=_plus(state.num_ready_by_version, group.version, 1),
    ), []


def _discard(rules: Rules, state: State, group_id: int, version: int, reason: str) -> tuple[State, list[Action]]:
    state = dataclasses.replace(state, num_by_version=_plus(state.num_by_version, version, -1))
    return _count(rules, state, reason), [Discard(group_id, reason)]


def _finish_batch(rules: Rules, state: State) -> tuple[State, list[Action]]:
    if not state.training:
        raise ValueError("a batch was reported as trained, but none was in the trainer")
    state = _count(rules, state, "trained", len(state.training))
    state = dataclasses.replace(state, training=(), num_done=state.num_done + 1)
    actions: list[Action] = [Publish(state.num_done)]
    is_last = state.is_stopping or state.num_done >= rules.num_steps  # then the end saves
    if rules.checkpoint_every and state.num_done % rules.checkpoint_every == 0 and not is_last:
        actions.append(Checkpoint(state.num_done))
    return state, actions


def _end(rules: Rules, state: State) -> tuple[State, list[Action]]:
    is_over = state.is_stopping or state.num_done >= rules.num_steps
    if not is_over or state.training:
        return state, []
    # What is on its way stays in the saved state: a resumed or a longer run dispatches it again.
    return dataclasses.replace(state, is_finished=True), [Checkpoint(state.num_done), Finish()]


def _train(rules: Rules, state: State) -> tuple[State, list[Action]]:
    num_groups = rules.batch_size // rules.group_size
    if state.is_finished or state.training or len(state.ready) < num_groups:
        return state, []
    taken = _oldest(state.num_ready_by_version, num_groups)
    left = _minus(state.num_by_version, taken)
    # Staleness is bounded by waiting for the slowest, not by throwing it away: no bias towards short completions.
    pending = _minus(state.num_by_version, state.num_ready_by_version)
    if pending and min(pending) < max(taken):  # else nobody would take an older one's place, and waiting helps nothing
        place = 0
        for version in sorted(left):
            place += left[version]
            if state.num_done + 1 + (place - 1) // num_groups - version > rules.max_staleness:
                return state, []  # the last of this version would be too stale when its turn comes
    batch = tuple(sorted(state.ready, key=lambda group_id: (state.ready[group_id], group_id))[:num_groups])
    ready = state.ready
    for group_id in batch:
        ready = ready.delete(group_id)
    state = dataclasses.replace(
        state,
        ready=ready,
        training=batch,
        num_by_version=left,
        num_ready_by_version=_minus(state.num_ready_by_version, taken),
    )
    return state, [Train(state.num_done, batch)]


def _oldest(num_by_version: Mapping[int, int], num_groups: int) -> dict[int, int]:
    """How many groups of each version are among the oldest `num_groups`."""
    taken: dict[int, int] = {}
    for version in sorted(num_by_version):
        taken[version] = min(num_by_version[version], num_groups)
        num_groups -= taken[version]
        if not num_groups:
            break
    return taken


def _dispatch(rules: Rules, state: State) -> tuple[State, list[Action]]:
    actions: list[Action] = []
    is_open = not (state.is_finished or state.is_stopping or state.generators == frozenset())
    while is_open and limit(rules, state) is None:
        is_again = state.num_again < len(state.again)
        group_id = state.again[state.num_again] if is_again else state.next_group
        version = state.oldest_after(group_id) if is_again else state.num_done
        state = dataclasses.replace(
            state,
            num_again=state.num_again + is_again,
            pending=state.pending.set(group_id, Pending(version, {})),
            num_in_flight=state.num_in_flight + rules.group_size,
            num_by_version=_plus(state.num_by_version, version, 1),
            next_group=state.next_group + (not is_again),
            counts=state.counts if is_again else _plus(state.counts, "dispatched", rules.group_size),
        )
        actions.append(Dispatch(group_id))
    return state, actions


def _count(rules: Rules, state: State, how: str, num_groups: int = 1) -> State:
    return dataclasses.replace(state, counts=_plus(state.counts, how, num_groups * rules.group_size))


_Key = TypeVar("_Key")


def _plus(counts: Mapping[_Key, int], name: _Key, amount: int) -> dict[_Key, int]:
    """Counts with one of them changed; a count of 0 has no entry."""
    counts = {**counts, name: counts.get(name, 0) + amount}
    if not counts[name]:
        del counts[name]
    return counts


def _minus(counts: Mapping[_Key, int], taken: Mapping[_Key, int]) -> dict[_Key, int]:
    return {name: count - taken.get(name, 0) for name, count in counts.items() if count > taken.get(name, 0)}

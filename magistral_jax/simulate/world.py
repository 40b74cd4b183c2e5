"""The schedule's own machine in a simulated world: its actions become work of modelled roles, their ends its events.

`simulate` is a pure function: time is a number in a heap, and every random number comes from the seed. An event costs
O(log n) in the sequences and generators there are.
"""

import dataclasses
import heapq
import itertools
import random
from collections import Counter, deque
from typing import Any

from magistral_jax.schedule import machine
from magistral_jax.schedule.machine import LIMITS, Rules, State, limit
from magistral_jax.simulate.costs import Costs
from magistral_jax.simulate.generator import Arrival, Generator, OnPublish, Request, Sample
from magistral_jax.simulate.outcome import Outcome, Span, Step
from magistral_jax.simulate.roles import LeastLoaded, Trainer, Verifiers
from magistral_jax.simulate.workload import Workload


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How much there is of each role."""

    num_generators: int = 1
    num_slots: int = 64
    num_workers: int = 2
    num_minibatches: int = 1  # updates of a batch
    on_publish: OnPublish = "in_place"


def simulate(
    rules: Rules, cluster: Cluster, costs: Costs, workload: Workload, *, seed: int = 0, traced_generators: int = 0
) -> Outcome:
    """Run the schedule to its last step.

    Args:
      rules: As the live loop has them.
      cluster: Sizes of the roles.
      costs: What their work takes.
      workload: What they work on.
      seed: Of lengths, filters, graders and failures. Lengths and filters do not depend on the schedule.
      traced_generators: Of how many generators the timeline is kept.
    """
    return _World(rules, cluster, costs, workload, seed, traced_generators).run()


_GENERATOR, _VERDICT, _TRAINED, _PUBLISHED, _LOST, _JOINED = range(6)


class _World:
    def __init__(
        self, rules: Rules, cluster: Cluster, costs: Costs, workload: Workload, seed: int, traced_generators: int
    ) -> None:
        self.rules, self.cluster, self.costs, self.workload = rules, cluster, costs, workload
        self.traced_generators = traced_generators
        self.state = State()
        self.now, self.num_events = 0.0, 0
        self.coming: list[tuple[float, int, int, int, int]] = []  # (time, order, kind, subject, epoch)
        self.order = itertools.count()
        self.workload_random, self.luck = random.Random(seed), random.Random(seed + 1)
        self.arrivals: list[Arrival] = []
        step_seconds = costs.step_seconds(cluster.num_slots)
        self.generators = [
            Generator(
                step_seconds,
                cluster.num_slots,
                prefill_seconds=costs.prefill_seconds_per_token,
                swap_seconds=costs.swap_seconds,
                on_publish=cluster.on_publish,
                arrivals=self.arrivals,
            )
            for _ in range(cluster.num_generators)
        ]
        self.epochs = [0] * cluster.num_generators  # an event of an earlier epoch has been overtaken
        self.trainer_epoch = self.num_busy = self.num_lost = 0
        self.is_shared = costs.generator_slowdown > 1 or costs.trainer_slowdown > 1
        self.is_counted = [False] * cluster.num_generators  # as busy
        self.loads = LeastLoaded()
        self.homeless: deque[list[Request]] = deque()  # groups that no living generator has
        self.verifiers, self.trainer = Verifiers(cluster.num_workers), Trainer()
        self.owner: dict[int, int] = {}  # request -> generator
        self.samples: dict[int, Sample] = {}
        self.is_filtered: dict[int, bool] = {}
        self.batch: tuple[int, tuple[int, ...], float] | None = None  # step, groups, begin
        self.steps: list[Step] = []
        self.staleness: Counter[int] = Counter()
        self.depths = dict.fromkeys(("in_flight", "ready_groups"), 0.0)  # integrals over time
        self.limits: dict[str, float] = dict.fromkeys(
            ("none", *LIMITS), 0.0
        )  # seconds in which each closed the admission
        self.down_seconds = self.publish_seconds = 0.0
        self.spans: list[Span] = []

    # ---- the loop ----

    def run(self) -> Outcome:
        for generator in range(self.cluster.num_generators):
            self.join(generator, is_event=self.costs.generator_mtbf > 0)
        self.feed(machine.Started())
        while not self.state.is_finished:
            time, _, kind, subject, epoch = heapq.heappop(self.coming)
            if kind == _GENERATOR and epoch != self.epochs[subject]:
                continue
            if kind == _TRAINED and epoch != self.trainer_epoch:
                continue
            self.pass_time(time)
            match kind:
                case 0:
                    self.finish_samples(subject)
                case 1:
                    self.feed(machine.Verified(subject, self.reward(subject)))
                case 2:
                    self.end_training()
                case 3:
                    self.end_publish(subject)
                case 4:
                    self.lose(subject)
                case _:
                    self.join(subject)
        return self.outcome()

    def feed(self, event: machine.Event) -> None:
        self.num_events += 1
        self.state, actions = machine.step(self.rules, self.state, event)
        for action in actions:
            match action:
                case machine.Dispatch(group_id):
                    self.dispatch(group_id)
                case machine.Verify(request_id):
                    self.verify(request_id)
                case machine.Train(step, group_ids):
                    self.train(step, group_ids)
                case machine.Discard(group_id):
                    for request_id in self.members(group_id):
                        del self.samples[request_id]
                    del self.is_filtered[group_id]
                case _:  # the weights came before the event, and what a checkpoint takes is not modelled
                    pass

    def pass_time(self, time: float) -> None:
        seconds = time - self.now
        self.depths["in_flight"] += self.state.num_in_flight * seconds
        self.depths["ready_groups"] += len(self.state.ready) * seconds
        self.limits[limit(self.rules, self.state) or "none"] += seconds
        self.now = time

    def after(self, seconds: float, kind: int, subject: int = 0, epoch: int = 0) -> None:
        self.at(self.now + seconds, kind, subject, epoch)

    def at(self, time: float, kind: int, subject: int = 0, epoch: int = 0) -> None:
        heapq.heappush(self.coming, (time, next(self.order), kind, subject, epoch))

    def members(self, group_id: int) -> range:
        return range(group_id * self.rules.group_size, (group_id + 1) * self.rules.group_size)

    # ---- generators ----

    def dispatch(self, group_id: int) -> None:
        version, draw = self.state.num_done, self.workload_random.random
        self.is_filtered[group_id] = self.workload.is_filtered(draw(), version)
        prompt = self.workload.prompt_tokens
        members = self.members(group_id)
        self.submit([Request(i, self.workload.lengths(draw(), version), prompt, i == members[0]) for i in members])

    def submit(self, requests: list[Request]) -> None:
        generator = self.loads.least()
        if generator is None:
            self.homeless.append(requests)
            return
        for request in requests:
            self.owner[request.id] = generator
        self.generators[generator].submit(self.now, requests)
        self.update(generator)

    def update(self, number: int) -> None:
        """After a change in a generator: its load, and when it reports next."""
        generator = self.generators[number]
        self.loads.set(number, generator.num_unfinished)
        self.expect(number)
        if self.is_shared and generator.is_busy != self.is_counted[number]:
            self.is_counted[number] = generator.is_busy
            self.num_busy += 1 if generator.is_busy else -1
            self.slow_trainer()

    def expect(self, number: int) -> None:
        self.epochs[number] += 1
        if self.generators[number].is_busy:
            self.at(self.generators[number].next_end(), _GENERATOR, number, self.epochs[number])

    def finish_samples(self, number: int) -> None:
        samples = self.generators[number].finish(self.now)
        self.update(number)
        for sample in samples:
            self.samples[sample.request_id] = sample
            del self.owner[sample.request_id]
            if number < self.traced_generators:
                span = Span("generator", sample.slot, sample.started, self.now, sample.first_version, number)
                self.spans.append(span)
            self.feed(machine.Generated(sample.request_id))

    def lose(self, number: int) -> None:
        lost = self.generators[number].fail(self.now)
        self.num_lost += 1
        self.update(number)
        self.loads.remove(number)
        self.after(self.costs.restart_seconds, _JOINED, number)
        self.feed(machine.GeneratorLost(number))
        for _, group in itertools.groupby(lost, key=lambda request: request.id // self.rules.group_size):
            first, *others = group
            self.submit([dataclasses.replace(first, reads_prompt=True), *others])

    def join(self, number: int, *, is_event: bool = True) -> None:
        if self.now:
            self.down_seconds += self.costs.restart_seconds
        self.generators[number].advance(self.now)
        self.loads.set(number, 0)
        if is_event:
            self.after(self.luck.expovariate(1 / self.costs.generator_mtbf), _LOST, number)
            self.feed(machine.GeneratorJoined(number))
        while self.homeless:
            self.submit(self.homeless.popleft())

    # ---- verifiers ----

    def verify(self, request_id: int) -> None:
        mean, spread = self.costs.verify_seconds, self.costs.verify_spread
        seconds = mean * (1 - spread + spread * (self.luck.expovariate(1.0) if spread else 0.0))
        end = self.verifiers.grade(self.now, seconds)
        self.at(end, _VERDICT, request_id)
        if self.traced_generators:
            self.spans.append(Span("verifier", 0, end - seconds, end, self.state.num_done))

    def reward(self, request_id: int) -> float | None:
        if self.costs.verifier_failure_rate and self.luck.random() < self.costs.verifier_failure_rate:
            return None
        group_id, member = divmod(request_id, self.rules.group_size)
        return 0.0 if self.is_filtered[group_id] else float(member % 2)

    # ---- trainer ----

    def train(self, step: int, group_ids: tuple[int, ...]) -> None:
        costs = self.costs
        lengths = (self.samples[i].length for group_id in group_ids for i in self.members(group_id))
        num_tokens = sum(lengths) + self.rules.batch_size * self.workload.prompt_tokens
        work = costs.train_seconds + self.cluster.num_minibatches * costs.train_seconds_per_update
        self.batch = (step, group_ids, self.now)
        self.trainer.begin(self.now, work + num_tokens * costs.train_seconds_per_token)
        self.slow_generators()
        self.slow_trainer()

    def slow_trainer(self) -> None:
        """Trainer and generators may share what they run on; what one does changes how long the other takes."""
        if self.trainer.is_busy:
            self.trainer.advance(self.now)
            self.trainer.slowdown = self.costs.trainer_slowdown if self.num_busy else 1.0
            self.trainer_epoch += 1
            self.at(self.trainer.end(), _TRAINED, 0, self.trainer_epoch)

    def slow_generators(self) -> None:
        if self.is_shared:
            for number, generator in enumerate(self.generators):
                generator.advance(self.now)
                generator.slowdown = self.costs.generator_slowdown if self.trainer.is_busy else 1.0
                self.expect(number)

    def end_training(self) -> None:
        self.trainer.advance(self.now)
        self.slow_generators()
        self.publish_seconds += self.costs.publish_seconds
        if self.batch is not None:
            step, _, began = self.batch
            self.spans.append(Span("trainer", 0, began, self.now, step))
        self.after(self.costs.publish_seconds, _PUBLISHED)

    def end_publish(self, _: int) -> None:
        assert self.batch is not None  # the machine trains before anything is published
        step, group_ids, began = self.batch
        self.arrivals.append(Arrival(self.now, step + 1))
        samples = [self.samples.pop(i) for group_id in group_ids for i in self.members(group_id)]
        for group_id in group_ids:
            del self.is_filtered[group_id]
        self.staleness.update(step - sample.first_version for sample in samples)
        tokens = sum(sample.length for sample in samples)
        self.steps.append(
            Step(
                began,
                self.now - self.costs.publish_seconds,
                self.now,
                tokens,
                staleness=max(sum((step - s.mean_version) * s.length for s in samples) / tokens, 0.0),
                swapped_share=sum(sample.tokens_after_swap for sample in samples) / tokens,
            )
        )
        self.feed(machine.Trained())

    # ---- the end ----

    def outcome(self) -> Outcome:
        for generator in self.generators:
            generator.advance(self.now)
        seconds, num_generators = max(self.now, 1e-12), self.cluster.num_generators
        mean = lambda name: sum(getattr(generator, name) for generator in self.generators) / (seconds * num_generators)
        busy, paused, down = mean("busy_seconds"), mean("pause_seconds"), self.down_seconds / seconds / num_generators
        training, publishing = self.trainer.busy_seconds / seconds, self.publish_seconds / seconds
        grading = self.verifiers.busy_seconds / (seconds * self.cluster.num_workers)
        num_completions = self.state.counts.get("dispatched", 0) - self.state.num_in_flight
        shares: dict[str, dict[str, Any]] = {
            "generator": {"decoding": busy - paused, "paused": paused, "idle": 1 - busy - down, "down": down},
            "trainer": {"training": training, "publishing": publishing, "waiting": 1 - training - publishing},
            "verifier": {"grading": grading, "idle": 1 - grading},
            "admission": {name: self.limits[name] / seconds for name in LIMITS},
        }
        depths = {name: total / seconds for name, total in self.depths.items()}
        depths["slots_used_share"] = mean("slot_seconds") / self.cluster.num_slots
        depths["verify_queue"] = self.verifiers.queue_seconds / seconds
        return Outcome(
            steps=self.steps,
            num_completions=num_completions,
            num_events=self.num_events,
            sampled_tokens=sum(generator.num_tokens for generator in self.generators),
            counts=self.state.counts,
            shares=shares,
            depths=depths,
            staleness=self.staleness,
            generators_lost=self.num_lost,
            num_minibatches=self.cluster.num_minibatches,
            spans=self.spans,
        )

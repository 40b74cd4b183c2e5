"""The engine as the event loop sees it: admission, and a `Job` for each client. Never blocks.

    open → Job: deltas of its completions, scores of its prompts → close

Everything here runs on the event loop; the thread's news arrive by `call_soon_threadsafe`, once a step. What a client
has not read yet is at most the tokens that it asked for.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.records import SamplingParams
from magistral_jax.serve.engine_thread import Delta, EngineStats, EngineThread
from magistral_jax.serve.errors import ApiError
from magistral_jax.serve.scoring import PromptScore, PromptScorer

_STOP_DEADLINE = 60.0  # seconds for the running step, which may be compiling
PromptIds = Int32[np.ndarray, " _"]  # of many lengths, side by side


def _failed() -> ApiError:
    return ApiError(503, "The engine has failed, and the service is ending.", code="engine_failed")


def _ending() -> ApiError:
    return ApiError(503, "The service is shutting down.", code="shutting_down", retry_after=30)


class Job:
    """What one client waits for: completions, numbered in the order in which they were asked for, and scores."""

    def __init__(self, first_id: int, num_choices: int, num_scores: int) -> None:
        self._first_id, self._num_choices = first_id, num_choices
        self._deltas: asyncio.Queue[tuple[int, Delta] | ApiError] = asyncio.Queue()
        self._scores = [asyncio.get_running_loop().create_future() for _ in range(num_scores)]

    @property
    def choice_ids(self) -> range:
        """Ids of the completions in the engine."""
        return range(self._first_id, self._first_id + self._num_choices)

    @property
    def score_ids(self) -> range:
        """Ids of the prompts to score."""
        return range(self.choice_ids.stop, self.choice_ids.stop + len(self._scores))

    async def next(self) -> tuple[int, Delta]:
        """The next piece of any completion, with its number.

        Raises:
          ApiError: The engine has failed, or gave up when the service ended.
        """
        item = await self._deltas.get()
        if isinstance(item, ApiError):
            raise item
        return item

    async def scores(self) -> list[PromptScore]:
        """Scores of the prompts, in order.

        Raises:
          ApiError: As for `next`.
        """
        return list(await asyncio.gather(*self._scores))

    def put(self, news: Delta | PromptScore) -> None:
        """Take what the engine made for this job."""
        if isinstance(news, Delta):
            self._deltas.put_nowait((news.request_id - self._first_id, news))
        else:
            _settle(self._scores[news.request_id - self.score_ids.start], news)

    def fail(self, error: ApiError) -> None:
        """Let every waiting reader end with `error`."""
        self._deltas.put_nowait(error)
        for score in self._scores:
            if not score.done():
                score.set_exception(error)
                score.exception()  # whether somebody waits for it or not


class AsyncEngine:
    """Lets jobs in, spreads the news of the engine's thread among them, and ends in an orderly way.

    Args:
      batcher: The engine, with weights and compiled.
      scorer: For log-probs of prompts.
      num_slots: Sequences that the engine decodes at one time.
      max_pending: Completions and prompts to score that may wait beyond those.
    """

    def __init__(self, batcher: ContinuousBatcher, scorer: PromptScorer, *, num_slots: int, max_pending: int) -> None:
        self._capacity = num_slots + max_pending
        self._thread = EngineThread(
            batcher, scorer, num_slots=num_slots, emit=self._on_news, on_failure=self._on_failure
        )
        self._next_id = 0
        self._jobs: dict[int, Job] = {}  # by the ids that are not done
        self._asked: set[asyncio.Future[Any]] = set()  # answers of the thread that somebody waits for
        self._loop: asyncio.AbstractEventLoop | None = None
        self._refuse: Callable[[], ApiError] | None = None  # all new jobs
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self.has_failed = asyncio.Event()
        self.failure: Exception | None = None

    @property
    def stats(self) -> EngineStats:
        """Counts after the latest step."""
        return self._thread.stats

    @property
    def refusal(self) -> ApiError | None:
        """Why no job is let in any more."""
        return None if self._refuse is None else self._refuse()

    @property
    def num_open(self) -> int:
        """Completions and prompts to score that are not done."""
        return len(self._jobs)

    def start(self) -> None:
        """Begin; called on the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def open(
        self,
        prompts: Sequence[PromptIds],
        sampling: SamplingParams,
        random_ids: Sequence[int],
        *,
        with_scores: bool = False,
    ) -> Job:
        """Queue work for one client, who must `close` it.

        Args:
          prompts: Within the engine's limits.
          sampling: Of all completions.
          random_ids: For each completion of a prompt the name of its random numbers; empty makes no completions.
          with_scores: Score the prompts as well.

        Raises:
          ApiError: Too much is waiting (429), or the service is ending (503).
        """
        num_choices, num_scores = len(prompts) * len(random_ids), len(prompts) * with_scores
        if self._refuse is not None:
            raise self._refuse()
        if self.num_open + num_choices + num_scores > self._capacity:
            raise ApiError(
                429,
                f"{self.num_open} completions are running or waiting, and {self._capacity} is the limit; try again.",
                code="too_many_pending",
                retry_after=1,
            )
        job = Job(self._next_id, num_choices, num_scores)
        self._next_id += num_choices + num_scores
        self._jobs |= dict.fromkeys([*job.choice_ids, *job.score_ids], job)
        self._is_idle.clear()
        pairs = itertools.product(prompts, random_ids)
        self._thread.submit(
            [
                GenerationRequest(request_id, prompt, sampling, random_id)
                for request_id, (prompt, random_id) in zip(job.choice_ids, pairs, strict=True)
            ],
            dict(zip(job.score_ids, prompts, strict=False)),
        )
        return job

    def end_choice(self, job: Job, choice: int) -> None:
        """Give up one completion of a job, if it is not done."""
        self._give_up([job.choice_ids[choice]])

    def close(self, job: Job) -> None:
        """Give up whatever of a job is not done; its pages are free before the next step."""
        self._give_up([*job.choice_ids, *job.score_ids])

    async def pause(self, is_paused: bool) -> None:
        """Stop stepping once the running step has ended, or go on."""
        await self._ask(lambda done: self._thread.pause(is_paused, done))

    async def set_weights(self, params: Any) -> tuple[int, bool]:
        """Hand over weights; returns their version, and whether they are in use already."""
        return await self._ask(lambda done: self._thread.set_weights(params, done))

    async def drain(self, seconds: float) -> None:
        """Let no job in any more, and wait for those that are; after `seconds` they are given up."""
        self._refuse = _ending
        try:
            await asyncio.wait_for(self._is_idle.wait(), seconds)
        except TimeoutError:
            self.give_up()

    def give_up(self) -> None:
        """End all jobs with an error."""
        self._fail_all(_ending)

    async def stop(self) -> None:
        """End the thread.

        Raises:
          TimeoutError: It does not end.
        """
        if self.failure is None:
            await asyncio.to_thread(self._thread.stop, _STOP_DEADLINE)

    async def _ask(self, send: Callable[[Callable[..., None]], None]) -> Any:
        """Send a command and wait until the thread has carried it out."""
        if self.failure is not None:
            raise _failed()
        answer = asyncio.get_running_loop().create_future()
        self._asked.add(answer)
        try:
            send(lambda *result: self._call_soon(_settle, answer, result))
            return await answer
        finally:
            self._asked.discard(answer)

    # ---- from the engine's thread -----------------------------------------------------------------------------------

    def _on_news(self, news: list[Delta | PromptScore]) -> None:
        self._call_soon(self._spread, news)

    def _on_failure(self, error: Exception) -> None:
        self._call_soon(self._fail, error)

    def _call_soon(self, function: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(function, *arguments)

    # ---- on the loop again ------------------------------------------------------------------------------------------

    def _spread(self, news: list[Delta | PromptScore]) -> None:
        for item in news:
            job = self._jobs.get(item.request_id)
            if job is None:
                continue  # given up in the meantime
            if isinstance(item, PromptScore) or item.finish is not None:
                del self._jobs[item.request_id]
            job.put(item)
        self._notice_idle()

    def _give_up(self, request_ids: list[int]) -> None:
        gone = [request_id for request_id in request_ids if self._jobs.pop(request_id, None)]
        if gone:
            self._thread.cancel(gone)
        self._notice_idle()

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self._refuse = _failed
        self._fail_all(_failed)
        for answer in self._asked:
            answer.set_exception(_failed())
        self.has_failed.set()

    def _fail_all(self, error: Callable[[], ApiError]) -> None:
        jobs = set(self._jobs.values())
        self._give_up(list(self._jobs))
        for job in jobs:
            job.fail(error())

    def _notice_idle(self) -> None:
        if not self._jobs:
            self._is_idle.set()


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if not future.done():  # whoever waited for it may have gone
        future.set_result(result)

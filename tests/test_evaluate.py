"""Evaluation: every sample to its problem, the same samples for the same weights, and the scores of known policies."""

import random
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

from magistral_jax.data.config import EvaluationConfig
from magistral_jax.evaluate import FIRST_REQUEST, evaluate, extract_answer, generate_all
from magistral_jax.generate.batching import ContinuousBatcher, GenerationRequest
from magistral_jax.generate.config import GenerationConfig
from magistral_jax.policy.config import ModelConfig
from magistral_jax.policy.transformer import init_params, unstack
from magistral_jax.records import Graded, Problem, Prompt, Rollout, SamplingParams, Verdict
from magistral_jax.studies.pass_at_k import EvaluationSummary
from magistral_jax.verify.config import PoolConfig, RewardConfig
from magistral_jax.verify.pool import VerifierPool

TAGS = ("<think>", "</think>")
Choose = Callable[[int, int], int]
SAMPLING = SamplingParams(0.7, 1.0, 0, 8)


def make_prompts(answers: list[str]) -> list[Prompt]:
    ids = [np.array([1, 2, 3 + i], np.int32) for i in range(len(answers))]
    return [
        Prompt(Problem(f"p{i}", f"Question {i}?", answer), ids[i], f"Question {i}?") for i, answer in enumerate(answers)
    ]


class FakeBatcher(ContinuousBatcher):
    """Answers the n-th sample of a problem with the one token `choose(problem, n)`, late and in any order."""

    def __init__(self, num_samples: int, choose: Choose = lambda problem, sample: 10 * problem + sample) -> None:
        self._num_samples, self._choose = num_samples, choose
        self._requests: list[GenerationRequest] = []
        self._random = random.Random(0)

    def submit(self, request: GenerationRequest) -> None:
        self._requests.append(request)

    def step(self) -> list[Rollout]:
        self._random.shuffle(self._requests)
        count = self._random.randrange(4)
        done, self._requests = self._requests[:count], self._requests[count:]
        return [self._answer(request) for request in done]

    def _answer(self, request: GenerationRequest) -> Rollout:
        problem, sample = divmod(request.request_id - FIRST_REQUEST, self._num_samples)
        return Rollout(
            request_id=request.request_id,
            prompt_ids=request.prompt_ids,
            completion_ids=np.array([self._choose(problem, sample)], np.int32),
            behavior_logprob=np.zeros(1, np.float32),
            weight_version=np.zeros(1, np.int32),
            truncated=False,
        )


# --- samples ---------------------------------------------------------------------------------------------------------


def test_samples_come_in_the_order_of_the_problems():
    prompts = make_prompts(["0"] * 5)
    reports = []
    batcher = FakeBatcher(3)
    rollouts = generate_all(prompts, batcher, SAMPLING, num_samples=3, on_progress=lambda *r: reports.append(r))
    assert [int(r.completion_ids[0]) for r in rollouts] == [10 * p + s for p in range(5) for s in range(3)]
    assert all(r.prompt_ids is prompts[i // 3].token_ids for i, r in enumerate(rollouts))
    assert reports[-1] == (15, 15)
    assert reports == sorted(reports)


def test_request_ids_are_those_of_no_training_rollout():
    batcher = FakeBatcher(2)
    rollouts = generate_all(make_prompts(["0"] * 2), batcher, SAMPLING, num_samples=2)
    assert [r.request_id for r in rollouts] == [2**31 + i for i in range(4)]
    assert rollouts[-1].request_id < 2**32  # an engine keeps them in 32 bits


def test_the_same_weights_give_the_same_samples():
    model = ModelConfig(vocab_size=20, d_model=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16)
    engine = GenerationConfig(num_slots=3, page_size=4, max_prompt_tokens=4, max_new_tokens=8, decode_block=4)
    weights = [jax.jit(lambda key: unstack(init_params(model, key), model))(jax.random.key(seed)) for seed in (0, 1)]
    batcher = ContinuousBatcher(model, engine, (0,), seed=5)
    samples = []
    for version, index in enumerate((0, 0, 1, 0)):
        batcher.set_weights(weights[index], version)
        rollouts = generate_all(make_prompts(["0"] * 3), batcher, SAMPLING, num_samples=4)
        samples.append([(r.request_id, r.completion_ids.tolist()) for r in rollouts])
    assert samples[0] == samples[1] == samples[3] != samples[2]
    assert len({tuple(ids) for _, ids in samples[0]}) > 6  # the samples of one problem differ


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifiers() -> Iterator[VerifierPool]:
    with VerifierPool(RewardConfig(language=0.0), PoolConfig(num_workers=1, deadline=60.0)) as pool:
        yield pool


def score(
    verifiers: VerifierPool,
    answers: list[str],
    choose: Choose,
    decode: Callable[[np.ndarray], str] = lambda ids: f"<think>.</think>\\boxed{{{ids[0]}}}",
) -> tuple[EvaluationSummary, list[list[Graded]]]:
    return evaluate(
        make_prompts(answers),
        FakeBatcher(4, choose),
        verifiers,
        config=EvaluationConfig(num_samples=4),
        max_new_tokens=8,
        decode=decode,
        tags=TAGS,
    )


def test_scores_of_a_policy_that_is_known(verifiers: VerifierPool):
    # Problem p is answered right by its first p samples of 4, and by 100 + sample otherwise.
    choose = lambda problem, sample: 7 if sample < problem else 100 + sample
    summary, graded = score(verifiers, ["7", "7", "14/2", "7", "7"], choose)
    assert summary.pass_at_k[1] == pytest.approx((0 + 1 + 2 + 3 + 4) / 4 / 5)
    # 1 - C(4 - c, 2) / 6 for c = 0 … 4
    assert summary.pass_at_k[2] == pytest.approx((0 + 3 / 6 + 5 / 6 + 1 + 1) / 5)
    assert summary.pass_at_k[4] == pytest.approx(4 / 5)
    # One right vote against three different wrong ones is a draw of four; two make a majority.
    assert (summary.maj_k, summary.maj_at_k) == (4, pytest.approx((0 + 1 / 4 + 1 + 1 + 1) / 5))
    assert (summary.num_problems, summary.num_samples, summary.num_ungraded) == (5, 20, 0)
    assert (summary.format_rate, summary.truncated_share, summary.mean_completion_length) == (1.0, 0.0, 1.0)
    verdicts = [[member.reward.verdict is Verdict.CORRECT for member in group] for group in graded]
    assert verdicts == [[sample < problem for sample in range(4)] for problem in range(5)]


def test_a_policy_without_format_scores_nothing(verifiers: VerifierPool):
    summary, _ = score(verifiers, ["7"] * 3, lambda problem, sample: 7, decode=lambda ids: f"\\boxed{{{ids[0]}}}")
    assert (summary.pass_at_k[1], summary.maj_at_k, summary.format_rate) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<think>1</think>so \\boxed{4 2}", "42"),
        ("<think>\\boxed{1}</think>none", None),
        ("<think>\\boxed{1}</think>\\boxed{2} or \\boxed{ x + 1 }", "x+1"),
        ("\\boxed{1}", None),
        ("", None),
    ],
)
def test_the_answer_is_what_stands_in_the_last_box(completion: str, answer: str | None):
    assert extract_answer(completion, TAGS) == answer

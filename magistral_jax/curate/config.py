"""Settings of curation and translation (report §4)."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CurateConfig:
    """How problems are judged. Those to be curated are `data.train`; the sampler is `policy.path`."""

    stage: int = 1
    """Number of the difficulty stage, which names its columns: `pass_rate_1`. Stage 2 takes `pool.jsonl` of stage 1 and
    a stronger model (report §4.1)."""
    num_samples: int = 16
    """Completions of a problem from which its difficulty is told; 0 leaves difficulty out."""
    format: Literal["strict", "none"] = "strict"
    """`none` judges the answer of a completion wherever it stands, for a sampler that was not taught the format."""
    too_hard: float = 0.0
    """Pass rate at which and below which a problem is dropped: never solved."""
    too_easy: float = 1.0
    """Pass rate at which and above which a problem is dropped: always solved."""
    agreement: float = 0.5
    """Where more than this share of the samples agree with each other and not with the reference, the reference is
    taken for wrong."""
    chunk: int = 64
    """Problems that are sampled between two saves; a kill costs at most as many."""
    max_solutions: int = 10
    """Known solutions of a code problem that are run, the first ones."""
    min_tests: int = 5
    """Tests that a code problem needs in the end."""
    max_tests: int = 50
    """Tests of a code problem up to which new ones are made where it has fewer; the tests it came with all stay."""
    new_tests: int = 20
    """Inputs that are tried to make new tests of a code problem; 0 makes none."""


@dataclasses.dataclass(frozen=True)
class TranslateConfig:
    """Translation of English problems (report §4) by a chat endpoint with OpenAI's interface."""

    endpoint: str = ""
    """Address up to `/v1`, such as `http://127.0.0.1:8000/v1`."""
    model: str = ""
    """Name of the model; empty takes the only one that the endpoint lists."""
    key_file: str = ""
    """File with the key of the endpoint; empty sends none."""
    share: float = 0.1
    """Share of the English problems that are translated."""
    languages: tuple[str, ...] = ("fr", "es", "it", "de", "zh", "ru")
    """Languages, which get equal shares."""
    attempts: int = 3
    """Requests for one problem until an answer can be taken; after that it stays in English."""
    temperature: float = 0.3
    """Sampling temperature; each attempt has a seed of its own."""
    max_tokens: int = 2048
    """Longest answer in tokens of the endpoint's model."""
    concurrency: int = 8
    """Requests that are under way at a time."""
    timeout: float = 120.0
    """Seconds until a request is given up."""
    retries: int = 4
    """Times that a request is sent again after a 429, a 5xx or a broken connection, with growing pauses."""
    chunk: int = 32
    """Problems that are translated between two saves; a kill costs at most as many."""

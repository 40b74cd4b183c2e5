"""Settings of curation (report §4)."""

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

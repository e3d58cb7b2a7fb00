"""The content of a run's ``summary.json``, and of the evaluation results in it."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from stages.json_types import JsonObject
from stages.process.gpus import Gpu


class Interval(TypedDict):
    """A mean with its 95 % interval; None if a single prompt shows no spread."""

    mean: float
    ci_low: float | None
    ci_high: float | None


class TextMeasures(TypedDict):
    """Measures of a candidate's completions as texts."""

    completions: int
    length_words: float
    empty_share: float
    distinct_1: float
    distinct_2: float
    distinct_completions: float


class TokenMeasures(TypedDict, total=False):
    """Measures of the completions that were sampled in the run."""

    length_tokens: float
    stopped_share: float
    distinct_2_tokens: float


class Candidate(TextMeasures, TokenMeasures):
    """The measurements of one candidate of an evaluation. Keys that were not measured are missing."""

    model: str | None  # None for existing completions
    digest: str | None
    scores: dict[str, float]  # mean score by judge
    score_intervals: dict[str, tuple[float, float]]  # 95 % interval by judge
    perplexity: NotRequired[float]
    bits_per_byte: NotRequired[float | None]
    tasks: NotRequired[dict[str, dict[str, float]]]
    kl: NotRequired[float]  # nats per completion
    kl_interval: NotRequired[tuple[float, float]]
    best_of: NotRequired[int]


class LengthControlledRate(TypedDict):
    """The expected win rate at equal lengths."""

    win_rate: float
    ci_low: float
    ci_high: float
    length_effect: float


class WinRateNumbers(TypedDict):
    """The fields of ``stages.stats.comparing.WinRateEstimate`` as JSON."""

    win_rate: float
    ci_low: float
    ci_high: float
    wins: int
    ties: int
    n: int
    samples: int
    bootstrap_low: float
    bootstrap_high: float
    variance: float
    prompts_needed: float | None  # None if no number of prompts is enough


class WinRate(WinRateNumbers):
    """How often a judge prefers candidate ``a`` to candidate ``b``."""

    a: str
    b: str
    judge: str
    length_controlled: LengthControlledRate
    score_difference: NotRequired[Interval]


class EvaluationResult(TypedDict):
    """The result of an evaluation step for the run."""

    candidates: dict[str, Candidate]
    win_rates: list[WinRate]
    judges: list[str]


class BestOfPoint(TypedDict):
    """The best of ``n`` samples: the KL to the sampling policy, the score that selects the best, and the scores by judge."""

    n: int
    kl: float
    reward: Interval
    scores: dict[str, Interval]


class PairOfJudges(TypedDict):
    """Agreement of two judges over ``n`` comparisons, and over those without a tie (``decided``)."""

    a: str
    b: str
    n: int
    agreement: float | None
    kappa: float | None
    decided: int
    agreement_decided: float | None
    ci_low: float | None
    ci_high: float | None


class JudgeAgreement(TypedDict, total=False):
    """Agreement between judges, and between the annotators of each judge."""

    pairs: list[PairOfJudges]
    units: int
    alpha: float | None
    annotators: dict[str, dict[str, float | None]]  # by judge


class ExclusionRow(TypedDict):
    """A number of excluded items, the total, the reason, and whether the recipe intends the exclusion."""

    what: str
    count: int
    of: int
    expected: bool


class CutTexts(TypedDict):
    """How many texts a reward source could not read completely, of all texts that it was asked about."""

    reader: str
    count: int
    of: int


class EvaluationFile(TypedDict):
    """The content of evaluation.json. Numbers that are not finite are None."""

    verdict: str
    prompts: int
    samples_per_prompt: int
    kl_reference: str | None
    candidates: dict[str, Candidate]
    win_rates: list[WinRate]
    judges: list[dict[str, Any]]  # name, kind, and what the kind of judge records
    agreement: JudgeAgreement
    best_of_n: dict[str, list[BestOfPoint]]
    few_shot: JsonObject
    exclusions: list[ExclusionRow]
    cut_texts: NotRequired[list[CutTexts]]  # missing in files of earlier versions


class SummaryModel(TypedDict):
    """The model that a step published: its name without the version, and its digest."""

    ref: str
    digest: str


class StepSummary(TypedDict):
    """One step of a run."""

    name: str
    stage: str
    model: SummaryModel | None  # None for an evaluation
    version: int | None
    wall_seconds: float
    reused: bool
    action: str  # reuse | run | resume
    reason: str
    inputs: dict[str, str]  # model reference by field path
    hub: dict[str, str]  # owner/name@commit by field path
    data: dict[str, str]  # fingerprint by field path
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    seed: int
    circumstances: JsonObject
    fingerprint: str | None
    settings: JsonObject
    config: JsonObject
    metrics: JsonObject


class Environment(TypedDict, total=False):
    """Facts besides the recipe that can influence the numbers of a run. Summaries of earlier versions lack some."""

    python: str
    platform: str
    machine: str
    cpu: str
    cpu_count: int | None
    num_processes: int
    gpus: list[Gpu]
    packages: dict[str, str]
    sharded: bool


class RunSummary(TypedDict):
    """The summary of a run, rewritten after every step."""

    recipe: str
    recipe_file: str
    description: str | None
    seed: int
    overrides: list[str]
    command: str | None  # what the user typed
    started: str  # ISO 8601, UTC
    finished: bool
    wall_seconds: float
    peak_memory_bytes: int
    peak_gpu_memory_bytes: int | None
    environment: Environment
    steps: list[StepSummary]
    candidates: dict[str, Candidate]
    win_rates: list[WinRate]

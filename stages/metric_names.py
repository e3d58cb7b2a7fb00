"""Names and meanings of the metrics: those of ``metrics.jsonl``, and those of a step's summary.

Each name is written here only. Modules that log a metric and modules that read it import its name, or the function that builds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# PPO, by iteration

SCORE_MEAN, SCORE_STD, TOTAL_MEAN = "rewards/score_mean", "rewards/score_std", "rewards/total_mean"
PROMPT_STD, FLAT_PROMPT_SHARE = "rewards/prompt_std", "rewards/flat_prompt_share"

KL, KL_STANDARD_ERROR, KL_COEF = "policy/kl", "policy/kl_standard_error", "policy/kl_coef"
POLICY_LOSS, ENTROPY, PRETRAINING_LOSS = "policy/loss", "policy/entropy", "policy/pretraining_loss"
LEARNING_RATE = "policy/learning_rate"
APPROX_KL, CLIP_FRACTION = "policy/approx_kl", "policy/clip_fraction"
RATIO_MEAN, RATIO_VARIANCE, RATIO_MAX_DEVIATION = "policy/ratio_mean", "policy/ratio_variance", "policy/ratio_max_deviation"
RATIO_FIRST_DEVIATION, LOG_RATIO_FIRST_RMS = "policy/ratio_first_deviation", "policy/log_ratio_first_rms"
SAMPLING_GAP, SAMPLING_GAP_MEAN, SAMPLING_LAG = "policy/sampling_gap", "policy/sampling_gap_mean", "policy/sampling_lag"
IMPORTANCE_MEAN, IMPORTANCE_CAPPED_SHARE = "policy/importance_mean", "policy/importance_capped_share"

VALUE_LOSS, VALUE_CLIP_FRACTION, VALUE_MEAN = "value/loss", "value/clip_fraction", "value/mean"
RETURNS_MEAN, RETURNS_VARIANCE, EXPLAINED_VARIANCE = "value/returns_mean", "value/returns_variance", "value/explained_variance"

LENGTH_MEAN, LENGTH_MAX = "responses/length_mean", "responses/length_max"
STOPPED_SHARE, STOPPED_SCORE, UNSTOPPED_SCORE = "responses/stopped_share", "responses/stopped_score", "responses/unstopped_score"
REPETITION, DISTINCT_SHARE = "responses/repetition", "responses/distinct_share"

EPISODES_PER_SECOND = "time/episodes_per_second"
UPDATE_MATMUL_SHARE, UPDATE_PASS_TOKENS = "time/update_matmul_share", "time/update_pass_tokens"
UPDATE_RECOMPUTED_SHARE = "time/update_recomputed_share"
SCORING_HIDDEN_SECONDS, GENERATION_HIDDEN_SECONDS = "time/scoring_hidden_s", "time/generation_hidden_s"

RETREATS = "passes/retreats"
ALARMS = "health/alarms"

# Other stages, by optimizer step

TRAIN_PREFIX, MASKED_PREFIX = "train", "masked"
TRAIN_LOSS, TRAIN_MARGINS = f"{TRAIN_PREFIX}/loss", f"{TRAIN_PREFIX}/rewards/margins"
HELDOUT_LOG_LOSS, HELDOUT_LOG_ACCURACY, HELDOUT_LOG_MARGIN = "heldout/loss", "heldout/accuracy", "heldout/margin"
HELDOUT_LOG_PERPLEXITY, HELDOUT_LOG_BITS_PER_BYTE = "heldout/perplexity", "heldout/bits_per_byte"
SELECTION_SCORE, SELECTION_LOSS = "selection/score", "selection/heldout_loss"


def seed_prefix(seed: int) -> str:
    """The prefix of the metrics of one of several trainings in a step, which differ in their seed."""
    return f"{TRAIN_PREFIX}_seed_{seed}"


def seed_of_loss(metric: str) -> str | None:
    """The seed of a training loss with a prefix of ``seed_prefix``; None for other metrics."""
    prefix, _, name = metric.partition("/")
    start, _, seed = prefix.partition("_seed_")
    return seed if (start, name) == (TRAIN_PREFIX, "loss") and seed else None


# Names that contain the name of something else


def reward_name(source: str) -> str:
    """The mean score of a reward source."""
    return f"rewards/{source}"


def monitor_name(source: str) -> str:
    """The mean score of a monitor."""
    return f"monitors/{source}"


def is_monitor(metric: str) -> bool:
    return metric.startswith("monitors/")


def source_of(metric: str) -> str:
    """The reward source or monitor of a metric from ``reward_name`` or ``monitor_name``. From ``scoring_name``: also what is measured."""
    return metric.partition("/")[2]


def is_reward(metric: str) -> bool:
    """Whether a metric is the mean score of a reward source, not a statistic of all scores."""
    return metric.startswith("rewards/") and metric not in MEANINGS


def scoring_name(source: str, measured: str) -> str:
    """A measurement of a reward source other than its score, e.g. how many texts it did not apply to."""
    return f"scoring/{source}_{measured}"


CUT_SHARE, COMPLETION_CUT_SHARE, NOT_APPLIED = "cut_share", "completion_cut_share", "not_applied"
"""Measurements of reward sources about texts, as ``measured`` of ``scoring_name``."""


def seconds_name(phase: str) -> str:
    return f"time/{phase}_s"


def tokens_per_second_name(phase: str) -> str:
    return f"time/{phase}_tokens_per_second"


def gpu_memory_name(phase: str) -> str:
    return f"memory/{phase}_gpu_gib"


def grad_norm_name(network: str) -> str:
    """``network``: policy or value."""
    return f"{network}/grad_norm"


def alarm_name(alarm: str) -> str:
    return f"health/{alarm}"


# The summary of a step (run_summary.json, the metrics of a model)

HELDOUT_ACCURACY, HELDOUT_ACCURACY_BEFORE = "heldout_accuracy", "heldout_accuracy_before"
HELDOUT_LOSS_BEFORE, HELDOUT_LOSS_AFTER = "heldout_loss_before", "heldout_loss_after"
HELDOUT_PERPLEXITY, HELDOUT_BITS_PER_BYTE = "heldout_perplexity", "heldout_bits_per_byte"
HELDOUT_PERPLEXITY_BEFORE, HELDOUT_PERPLEXITY_AFTER = "heldout_perplexity_before", "heldout_perplexity_after"
HELDOUT_BESIDE = "heldout_beside"
HELDOUT_CALIBRATION, HELDOUT_CALIBRATION_ERROR = "heldout_calibration", "heldout_calibration_error"
HELDOUT_ACCURACY_BY_MARGIN, HELDOUT_ACCURACY_BY_LENGTH = "heldout_accuracy_by_margin", "heldout_accuracy_by_length"
HELDOUT_ACCURACY_BY_GROUP = "heldout_accuracy_by_group"
NUM_DEMONSTRATIONS, NUM_COMPARISONS, NUM_REVIEWS, NUM_PAIRS = "demonstrations", "comparisons", "reviews", "pairs"
NUM_EPISODES, NUM_ITERATIONS, NUM_OPTIMIZER_STEPS = "episodes", "iterations", "optimizer_steps"
RAISED_ALARMS = "alarms"


def first_tenth(metric: str) -> str:
    """The mean of a metric of FIRST_AND_LAST over the first tenth of a run."""
    return f"{metric.rpartition('/')[2]}_first"


def last_tenth(metric: str) -> str:
    """The mean of a metric of FIRST_AND_LAST over the last tenth of a run."""
    return f"{metric.rpartition('/')[2]}_last"


def heldout_names(measured: Mapping[str, T]) -> dict[str, T]:
    """Measurements on held-out data by their names in a summary."""
    return {f"heldout_{name}": value for name, value in measured.items()}


def curation_names(left_out: Mapping[str, int]) -> dict[str, int]:
    """Numbers of rows that the curation left out, by their names in a summary: one for each reason."""
    return {f"curation_{reason}": count for reason, count in sorted(left_out.items())}


FIRST_AND_LAST = (SCORE_MEAN, KL, ENTROPY, LENGTH_MEAN, STOPPED_SHARE)
"""The metrics of a PPO run whose first and last tenth are in its summary. Monitors are, too."""
SUMMED_UP = frozenset([*FIRST_AND_LAST, EXPLAINED_VARIANCE, EPISODES_PER_SECOND])
"""The metrics of all iterations that a PPO run keeps for its summary. It keeps monitors, too."""

# Meanings

MEANINGS = {
    SCORE_MEAN: "mean score of the completions, after the penalties for length and for a missing end token",
    SCORE_STD: "standard deviation of the scores",
    reward_name("<source>"): "mean score by one reward source, without its weight",
    monitor_name("<judge>"): "mean score by one monitor",
    PROMPT_STD: "mean over prompts of the standard deviation of the scores of one prompt's completions",
    FLAT_PROMPT_SHARE: "share of prompts whose completions all have the same score",
    TOTAL_MEAN: "mean of score minus KL coefficient times KL",
    scoring_name("<source>", NOT_APPLIED): "number of completions that the source does not apply to",
    scoring_name("<source>", CUT_SHARE): "share of texts that were cut to the source's maximum length",
    scoring_name("<source>", COMPLETION_CUT_SHARE): "share of texts whose completion was cut, too",
    scoring_name("<source>", "<measurement>"): "mean of a measurement that the source returned, e.g. tokens or cost of an endpoint",
    KL: "KL to the reference in nats: mean over completions of the sum over tokens",
    KL_STANDARD_ERROR: "standard error of this mean",
    KL_COEF: "coefficient of the KL penalty",
    POLICY_LOSS: "PPO's clipped loss per token",
    ENTROPY: "entropy in nats per token",
    APPROX_KL: "KL to the policy at the start of the update, per token: half the mean squared log-ratio",
    CLIP_FRACTION: "share of tokens whose ratio was clipped",
    RATIO_MEAN: "mean probability ratio to the policy at the start of the update",
    RATIO_VARIANCE: "variance of this ratio",
    RATIO_MAX_DEVIATION: "largest |ratio - 1| of the iteration",
    PRETRAINING_LOSS: "loss on the pretraining texts (PPO-ptx): the sum divided as pretraining_mix.normalization says",
    grad_norm_name("policy"): "gradient norm of the policy before clipping",
    VALUE_LOSS: "value loss per state",
    VALUE_CLIP_FRACTION: "share of states whose value was clipped",
    VALUE_MEAN: "mean value",
    RETURNS_MEAN: "mean return",
    RETURNS_VARIANCE: "variance of the returns",
    EXPLAINED_VARIANCE: "1 - squared error of the values / variance of the returns: 1 is perfect, 0 no better than the mean",
    grad_norm_name("value"): "gradient norm of the value network before clipping",
    RATIO_FIRST_DEVIATION: "largest |ratio - 1| before the first optimizer step",
    LOG_RATIO_FIRST_RMS: "root mean square of the log-ratio before the first optimizer step, in nats",
    LENGTH_MEAN: "mean length of the completions in tokens",
    LENGTH_MAX: "largest length of a completion in tokens",
    STOPPED_SHARE: "share of completions with an end token",
    STOPPED_SCORE: "mean score of the completions with an end token, after all penalties",
    UNSTOPPED_SCORE: "mean score of the completions without one",
    REPETITION: "share of a completion's 4-grams that repeat an earlier one",
    DISTINCT_SHARE: "share of different completions",
    SAMPLING_GAP: "largest difference between sampled and recomputed log-probabilities of a token, in nats",
    SAMPLING_GAP_MEAN: "mean absolute difference of them, where another engine samples",
    IMPORTANCE_MEAN: "mean importance weight of the tokens that another engine sampled",
    IMPORTANCE_CAPPED_SHARE: "share of these weights that were capped",
    SAMPLING_LAG: "number of updates between the policy that sampled and the policy that trains",
    seconds_name("<phase>"): "seconds of a phase: generation, measuring, scoring, update, transfer",
    EPISODES_PER_SECOND: "episodes per second of all phases together",
    tokens_per_second_name("<phase>"): "tokens per second of a phase; the update counts each token once per epoch",
    UPDATE_MATMUL_SHARE: "flops of the update's matrix products as a share of the machine's peak; without those of the next metric",
    UPDATE_RECOMPUTED_SHARE: "the same for products that gradient checkpointing computes again",
    SCORING_HIDDEN_SECONDS: "seconds of requests for scores during which PPO did not wait",
    GENERATION_HIDDEN_SECONDS: "seconds of sampling during the update before",
    UPDATE_PASS_TOKENS: "tokens of the largest pass of the update",
    RETREATS: "number of times that memory ran out, so that passes became smaller",
    gpu_memory_name("<phase>"): "peak GPU memory of a phase in GiB, maximum over processes",
    LEARNING_RATE: "learning rate of the policy",
    ALARMS: "number of raised alarms",
    alarm_name("<alarm>"): "1 if the alarm is raised",
    f"{TRAIN_PREFIX}/<metric>": "metric of a training pass, as the trainer logs it: loss, learning rate, gradient norm, epoch",
    f"{TRAIN_PREFIX}_seed_<seed>/<metric>": "reward_model with num_seeds: the same for each seed",
    f"{MASKED_PREFIX}/<metric>": "sentiment with random weights: the same, of the masked language model that comes first",
    TRAIN_LOSS: "training loss since the last line",
    TRAIN_MARGINS: "dpo: mean difference of the implicit rewards of the better and the worse completion",
    HELDOUT_LOG_LOSS: "held-out loss, before or after training",
    HELDOUT_LOG_ACCURACY: "held-out accuracy after training",
    HELDOUT_LOG_MARGIN: "dpo: held-out difference of the implicit rewards after training",
    HELDOUT_LOG_PERPLEXITY: "held-out perplexity, before or after training",
    HELDOUT_LOG_BITS_PER_BYTE: "held-out bits per byte, before or after training",
    SELECTION_SCORE: "sft with selection: mean reward of a checkpoint's completions",
    SELECTION_LOSS: "sft with selection: held-out loss of a checkpoint",
}
"""Metric of metrics.jsonl -> its meaning. ``<...>`` stands for a name."""

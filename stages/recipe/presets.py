"""Published settings of four papers, each with its source. ``preset: instructgpt2022`` provides defaults for a step's settings.

An unpublished value is our own default and is marked as such (``ours``), because the paper's value is unknown.

Sources: Z Ziegler et al. 2019 (arXiv 1909.08593), its code openai/lm-human-preferences (LMHP); S Stiennon et al. 2020 (2009.01325);
I Ouyang et al. 2022 (2203.02155); H Huang et al. 2024 (2403.17031), its code vwxyzjn/summarize_from_feedback_details (N+).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict


@dataclass(frozen=True)
class Value:
    """One setting of a preset: its value and its published source, or the reason for our choice."""

    value: object
    source: str
    published: bool = True

    @property
    def origin(self) -> str:
        """``C.4``, or ``not published; ours: ...``."""
        return self.source if self.published else f"not published; ours: {self.source}"


def ours(value: object, reason: str) -> Value:
    return Value(value, reason, published=False)


Settings = dict[str, Value]  # field path -> value


@dataclass(frozen=True)
class Preset:
    """The settings of one paper by stage, for one model size or task."""

    paper: str
    stages: dict[str, Settings]
    missing: dict[str, str] = field(default_factory=dict)  # stage -> why the preset has no settings for it
    required: dict[str, dict[str, str]] = field(default_factory=dict)  # stage -> field that the recipe must set -> its purpose
    notes: dict[str, str] = field(default_factory=dict)  # stage -> differences that the preset cannot express


UNSAID = "the paper does not mention it"
NO_CLIP = ours(None, "no paper mentions gradient clipping, and neither LMHP nor N+ clips")
_Z_REWARD: Settings = {
    "loss": Value("best_of", "Z 2; LMHP label_types.py PickBest"),
    "training.epochs": Value(1.0, "LMHP train_reward.py: every label once"),
    "training.schedule": Value("linear", "LMHP train_reward.py"),
    "training.final_learning_rate_fraction": Value(0.0, "LMHP train_reward.py"),
    "training.warmup_fraction": Value(0.0, "LMHP train_reward.py"),
    "training.adam_beta1": Value(0.9, "LMHP utils/core.py: TensorFlow's default"),
    "training.adam_beta2": Value(0.999, "LMHP utils/core.py: TensorFlow's default"),
    "training.adam_epsilon": Value(1e-5, "LMHP utils/core.py (there outside the bias correction)"),
    "training.weight_decay": Value(0.0, "LMHP utils/core.py"),
    "training.max_grad_norm": Value(None, "LMHP utils/core.py"),
    "normalization.to": Value("standardize", "Z 2.2; LMHP train_reward.py"),
    "normalization.on": Value("samples", "Z 2.2: x ~ D, y ~ rho(.|x)"),
    "normalization.num_samples": Value(256, "LMHP launch.py"),
    "normalization.before_training": Value(True, "LMHP launch.py normalize_before"),
    "normalization.generation.ignore_eos": Value(True, "LMHP train_reward.py: responses of a fixed length"),
}
_Z_PPO: Settings = {
    "value": Value("shared", "LMHP policy.py: a head on the policy's hidden states, weights 0 at first"),
    "total_episodes": Value(1_000_000, "LMHP launch.py (the paper: 2,000,000 for its 774M model)"),
    "ppo_epochs": Value(4, "LMHP train_policy.py noptepochs"),
    "gae.gamma": Value(1.0, "LMHP train_policy.py"),
    "gae.gae_lambda": Value(0.95, "LMHP train_policy.py"),
    "clip.ratio": Value(0.2, "LMHP train_policy.py"),
    "clip.value": Value(0.2, "LMHP train_policy.py"),
    "value_coef": Value(0.1, "LMHP train_policy.py"),
    "entropy_coef": Value(0.0, "LMHP train_policy.py"),
    "kl.estimator": Value("k1", "LMHP train_policy.py compute_rewards"),
    "whiten.advantages": Value(True, "LMHP train_policy.py loss"),
    "whiten.scope": Value("minibatch", "LMHP train_policy.py: inside the loss"),
    "missing_eos": Value("replace", "LMHP train_policy.py penalize"),
    "missing_eos_penalty": Value(1.0, "LMHP lm_tasks.py penalty_reward_value"),
    "score_placement": Value("last_token", "LMHP train_policy.py compute_rewards"),
    "generation.ignore_eos": Value(True, "LMHP lm_tasks.py: truncate_token alone ends a completion"),
    "generation.top_k": Value(0, "LMHP: pure sampling"),
    "generation.top_p": Value(1.0, "LMHP: pure sampling"),
    "training.schedule": Value("linear", "LMHP train_policy.py"),
    "training.final_learning_rate_fraction": Value(0.0, "LMHP train_policy.py"),
    "training.warmup_iterations": Value(0, "LMHP train_policy.py"),
    "training.adam_style": Value("tensorflow", "LMHP utils/core.py: tf.train.AdamOptimizer"),
    "training.adam_beta1": Value(0.9, "TensorFlow's default"),
    "training.adam_beta2": Value(0.999, "TensorFlow's default"),
    "training.adam_epsilon": Value(1e-5, "LMHP utils/core.py"),
    "training.weight_decay": Value(0.0, "LMHP utils/core.py"),
    "training.max_grad_norm": Value(None, "LMHP utils/core.py"),
    "ema.decay": Value(None, "LMHP train_policy.py"),
    "kl.update_limit": Value(None, "LMHP train_policy.py"),
}
_Z_NOTES = {
    "ppo": "LMHP also trains on tokens after the truncation; here they do not exist, as in later papers",
    "reward_model": "LMHP's Adam applies epsilon outside the bias correction also in the reward model; here only PPO does",
}
_Z_MISSING = {"sft": "Ziegler et al. start from a pretrained model without fine-tuning on demonstrations"}


class _ZieglerTask(TypedDict):
    """Settings of a kind of task in Ziegler et al."""

    length: int
    stop: str
    after: int
    adaptive: bool
    whiten: bool
    batch: int
    rate: float
    reward_rate: float
    reward_batch: int


def _ziegler(task: _ZieglerTask, *, temperature: float, kl_coef: float) -> Preset:
    launch = "LMHP launch.py"
    samples = {
        "normalization.generation.temperature": Value(temperature, launch),
        "normalization.generation.max_new_tokens": Value(task["length"], launch),
    }
    training = {"training.learning_rate": Value(task["reward_rate"], launch), "training.batch_size": Value(task["reward_batch"], launch)}
    ppo = {
        "rollout_batch_size": Value(task["batch"], launch),
        "minibatch_size": Value(task["batch"], "LMHP train_policy.py nminibatches = 1"),
        "kl.coef": Value(kl_coef, launch + (" (adapted from there)" if task["adaptive"] else "")),
        "kl.target": Value(6.0 if task["adaptive"] else None, launch),
        "kl.horizon": Value(10_000, "LMHP train_policy.py"),
        "whiten.rewards": Value(task["whiten"], "LMHP train_policy.py" if task["whiten"] else launch),
        "generation.max_new_tokens": Value(task["length"], f"{launch} response_length"),
        "generation.temperature": Value(temperature, launch),
        "generation.stop": Value([task["stop"]], f"{launch} truncate_token"),
        "generation.stop_after": Value(task["after"], f"{launch} truncate_after"),
        "training.learning_rate": Value(task["rate"], launch),
    }
    return Preset("Ziegler et al. 2019", {"reward_model": _Z_REWARD | samples | training, "ppo": _Z_PPO | ppo}, _Z_MISSING, notes=_Z_NOTES)


_STYLE: _ZieglerTask = {
    "length": 24,
    "stop": ".",
    "after": 16,
    "adaptive": True,
    "whiten": True,
    "batch": 512,
    "rate": 1e-5,
    "reward_rate": 5e-5,
    "reward_batch": 32,
}
_SUMMARIES: _ZieglerTask = {
    "length": 75,
    "stop": "\n",
    "after": 55,
    "adaptive": False,
    "whiten": False,
    "batch": 32,
    "rate": 2e-6,
    "reward_rate": 2.5e-5,
    "reward_batch": 16,
}
_TLDR_FIT: Settings = {
    "prompt_fit.max_tokens": Value(512, "S B.2; N+ tldr_dataset.py"),
    "prompt_fit.after": Value("POST: ", "N+ tldr_dataset.py format_str, truncate_field"),
    "prompt_fit.before": Value("\n\nTL;DR:", "N+ tldr_dataset.py format_str"),
    "prompt_fit.at": Value("\n", "S B.2; N+ tldr_dataset.py truncate_text"),
}


def _stiennon(sft_rate: float, reward_rate: float, rate: float, batch: int) -> Preset:
    sft: Settings = _TLDR_FIT | {
        "training.epochs": Value(1.0, "S B.1"),
        "training.batch_size": Value(128, "S B.1"),
        "training.learning_rate": Value(sft_rate, "S B.1"),
        "training.schedule": Value("cosine", "S B.1"),
        "training.final_learning_rate_fraction": ours(0.0, "as Huang et al. 2024"),
        "training.warmup_fraction": ours(0.0, UNSAID),
        "training.adam_epsilon": ours(1e-5, "as Ziegler and Huang et al."),
        "training.max_grad_norm": NO_CLIP,
        "completion_only_loss": ours(True, UNSAID),
    }
    reward: Settings = _TLDR_FIT | {
        "loss": Value("pairs", "S 3.4"),
        "num_seeds": Value(3, "S B.1: 3 to 10, the best on validation comparisons is kept"),
        "training.epochs": Value(1.0, "S B.1"),
        "training.batch_size": Value(64, "S B.1"),
        "training.learning_rate": Value(reward_rate, "S B.1"),
        "training.schedule": Value("cosine", "S B.1"),
        "training.final_learning_rate_fraction": ours(0.0, "as Huang et al. 2024"),
        "training.warmup_fraction": ours(0.0, UNSAID),
        "training.adam_epsilon": ours(1e-5, "as Ziegler and Huang et al."),
        "training.max_grad_norm": NO_CLIP,
        "normalization.to": Value("center", "S 3.4: the reference summaries have a mean score of 0"),
        "normalization.on": Value("demonstrations", "S 3.4"),
    }
    ppo: Settings = _TLDR_FIT | {
        "value": Value(None, "S 3.4: a separate network that starts from the reward model (null: the first reward model)"),
        "total_episodes": Value(1_000_000, "S B.1"),
        "rollout_batch_size": Value(batch, "S B.1"),
        "minibatch_size": ours(batch, "one minibatch, as LMHP and N+"),
        "ppo_epochs": Value(4, "S B.1"),
        "kl.coef": Value(0.05, "S B.1"),
        "kl.target": Value(None, "S B.1: a fixed coefficient"),
        "kl.estimator": Value("k1", "S 3.4"),
        "gae.gamma": Value(1.0, "S B.1"),
        "gae.gae_lambda": Value(0.95, "S B.1"),
        "clip.ratio": ours(0.2, "as LMHP"),
        "clip.value": ours(0.2, "as LMHP"),
        "value_coef": ours(0.1, "as LMHP"),
        "whiten.advantages": ours(True, "as LMHP"),
        "whiten.rewards": ours(False, "as LMHP for summaries"),
        "missing_eos": ours("replace", "as N+"),
        "missing_eos_penalty": ours(1.0, "as N+"),
        "generation.max_new_tokens": ours(53, "as N+; the data's summaries have 24 to 48 tokens"),
        "generation.temperature": ours(0.7, "as N+"),
        "training.learning_rate": Value(rate, "S B.1"),
        "training.schedule": Value("linear", "S B.1"),
        "training.final_learning_rate_fraction": Value(0.0, "S B.1"),
        "training.warmup_iterations": ours(0, UNSAID),
        "training.adam_epsilon": ours(1e-5, "as LMHP and N+"),
        "training.max_grad_norm": NO_CLIP,
        "ema.decay": ours(None, UNSAID),
        "kl.update_limit": ours(None, UNSAID),
    }
    return Preset("Stiennon et al. 2020", {"sft": sft, "reward_model": reward, "ppo": ppo})


_I_ADAM: Settings = {
    "training.adam_beta1": Value(0.9, "I C"),
    "training.adam_beta2": Value(0.95, "I C"),
    "training.weight_decay": ours(0.0, UNSAID),
    "training.max_grad_norm": NO_CLIP,
}
_I_COSINE: Settings = {
    "training.schedule": Value("cosine", "I C.1 to C.3"),
    "training.final_learning_rate_fraction": Value(0.1, "I C.1 to C.3"),
    "training.warmup_fraction": Value(0.0, "I C.1 to C.3: no warmup"),
    "training.adam_epsilon": ours(1e-8, UNSAID),
}
_PRETRAINING_DATA = "texts of the pretraining distribution"
_I_REWARD: Settings = {
    **_I_ADAM,
    **_I_COSINE,
    "loss": Value("pairs", "I equation 1: all C(K, 2) pairs of a prompt as one element"),
    "training.epochs": Value(1.0, "I C.2"),
    "training.learning_rate": Value(9e-6, "I C.2"),
    "training.batch_size": Value(64, "I C.2: prompts"),
    "normalization.to": Value("center", "I 3.5: demonstrations have a mean score of 0"),
    "normalization.on": Value("demonstrations", "I 3.5"),
}


def _instructgpt_sft(*, epochs: Value, rate: Value, batch: int, section: str, own: Settings) -> Settings:
    """Supervised fine-tuning as in ``section`` of the paper; ``own``: settings that only one of its two runs has."""
    return {
        **_I_ADAM,
        **_I_COSINE,
        "training.epochs": epochs,
        "training.learning_rate": rate,
        "training.batch_size": Value(batch, section),
        **own,
        "completion_only_loss": ours(True, UNSAID),
    }


def _instructgpt_init(size: _Size) -> Preset:
    """The model that PPO starts from: the demonstrations mixed with pretraining data."""
    own: Settings = {
        "pretraining_mix.share": Value(0.1, "I C.3, E.8: 10 % pretraining data"),
        "residual_dropout": ours(None, "C.1 states it for supervised fine-tuning only"),
    }
    epochs, rate = Value(2.0, "I C.3"), Value(size["init_rate"], "I C.3")
    return Preset(
        "Ouyang et al. 2022",
        {"sft": _instructgpt_sft(epochs=epochs, rate=rate, batch=size["sft_batch"], section="I C.3", own=own)},
        {stage: "init is the model that PPO starts from" for stage in ("reward_model", "ppo")},
        required={"sft": {"pretraining_mix.data": f"{_PRETRAINING_DATA}, for one row in ten (I C.3)"}},
    )


def _instructgpt(size: _Size) -> Preset:
    epochs, rate = Value(16.0, "I 3.5, C.1"), Value(size["sft_rate"], "I C.1")
    own: Settings = {"residual_dropout": Value(0.2, "I C.1")}
    sft = _instructgpt_sft(epochs=epochs, rate=rate, batch=size["sft_batch"], section="I C.1", own=own)
    return Preset(
        "Ouyang et al. 2022",
        {"sft": sft, "reward_model": _I_REWARD, "ppo": _instructgpt_ppo(size["value_rate"])},
        required={"ppo": {"pretraining_mix.data": f"{_PRETRAINING_DATA}, whose gradients PPO-ptx adds (I C.4)"}},
        notes={
            "sft": "the paper selects the checkpoint with the best reward model score on validation prompts (selection.reward)",
            "ppo": "the paper's policy starts not from the sft model but from one trained with the preset instructgpt2022/init",
        },
    )


def _instructgpt_ppo(value_rate: float) -> Settings:
    return _I_ADAM | {
        "value": Value(None, "I C.4: a separate network that starts from the reward model (null: the first reward model)"),
        "total_episodes": Value(256_000, "I C.4"),
        "rollout_batch_size": Value(512, "I C.4"),
        "minibatch_size": Value(64, "I C.4"),
        "ppo_epochs": Value(1, "I C.4"),
        "kl.coef": Value(0.02, "I C.4, E.7"),
        "kl.target": Value(None, "I C.4: a fixed coefficient"),
        "kl.estimator": Value("k1", "I equation 2"),
        "gae.gamma": Value(1.0, "I C.4: no discount"),
        "clip.ratio": Value(0.2, "I C.4"),
        "gae.gae_lambda": ours(0.95, "as Ziegler and Stiennon et al."),
        "clip.value": ours(0.2, "as LMHP"),
        "value_coef": ours(0.1, "as LMHP"),
        "whiten.advantages": ours(True, "as LMHP"),
        "whiten.rewards": ours(False, UNSAID),
        "missing_eos": ours("none", "responses of at most 1k tokens; the treatment of longer ones is not stated"),
        "max_prompt_tokens": Value(1024, "I C: prompts of more than 1k tokens are left out"),
        "generation.max_new_tokens": Value(1024, "I C: responses of at most 1k tokens"),
        "generation.temperature": Value(1.0, "I C.4"),
        "generation.top_k": ours(0, "as LMHP"),
        "generation.top_p": ours(1.0, "as LMHP"),
        "training.learning_rate": ours(8.05e-6, "E.9 scans 2.55e-6 to 2.55e-5; above 8.05e-6 PPO without pretraining data diverged"),
        "training.value_learning_rate": Value(value_rate, "I C.4"),
        "training.schedule": Value("constant", "I C.4"),
        "training.warmup_iterations": Value(10, "I C.4"),
        "training.warmup_start_fraction": Value(0.1, "I C.4"),
        "training.adam_epsilon": ours(1e-5, "as LMHP"),
        "pretraining_mix.coef": Value(27.8, "I C.4"),
        "pretraining_mix.examples_per_episode": Value(8, "I C.4, E.6"),
        "pretraining_mix.normalization": ours("token", "the paper does not say what the coefficient multiplies"),
        "ema.decay": Value(0.992, "I C.4"),
        "ema.cadence": ours("optimizer_step", UNSAID),
        "kl.update_limit": ours(None, UNSAID),
    }


class _Size(TypedDict):
    """Settings of InstructGPT that depend on the model size."""

    sft_rate: float
    init_rate: float
    sft_batch: int
    value_rate: float


_I_SIZES: dict[str, _Size] = {
    "1.3b": {"sft_rate": 9.65e-6, "init_rate": 5e-6, "sft_batch": 32, "value_rate": 9e-6},
    "6b": {"sft_rate": 9.65e-6, "init_rate": 1.04e-5, "sft_batch": 32, "value_rate": 9e-6},
    "175b": {"sft_rate": 5.03e-6, "init_rate": 2.45e-6, "sft_batch": 8, "value_rate": 5e-6},
}
_H_ADAM: Settings = {
    "training.learning_rate": Value(3e-6, "H; N+ Args.lr"),
    "training.adam_epsilon": Value(1e-5, "N+ Args.eps"),
    "training.adam_beta1": Value(0.9, "N+: torch's default"),
    "training.adam_beta2": Value(0.999, "N+: torch's default"),
    "training.weight_decay": Value(0.01, "N+: AdamW with torch's default"),
    "training.max_grad_norm": Value(None, "N+ does not clip"),
}
_H_COSINE: Settings = {
    "training.schedule": Value("cosine", "N+ Args.scheduler"),
    "training.final_learning_rate_fraction": Value(0.0, "N+: transformers' cosine"),
    "training.warmup_fraction": Value(0.0, "N+ Args.warm_up_steps"),
    "training.epochs": Value(1.0, "N+ Args.num_train_epochs"),
}
_HUANG = Preset(
    "Huang et al. 2024",
    {
        "sft": _H_ADAM
        | _H_COSINE
        | _TLDR_FIT
        | {
            "training.batch_size": Value(128, "H, hyperparameters of SFT"),
            "completion_only_loss": Value(False, "N+ sft.py: only padding is left out of the loss"),
            "residual_dropout": Value(0.0, "N+ disable_dropout: none anywhere"),
            "max_length": Value(562, "N+ README max_sft_query_response_length"),
        },
        "reward_model": _H_ADAM
        | _H_COSINE
        | _TLDR_FIT
        | {
            "loss": Value("pairs", "N+ reward.py"),
            "training.batch_size": Value(64, "H, hyperparameters of the reward model"),
            "max_length": Value(638, "N+ README max_rm_query_response_length"),
            "normalization.to": Value("center", "N+ reward.py: config.bias"),
            "normalization.on": Value("demonstrations", "N+ reward.py"),
        },
        "ppo": _H_ADAM
        | _TLDR_FIT
        | {
            "value": Value(None, "N+ ppo.py: a separate network that starts from the reward model (null: the first reward model)"),
            "total_episodes": Value(1_000_000, "N+ Args.total_episodes"),
            "rollout_batch_size": Value(512, "H, hyperparameters of PPO"),
            "minibatch_size": Value(512, "N+ PpoHParams.nminibatches = 1"),
            "ppo_epochs": Value(4, "N+ PpoHParams"),
            "kl.coef": Value(0.05, "N+ PpoHParams"),
            "kl.target": Value(None, "N+ ppo.py"),
            "kl.estimator": Value("k1", "N+ ppo.py"),
            "gae.gamma": Value(1.0, "N+ PpoHParams"),
            "gae.gae_lambda": Value(0.95, "N+ PpoHParams"),
            "clip.ratio": Value(0.2, "N+ PpoHParams"),
            "clip.value": Value(0.2, "N+ PpoHParams"),
            "value_coef": Value(0.1, "N+ PpoHParams"),
            "entropy_coef": Value(0.0, "N+ ppo.py"),
            "whiten.advantages": Value(True, "N+ ppo.py"),
            "whiten.rewards": Value(False, "N+ PpoHParams"),
            "whiten.scope": Value("process", "N+ ppo.py: each process's own episodes"),
            "missing_eos": Value("replace", "N+ ppo.py non_eos_penalty"),
            "missing_eos_penalty": Value(1.0, "N+ Args.penalty_reward_value"),
            "score_placement": Value("after", "N+ ppo.py sequence_lengths_p1"),
            "generation.max_new_tokens": Value(53, "N+ Args.response_length"),
            "generation.temperature": Value(0.7, "N+ Args.temperature"),
            "generation.top_k": Value(0, "N+ generation_config"),
            "generation.top_p": Value(1.0, "N+ generation_config"),
            "training.schedule": Value("linear", "N+ ppo.py lrnow"),
            "training.final_learning_rate_fraction": Value(0.0, "N+ ppo.py lrnow"),
            "training.warmup_iterations": Value(0, "N+ ppo.py"),
            "training.adam_style": Value("torch", "N+ ppo.py"),
            "ema.decay": Value(None, "N+ ppo.py"),
            "kl.update_limit": Value(None, "N+ ppo.py"),
        },
    },
)
PRESETS: dict[str, Preset] = {
    **dict.fromkeys(("ziegler2019", "ziegler2019/style"), _ziegler(_STYLE, temperature=0.7, kl_coef=0.15)),
    "ziegler2019/tldr": _ziegler(_SUMMARIES, temperature=0.7, kl_coef=0.03),
    "ziegler2019/cnndm": _ziegler(_SUMMARIES, temperature=0.5, kl_coef=0.01),
    "stiennon2020": _stiennon(6.35e-5, 1.5e-5, 1.5e-5, 512),
    "stiennon2020/1.3b": _stiennon(6.35e-5, 1.5e-5, 1.5e-5, 512),
    "stiennon2020/6.7b": _stiennon(2.83e-5, 5e-6, 7e-6, 256),
    "instructgpt2022": _instructgpt(_I_SIZES["1.3b"]),
    "instructgpt2022/init": _instructgpt_init(_I_SIZES["1.3b"]),
    **{f"instructgpt2022/{name}": _instructgpt(size) for name, size in _I_SIZES.items()},
    **{f"instructgpt2022/{name}-init": _instructgpt_init(size) for name, size in _I_SIZES.items()},
    "huang2024": _HUANG,
}

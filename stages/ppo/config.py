"""Settings of a PPO step. Batch sizes count episodes (one prompt, one completion), summed over processes."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from stages.config import (
    AUTO_ROWS,
    AdamBeta1,
    AdamBeta2,
    AdamEpsilon,
    CheckpointedStepConfig,
    DataField,
    DataSource,
    FinalFraction,
    GenerationSettings,
    GradientCheckpointing,
    LoraSettings,
    Microbatch,
    ModelField,
    ModelInput,
    Optimizer,
    Strict,
    TorchCompile,
    as_written,
    check_trainable,
    is_changed,
)
from stages.corpora.conversations.messages import location_of
from stages.corpora.curation import Curation, Curator
from stages.corpora.encoding.fitting import PromptFit
from stages.corpora.prompts import load_prompt_rows, load_prompts
from stages.corpora.text import check_texts
from stages.ppo.health import HealthSettings
from stages.rewards.config import RewardInput, check_names, check_rubrics, leaves, reward_model_inputs, rubric_inputs
from stages.rewards.signature import columns_asked_for

if TYPE_CHECKING:
    from stages.corpora.conversations.messages import Completion, Prompt


class PPOOptimizer(Strict):
    """Optimizer settings of policy and value network. Warmup and schedule count iterations."""

    learning_rate: float = Field(1e-5, gt=0, description="Peak learning rate of the policy.")
    value_learning_rate: float | None = Field(None, gt=0, description="Peak learning rate of the value network; null: the policy's.")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="Learning rate schedule after warmup, over iterations.")
    final_learning_rate_fraction: FinalFraction = 0.0
    warmup_iterations: int = Field(0, ge=0, description="Number of first iterations in which the learning rate rises linearly to its peak.")
    warmup_start_fraction: float = Field(0.1, ge=0, le=1, description="Learning rate of the first warmup iteration as a share of the peak.")
    optimizer: Optimizer = "adamw"
    adam_style: Literal["torch", "tensorflow"] = Field(
        "torch", description="tensorflow: epsilon outside the bias correction, as in the papers' original code (smaller first steps)."
    )
    adam_beta1: AdamBeta1 = 0.9
    adam_beta2: AdamBeta2 = 0.999
    adam_epsilon: AdamEpsilon = 1e-5
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW (only with adam_style: torch); 0: none.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Larger gradients of a network are scaled down to this norm; null: no clipping."
    )
    gradient_checkpointing: GradientCheckpointing = False
    torch_compile: TorchCompile = False

    def without_effect(self) -> set[str]:
        return set() if self.torch_compile else {"torch_compile"}


class PretrainingMix(Strict):
    """PPO-ptx (Ouyang et al. 2022, C.4): pretraining gradients are added to those of every minibatch."""

    data: DataField = Field(description="Texts of the pretraining distribution.")
    coef: float = Field(27.8, ge=0, description="Weight of the pretraining loss relative to PPO's mean loss per token.")
    examples_per_episode: int = Field(8, ge=1, description="Pretraining rows per episode of a minibatch.")
    block_size: int = Field(128, ge=2, description="Tokens per pretraining row.")
    normalization: Literal["token", "row"] = Field(
        "token",
        description="Average the pretraining loss over tokens, or over rows (summed over a row's tokens, the literal equation 2 of the "
        "paper). The paper does not say which.",
    )


class KLSettings(Strict):
    """The penalty on the KL divergence between policy and reference, and a limit for one iteration's updates."""

    coef: float = Field(
        0.05,
        ge=0,
        description="Weight of the KL penalty: points of the score per nat. Raise it to keep the policy closer to the reference. With "
        "target: the initial weight.",
    )
    target: float | None = Field(
        None, gt=0, description="Adapt coef so that the KL per completion approaches this, in nats; null: coef is fixed."
    )
    horizon: int = Field(
        10_000,
        ge=1,
        description="With target: in each iteration, coef changes by the relative error of the KL (at most 20 %) times episodes / "
        "horizon. Higher: slower.",
    )
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1",
        description="Estimator of the KL of a token. With d = log p(policy) - log p(reference): k1 = d, as in the papers; k2 = d^2 / 2; "
        "k3 = exp(-d) - 1 + d.",
    )
    update_limit: float | None = Field(
        None,
        gt=0,
        description="Limit for the change of the policy in one iteration: the KL to the policy that sampled, in nats per token "
        "(policy/approx_kl). It is checked after each epoch, for the last minibatch. Above the limit, the iteration's remaining epochs are "
        "skipped. null: no limit. Set it (e.g. to 0.02) if ratio_blow_up is raised.",
    )


OF_THE_VALUE_NETWORK = (
    "value",
    "value_coef",
    "publish_value",
    "value_warmup_iterations",
    "clip.value",
    "gae.gae_lambda",
    "gae.value_gae_lambda",
    "score_placement",
    "whiten.rewards",
)
"""Fields that only a value network uses."""


class GAESettings(Strict):
    """Generalized advantage estimation (Schulman et al. 2016)."""

    gamma: float = Field(1.0, gt=0, le=1, description="Discount per token; 1: none.")
    gae_lambda: float = Field(
        0.95,
        ge=0,
        le=1,
        description="Between 0 (rely on the value network: less variance) and 1 (rely on the rewards of the full completion: less bias).",
    )
    value_gae_lambda: float | None = Field(
        None, ge=0, le=1, description="Lambda of the returns that the value network learns; null: gae_lambda."
    )


class ClipSettings(Strict):
    """Clips of the PPO objective."""

    ratio: float = Field(
        0.2,
        gt=0,
        description="A token's probability ratio to the policy that sampled is clipped to 1 - this ... 1 + this. Lower: smaller updates.",
    )
    dual: float | None = Field(
        None,
        gt=1,
        description="Maximum probability ratio of tokens with a negative advantage; null: no maximum. Set it (e.g. to 3) if ratio_blow_up "
        "is raised.",
    )
    value: float | None = Field(
        0.2,
        gt=0,
        description="Maximum change of a predicted value since the rollout, in points of the score, in the value loss; null: no maximum.",
    )


class WhiteningSettings(Strict):
    """Whitening of advantages and rewards."""

    advantages: bool | None = Field(
        None, description="Scale advantages to mean 0 and variance 1 over all response tokens; null: only with advantages: gae."
    )
    rewards: bool = Field(False, description="Scale the rewards of tokens to variance 1 over all response tokens; their mean stays.")
    scope: Literal["rollout", "process", "minibatch"] = Field(
        "rollout",
        description="Scale over all episodes of an iteration; over each process's episodes (Huang et al. 2024); or over each minibatch, "
        "which then computes its own advantages (Ziegler et al. 2019).",
    )


class EMASettings(Strict):
    """An exponential moving average of the policy's weights."""

    decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Publish an exponential moving average of the weights with this decay, e.g. 0.99; null: the last weights.",
    )
    cadence: Literal["optimizer_step", "iteration"] = Field(
        "optimizer_step", description="When the average is updated; the paper does not say. Rollouts use the policy's current weights."
    )
    publish_last: bool = Field(False, description="With decay: also publish the last weights, as <name>-last.")


class PPOStepConfig(CheckpointedStepConfig):
    """Train ``policy`` on the weighted ``reward`` sources, with a KL penalty to its reference."""

    stage: Literal["ppo"] = "ppo"
    preset: str | None = Field(None, description="Published settings as defaults of this step, e.g. instructgpt2022 (docs/presets.md).")
    policy: ModelField = Field(description="Language model to train, usually an sft step.")
    reference: ModelField | None = Field(None, description="Frozen model of the KL penalty; null: the initial policy.")
    value: Literal["policy", "shared"] | ModelField | None = Field(
        None,
        union_mode="left_to_right",
        description="What the value network starts from: a reward model; policy: a copy of the policy with a new head; shared: only a new "
        "head, on the policy's hidden states (less memory). null: the first reward model of reward with the policy's vocabulary, else "
        "policy.",
    )
    reward: list[RewardInput] = Field(
        min_length=1, description="Reward sources; the weighted sum of their scores is the score of a completion."
    )
    monitors: list[RewardInput] = Field([], description="Reward sources that are only logged, not trained on.")
    data: DataField = Field(description="Prompts.")
    prompt_words: int | None = Field(None, ge=1, description="Use only this many words of each text as the prompt.")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="Longer prompts are dropped and counted. null: the model's maximum length minus max_new_tokens."
    )
    prompt_fit: PromptFit | None = Field(None, description="Shorten prompts that are too long; null: drop them.")
    curation: Curation = Field(Curation(), description="Prompt filters.")
    generation: GenerationSettings = Field(GenerationSettings(), description="How completions are sampled.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters of policy and value network instead of full weights.")
    training: PPOOptimizer = Field(
        PPOOptimizer(), description="Optimizer settings of policy and value network. Warmup and schedule count iterations."
    )

    total_episodes: int = Field(8192, ge=1, description="Length of the run: total number of sampled completions.")
    rollout_batch_size: int = Field(64, ge=1, description="Episodes per iteration, summed over processes.")
    minibatch_size: int = Field(32, ge=1, description="Episodes per optimizer step, summed over processes.")
    microbatch_size: Microbatch = Field(
        "auto",
        description="Maximum episodes per forward pass and process. It changes speed and memory, not the gradient. auto: 16 on a CPU; on "
        "a GPU as many tokens as fit into its free memory, measured in the first passes.",
    )
    ppo_epochs: int = Field(4, ge=1, description="How often each episode of an iteration is used. Higher: larger updates.")

    kl: KLSettings = Field(KLSettings(), description="The KL penalty, which keeps the policy close to the reference.")
    gae: GAESettings = Field(GAESettings(), description="Generalized advantage estimation.")
    clip: ClipSettings = Field(ClipSettings(), description="Limits of one iteration's changes in the loss.")
    whiten: WhiteningSettings = Field(WhiteningSettings(), description="Whitening: scaling of advantages and rewards.")
    ema: EMASettings = Field(EMASettings(), description="Moving average of the weights.")
    advantages: Literal["gae", "rloo", "grpo", "reinforce"] = Field(
        "gae",
        description="gae: with a value network. The others have none: all tokens of a completion have the same advantage, its return "
        "(score minus KL penalties) minus a baseline. rloo: the mean of the prompt's other completions; grpo: the mean of all the prompt's "
        "completions, then divided by their standard deviation; reinforce: the mean of the iteration.",
    )
    samples_per_prompt: int = Field(1, ge=1, description="Completions per prompt in an iteration; rollout_batch_size counts completions.")
    divide_by_deviation: bool = Field(True, description="grpo: false omits the division (Dr. GRPO, Liu et al. 2025).")
    value_coef: float = Field(0.1, gt=0, description="Weight of the value loss in the sum of the losses.")
    entropy_coef: float = Field(
        0.0,
        ge=0,
        description="Weight of the entropy (nats per token) that is added to the objective; 0: none. Raise it if entropy_collapse is "
        "raised.",
    )
    missing_eos: Literal["none", "replace", "subtract"] = Field(
        "none",
        description="Completion without stop token: replace its score by -missing_eos_penalty (Ziegler et al. 2019, Huang et al. 2024), "
        "or subtract missing_eos_penalty from its score (TRL).",
    )
    missing_eos_penalty: float = Field(1.0, ge=0, description="Points of the score for missing_eos: replace and subtract.")
    length_penalty: float = Field(
        0.0,
        ge=0,
        description="Points subtracted from the score for each token of the completion. Raise it if the reward model prefers long answers "
        "(Singhal et al. 2024; docs/rewards.md).",
    )
    score_placement: Literal["last_token", "after"] = Field(
        "last_token",
        description="Credit the score to the last token, or to an extra state after it (Huang et al. 2024). The extra state has its own "
        "value. A response of the maximum length has no extra state.",
    )
    value_warmup_iterations: int = Field(0, ge=0, description="In this number of first iterations, only the value network is trained.")
    rollout_logprobs: Literal["auto", "sampled", "recomputed"] = Field(
        "auto",
        description="Where the log-probabilities of the rollout come from: sampled: from sampling; recomputed: from a forward pass as in "
        "the update. auto: sampled in fp32 with engine: local, else recomputed.",
    )
    importance_cap: float = Field(
        2.0,
        ge=1,
        description="With generation.engine: vllm, a token's loss is weighted by its probability under the policy divided by that under "
        "the sampler. This is the maximum weight.",
    )
    overlap: Literal[0, 1] = Field(
        0,
        description="1, only with generation.engine: vllm: sample the next rollout while an update runs, with the policy before this "
        "update. Importance weights (importance_cap) correct for the difference (docs/vllm.md).",
    )
    pretraining_mix: PretrainingMix | None = Field(
        None, description="Add the loss on pretraining texts (PPO-ptx), so that the policy forgets less; null: plain PPO."
    )
    num_samples: int = Field(2, ge=0, description="Sample completions to keep per iteration (samples.jsonl).")
    health: HealthSettings = Field(HealthSettings(), description="When to raise alarms, and which alarms end the run.")
    offload: bool = Field(
        False,
        description="Keep idle models (reference, reward models, value network) in CPU memory: less GPU memory, but slower.",
    )
    publish_value: bool = Field(False, description="Also publish the value network, as <name>-value.")

    former_names: ClassVar[dict[str, str]] = {
        **CheckpointedStepConfig.former_names,
        "kl_coef": "kl.coef",
        "kl_target": "kl.target",
        "kl_horizon": "kl.horizon",
        "kl_estimator": "kl.estimator",
        "target_update_kl": "kl.update_limit",
        "gamma": "gae.gamma",
        "gae_lambda": "gae.gae_lambda",
        "value_gae_lambda": "gae.value_gae_lambda",
        "clip_range": "clip.ratio",
        "dual_clip": "clip.dual",
        "value_clip_range": "clip.value",
        "whiten_advantages": "whiten.advantages",
        "whiten_rewards": "whiten.rewards",
        "whitening_scope": "whiten.scope",
        "ema_decay": "ema.decay",
        "ema_cadence": "ema.cadence",
        "publish_last": "ema.publish_last",
    }

    @model_validator(mode="after")
    def _consistent(self) -> PPOStepConfig:
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(f"{self.setting('rollout_batch_size')} must be a multiple of {self.setting('minibatch_size')}")
        if self.total_episodes < self.rollout_batch_size:
            raise ValueError(f"{self.setting('total_episodes')} is less than {self.setting('rollout_batch_size')}, one iteration; raise it")
        if self.whiten.scope == "minibatch" and self.minibatch_size < 8:
            raise ValueError(
                f"whiten.scope=minibatch needs minibatch_size >= 8 for a usable variance, got {self.setting('minibatch_size')}"
            )
        check_trainable(self.policy, self.lora, "policy")
        if self.generation.temperature == 0:
            raise ValueError("generation.temperature=0 is greedy: all samples of a prompt would be equal, so PPO could not learn. Use 1")
        if self.training.adam_style == "tensorflow" and self.training.optimizer != "adamw":
            raise ValueError(f"training.adam_style=tensorflow requires optimizer: adamw, got {self.training.optimizer!r}")
        if self.training.adam_style == "tensorflow" and self.training.weight_decay:
            raise ValueError("training.weight_decay requires adam_style: torch, got tensorflow; remove weight_decay, or change adam_style")
        if self.ema.publish_last and self.ema.decay is None:
            raise ValueError("ema.publish_last requires ema.decay: without an average the last weights are published anyway")
        if self.generation.vllm is None and self.importance_cap != type(self).model_fields["importance_cap"].default:
            raise ValueError("importance_cap requires generation.engine: vllm; the local sampler is the policy itself")
        if self.generation.vllm is None and self.overlap:
            raise ValueError(
                "overlap=1 requires generation.engine: vllm; the local sampler computes with the weights that the update is changing"
            )
        generation = self.generation
        if generation.vllm is not None and generation.temperature != 1 and (generation.top_k or generation.top_p < 1):
            raise ValueError(
                f"generation.temperature={generation.temperature:g} with top_k or top_p is not supported with engine: vllm, whose "
                "log-probabilities are those after top_k and top_p, but PPO needs those before. Use temperature: 1, remove top_k and "
                "top_p, or use engine: local"
            )
        if self.generation.vllm is not None and self.rollout_logprobs == "sampled":
            raise ValueError("rollout_logprobs=sampled requires generation.engine: local; the log-probabilities of vLLM are recomputed")
        if self.generation.vllm is not None and self.lora is not None and self.lora.modules_to_save:
            raise ValueError(
                "lora.modules_to_save makes an adapter that vLLM cannot load (it accepts only low-rank updates); remove it, train "
                "without lora, or use generation.engine: local"
            )
        if self.generation.ignore_eos and not self.generation.stop and self.missing_eos != "none":
            raise ValueError("generation.ignore_eos without generation.stop: no completion ends, so each gets the missing_eos penalty")
        check_names([*self.reward, *self.monitors], "reward and monitors")
        return self

    @model_validator(mode="after")
    def _consistent_advantages(self) -> PPOStepConfig:
        if self.rollout_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"{self.setting('rollout_batch_size')} must be a multiple of {self.setting('samples_per_prompt')}: it counts completions"
            )
        if self.advantages == "reinforce" and self.rollout_batch_size == 1:
            raise ValueError("rollout_batch_size=1 with advantages: reinforce has no other completion to compare with; set it to 2 or more")
        if self.advantages in ("rloo", "grpo") and self.samples_per_prompt == 1:
            raise ValueError(f"advantages={self.advantages} compares completions of one prompt; set samples_per_prompt, e.g. to 4")
        if not self.divide_by_deviation and self.advantages != "grpo":
            raise ValueError(f"divide_by_deviation=false requires advantages: grpo, got {self.advantages!r}")
        if self.has_value:
            return self
        if changed := [path for path in OF_THE_VALUE_NETWORK if is_changed(self, path)]:
            shown = ", ".join(f"{path}={as_written(attrgetter(path)(self))}" for path in changed)
            requires = "requires" if len(changed) == 1 else "require"
            raise ValueError(f"{shown} {requires} advantages: gae; {self.advantages} has no value network")
        if self.training.value_learning_rate is not None:
            raise ValueError(f"training.value_learning_rate requires advantages: gae; {self.advantages} has no value network")
        if self.gae.gamma != 1:
            raise ValueError(f"gae.gamma={self.gae.gamma} requires advantages: gae; {self.advantages} has one advantage per completion")
        if self.whiten.scope != "rollout":
            raise ValueError(f"whiten.scope={self.whiten.scope} requires advantages: gae; it would separate the completions of a prompt")
        return self

    def without_effect(self) -> set[str]:
        unused = {"importance_cap", "health.sampler_gap"} if self.generation.vllm is None else set()
        unused |= set() if self.length_penalty else {"length_penalty"}
        return unused if self.overlap else {*unused, "overlap"}

    @property
    def has_value(self) -> bool:
        """Whether there is a value network or a value head on the policy."""
        return self.advantages == "gae"

    def value_input(self, fits: Callable[[str], bool]) -> str | None:
        """The model input that the value network starts from, e.g. ``reward[0].model``; None without a separate value network.

        A start from ``policy`` has a new head. ``fits(input)``: whether a reward model can read the policy's texts; it is asked in the
        order of the sources if ``value`` is null, until one fits. InstructGPT starts from the reward model (section 3.5).
        """
        if self.value == "shared" or not self.has_value:
            return None
        if isinstance(self.value, ModelInput):
            return "value"
        if self.value is None:
            for path, source in leaves(self.reward, "reward").items():
                if source.model is not None and source.label is None and source.answers is None and fits(f"{path}.model"):
                    return f"{path}.model"
        return "policy"

    @property
    def rows_per_pass(self) -> int:
        """Maximum episodes of a pass with gradients, where passes are not filled by tokens."""
        return AUTO_ROWS["ppo"] if self.microbatch_size == "auto" else self.microbatch_size

    @property
    def measuring_rows(self) -> int:
        """``rows_per_pass`` of a pass without gradients: twice as many fit."""
        return 2 * self.rows_per_pass

    @property
    def whitens_advantages(self) -> bool:
        """``whiten.advantages``; the default is true with a value network and false without."""
        return self.has_value if self.whiten.advantages is None else self.whiten.advantages

    @property
    def prompts_per_iteration(self) -> int:
        """Number of prompts in an iteration; each has ``samples_per_prompt`` completions."""
        return self.rollout_batch_size // self.samples_per_prompt

    @property
    def num_iterations(self) -> int:
        """Number of full iterations in ``total_episodes``."""
        return self.total_episodes // self.rollout_batch_size

    def model_inputs(self) -> dict[str, ModelInput]:
        inputs = {"policy": self.policy}
        if self.reference is not None:
            inputs["reference"] = self.reference
        if isinstance(self.value, ModelInput):
            inputs["value"] = self.value
        return {**inputs, **reward_model_inputs(self.reward, "reward"), **reward_model_inputs(self.monitors, "monitors")}

    def data_inputs(self) -> dict[str, list[DataSource]]:
        rubrics = {**rubric_inputs(self.reward, "reward"), **rubric_inputs(self.monitors, "monitors")}
        inputs = {"data": self.data, **rubrics}
        return inputs if self.pretraining_mix is None else {**inputs, "pretraining_mix.data": self.pretraining_mix.data}

    def conversations(self) -> list[tuple[Prompt, list[Completion], str]]:
        """Rows of (prompt, its completions, the row's location) that the models of this step read; see ``chain/conversations.py``."""
        return [(prompt, [], location_of(prompt)) for prompt in load_prompts(self.data, prompt_words=self.prompt_words)]

    def check_data(self) -> None:
        """Raise DataError for prompts that this stage cannot use. Loads no model."""
        check_rubrics([*self.reward, *self.monitors])
        asked = columns_asked_for([*self.reward, *self.monitors], run=False)
        load_prompt_rows(self.data, prompt_words=self.prompt_words, curator=Curator(self.curation), columns=asked)
        if self.pretraining_mix is not None:
            check_texts(self.pretraining_mix.data)

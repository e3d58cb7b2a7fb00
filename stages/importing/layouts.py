"""Recognise how another library saved a transformer with a scalar head, by its tensor names.

d is the hidden size. A head is weight [1, d] and a bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypedDict

import torch
from torch import Tensor

from stages.errors import ModelError

Role = Literal["language_model", "reward_model", "value_model", "classifier"]


class HeadConfig(TypedDict, total=False):
    """The entries of config.json that tell how a head was saved."""

    architectures: list[str] | None
    num_labels: int
    id2label: dict[str, str] | None
    value_head_prefix: str
    normalize_reward: bool
    mean: float
    std: float


@dataclass(frozen=True)
class Head:
    """A scalar head: weight [1, d] fp32, its bias, and its name in the file."""

    weight: Tensor
    bias: float
    name: str


@dataclass(frozen=True)
class Layout:
    """The content of a folder.

    ``library``: its author; ``body``: the transformer's tensors with transformers' names; ``role``: that of the head (None without one);
    ``has_policy``: besides the head, the language model is also a result; ``notes``: what was assumed, changed or dropped.
    """

    library: str
    body: dict[str, Tensor]
    head: Head | None = None
    role: Role | None = None
    has_policy: bool = False
    notes: list[str] = field(default_factory=list)


def recognise(weights: dict[str, Tensor], head_file: dict[str, Tensor], config: HeadConfig, *, is_adapter: bool) -> Layout:
    """Recognise the layout of a folder from its model's ``weights``, a separate ``head_file``, and ``config`` (config.json).

    Raises ModelError for a head that is not linear from d to 1.
    """
    names = set(weights)
    if head_file:
        return _separate_head(weights, head_file)
    if any(name.startswith("rwtransformer.") for name in names):
        return _deepspeed_chat(weights)
    if any(name.startswith("base_model.") for name in names) and not is_adapter:
        return _trlx(weights)
    if "v_head.summary.weight" in names:
        return _trl_value_head(weights, is_adapter)
    if "v_head.weight" in names:
        return _trlx_reward_model(weights)
    if "value_head.weight" in names or _is_openrlhf(config, names):
        return _openrlhf(weights, config)
    return Layout("transformers", weights, role=_role_of(config, names, is_adapter))


def _role_of(config: HeadConfig, names: set[str], is_adapter: bool) -> Role | None:
    """The role of a model in transformers' own form."""
    heads = [name for name in names if name.split(".")[0] in ("score", "classifier")]
    if not heads:
        return None if is_adapter else "language_model"
    labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    return "reward_model" if labels == 1 and names & {"score.weight"} else "classifier"


def _separate_head(weights: dict[str, Tensor], head_file: dict[str, Tensor]) -> Layout:
    head = linear_head(head_file, "v_head.summary")
    return Layout("LLaMA-Factory or ms-swift", weights, head, "reward_model", notes=[_assumed_reward("value_head")])


def _deepspeed_chat(weights: dict[str, Tensor]) -> Layout:
    head = linear_head(weights, "v_head")
    body, dropped = _split(weights, "rwtransformer.", head)
    return Layout("DeepSpeed-Chat", body, head, "reward_model", notes=[_assumed_reward("v_head"), *dropped])


def _trl_value_head(weights: dict[str, Tensor], is_adapter: bool) -> Layout:
    head = linear_head(weights, "v_head.summary")
    body = {name.removeprefix("pretrained_model."): value for name, value in weights.items() if not name.startswith("v_head.")}
    return Layout("TRL 0.4 to 0.11 (AutoModelForCausalLMWithValueHead)", body, head, "value_model", has_policy=bool(body) or is_adapter)


def _trlx(weights: dict[str, Tensor]) -> Layout:
    body = {name.removeprefix("base_model."): value for name, value in weights.items() if name.startswith("base_model.")}
    others = sorted({name.split(".")[0] for name in weights if not name.startswith("base_model.")})
    notes = []
    if "v_head" in others:
        notes.append(
            "dropped: v_head, which has two layers (or a branch of the transformer) in trlX; the value network here has one linear layer. "
            "Start PPO's value network from a reward model or from the policy"
        )
    if "frozen_head" in others:
        notes.append("dropped: frozen_head, a copy of the reference's upper layers; start the policy from the SFT model instead")
    return Layout("trlX (AutoModelForCausalLMWithValueHead)", body, has_policy=True, role="language_model", notes=notes)


def _trlx_reward_model(weights: dict[str, Tensor]) -> Layout:
    head = linear_head(weights, "v_head")
    body = {name: value for name, value in weights.items() if not name.startswith("v_head.")}
    return Layout("trlX (reward model of its examples)", body, head, "reward_model", notes=[_assumed_reward("v_head")])


def _is_openrlhf(config: HeadConfig, names: set[str]) -> bool:
    made = (config.get("architectures") or [""])[0]
    return made in ("RewardModel", "CriticModel") and any(name.endswith(".weight") and "." in name for name in names)


def _openrlhf(weights: dict[str, Tensor], config: HeadConfig) -> Layout:
    prefix = next((name for name in ("value_head", "score") if f"{name}.weight" in weights), config.get("value_head_prefix", "score"))
    head = linear_head(weights, prefix)
    body = {name: value for name, value in weights.items() if not name.startswith(f"{prefix}.")}
    is_critic = (config.get("architectures") or [""])[0] == "CriticModel"
    notes = [] if is_critic or config.get("architectures") else [_assumed_reward(prefix)]
    if config.get("normalize_reward") and "mean" in config:
        mean, deviation = float(config["mean"]), float(config["std"])
        head = Head(head.weight / deviation, (head.bias - mean) / deviation, head.name)
        notes.append(f"scores are normalised as in OpenRLHF's evaluation mode: (score - {mean:g}) / {deviation:g}, applied to the head")
    return Layout("OpenRLHF", body, head, "value_model" if is_critic else "reward_model", notes=notes)


def linear_head(tensors: dict[str, Tensor], prefix: str) -> Head:
    """The linear head under ``prefix``. Raises ModelError if it is missing or not linear from d to 1."""
    tensors_of_head = {name: value for name, value in tensors.items() if name.startswith(f"{prefix.split('.')[0]}.")}
    weight, bias = tensors.get(f"{prefix}.weight"), tensors.get(f"{prefix}.bias")
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(tensors_of_head.items())) or "none"
    if weight is None or set(tensors_of_head) - {f"{prefix}.weight", f"{prefix}.bias"} or weight.dim() != 2 or weight.shape[0] != 1:
        raise ModelError(f"the head is not a linear layer with one output: expected {prefix}.weight [1, d]; the file has {shapes}")
    return Head(weight.float(), 0.0 if bias is None else float(torch.as_tensor(bias).reshape(-1)[0]), prefix)


def _split(weights: dict[str, Tensor], prefix: str, head: Head) -> tuple[dict[str, Tensor], list[str]]:
    """Return (the tensors under ``prefix`` without it, notes on tensors that belong neither there nor to the head)."""
    body = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    others = sorted(name for name in weights if not name.startswith((prefix, f"{head.name}.")))
    return body, [f"dropped: {', '.join(others)}"] if others else []


def _assumed_reward(name: str) -> str:
    return f"the file does not say whether {name} predicts rewards or values; assumed: a reward model (else use --role value_model)"

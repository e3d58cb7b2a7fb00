"""Recognise how another library saved a transformer with a scalar head, by its tensor names.

d is the hidden size. A head is weight [1, d] and a bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypedDict, cast

import torch
from torch import Tensor

from stages.errors import ModelError, some_of
from stages.json_types import JsonObject

Role = Literal["language_model", "reward_model", "value_model", "classifier"]
CLASSIFIERS = ("score", "classifier", "classification_head", "logits_proj", "sequence_summary")
"""First parts of the names that transformers gives to the heads of sequence classifiers."""
IN_LAYER = re.compile(r"\.\d+\.")
"""Matches the names of tensors in a numbered layer: model.layers.0.mlp..."""
HEADS_ONLY = ("v_head.", "ilql_heads.")
"""Prefixes of the tensors that TRL and trlX save next to an adapter."""
DEEPSPEED_CHAT = ("rwtransformer.", "rwtranrsformer.")
"""Both spellings are in DeepSpeed-Chat's releases."""


class HeadConfig(TypedDict, total=False):
    """The entries of config.json that tell how a head was saved."""

    architectures: list[str] | None
    num_labels: int
    id2label: dict[str, str] | None
    value_head_prefix: str
    normalize_reward: bool
    mean: float | list[float]
    std: float | list[float]
    num_padding_at_beginning: int


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
    ``has_policy``: besides the head, the language model is also a result; ``notes``: what was assumed, changed or dropped;
    ``value_body``: the tensors of a value network with its own transformer (empty: it uses ``body``); ``head_name``: the head in words;
    ``base``: the base of an adapter, as its config names it.
    """

    library: str
    body: dict[str, Tensor]
    head: Head | None = None
    role: Role | None = None
    has_policy: bool = False
    notes: list[str] = field(default_factory=list)
    value_body: dict[str, Tensor] = field(default_factory=dict)
    head_name: str = ""
    base: str = ""


def recognise(
    weights: dict[str, Tensor], head_file: dict[str, Tensor], config: JsonObject, *, adapter: Mapping[str, Tensor] | None = None
) -> Layout:
    """Recognise the layout of a folder from its model's ``weights``, a separate ``head_file``, ``config`` (config.json), and the tensors
    of an ``adapter`` (None without one).

    Raises ModelError for a head that is not linear from d to 1, and for a folder with both an adapter and a complete model.
    """
    settings = cast("HeadConfig", config)
    layout = _adapter_layout(weights, head_file, adapter) if adapter is not None else _full_layout(weights, head_file, settings)
    if layout.head is not None:
        _require_finite(layout.head.name, layout.head.weight)
        width, bias = layout.head.weight.shape[1], " with a bias" if layout.head.bias else ""
        return replace(layout, head_name=layout.head_name or f"{layout.head.name}, linear from {width} to 1{bias}")
    return layout


def _require_finite(name: str, weight: Tensor) -> None:
    if not bool(torch.isfinite(weight.float()).all()):
        raise ModelError(f"the head {name} contains NaN or infinity; use an earlier checkpoint")


def _full_layout(weights: dict[str, Tensor], head_file: dict[str, Tensor], config: HeadConfig) -> Layout:
    names = set(weights)
    if all(name.startswith(HEADS_ONLY) for name in names):
        raise ModelError(f"the weights contain only a value head ({some_of(sorted(names))}) and no transformer; import the complete model")
    if head_file:
        return _separate_head(weights, head_file)
    if any(name.startswith(DEEPSPEED_CHAT) for name in names):
        return _deepspeed_chat(weights, config)
    if any(name.startswith("base_model.") for name in names):
        return _trlx(weights)
    if any(name.startswith("policy.") for name in names) and any(name.startswith("value_model.") for name in names):
        return _trl_wrapper(weights)
    if "v_head.summary.weight" in names:
        return _trl_value_head(weights)
    if "v_head.weight" in names:
        return _trlx_reward_model(weights)
    if "value_head.weight" in names or _is_openrlhf(config, names):
        return _openrlhf(weights, config)
    if (prefix := _unknown_head(weights)) is not None:
        return _unknown_library(weights, prefix)
    return _transformers(weights, config)


def _adapter_layout(weights: dict[str, Tensor], head_file: dict[str, Tensor], adapter: Mapping[str, Tensor]) -> Layout:
    """An adapter: its head is in the adapter's file, in a separate file, or (TRL, trlX) the only content of pytorch_model.bin."""
    others = sorted(name for name in weights if not name.startswith(HEADS_ONLY))
    if others:
        raise ModelError(
            f"the folder contains both an adapter and a complete model ({some_of(others)}). Remove adapter_config.json to import the "
            "complete model, or move its weights away to import the adapter"
        )
    if head_file:
        return _separate_head({}, head_file)
    if "v_head.summary.weight" in weights:
        return Layout(TRL_VALUE_HEAD, {}, linear_head(weights, "v_head.summary"), "value_model", has_policy=True)
    notes = [_dropped_two_layers(sorted(weights))] if weights else []
    heads = heads_of_adapter(adapter)
    if not heads:
        return Layout("trlX (with an adapter)" if weights else "peft", {}, notes=notes)
    (name, weight), *more = heads.items()
    if more or weight.shape[0] != 1 or short_name(name).startswith("classifier"):  # an encoder's, even with one output
        shown = ", ".join(f"{short_name(name)} {list(value.shape)}" for name, value in heads.items())
        return Layout("peft", {}, role="classifier", notes=notes, head_name=shown)
    bias = adapter.get(name.removesuffix("weight") + "bias")
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    prefix = short_name(name).removesuffix(".weight")
    head = linear_head({f"{prefix}.{part}": value for part, value in tensors.items()}, prefix)
    return Layout("peft", {}, head, "reward_model", notes=[*notes, assumed_reward(head.name)])


def heads_of_adapter(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of heads among an adapter's tensors, by their name in the file: reward and value heads, and classifiers."""
    pattern = re.compile(r"(score|value_head|v_head|v_head\.summary|reward_head|classifier|classifier\.(dense|out_proj))\.weight")
    return {name: value for name, value in adapter.items() if value.dim() == 2 and pattern.fullmatch(short_name(name))}


def short_name(name: str) -> str:
    """The name of an adapter's tensor in the model that was trained, without the prefixes of peft."""
    return re.sub(r"\.modules_to_save(\.default)?\.", ".", re.sub(r"^(base_model\.)?(model\.)?", "", name, count=1))


def _transformers(weights: dict[str, Tensor], config: HeadConfig) -> Layout:
    """A model in transformers' own form."""
    heads = {name: value for name, value in weights.items() if name.split(".")[0] in CLASSIFIERS and name.endswith("weight")}
    if not heads:
        return Layout("transformers", weights, role="language_model")
    for name, weight in heads.items():
        _require_finite(name.removesuffix(".weight"), weight)
    labels = config.get("num_labels") or len(config.get("id2label") or {}) or 2
    if (score := heads.get("score.weight")) is not None and score.dim() == 2:
        labels = score.shape[0]
    role: Role = "reward_model" if labels == 1 and "score.weight" in heads else "classifier"
    shown = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(heads.items()))
    notes = [assumed_reward("score")] if role == "reward_model" else []
    return Layout("transformers", weights, role=role, notes=notes, head_name=f"{shown}, {labels} label{'s' if labels != 1 else ''}")


def _separate_head(weights: dict[str, Tensor], head_file: dict[str, Tensor]) -> Layout:
    head = linear_head(head_file, "v_head.summary")
    return Layout("LLaMA-Factory or ms-swift", weights, head, "reward_model", notes=[assumed_reward("value_head", has_policy=True)])


def _deepspeed_chat(weights: dict[str, Tensor], config: HeadConfig) -> Layout:
    head = linear_head(weights, "v_head")
    prefix = next(prefix for prefix in DEEPSPEED_CHAT if any(name.startswith(prefix) for name in weights))
    body, dropped = _split(weights, prefix, head)
    notes = [assumed_reward("v_head"), *dropped]
    if config.get("num_padding_at_beginning"):
        notes.append("num_padding_at_beginning is not used: the score is read at the last token that is not padding")
    return Layout("DeepSpeed-Chat", body, head, "reward_model", notes=notes)


TRL_VALUE_HEAD = "TRL (AutoModelForCausalLMWithValueHead)"


def _trl_value_head(weights: dict[str, Tensor]) -> Layout:
    head = linear_head(weights, "v_head.summary")
    body = {name.removeprefix("pretrained_model."): value for name, value in weights.items() if not name.startswith("v_head.")}
    return Layout(TRL_VALUE_HEAD, body, head, "value_model", has_policy=bool(body))


def _trl_wrapper(weights: dict[str, Tensor]) -> Layout:
    """A checkpoint of TRL's PolicyAndValueWrapper. ``critic_backbone`` is the transformer of ``value_model`` under a second name."""
    policy = {name.removeprefix("policy."): value for name, value in weights.items() if name.startswith("policy.")}
    value = {name.removeprefix("value_model."): value for name, value in weights.items() if name.startswith("value_model.")}
    head = linear_head(value, "score")
    others = sorted(name for name in weights if not name.startswith(("policy.", "value_model.", "critic_backbone.")))
    notes = [not_kept(others)] if others else []
    body = {name: value for name, value in value.items() if not name.startswith("score.")}
    return Layout(
        "TRL (PPOTrainer, policy and value model)",
        policy,
        replace(head, name="value_model.score"),
        "value_model",
        has_policy=True,
        notes=notes,
        value_body=body,
    )


def _trlx(weights: dict[str, Tensor]) -> Layout:
    body = {name.removeprefix("base_model."): value for name, value in weights.items() if name.startswith("base_model.")}
    others = sorted({name.split(".")[0] for name in weights if not name.startswith("base_model.")})
    notes = []
    if "v_head" in others:
        notes.append(_dropped_two_layers(["v_head"]))
    if "frozen_head" in others:
        notes.append("dropped: frozen_head, a copy of the reference's upper layers; start the policy from the SFT model instead")
    if rest := [name for name in others if name not in ("v_head", "frozen_head")]:
        notes.append(not_kept(rest))
    return Layout("trlX", body, has_policy=True, role="language_model", notes=notes)


def _dropped_two_layers(names: Sequence[str]) -> str:
    return (
        f"dropped: {some_of(names)}, which has two layers (or a branch of the transformer) in trlX; the value network here has one linear "
        "layer. Start PPO's value network from a reward model or from the policy"
    )


def _trlx_reward_model(weights: dict[str, Tensor]) -> Layout:
    head = linear_head(weights, "v_head")
    body = {name: value for name, value in weights.items() if not name.startswith("v_head.")}
    return Layout("trlX (reward model of its examples)", body, head, "reward_model", notes=[assumed_reward("v_head")])


def _is_openrlhf(config: HeadConfig, names: set[str]) -> bool:
    if not (_architecture(config) in ("RewardModel", "CriticModel") or "value_head_prefix" in config):
        return False
    return any(name.endswith(".weight") and "." in name for name in names)


def _architecture(config: HeadConfig) -> str:
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named else ""


def _openrlhf(weights: dict[str, Tensor], config: HeadConfig) -> Layout:
    configured = str(config.get("value_head_prefix", "score"))
    prefix = next((name for name in (configured, "value_head", "score") if f"{name}.weight" in weights), configured)
    head = linear_head(weights, prefix)
    buffers = {name: weights[name] for name in ("mean", "std") if name in weights}
    body = {name: value for name, value in weights.items() if not name.startswith(f"{prefix}.") and name not in buffers}
    is_critic = _architecture(config) == "CriticModel"
    notes = [] if is_critic or _architecture(config) == "RewardModel" else [assumed_reward(prefix)]
    if config.get("normalize_reward"):
        mean = _number(config.get("mean", buffers.get("mean", torch.zeros(1))), "mean")
        deviation = _number(config.get("std", buffers.get("std", torch.ones(1))), "std")
        if deviation <= 0:
            raise ModelError(f"std in config.json is {deviation:g}, which cannot divide scores; set normalize_reward to false there")
        head = Head(head.weight / deviation, (head.bias - mean) / deviation, head.name)
        notes.append(f"scores are normalised as in OpenRLHF's evaluation mode: (score - {mean:g}) / {deviation:g}, applied to the head")
    elif buffers or {"mean", "std"} & set(config):
        notes.append("mean and std are not used, because normalize_reward is not true in config.json; OpenRLHF does not use them either")
    return Layout("OpenRLHF", body, head, "value_model" if is_critic else "reward_model", notes=notes)


def _number(value: object, name: str) -> float:
    """A number that may be saved alone, in a list, or in a tensor of one element."""
    try:
        return float(torch.as_tensor(value).reshape(-1)[0])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(f"{name} in config.json is {value!r}; expected a number") from error


def _unknown_head(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the only linear layer from d to 1 of a model without an output matrix; None if there is no such layer.

    Weights of the transformer's layers (the gate of an expert that all tokens share) and embeddings of one row are not heads.
    """
    if any(name.split(".")[0] in (*CLASSIFIERS, "lm_head", "embed_out", "output") for name in weights):
        return None
    candidates = [
        name.removesuffix(".weight")
        for name, value in weights.items()
        if name.endswith(".weight") and value.dim() == 2 and value.shape[0] == 1 and value.shape[1] > 1
    ]
    heads = [name for name in candidates if not IN_LAYER.search(name) and "embed" not in name]
    return heads[0] if len(heads) == 1 else None


def _unknown_library(weights: dict[str, Tensor], prefix: str) -> Layout:
    group = f"{prefix.rpartition('.')[0] or prefix}."
    own = {name: value for name, value in weights.items() if name.startswith(group)}
    if any(IN_LAYER.search(name.rpartition(".")[0]) for name in own):  # the head is a part of the transformer's module
        own = {name: value for name, value in own.items() if name.startswith(f"{prefix}.")}
    head = linear_head(own, prefix)
    body = {name: value for name, value in weights.items() if not name.startswith(f"{prefix}.")}
    return Layout("an unknown library", body, head, "reward_model", notes=[assumed_reward(prefix)])


def linear_head(tensors: Mapping[str, Tensor], prefix: str) -> Head:
    """The linear head under ``prefix``. Raises ModelError if it is missing or not linear from d to 1."""
    tensors_of_head = {name: value for name, value in tensors.items() if name.startswith(f"{prefix.split('.')[0]}.")}
    weight, bias = tensors.get(f"{prefix}.weight"), tensors.get(f"{prefix}.bias")
    shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in sorted(tensors_of_head.items())) or "none"
    others = set(tensors_of_head) - {f"{prefix}.weight", f"{prefix}.bias"}
    if weight is None or others or weight.dim() != 2 or weight.shape[0] != 1 or (bias is not None and bias.numel() != 1):
        raise ModelError(
            f"the head is not a linear layer with one output: expected {prefix}.weight [1, d], a bias [1] or none; the file has {shapes}"
        )
    return Head(weight.float(), 0.0 if bias is None else float(bias.reshape(-1)[0]), prefix)


def _split(weights: dict[str, Tensor], prefix: str, head: Head) -> tuple[dict[str, Tensor], list[str]]:
    """Return (the tensors under ``prefix`` without it, notes on tensors that belong neither there nor to the head)."""
    body = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    others = sorted(name for name in weights if not name.startswith((prefix, f"{head.name}.")))
    return body, [not_kept(others)] if others else []


def not_kept(names: Sequence[str]) -> str:
    """The note on tensors that the imported model does not contain."""
    return f"not kept: {some_of(names)}"


def assumed_reward(name: str, *, has_policy: bool = False) -> str:
    """The note on a scalar head whose file does not say what it predicts. ``has_policy``: whether the file also contains a policy."""
    policy = ", or --role language_model for the policy beside it" if has_policy else ""
    return f"the file does not say whether {name} predicts rewards or values; assumed: a reward model (else use --role value_model{policy})"

"""Several roles on one frozen backbone: policy, reference, value network and reward model as adapters (and heads) on the same weights.

A role is a set of active adapters. The objects of the roles (a language model, a scalar model) share the backbone's modules, and each
activates its adapters before it computes. Between a forward pass and its backward pass no other role may compute.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from stages.config import LoraSettings
from stages.models.adapters.activation import activate, active_adapters, adapted, is_part_of, lora_config
from stages.models.adapters.attaching import add_adapter, attach_lora
from stages.models.adapters.saved import BEFORE, by_module
from stages.models.adapters.stacks import stack_of, trained_on, weights_of
from stages.models.adapters.variants import adapted_layers, write_as_lora
from stages.models.heads import RewardModel, ScalarModel, ValueModel, read_head
from stages.models.loading import load_base, load_tokenizer
from stages.models.parts import module_name, moved_to, transformer_of
from stages.sampling.support import plain_model

if TYPE_CHECKING:
    from stages.model_types import TransformersModel
    from stages.registry.references import ResolvedModel

Scalar = TypeVar("Scalar", bound=ScalarModel)


def backbone_key(model: ResolvedModel) -> tuple[str, str, bool, str]:
    """A key that is equal for models that can share a backbone.

    It contains the base weights, their quantization (now, and when the adapters were trained), and the requested attention.
    """
    loaded = model.input if model.input.quantization != "none" else trained_on(model)
    quantized = f"{model.input.quantization} {loaded.quantization}"
    return weights_of(stack_of(model).base), quantized, loaded.double_quantization, model.input.attention


class SharedBackbone:
    """The base weights of ``model`` as a causal language model, and the adapters on them."""

    def __init__(self, model: ResolvedModel, *, dtype: torch.dtype, device: torch.device, lora: LoraSettings) -> None:
        self.tokenizer = load_tokenizer(model)
        self.key = backbone_key(model)
        self.lora, self._dtype = lora, dtype
        self._source, self._path = model, stack_of(model).base.path
        backbone, self._new_rows = load_base(model, dtype=dtype, tokenizer=self.tokenizer)
        self.model: TransformersModel = moved_to(backbone, device)
        self._vocabulary = self.tokenizer.get_vocab()
        self._frozen: dict[str, str] = {}  # digest or path of an adapter -> its name here

    def is_base_of(self, model: ResolvedModel) -> bool:
        """Whether ``model`` is based on this backbone and has the same tokens."""
        return backbone_key(model) == self.key and load_tokenizer(model).get_vocab() == self._vocabulary

    # Adapters

    def frozen(self, model: ResolvedModel) -> tuple[str, ...]:
        """The names of ``model``'s adapters. Adapters that several models have in common are loaded once."""
        names: list[str] = []
        for adapter in stack_of(model).adapters:
            known = adapter.digest or adapter.path
            if known not in self._frozen:
                name = f"frozen-{len(self._frozen)}"
                self._activate(names)
                self.model = add_adapter(self.model, adapter, name, is_shared=True)
                self._frozen[known] = name
            names.append(self._frozen[known])
        return tuple(names)

    def new_adapter(self, name: str, below: Sequence[str] = (), *, source: ResolvedModel | None = None) -> str:
        """Create a trainable adapter on those ``below``; it starts as the identity. ``source``: the initial model (None: the policy)."""
        trainable = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        self._activate(below)
        self.model = attach_lora(
            self.model, self.lora, task="CAUSAL_LM", base=self._path, name=name, new_rows=self._new_rows, source=source or self._source
        )
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # log-probabilities must be equal in every forward pass
        return name

    def _activate(self, names: Sequence[str]) -> None:
        if hasattr(self.model, "peft_config"):
            activate(adapted(self.model), names)

    def activation(self, names: Iterable[str]) -> Callable[[], None]:
        """A function that makes exactly ``names`` active."""
        chosen = tuple(names)

        def activated() -> None:
            if active_adapters(self.model) != chosen:
                activate(adapted(self.model), chosen)

        return activated

    def named_parameters(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """The weights of one adapter."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if is_part_of(name, adapter)]

    # Roles

    def reward_model(self, model: ResolvedModel) -> RewardModel:
        """A frozen reward model on this backbone."""
        made = self._scalar(RewardModel, self.frozen(model))
        made.set_head(*read_head(model))
        made.score_head.requires_grad_(False)
        return made

    def value_model(self, model: ResolvedModel, *, with_head: bool) -> ValueModel:
        """A trainable value network that starts from ``model``: with a reward model's head, or with a zero head."""
        below = self.frozen(model)
        names = [*below, self.new_adapter("value", below, source=model)]
        made = self._scalar(ValueModel, names)
        if with_head:
            made.set_head(*read_head(model))
        made.save_adapter = self._saver("value")
        return made

    def _scalar(self, kind: type[Scalar], names: Iterable[str]) -> Scalar:
        made = kind(transformer_of(self.model), self.tokenizer)
        made.activate = self.activation(names)
        made.adapted = adapted(self.model) if hasattr(self.model, "peft_config") else None
        return made

    def _saver(self, name: str) -> Callable[[Path], None]:
        """A function that saves the adapter ``name`` as an adapter of a bare transformer, which is a scalar model's backbone."""

        def save(folder: Path) -> None:
            from peft import get_peft_model_state_dict
            from peft.utils.other import ModulesToSaveWrapper

            body = f"{module_name(plain_model(self.model), transformer_of(self.model))}."
            weights = get_peft_model_state_dict(self.model, adapter_name=name, save_embedding_layers=False)
            # A value network has no rows or copies of the output layer.
            own = {key: value for key, value in weights.items() if key.startswith(BEFORE + body)}
            renamed = {key.replace(BEFORE + body, BEFORE, 1): value.detach().cpu().contiguous() for key, value in own.items()}
            save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config = copy.deepcopy(lora_config(adapted(self.model), name))
            config.task_type = "FEATURE_EXTRACTION"
            if not config.target_parameters:
                names = {path.removeprefix(body): path for path, _ in adapted_layers(adapted(self.model), name) if path.startswith(body)}
                config.target_modules, config.exclude_modules = set(names), None  # type: ignore[assignment]  # peft uses sets
                config.rank_pattern = by_module(config.rank_pattern or {}, names)
                config.alpha_pattern = by_module(config.alpha_pattern or {}, names)
            copies = [path for path, part in plain_model(self.model).named_modules() if isinstance(part, ModulesToSaveWrapper)]
            copied = [path.removeprefix(body) for path in copies if any(key.startswith(f"{BEFORE}{path}.") for key in own)]
            config.modules_to_save = copied or None
            if isinstance(config.trainable_token_indices, dict):
                rows = config.trainable_token_indices.items()
                config.trainable_token_indices = {key.removeprefix(body): value for key, value in rows if key.startswith(body)}
            config.save_pretrained(str(folder))
            write_as_lora(adapted(self.model), name, folder, prefix=body)

        return save


class RoleParameters(nn.Module):
    """The trainable weights of one role, for its optimizer, its moving average and its checkpoint."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        super().__init__()
        for name, parameter in named:
            self.register_parameter(name.replace(".", "/"), parameter)

"""Scalar heads on a causal transformer: the reward model (one number per text) and the value model (one number per position).

B sequences, T tokens, d hidden size. Masks are 1 where a token counts; padding may be on either side.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from stages.config import LoraSettings
from stages.errors import ModelError
from stages.models.adapters.activation import NEW_ADAPTER
from stages.models.adapters.saved import HEAD_FILE
from stages.models.adapters.stacks import is_adapter
from stages.models.adapters.variants import write_as_lora
from stages.models.layers.attention import class_of
from stages.models.layers.longrope import positions_of_rows
from stages.models.loading import as_resolved, load_backbone, load_tokenizer, own_router_setting
from stages.models.parts import evaluation_mode, hidden_width
from stages.models.passes.packing import Packing, one_sequence_per_row, packed_attention
from stages.models.saving import save_tokenizer
from stages.models.verification import check_saved_adapter, check_saved_weights, rows_for

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from stages.model_types import TransformersModel
    from stages.registry.references import ResolvedModel


class ScalarHead(nn.Linear):
    """Maps hidden states [..., d] to one number each [...]. It computes in fp32, also under autocast. Weight and bias start at 0."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, 1, dtype=torch.float32, device=device)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        # A number in bf16 has 8 bits: values between 2 and 4 would be 1/64 apart.
        with torch.autocast(input.device.type, enabled=False):
            # DeepSpeed casts all weights.
            return functional.linear(input.float(), self.weight.float(), self.bias.float()).squeeze(-1)


class ScalarModel(nn.Module):
    """A transformer with a ``ScalarHead`` on its last hidden states."""

    def __init__(self, backbone: TransformersModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.config = backbone.config
        device = next(backbone.parameters()).device
        self.score_head = ScalarHead(hidden_width(backbone), device)
        # For a backbone shared with other roles (models/adapters/shared_backbone.py): functions that activate this role's adapters and
        # save them.
        self.activate: Callable[[], None] = _nothing
        self.save_adapter: Callable[[Path], None] | None = None
        self.adapted: PeftModel | None = None  # the PeftModel around the shared backbone

    # Creation

    @classmethod
    def from_pretrained(
        cls,
        model: ResolvedModel | str | Path,
        *,
        dtype: torch.dtype,
        lora: LoraSettings | None = None,
        trainable: bool = False,
        dropout: bool = False,
    ) -> Self:
        """Load a saved scalar model with its head and bias. Raises ModelError if the checkpoint has no such head."""
        model = as_resolved(model)
        weight, bias = read_head(model)
        made = cls._with_new_head(model, dtype=dtype, lora=lora, trainable=trainable, dropout=dropout)
        if weight.shape != made.score_head.weight.shape:
            raise ModelError(f"the head of {model.ref!r} has shape {tuple(weight.shape)}; expected {tuple(made.score_head.weight.shape)}")
        made.set_head(weight, bias)
        made.score_head.requires_grad_(trainable)
        return made.train(trainable)

    @classmethod
    def _with_new_head(
        cls, model: ResolvedModel | str | Path, *, dtype: torch.dtype, lora: LoraSettings | None, trainable: bool, dropout: bool
    ) -> Self:
        """The transformer of a causal language model with a head of zeros."""
        model = as_resolved(model)
        tokenizer = load_tokenizer(model)
        return cls(load_backbone(model, dtype=dtype, lora=lora, trainable=trainable, tokenizer=tokenizer, dropout=dropout), tokenizer)

    @torch.no_grad()
    def set_head(self, weight: Tensor, bias: float) -> None:
        """Set the head's weight [1, d] and bias."""
        self.score_head.weight.copy_(weight)
        self.score_head.bias.fill_(bias)

    # Computation

    def score_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One number per position, computed from that token and those before it. Inputs [B, T]; returns [B, T] fp32."""
        return self.score_head(self._hidden(input_ids, attention_mask))

    def score_positions(
        self, input_ids: Tensor, rows: Tensor, columns: Tensor, packing: Packing | None = None, lengths: Tensor | None = None
    ) -> Tensor:
        """The numbers [N] at positions (``rows``, ``columns``) [N] of right-padded ids [B, T], or of packed ids [1, S].

        ``lengths`` [B]: of the padded rows; None: all rows have T tokens.
        """
        self.activate()
        return self.score_head(hidden_states(self.backbone, input_ids, packing, lengths)[rows, columns])

    def _hidden(self, input_ids: Tensor, attention_mask: Tensor, *, right_padded: bool = False) -> Tensor:
        """Last hidden states [B, T, d]. ``right_padded``: whether the rows are known to be; otherwise the CPU waits for a GPU to see it.

        Right-padded rows need no mask, because a causal model does not attend to later tokens. Left-padded rows are rotated to right
        padding for the pass, and their hidden states are rotated back. So every family, including those without a mask (RWKV), reads a
        text from position 0, and the fastest kernels can be used.
        """
        self.activate()
        if right_padded or bool(attention_mask[:, 0].all()):
            return hidden_states(self.backbone, input_ids, lengths=attention_mask.sum(dim=1))
        starts = attention_mask.long().argmax(dim=1, keepdim=True)  # first real token of each row
        columns, width = torch.arange(input_ids.shape[1], device=input_ids.device), input_ids.shape[1]
        moved = input_ids.gather(1, (columns + starts) % width)
        hidden = hidden_states(self.backbone, moved, lengths=attention_mask.sum(dim=1))
        back = (columns - starts) % width
        return hidden.gather(1, back[..., None].expand_as(hidden))

    # Trainer interface

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, object] | None = None, **options: bool) -> None:
        """Recompute the backbone's activations in the backward pass. ``options`` are passed by transformers' trainer."""
        if hasattr(self.backbone, "activation_checkpointing_enable"):
            self.backbone.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)
        else:  # transformers before 5.24
            self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
        if not any(parameter.requires_grad for parameter in self.backbone.get_input_embeddings().parameters()):
            self.backbone.enable_input_require_grads()  # with a frozen embedding, the first block's input needs requires_grad

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict[str, object] | None = None, **options: bool) -> None:
        """Alias of ``gradient_checkpointing_enable`` that transformers 5.24 and later call."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    # Saving

    def save(
        self,
        folder: Path | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        state_dict: dict[str, Tensor] | None = None,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Save backbone, head, bias and tokenizer.

        Full weights are saved as a Hugging Face checkpoint of ``<Arch>ForSequenceClassification`` with one label (``score.weight``), if
        that class has no other head; the config contains the bias (``reward_bias``). An adapter is saved as in peft, with the head in
        head.safetensors. For ``state_dict`` and ``rows`` see ``saving.save_model``: the saved files are read again and compared with this
        model.
        """
        from peft import PeftModel, get_peft_model_state_dict

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        head = {f"score.{name}": state[f"score_head.{name}"].detach().float().cpu().contiguous() for name in ("weight", "bias")}
        body = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
        with own_router_setting(self.backbone):
            config = copy.deepcopy(self.config)
        config.num_labels = 1
        if config.problem_type != "regression":
            config.problem_type = None  # that of a classifier with several labels; transformers does not read such a config
        config.reward_bias = float(head["score.bias"])
        if self.save_adapter is not None or isinstance(self.backbone, PeftModel):
            if self.save_adapter is not None:
                self.save_adapter(folder)
            elif isinstance(self.backbone, PeftModel):
                adapter = get_peft_model_state_dict(self.backbone, state_dict=body, save_embedding_layers=False)
                save_file(
                    {name: value.detach().cpu().contiguous() for name, value in adapter.items()},
                    folder / "adapter_model.safetensors",
                    metadata={"format": "pt"},
                )
                self.backbone.peft_config[NEW_ADAPTER].save_pretrained(str(folder))
                write_as_lora(self.backbone, NEW_ADAPTER, folder)
            save_file(head, folder / HEAD_FILE, metadata={"format": "pt"})
            if hasattr(config, "quantization_config"):
                del config.quantization_config
        else:
            config.architectures = [_classifier_class(config)]
            prefix = self.backbone.base_model_prefix
            tied = getattr(self.backbone, "all_tied_weights_keys", {})  # by name, the weight that it is a copy of (layers of Zamba)
            body = {name: value for name, value in body.items() if tied.get(name) not in body}
            # In the names and shapes of checkpoints, from which transformers makes those in memory: it would convert the latter again.
            stored = revert_weight_conversion(self.backbone, {name: value.detach().cpu() for name, value in body.items()})
            weights = {f"{prefix}.{name}": value.contiguous() for name, value in stored.items()}
            save_file({**weights, **head}, folder / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)
        if tokenizer := tokenizer or self.tokenizer:
            save_tokenizer(tokenizer, folder)
        if state_dict is None and tokenizer:
            self._check_saved(folder, rows)

    def _check_saved(self, folder: Path, rows: Sequence[Sequence[int]] | None) -> None:
        """Raise ModelError if the files in ``folder`` do not compute the same outputs as this model."""
        from peft import PeftModel

        adapted = self.adapted or (self.backbone if isinstance(self.backbone, PeftModel) else None)
        ids = rows_for(self.backbone, rows)
        device = self.score_head.weight.device
        scale = float(self.score_head.weight.detach().norm())

        def reload(saved: ResolvedModel) -> list[Tensor]:
            dtype = torch.float32 if adapted is not None else next(self.backbone.parameters()).dtype
            return type(self).from_pretrained(saved, dtype=dtype).to(device)._outputs(ids)

        if adapted is None:
            check_saved_weights(self, folder, lambda: self._outputs(ids), reload, scale=scale)
            return
        self.activate()
        activate, self.activate = self.activate, _nothing  # the check selects the active adapters
        try:
            check_saved_adapter(adapted, folder, lambda: self._outputs(ids), reload, scale=scale)
        finally:
            self.activate = activate

    @torch.no_grad()
    def _outputs(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """The outputs [T] of each row of token ids, one row per pass."""
        with evaluation_mode(self):
            batches = [torch.tensor([row], device=self.score_head.weight.device) for row in rows]
            return [self.score_tokens(ids, torch.ones_like(ids))[0].float().cpu() for ids in batches]


def hidden_states(backbone: TransformersModel, input_ids: Tensor, packing: Packing | None = None, lengths: Tensor | None = None) -> Tensor:
    """Last hidden states [B, T, d] of right-padded ids [B, T]; of packed ones [1, S] inside each of their sequences [1, S, d].

    ``lengths`` [B]: of the padded rows; None: all rows have T tokens.
    """
    if packing is None:
        with one_sequence_per_row():
            positions = positions_of_rows(backbone, input_ids, lengths)
            return backbone(input_ids=input_ids, use_cache=False, **positions).last_hidden_state
    with packed_attention(packing, backbone):
        return backbone(input_ids=input_ids, position_ids=packing.positions, use_cache=False).last_hidden_state


def _nothing() -> None:
    """A separate backbone has no adapters to activate."""


class RewardModel(ScalarModel):
    """Scores a text: the head's output at its last token."""

    @classmethod
    def from_language_model(
        cls,
        model: ResolvedModel | str | Path,
        *,
        dtype: torch.dtype,
        lora: LoraSettings | None = None,
        trainable: bool = True,
        seed: int = 0,
    ) -> Self:
        """Create a reward model from a causal language model. Head weights ~ N(0, 1 / (d + 1)), bias 0.

        This is the initialization of Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325, appendix B.1), drawn from ``seed``. Raises
        ModelError for an encoder, whose last token has no special meaning.
        """
        made = cls._with_new_head(model, dtype=dtype, lora=lora, trainable=trainable, dropout=False)
        made.draw_head(seed)
        return made.train(trainable)

    @torch.no_grad()
    def draw_head(self, seed: int) -> None:
        """Re-draw the head's weights ~ N(0, 1 / (d + 1)); bias 0."""
        width = self.score_head.in_features
        self.score_head.weight.copy_(torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / math.sqrt(width + 1))
        self.score_head.bias.zero_()

    def score(self, input_ids: Tensor, attention_mask: Tensor, *, right_padded: bool = False) -> Tensor:
        """The score of each text, at its last non-padding token. Inputs [B, T]; returns [B] fp32. ``right_padded``: as in ``_hidden``."""
        last = last_positions(attention_mask)
        rows = torch.arange(len(last), device=last.device)
        return self.score_head(self._hidden(input_ids, attention_mask, right_padded=right_padded)[rows, last])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, right_padded: bool = False) -> Tensor:
        """``score``; wrappers (DDP, FSDP) call this method."""
        return self.score(input_ids, attention_mask, right_padded=right_padded)

    @torch.no_grad()
    def center(self, mean: float) -> None:
        """Subtract ``mean`` from all future scores, by the bias."""
        self.score_head.bias.sub_(mean)

    @torch.no_grad()
    def standardize(self, mean: float, deviation: float) -> float:
        """Rescale the head so that scores with this mean and standard deviation get mean 0 and standard deviation 1. Returns the gain.

        Ziegler et al. 2019: gain 1 / sigma and bias -gain * mu. Raises ModelError if all scores were equal.
        """
        if deviation <= 0:
            raise ModelError(
                "the reward model gives every text the same score, which cannot be scaled to variance 1. "
                "Remove normalization, or train it on more comparisons"
            )
        self.score_head.bias.sub_(mean).div_(deviation)
        self.score_head.weight.div_(deviation)
        return 1 / deviation

    @property
    def reward_bias(self) -> float:
        return self.score_head.bias.item()


class ValueModel(ScalarModel):
    """Predicts the return at every position of a text."""

    @classmethod
    def from_policy(
        cls,
        model: ResolvedModel | str | Path,
        *,
        dtype: torch.dtype,
        lora: LoraSettings | None = None,
        trainable: bool = True,
        dropout: bool = False,
    ) -> Self:
        """A policy's transformer with a zero-initialized head, so that the initial values are 0."""
        return cls._with_new_head(model, dtype=dtype, lora=lora, trainable=trainable, dropout=dropout).train(trainable)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values at all positions. Inputs [B, T]; returns [B, T] fp32."""
        return self.score_tokens(input_ids, attention_mask)


def last_positions(attention_mask: Tensor) -> Tensor:
    """Index of each row's last non-padding token, for either padding side. Mask [B, T]; returns [B]."""
    columns = torch.arange(attention_mask.shape[-1], device=attention_mask.device)
    return (attention_mask.long() * columns).argmax(dim=-1)


def _classifier_class(config: PretrainedConfig) -> str:
    """Name of transformers' sequence classifier of this architecture; the backbone's class if there is none with only a linear ``score``.

    In other classifiers (CTRL, ModernBERT's decoder) the head has another name or more layers, which would be random when they are loaded.
    """
    kind = class_of(AutoModelForSequenceClassification, config)
    if kind is not None:
        with torch.device("meta"):
            made = kind(config)
        if {name for name, part in made.named_children() if any(True for _ in part.parameters())} == {made.base_model_prefix, "score"}:
            return kind.__name__
    return (config.architectures or ["AutoModel"])[0]


def read_head(model: ResolvedModel) -> tuple[Tensor, float]:
    """Weight [1, d] and bias of a checkpoint's scalar head. ``reward_bias`` in the config takes precedence over a stored bias.

    Raises ModelError if there is no such head, or if it has several outputs.
    """
    refused = ModelError(
        f"{model.ref!r} has no reward head (score.weight), and a random head would give meaningless scores. "
        "Train one with a reward_model step, or use a model that has one; for a classifier, set label"
    )
    names = [HEAD_FILE] if is_adapter(model) else ["model.safetensors.index.json", "model.safetensors"]
    path = None
    for name in names:
        try:
            path = cached_file(model.path, name, revision=model.input.revision, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {model.ref!r}: {str(error).splitlines()[0]}") from error
        if path is not None:
            break
    if path is None:
        raise refused
    if path.endswith(".json"):
        shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        if "score.weight" not in shards:
            raise refused
        path = cached_file(model.path, shards["score.weight"], revision=model.input.revision)
    with safe_open(str(path), framework="pt") as file:
        stored = set(file.keys())
        if "score.weight" not in stored:
            raise refused
        weight = file.get_tensor("score.weight").float()
        bias = float(file.get_tensor("score.bias")) if "score.bias" in stored else 0.0
    if weight.shape[0] != 1:
        raise ModelError(
            f"the head of {model.ref!r} has {weight.shape[0]} outputs; a reward model has 1. For a classifier, add label: LABEL"
        )
    config_file = cached_file(model.path, "config.json", revision=model.input.revision, _raise_exceptions_for_missing_entries=False)
    config = json.loads(Path(config_file).read_text(encoding="utf-8")) if config_file is not None else {}
    return weight, float(config.get("reward_bias", bias))

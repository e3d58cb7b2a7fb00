"""Count the memory of a pass by running a few layers of the model on tensors without data.

The layers are those of transformers with this project's replacements, adapters and gradient checkpointing. Autograd runs as in training,
but torch's fake tensors have only a shape, so a count needs no weights, no memory and no GPU. If all layers have the same weights, the
difference between three layers and two is the memory of each further layer. Other models, and those of up to three layers, are counted
with all their layers. R rows (sequences), C columns (tokens of a row).
"""

from __future__ import annotations

import inspect
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    masking_utils,
)
from transformers.integrations import moe
from transformers.pytorch_utils import Conv1D

from stages.config import ModelInput
from stages.errors import ModelError
from stages.memory.passes import PassKind, PassMemory, Polynomial
from stages.models.adapters import folding
from stages.models.families import quantized_modules
from stages.models.layers.attention import attention_of, class_of
from stages.models.layers.dropout import disable_dropout
from stages.models.layers.lean import _LeanNorm, use_lean_layers
from stages.models.quantizing import STANDS_FOR
from stages.sampling.support import plain_model
from stages.tokens.positions import model_length

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from stages.memory.passes import Task
    from stages.model_types import AutoClass, TransformersModel

COLUMNS = 512  # of the passes that are counted; the positions of the model if those are fewer
LOOP_COLUMNS = 16  # the same for models that compute one token after the other: minutes become seconds
HALF = 2  # bytes
WHOLE = 3  # a model of up to this many layers is counted with all of them
CLASSES: dict[Task, AutoClass] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
    "SEQ_CLS": AutoModelForSequenceClassification,
}


def count(kind: PassKind) -> PassMemory:
    """Run the passes and fit the polynomials. Raises the errors of the model's code on fake tensors."""
    config = text_config_of(kind)
    most = LOOP_COLUMNS if _loops_over_tokens(kind, config) else COLUMNS
    columns = min(most, (model_length(config) or 2 * most) // 2)
    # With sdpa and no mask, nothing grows with pairs of tokens, and two sizes are enough.
    has_pairs = kind.masked or attention(kind, config) == "eager"
    sizes = [(2, columns), (4, columns), *([(2, 2 * columns)] if has_pairs else [])]
    taken = [_runs(kind, layers, sizes) for layers in _numbers_of_layers(kind, config)]
    kept, peak = (_fitted(columns, [[run[part] for run in runs] for runs in taken]) for part in (0, 1))
    return PassMemory(kept, peak)


def has_plain_logits(kind: PassKind) -> bool:
    """Whether the model's logits are its last hidden states times its output layer, without a cap or a scale before or after it."""
    config = config_of(kind, 1, vocab_size=kind.vocabulary)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention(kind, config))
    hidden: list[Tensor] = []
    seen: dict[str, Tensor] = {}
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part is not model:
            part.register_forward_hook(lambda module, args, made: hidden.append(made[0]))
    model.get_output_embeddings().register_forward_hook(lambda module, args, made: seen.update(multiplied=args[0], product=made))
    with FakeTensorMode(allow_non_fake_inputs=True), without_values(kind), torch.no_grad():
        give_fake_weights(model, kind)
        logits = model(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False).logits
    return _address(seen["multiplied"]) in map(_address, hidden) and _address(seen["product"]) == _address(logits)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _loops_over_tokens(kind: PassKind, config: PretrainedConfig) -> bool:
    """Whether a layer computes its recurrent state token by token (Mamba, Jamba, RWKV). Mamba 2 computes it in chunks of tokens."""
    layers = plain_model(_bare_model(kind, config.num_hidden_layers)).modules()
    return config.model_type == "rwkv" or any(getattr(layer, "A_log", torch.empty(0)).ndim > 1 for layer in layers)


def _numbers_of_layers(kind: PassKind, config: PretrainedConfig) -> tuple[int, ...]:
    """The numbers of layers to count with: two and three, or all layers if they are few or differ.

    A pass without gradients needs as much memory with two layers as with more: it frees a layer's input in the next layer.
    """
    layers: int = config.num_hidden_layers
    if layers <= WHOLE or not are_alike(kind, layers):
        return (layers,)
    return (2, 3) if kind.trains else (2,)


def are_alike(kind: PassKind, layers: int) -> bool:
    """Whether all layers have modules of the same classes with weights of the same shapes, including their adapters."""
    with torch.device("meta"):
        named = kind.adapter is not None and kind.adapter.may_differ_by_layer
        model = plain_model(_adapted_model(kind, layers) if named else _bare_model(kind, layers))
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == layers:
            first, *others = [_signature(layer) for layer in stack]
            return all(other == first for other in others)
    return False


def _signature(layer: nn.Module) -> list[tuple[str, type, list[torch.Size]]]:
    """The name, the class and the shapes of the weights of each module of a layer."""
    return [
        (name, type(module), [parameter.shape for parameter in module.parameters(recurse=False)]) for name, module in layer.named_modules()
    ]


def _fitted(columns: int, taken: Sequence[Sequence[float]]) -> Polynomial:
    """The polynomial through the bytes of two and three layers, each at (2, columns), (4, columns) and, with pairs, (2, 2 columns).

    With one number of layers, the bytes do not depend on it.
    """
    of_layers = []
    tokens = 2 * columns
    for small, rows, *wide in taken:
        # With n = R C tokens at the first size: small = f + t n + p n C; rows = f + 2 t n + 2 p n C; wide = f + 2 t n + 4 p n C.
        pairs = (wide[0] - rows) / (2 * tokens * columns) if wide else 0.0
        fixed = 2 * small - rows
        of_layers.append((fixed, (small - fixed) / tokens - pairs * columns, pairs))
    two, three = of_layers[0], of_layers[-1]
    slopes = [more - fewer for fewer, more in zip(two, three, strict=True)]
    return Polynomial(*((value - 2 * slope, slope) for value, slope in zip(two, slopes, strict=True)))


def _runs(kind: PassKind, layers: int, sizes: Sequence[tuple[int, int]]) -> list[tuple[float, float]]:
    """(bytes kept after the forward pass, most bytes) of passes over (rows, columns)."""
    model = _model(kind, layers)
    with FakeTensorMode(allow_non_fake_inputs=True), without_values(kind):
        give_fake_weights(model, kind)
        return [_run(model, kind, *size) for size in sizes]


def _run(model: TransformersModel, kind: PassKind, rows: int, columns: int) -> tuple[float, float]:
    ids = torch.ones(rows, columns, dtype=torch.long)
    live = LiveBytes()
    with _precision(kind), torch.set_grad_enabled(kind.trains), live:
        hidden = model(input_ids=ids, **({} if _is_encoder(model) else {"use_cache": False}))[0]
        kept = live.now
        if kind.trains:
            hidden.backward(torch.empty_like(hidden))
    return kept, live.peak


@contextmanager
def without_values(kind: PassKind) -> Iterator[None]:
    """Replace functions that fake tensors cannot run, or that treat them as another kind of weight.

    Without padding there is no attention mask. transformers cannot see this on fake tensors, and would build a mask for packed rows. Fake
    tensors know PyTorch's product of groups, which mixtures of experts use, only in bf16; that of transformers keeps the same tensors.
    Folded adapters would take a fake weight for a sharded one.
    """
    own: list[tuple[ModuleType, str, object]] = [(moe, "_can_use_grouped_mm", lambda *_, **__: False)]
    own.append((folding, "is_plain", lambda module: True))
    if not kind.masked:
        own.append((masking_utils, "find_packed_sequence_indices", lambda *_, **__: None))
    own = [(module, name, function) for module, name, function in own if hasattr(module, name)]
    usual = [getattr(module, name) for module, name, _ in own]
    for module, name, function in own:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(own, usual, strict=True):
            setattr(module, name, function)


def _is_encoder(model: TransformersModel) -> bool:
    return "use_cache" not in inspect.signature(plain_model(model).forward).parameters


def config_of(kind: PassKind, layers: int | None = None, **sizes: int) -> PretrainedConfig:
    """The transformers config with the first ``layers`` layers (None: all) and other ``sizes``. A list with a value per layer is cut.

    In the config of a model of several modalities, they belong to the part for text. Raises ModelError for a model type that
    transformers does not have.
    """
    fields = json.loads(kind.config, object_hook=_as_float)
    if fields["model_type"] not in CONFIG_MAPPING:
        raise ModelError(f"transformers has no model type {fields['model_type']!r}")
    left_out = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config"}
    kept = {name: value for name, value in fields.items() if name not in left_out}
    config: PretrainedConfig = CONFIG_MAPPING[fields["model_type"]](**kept)
    text = config.get_text_config()
    if layers is not None and layers != (full := text.num_hidden_layers):
        for name, value in list(vars(text).items()):
            if isinstance(value, list | tuple) and len(value) == full and not all(isinstance(item, float) for item in value):
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    for name, size in sizes.items():
        if not isinstance(getattr(type(text), name, None), property):  # computed from other sizes
            setattr(text, name, size)
    if (getattr(text, "pad_token_id", None) or 0) >= text.vocab_size:
        text.pad_token_id = None
    return config


def _as_float(content: dict[str, object]) -> object:
    """The number that transformers writes into a config.json as an object, e.g. {"__float__": "Infinity"}; other objects unchanged."""
    return float(str(content["__float__"])) if content.keys() == {"__float__"} else content


def text_config_of(kind: PassKind, layers: int | None = None, **sizes: int) -> PretrainedConfig:
    """The part of ``config_of`` for text; for most models all of it."""
    config: PretrainedConfig = config_of(kind, layers, **sizes).get_text_config()
    return config


def _bare_model(kind: PassKind, layers: int) -> TransformersModel:
    """The transformer for text with its first layers on the meta device, without adapters and quantization."""
    config = text_config_of(kind, layers, vocab_size=kind.vocabulary)
    with torch.device("meta"):
        model: TransformersModel = AutoModel.from_config(config, dtype=_dtype(kind), attn_implementation=attention(kind, config))
    return model


def _dtype(kind: PassKind) -> torch.dtype:
    return torch.float32 if kind.weights > HALF else torch.bfloat16


def full_model(kind: PassKind, layers: int | None = None) -> TransformersModel:
    """The model of the class that a step loads (``kind.task``), with its first layers (None: all), on the meta device."""
    config = config_of(kind, layers, vocab_size=kind.vocabulary)
    with torch.device("meta"):
        model: TransformersModel = CLASSES[kind.task].from_config(
            config, dtype=_dtype(kind), attn_implementation=attention(kind, config.get_text_config())
        )
    return model


def _adapted_model(kind: PassKind, layers: int) -> TransformersModel:
    """The transformer with its first layers and the new adapter, on the meta device.

    An adapter whose settings name modules is added to the model of the class that a step loads, because names depend on the class.
    """
    from stages.models.adapters.attaching import attach_lora

    assert kind.adapter is not None
    model = _bare_model(kind, layers) if kind.adapter.is_everywhere else full_model(kind, layers)
    disable_dropout(model)
    if kind.quantization != "none":
        quantize(model, kind.quantization, kind.device)
    model.requires_grad_(False)
    task = "FEATURE_EXTRACTION" if kind.adapter.is_everywhere else kind.task
    with torch.device("meta"):
        adapted = attach_lora(model, kind.adapter.settings, task=task, base="count", new_rows=kind.trained_rows)
    if kind.adapter.is_everywhere:
        return adapted
    inner = plain_model(adapted)
    transformer = inner.base_model if kind.task == "SEQ_CLS" else inner.get_decoder()
    assert isinstance(transformer, PreTrainedModel)
    return transformer


def _model(kind: PassKind, layers: int) -> TransformersModel:
    """The transformer with its first layers on the meta device, as a training step prepares it."""
    if kind.adapter is not None:
        model = _adapted_model(kind, layers)
    else:
        model = _bare_model(kind, layers)
        disable_dropout(model)
        if kind.quantization != "none":
            quantize(model, kind.quantization, kind.device)
    if kind.device == "cuda" or (kind.compute > HALF and kind.trains):
        _use_lean_layers(model, kind)
    model.train(kind.trains)
    if kind.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kind.adapter is not None:
            model.enable_input_require_grads()
    return model


def attention(kind: PassKind, config: PretrainedConfig) -> str:
    """The attention implementation of a pass: eager if a step would use it, else sdpa. Flash attention keeps what sdpa keeps."""
    chosen = attention_of(AutoModelForCausalLM, config, ModelInput(ref="count"), torch.float32 if kind.compute > HALF else torch.bfloat16)
    known = class_of(AutoModelForCausalLM, config) or class_of(AutoModel, config)
    return "eager" if chosen == "eager" or (known is not None and not known._supports_sdpa) else "sdpa"


def _use_lean_layers(model: nn.Module, kind: PassKind) -> None:
    """Use the lean layers of ``models/layers/lean.py``. They are chosen on a small real model, because the choice compares outputs."""
    config = text_config_of(kind)
    width = 8 * getattr(config, "num_attention_heads", 1)
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": 8, "vocab_size": 16}
    layers = min(2, config.num_hidden_layers)  # RWKV cannot be made with one layer
    small = AutoModel.from_config(text_config_of(kind, layers, **{name: size for name, size in sizes.items() if hasattr(config, name)}))
    usual = {name: type(module).__name__ for name, module in small.named_modules()}
    use_lean_layers(small)
    lean: dict[str, Any] = {usual[name]: type(module) for name, module in small.named_modules() if hasattr(module, "lean")}
    if kind.device == "cuda":  # a fused norm keeps what a lean norm keeps
        lean = {name: chosen for name, chosen in lean.items() if issubclass(chosen, _LeanNorm)}
    for module in model.modules():
        if (chosen := lean.get(type(module).__name__)) is not None and chosen.can_be_lean(module):
            module.__class__ = chosen
            setattr(module, "forward", getattr(module, "lean"))  # noqa: B009, B010  # its own forward would refuse fake tensors


def give_fake_weights(model: nn.Module, kind: PassKind) -> None:
    """Replace the tensors on the meta device by fake ones on a CPU. Trained weights get gradients, as after an earlier pass of a step."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                made = nn.Parameter(made, requires_grad=parameter.requires_grad and kind.trains)
                if made.requires_grad:
                    made.grad = torch.empty_like(made)
                module._parameters[name] = made
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextmanager
def _precision(kind: PassKind) -> Iterator[None]:
    """Autocast as in training in half precision. Autocast of a GPU computes layer norms in fp32, that of a CPU does not."""
    if kind.compute > HALF or not kind.trains:
        yield
        return
    usual = functional.layer_norm

    def in_fp32(x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
        weight, bias = (None if one is None else one.float() for one in (weight, bias))
        return usual(x.float(), shape, weight, bias, eps)

    if kind.device == "cuda":
        functional.layer_norm = in_fp32  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        functional.layer_norm = usual


class _Saved(Protocol):
    """What ``_Quantized`` keeps between its passes."""

    weight: Tensor
    x: Tensor


class _Quantized(torch.autograd.Function):
    """x [..., K] times a frozen weight [N, K], as in bitsandbytes.

    nf4 keeps nothing and dequantizes the weight in both passes. int8 keeps x. On a CPU it also dequantizes the weight; on a GPU it
    quantizes x, and multiplies the codes into 32-bit integers. The columns of x with outliers, which it keeps too, depend on the data.
    """

    @staticmethod
    def forward(ctx: _Saved, x: Tensor, weight: Tensor, quantization: str, device: str) -> Tensor:
        ctx.weight = weight
        if quantization == "int8":
            ctx.x = x
        if quantization == "nf4" or device == "cpu":
            return x @ torch.empty_like(weight, dtype=x.dtype).T
        half = x.to(torch.float16)
        codes = torch.empty_like(half, dtype=torch.int8)
        del half
        product = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.int32)
        output = torch.empty_like(product, dtype=x.dtype)
        del codes, product
        return output

    @staticmethod
    def backward(ctx: _Saved, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = upstream
        return gradient @ torch.empty_like(ctx.weight, dtype=gradient.dtype), None, None, None


def _quantized_product(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    quantization, device = QUANTIZED[type(module)]
    output: Tensor = _Quantized.apply(x.to(dtype), weight, quantization, device)
    return output if bias is None else output + bias.to(dtype)


class _QuantizedLinear(nn.Linear):
    """A linear layer with the memory behaviour of one of bitsandbytes."""

    def forward(self, input: Tensor) -> Tensor:
        return _quantized_product(self, input, self.weight, self.bias)


class _QuantizedConv1D(Conv1D):
    """The same for the linear layer of GPT-2, whose weight is transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return _quantized_product(self, x, self.weight.T, self.bias)


def _quantized_class(kind: type[nn.Module], quantization: str, device: str) -> type[nn.Module]:
    """The subclass of a class above for a quantization and a device; always the same one."""
    for made, settings in QUANTIZED.items():
        if issubclass(made, kind) and settings == (quantization, device):
            return made
    made = type(f"{kind.__name__}_{quantization}_{device}", (kind,), {STANDS_FOR: (quantization, device)})
    QUANTIZED[made] = (quantization, device)
    return made


QUANTIZED: dict[type[nn.Module], tuple[str, str]] = {}
"""(quantization, device) of each class of quantized layers that a count has made."""


def quantize(model: TransformersModel, quantization: str, device: str) -> None:
    """Make those linear layers that bitsandbytes would quantize behave like quantized ones."""
    for module in quantized_modules(plain_model(model)):
        kind = _QuantizedConv1D if isinstance(module, Conv1D) else _QuantizedLinear
        module.__class__ = _quantized_class(kind, quantization, device)  # type: ignore[assignment]  # a subclass of the layer's own class
        module.requires_grad_(False)


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors made within it: ``now``, those that are alive, and their ``peak``.

    It works on fake tensors and on real ones, and sees every operation, also in backward passes. Tensors on the meta
    device have no bytes. ``counts_inputs``: also count tensors that were made before, from their first use on.
    """

    def __init__(self, *, counts_inputs: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._counts_inputs = counts_inputs
        self._sizes: dict[int, int] = {}  # bytes of each storage by its address

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        self._see((args, kwargs), is_new=False)  # made before, e.g. weights; operations may return views of them
        made = func(*args, **(kwargs or {}))
        self._see(made, is_new=True)
        return made

    def _see(self, tensors: object, *, is_new: bool) -> None:
        for leaf in tree_leaves(tensors):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.device.type != "meta":
                self._add(leaf.untyped_storage(), is_new)

    def _add(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        self._sizes[address] = size = storage.nbytes() if is_new or self._counts_inputs else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, address)

    def _drop(self, address: int) -> None:
        self.now -= self._sizes.pop(address, 0)

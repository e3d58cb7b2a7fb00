"""Count the memory of a forward and backward pass by running a few layers of the model on tensors without data.

The layers are those of transformers with this project's replacements, adapters and gradient checkpointing. Autograd runs as in training,
but torch's fake tensors have only a shape, so a count needs no weights, no memory and no GPU. The difference between three layers and two
is the memory of each further layer. R rows (sequences), C columns (tokens of a row).

Imports torch when it counts. Counts are kept in a file, so a later plan imports nothing.
"""

from __future__ import annotations

import inspect
import json
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.config import LoraSettings, ModelInput
from stages.tokens.positions import model_length

logger = logging.getLogger(__name__)

COLUMNS = 512  # of the passes that are counted; the positions of the model if those are fewer
HALF = 2  # bytes
_file: ContextVar[Path | None] = ContextVar("file", default=None)  # where counts are kept


@dataclass(frozen=True)
class PassKind:
    """A pass through the layers of a transformer, without an output layer.

    ``config``: the transformers config as JSON. ``weights`` and ``compute``: bytes per weight, and per value of the compute dtype.
    ``rank``: of the adapters that are trained; 0: all weights are trained. ``trains``: with a backward pass. ``masked``: rows have padding,
    so attention gets a mask.
    """

    config: str
    vocabulary: int
    device: str  # cpu | cuda
    weights: int
    compute: int
    trains: bool
    checkpointing: bool = False
    rank: int = 0
    quantization: str = "none"
    masked: bool = False


@dataclass(frozen=True)
class Polynomial:
    """Bytes as a function of layers, rows and columns: fixed + tokens * (R C) + pairs * (R C^2), each (of the model, of every layer)."""

    fixed: tuple[float, float]
    tokens: tuple[float, float]
    pairs: tuple[float, float]

    def at(self, layers: int, rows: float, columns: float) -> float:
        """The bytes of a pass; never negative."""
        sizes = (1.0, rows * columns, rows * columns**2)
        terms = zip((self.fixed, self.tokens, self.pairs), sizes, strict=True)
        return max(0.0, sum((of_model + layers * of_layer) * size for (of_model, of_layer), size in terms))


@dataclass(frozen=True)
class PassMemory:
    """The memory of a pass besides weights and gradients. ``kept``: at the end of the forward pass. ``peak``: the maximum."""

    kept: Polynomial
    peak: Polynomial


@contextmanager
def kept_in(path: Path) -> Iterator[None]:
    """Context manager in which counts are read from and added to the file at ``path``. It may be deleted at any time."""
    token = _file.set(path)
    try:
        yield
    finally:
        _file.reset(token)


def pass_memory(kind: PassKind) -> PassMemory | None:
    """The memory of a pass; None if its layers cannot be counted. The log then says why, once."""
    if not kind.config:
        return None
    key = _key(kind)
    if key not in _counts:
        _counts.update(_read(_file.get()))
    if key not in _counts:
        _counts[key] = _count_or_explain(kind)
        _write(_file.get(), key)
    known = _counts[key]
    if "reason" in known:
        _warn(str(json.loads(kind.config).get("model_type", "this model")), known["reason"])
        return None
    return PassMemory(*(Polynomial(**{name: tuple(pair) for name, pair in known[part].items()}) for part in _PARTS))


@cache
def _warn(family: str, reason: str) -> None:
    logger.warning("the activations of %s are estimated by constants, because its layers cannot be counted: %s", family, reason)


_PARTS = ("kept", "peak")
_counts: dict[str, dict[str, Any]] = {}  # by ``_key``: the fields of PassMemory, or ``reason`` if there is no count


@cache
def _key(kind: PassKind) -> str:
    """The key of a count: it depends on the pass, the libraries, and this module."""
    libraries = [version(name) for name in ("torch", "transformers", "peft")]
    content = json.dumps([asdict(kind), libraries, Path(__file__).read_text(encoding="utf-8")], sort_keys=True)
    return sha256(content.encode()).hexdigest()[:32]


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path | None, key: str) -> None:
    """Add a count to the file."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**_read(path), key: _counts[key]}), encoding="utf-8")
    except OSError as error:
        logger.info("the counts of activations cannot be saved: %s", error)


def _count_or_explain(kind: PassKind) -> dict[str, Any]:
    """The count as fields, or the reason why there is none: any error of a family's own code. The plan then uses constants."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")  # it logs tracebacks of the errors that are caught here
    level = fake.level
    fake.setLevel(logging.CRITICAL)
    try:
        return asdict(count(kind))
    except Exception as error:
        return {"reason": " ".join(str(error).split())[:200]}
    finally:
        fake.setLevel(level)


# Counting. Imports torch.


def count(kind: PassKind) -> PassMemory:
    """Run the passes and fit the polynomials. Raises the errors of the model's code on fake tensors."""
    config = _config(kind)
    columns = min(COLUMNS, (model_length(config) or 2 * COLUMNS) // 2)
    # With sdpa and no mask, nothing grows with pairs of tokens, and two sizes are enough.
    has_pairs = kind.masked or _attention(kind, config) == "eager"
    sizes = [(2, columns), (4, columns), *([(2, 2 * columns)] if has_pairs else [])]
    # Two layers at least, because a pass without gradients frees a layer's input in the next layer.
    taken = [_runs(kind, layers, sizes) for layers in ((2, 3) if kind.trains else (2,))]
    return PassMemory(*(_fitted(columns, [[run[part] for run in runs] for runs in taken]) for part in range(len(_PARTS))))


def _fitted(columns: int, taken: Sequence[Sequence[float]]) -> Polynomial:
    """The polynomial through the bytes of two and three layers, each at (2, columns), (4, columns) and, with pairs, (2, 2 columns).

    Without three layers, the bytes do not depend on the number of layers.
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
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = _model(kind, layers)
    with FakeTensorMode(allow_non_fake_inputs=True), _without_packing(kind):
        _give_fake_weights(model, kind)
        return [_run(model, kind, *size) for size in sizes]


def _run(model: Any, kind: PassKind, rows: int, columns: int) -> tuple[float, float]:
    import torch

    ids = torch.ones(rows, columns, dtype=torch.long)
    live = live_bytes()
    with _precision(kind), torch.set_grad_enabled(kind.trains), live:
        hidden = model(input_ids=ids, **({} if _is_encoder(model) else {"use_cache": False}))[0]
        kept = live.now
        if kind.trains:
            hidden.backward(torch.empty_like(hidden))
    return kept, live.peak


@contextmanager
def _without_packing(kind: PassKind) -> Iterator[None]:
    """Without padding there is no attention mask. transformers cannot see this on fake tensors, and would build a mask for packed rows."""
    from transformers import masking_utils

    usual: Any = getattr(masking_utils, "find_packed_sequence_indices", None)
    if kind.masked or usual is None:
        yield
        return
    masking_utils.find_packed_sequence_indices = lambda *_, **__: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = usual


def _is_encoder(model: Any) -> bool:
    return "use_cache" not in inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters


def _config(kind: PassKind, **changes: Any) -> Any:
    """The transformers config with other sizes. Fields that list layers are left out; transformers computes them again."""
    from transformers import CONFIG_MAPPING

    fields = json.loads(kind.config)
    layers = fields.get("num_hidden_layers") or fields.get("n_layer") or fields.get("n_layers")
    lists = [name for name, value in fields.items() if isinstance(value, list) and len(value) == layers]
    left_out = {"model_type", "architectures", "torch_dtype", "dtype", "transformers_version", "quantization_config", *lists}
    config = CONFIG_MAPPING[fields["model_type"]](**{name: value for name, value in fields.items() if name not in left_out})
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def _model(kind: PassKind, layers: int) -> Any:
    """The transformer with some layers on the meta device, as a training step prepares it."""
    import torch
    from transformers import AutoModel

    from stages.models.adapters import attach_lora
    from stages.models.loading import disable_dropout

    dtype = torch.float32 if kind.weights > HALF else torch.bfloat16
    config = _config(kind, num_hidden_layers=layers, vocab_size=kind.vocabulary)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config, dtype=dtype, attn_implementation=_attention(kind, config))
    disable_dropout(model)
    if kind.quantization != "none":
        _quantize(model, kind.quantization)
    if kind.rank:
        model.requires_grad_(False)
        model = attach_lora(model, LoraSettings(r=kind.rank), task="FEATURE_EXTRACTION", base="count")
    elif kind.device == "cpu" and kind.compute > HALF and kind.trains:
        _use_lean_layers(model, kind)
    model.train(kind.trains)
    if kind.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if kind.rank:
            model.enable_input_require_grads()
    return model


def _attention(kind: PassKind, config: Any) -> str:
    """eager if a step would use it, else sdpa. Flash attention keeps what sdpa keeps."""
    import torch
    from transformers import AutoModelForCausalLM

    from stages.models.attention import attention_of, class_of

    chosen = attention_of(AutoModelForCausalLM, config, ModelInput(ref="count"), torch.float32 if kind.compute > HALF else torch.bfloat16)
    known = class_of(AutoModelForCausalLM, config)
    return "eager" if chosen == "eager" or (known is not None and not known._supports_sdpa) else "sdpa"


def _use_lean_layers(model: Any, kind: PassKind) -> None:
    """Use the lean layers of ``models/lean.py``. They are chosen on a small real model, because the choice compares outputs."""
    from transformers import AutoModel

    from stages.models.lean import use_lean_layers

    config = _config(kind)
    width = 8 * config.num_attention_heads
    sizes = {"hidden_size": width, "intermediate_size": width, "head_dim": 8, "vocab_size": 16, "num_hidden_layers": 1}
    small = AutoModel.from_config(_config(kind, **{name: size for name, size in sizes.items() if hasattr(config, name)}))
    usual = {name: type(module).__name__ for name, module in small.named_modules()}
    use_lean_layers(small)
    lean = {usual[name]: type(module) for name, module in small.named_modules() if hasattr(module, "lean")}
    for module in model.modules():
        if (chosen := lean.get(type(module).__name__)) is not None:
            module.__class__ = chosen
            module.forward = module.lean  # it would refuse fake tensors


def _give_fake_weights(model: Any, kind: PassKind) -> None:
    """Replace the tensors on the meta device by fake ones on a CPU. Trained weights get gradients, as after an earlier pass of a step."""
    import torch
    from torch import nn

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
    import torch
    from torch.nn import functional

    if kind.compute > HALF or not kind.trains:
        yield
        return
    usual: Any = functional.layer_norm

    def in_fp32(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
        return usual(x.float(), shape, *(None if one is None else one.float() for one in (weight, bias)), eps)

    if kind.device == "cuda":
        functional.layer_norm = in_fp32  # type: ignore[assignment]
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        functional.layer_norm = usual


def _quantize(model: Any, quantization: str) -> None:
    """Give the linear layers the memory behaviour of bitsandbytes' ones: a dequantized copy of the weight in each product."""
    import torch
    from torch import nn

    class Quantized(torch.autograd.Function):
        """x [..., K] times a frozen weight [N, K]. int8 keeps x, and quantizes a copy of it in fp16; nf4 keeps nothing."""

        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.weight = weight
            if quantization == "int8":
                ctx.x = x
                half = x.to(torch.float16)
                codes = torch.empty_like(half, dtype=torch.int8)
                del half
                output = x.new_empty(*x.shape[:-1], len(weight))
                del codes
                return output
            return x @ torch.empty_like(weight, dtype=x.dtype).T

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            (gradient,) = upstream
            return gradient @ torch.empty_like(ctx.weight, dtype=gradient.dtype), None

    class Layer(nn.Linear):
        def forward(self, input: Any) -> Any:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else input.dtype
            output = Quantized.apply(input.to(dtype), self.weight)
            return output if self.bias is None else output + self.bias.to(dtype)

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Layer
            module.requires_grad_(False)


def live_bytes(*, counts_inputs: bool = False) -> Any:
    """A context manager that counts the bytes of the tensors made within it: ``now``, those that are alive, and their ``peak``.

    It works on fake tensors and on real ones, and sees every operation, also in backward passes. ``counts_inputs``: also count tensors that
    were made before, from their first use on.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self._sizes: dict[int, int] = {}  # bytes of each storage by its address

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self._see((args, kwargs), is_new=False)  # made before, e.g. weights; operations may return views of them
            made = func(*args, **(kwargs or {}))
            self._see(made, is_new=True)
            return made

        def _see(self, tensors: Any, *, is_new: bool) -> None:
            for leaf in tree_leaves(tensors):
                if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                    self._add(leaf.untyped_storage(), is_new)

        def _add(self, storage: Any, is_new: bool) -> None:
            address = storage._cdata
            if address in self._sizes:
                return
            self._sizes[address] = size = storage.nbytes() if is_new or counts_inputs else 0
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, address)

        def _drop(self, address: int) -> None:
            self.now -= self._sizes.pop(address, 0)

    return LiveBytes()

"""Compiled layers: torch.compile computes the forward and backward pass of a transformer's layers, one layer at a time.

All layers of a class share the compiled code, also those of several models of a step. The code is valid for any number of rows and tokens,
so a run compiles only a few graphs: with and without gradient, for one row and for several, with and without a mask, for each set of
active adapters. Compiled layers are used only inside ``compiled_passes``. Decoding and short test passes compute as usual.

A layer's class is changed to a subclass. Parameters, names and the saved form do not change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stages.errors import is_out_of_memory
from stages.kernels.casts import cast_with_gradient, keeps_casts
from stages.models.sharding import blocks_of, gathers_in_passes
from stages.process.console import announce
from stages.sampling.support import has_int8_layers

logger = logging.getLogger(__name__)

BACKEND = "inductor"
MOST_GRAPHS = 100
"""Most graphs of one class of layers. More would mean that a property of the passes changes all the time, and each graph takes seconds."""
REASON_LENGTH = 200  # characters of an error in the log


class CompilationFacts(TypedDict):
    """How the layers of a step were computed, for its summary. ``reason`` (why layers are not compiled) is empty if all are.

    ``seconds``: time of the passes that compiled. ``graphs``: number of compiled graphs.
    """

    compiled: bool
    layers: int
    graphs: int
    seconds: float
    reason: str


NOT_WANTED: CompilationFacts = {"compiled": False, "layers": 0, "graphs": 0, "seconds": 0.0, "reason": "training.torch_compile is false"}

SETTINGS: dict[str, Any] = {
    "recompile_limit": 2 * MOST_GRAPHS,  # beyond it, torch would go on uncompiled without an error
    "accumulated_recompile_limit": 2 * MOST_GRAPHS,
    "specialize_float": True,  # an epsilon or a scaling is a constant, not an input
    "optimize_ddp": False,  # it divides the graph of a complete model; here each layer is a graph
}
"""Settings of torch.compile in ``compiled_passes``."""

_is_used = False  # whether this process has made a ``LayerCompiler``
_active = False  # not thread-local, because autograd recomputes checkpointed layers in other threads


@contextmanager
def compiled_passes() -> Iterator[None]:
    """Context manager of forward and backward passes in which the layers that a ``LayerCompiler`` has changed are compiled."""
    global _active
    if not _is_used or _active:
        yield
        return
    import torch._dynamo

    _active = True
    try:
        with torch._dynamo.config.patch(**SETTINGS):
            yield
    finally:
        _active = False


class LayerCompiler:
    """Compiles the layers of a step's models. A class of layers that cannot be compiled computes as usual; one line says why."""

    def __init__(self, *, distributed: str = "") -> None:
        """``distributed``: a library that gathers weights inside of passes, e.g. DeepSpeed; its layers are not compiled."""
        self._distributed = distributed
        self._forwards: dict[Any, _CompiledForward] = {}  # by class of the layers
        self._layers = 0
        self._refusals: list[str] = []
        global _is_used
        _is_used = True

    def add(self, *models: nn.Module | None) -> None:
        """Let the layers of ``models`` be compiled in ``compiled_passes``. Call it after adapters were added and weights were sharded.

        Layers are compiled when a pass first uses them.
        """
        for model in models:
            if model is None:
                continue
            name = type(model).__name__
            layers = [layer for layer in blocks_of(model) if not self._compiles(layer)]
            if reason := self._why_not(model, layers):
                self._refuse(f"{name}: layers are not compiled: {reason}")
                continue
            for layer in layers:
                kind = layer.compiled_forward.kind if isinstance(layer, _CompiledLayer) else type(layer)
                layer.__class__ = self._compiled_class(kind)
            self._layers += len(layers)
            if layers:
                announce(
                    ("compiled layers", name),
                    f"{name}: torch.compile compiles {len(layers)} layers; the first passes take longer",
                )

    def facts(self) -> CompilationFacts:
        """How the layers were computed until now."""
        forwards = list(self._forwards.values())
        reasons = [*self._refusals, *(forward.reason for forward in forwards if forward.reason)]
        return {
            "compiled": any(forward.graphs and not forward.reason for forward in forwards),
            "layers": self._layers,
            "graphs": sum(forward.graphs for forward in forwards),
            "seconds": round(sum(forward.seconds for forward in forwards), 3),
            "reason": "; ".join(reasons),
        }

    def _compiles(self, layer: nn.Module) -> bool:
        return isinstance(layer, _CompiledLayer) and layer.compiled_forward is self._forwards.get(layer.compiled_forward.kind)

    def _why_not(self, model: nn.Module, layers: Sequence[nn.Module]) -> str:
        if self._distributed:
            return f"{self._distributed} gathers their weights in each pass"
        if gathers_in_passes(model):
            return "their weights are sharded over the processes (FSDP)"
        if any(map(has_int8_layers, layers)):
            return "int8 products divide each layer into many small graphs"
        if not layers and not any(map(self._compiles, blocks_of(model))):
            return "the model has no layers of one class"
        return ""

    def _refuse(self, line: str) -> None:
        if line not in self._refusals:
            self._refusals.append(line)
            logger.info(line)
            announce(("layers are not compiled", line), line)

    def _compiled_class(self, kind: Any) -> Any:
        """The subclass of ``kind`` whose forward is compiled. It has the same name, because configs refer to classes by name."""
        if kind not in self._forwards:
            self._forwards[kind] = _CompiledForward(kind)
        forward = self._forwards[kind]
        if forward.made is None:
            forward.made = type(kind.__name__, (_CompiledLayer, kind), {"__module__": kind.__module__, "compiled_forward": forward})
        return forward.made


class _CompiledLayer(nn.Module):
    """Mixin for a class of layers."""

    compiled_forward: _CompiledForward  # of the class

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if not _active or named.get("past_key_values") is not None or torch.compiler.is_compiling():
            return super().forward(*inputs, **named)
        return type(self).compiled_forward.run(self, inputs, named)


class _CompiledForward:
    """The compiled forward of a class of layers. ``reason``: why it is not used (any more); empty if it is used."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind
        self.made: Any = None  # the subclass of ``kind``
        self.graphs, self.seconds, self.reason = 0, 0.0, ""
        self._compiled: Callable[..., Any] = torch.compile(_with_own_code(kind.forward), dynamic=True, backend=self._compile)

    def run(self, layer: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> Any:
        """The output of ``layer``. If its forward cannot be compiled, ``reason`` is set and it computes as usual from now on."""
        if not self.reason:
            known, began = self.graphs, time.perf_counter()
            try:
                with _kept_weights(layer, inputs, named):
                    output = self._compiled(layer, *inputs, **named)
            except Exception as error:
                if not _is_of_compiler(error) or is_out_of_memory(error):
                    raise
                self._give_up(error)
            else:
                if self.graphs != known:
                    self.seconds += time.perf_counter() - began
                return output
        return self.kind.forward(layer, *inputs, **named)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        """The backend of torch.compile."""
        self.graphs += 1
        if self.graphs > MOST_GRAPHS:
            raise RuntimeError(f"more than {MOST_GRAPHS} graphs were needed")
        from torch._dynamo.backends.registry import lookup_backend
        from torch._functorch import config as functorch_config

        # Without this, errors in the backward graph would appear in the backward pass, where there is no way back.
        with functorch_config.patch(force_non_lazy_backward_lowering=True):
            return lookup_backend(BACKEND)(graph, inputs)

    def _give_up(self, error: Exception) -> None:
        self.reason = f"{self.kind.__name__}: {_cause(error)}"
        line = f"layers are not compiled: {self.reason}"
        logger.info(line)
        announce(("layers are not compiled", self.kind.__name__), line)


def _with_own_code(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls ``forward``, with its own code object: torch.compile keeps its graphs by code object."""

    def compiled_layer(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        return forward(layer, *inputs, **named)

    code = compiled_layer.__code__.replace()
    return FunctionType(code, compiled_layer.__globals__, closure=compiled_layer.__closure__)


def _is_of_compiler(error: Exception) -> bool:
    """Whether torch.compile raised the error, not the layer."""
    from torch._dynamo.exc import TorchDynamoException

    return isinstance(error, TorchDynamoException)


def _cause(error: BaseException) -> str:
    """The innermost error of a compiler in one line."""
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return " ".join(f"{type(error).__name__}: {error}".split())[:REASON_LENGTH]


# Weights in half precision


@contextmanager
def _kept_weights(layer: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> Iterator[None]:
    """Context manager in which the linear modules of ``layer`` have their half-precision copies of ``kept_casts`` as weights.

    A compiled graph does not use autocast's copies. Without this, it would cast every weight in every pass.
    """
    first = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    if first is None or not keeps_casts() or not torch.is_autocast_enabled(first.device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(first.device.type)
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module in layer.modules():
            if isinstance(module, nn.Linear | Conv1D):
                for name, weight in module._parameters.items():
                    if weight is not None and weight.dtype == torch.float32:
                        replaced.append((module, name, weight))
                        module._parameters[name] = cast_with_gradient(weight, dtype)  # type: ignore[assignment]  # a plain tensor
        yield
    finally:
        for module, name, weight in replaced:
            module._parameters[name] = weight

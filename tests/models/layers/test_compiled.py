"""Compiled layers compute the same with few graphs, and a layer that cannot be compiled computes as usual.

tests/models/passes/test_packing.py compares compiled layers of several families with transformers.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stages.kernels.casts import kept_casts
from stages.models.layers import compiled as compiled_layers
from stages.models.layers.compiled import LayerCompiler, compiled_passes
from stages.models.loading import load_language_model
from stages.process.console import announcing

TRACED = "aot_eager"  # a backend that traces forward and backward pass, but generates no code: fast


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that a step prints."""
    lines: list[str] = []
    with announcing(lines.append):
        yield lines


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", TRACED)


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    made = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return made


# A small model, whose graphs take little time


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None, past_key_values: object = None) -> Tensor:
        hidden = self.inner(self.norm(x)).tanh()
        return x + (hidden if mask is None else hidden * mask)


class Stack(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self, layers: int = 3, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor, **named: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **named)
        return x


def compiled_stack(**sizes: int) -> tuple[Stack, Stack, LayerCompiler]:
    """(a model with compiled layers, the same model without, the compiler)."""
    usual = Stack(**sizes)
    model, compiler = copy.deepcopy(usual), LayerCompiler()
    compiler.add(model)
    return model, usual, compiler


def step(model: nn.Module, x: Tensor, **named: Any) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(x, **named)
    (out * torch.arange(out.shape[-1])).sum().backward()
    return out.detach(), gradients_of(model)


def test_many_shapes_and_layers_and_a_second_model_need_three_graphs(traced: None) -> None:
    model, usual, compiler = compiled_stack(layers=4)
    compiler.add(second := Stack())
    for rows, tokens in [(4, 20), (3, 17), (5, 33), (1, 11), (16, 2), (1, 64), (2, 9)]:
        x = torch.randn(rows, tokens, 8, requires_grad=True)
        with compiled_passes():
            out, gradients = step(model, x)
            step(second, x)
        expected, wanted = step(usual, x)
        torch.testing.assert_close(out, expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert compiler.facts()["graphs"] == 2  # one row, several rows
    with compiled_passes(), torch.no_grad():
        for rows, tokens in [(4, 20), (3, 17), (5, 33)]:
            model(torch.randn(rows, tokens, 8))
    assert compiler.facts() == {"compiled": True, "layers": 7, "graphs": 3, "seconds": compiler.facts()["seconds"], "reason": ""}


def test_names_and_classes_do_not_change_and_other_passes_are_not_compiled(traced: None) -> None:
    model, usual, compiler = compiled_stack()
    assert type(model.layers[0]).__name__ == "Block"
    assert [name for name, _ in model.named_modules()] == [name for name, _ in usual.named_modules()]
    for one, other in ((model, usual), (usual, model)):  # with strict names
        one.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 8)
    model(x)  # outside of compiled passes
    with compiled_passes():
        model(x, past_key_values=object())  # decoding
    copy.deepcopy(model)
    compiler.add(model)  # a second time: no layers are left
    assert compiler.facts() == {"compiled": False, "layers": 3, "graphs": 0, "seconds": 0.0, "reason": ""}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_by_the_same_graph(reentrant: bool, traced: None) -> None:
    model, usual, compiler = compiled_stack()
    x = torch.randn(4, 5, 8, requires_grad=True)

    def checkpointed() -> dict[str, Tensor]:
        hidden = x
        for layer in model.layers:
            hidden = torch.utils.checkpoint.checkpoint(layer, hidden, use_reentrant=reentrant)
        (hidden * torch.arange(8)).sum().backward()
        return gradients_of(model)

    with compiled_passes():
        gradients = checkpointed()
    for name, gradient in step(usual, x)[1].items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)
    assert compiler.facts()["graphs"] == (2 if reentrant else 1)  # the reentrant way first computes without gradient


def test_under_autocast_a_graph_reads_the_kept_casts_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[Any] = []

    def backend(graph: Any, examples: list[Tensor]) -> Callable[..., Any]:
        inputs.extend((tuple(one.shape), one.dtype) for one in examples if isinstance(one, Tensor))
        return graph.forward

    monkeypatch.setattr(compiled_layers, "BACKEND", backend)
    model, usual, compiler = compiled_stack()
    parts = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(2)]
    gradients = []
    for stack in (model, usual):
        with kept_casts("cpu"), compiled_passes():
            for part in parts:
                with torch.autocast("cpu", torch.bfloat16):
                    out = stack(part)
                (out.float() * torch.arange(8)).sum().backward()
        gradients.append(gradients_of(stack))
    assert ((8, 8), torch.bfloat16) in inputs and ((8, 8), torch.float32) not in inputs
    assert compiler.facts()["graphs"] == 1
    for name, gradient in gradients[0].items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradients[1][name]), name
    assert all(isinstance(weight, nn.Parameter) and weight.dtype == torch.float32 for weight in model.parameters())


def test_nf4_layers_compute_the_same_compiled_or_not(traced: None, tiny_llama_folder: Path, resolve_folder: Any) -> None:
    """Without gradients and in evaluation mode, bitsandbytes itself would compute in bf16 on some processors."""
    from bitsandbytes.functional import dequantize_4bit

    model = load_language_model(resolve_folder(tiny_llama_folder, quantization="nf4"), dtype=torch.float32, trainable=False).eval()
    plain = load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False).eval()
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            weight: Any = layer.weight
            plain.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state)
    ids = torch.arange(24).view(2, 12)
    compiler = LayerCompiler()
    compiler.add(model)
    with torch.no_grad():
        expected, usual = plain(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits
        with compiled_passes():
            compiled = model(input_ids=ids, use_cache=False).logits
    assert (compiler.facts()["compiled"], compiler.facts()["reason"]) == (True, "")
    assert relative(usual, expected) < 1e-5 and relative(compiled, expected) < 1e-5


# The real compiler, and why layers are not compiled


def test_generated_code_has_the_gradients_of_the_usual_layers_and_no_file_in_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, usual, compiler = compiled_stack(width=32)
    x = torch.randn(4, 20, 32)
    with compiled_passes():
        out, gradients = step(model, x)
    expected, wanted = step(usual, x)
    assert compiler.facts()["compiled"] and compiler.facts()["seconds"] > 0
    assert relative(out, expected) < 1e-5
    for name, gradient in gradients.items():
        assert relative(gradient, wanted[name]) < 1e-5, name
    assert list(tmp_path.iterdir()) == []


def test_without_a_compiler_layers_compute_as_usual_and_one_line_says_why(
    said: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # without code that was compiled earlier
    model, usual, compiler = compiled_stack()
    said.clear()
    x = torch.randn(4, 20, 8)
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}), caplog.at_level(logging.WARNING), compiled_passes():
        results = [step(model, x) for _ in range(2)]
    expected, wanted = step(usual, x)
    for out, gradients in results:
        assert torch.equal(out, expected)
        assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients.items())
    assert len(said) == 1 and said[0].startswith("layers are not compiled: Block: ") and "compiler" in said[0]
    facts = compiler.facts()
    assert not facts["compiled"] and facts["reason"] == said[0].removeprefix("layers are not compiled: ")
    # PyTorch's scheduler logs one line, depending on what the process has compiled before.
    assert [record for record in caplog.records if record.name != "torch._inductor.scheduler"] == []


def test_too_many_graphs_end_the_compilation(said: list[str], traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers, "MOST_GRAPHS", 1)
    model, usual, compiler = compiled_stack()
    with compiled_passes():
        for x in (torch.randn(2, 3, 8), torch.randn(1, 3, 8)):
            assert torch.equal(model(x), usual(x))
    assert said[1:] == ["layers are not compiled: Block: RuntimeError: more than 1 graphs were needed"]


def test_errors_of_a_layer_and_of_its_memory_are_raised(traced: None) -> None:
    model, _, compiler = compiled_stack()
    with compiled_passes(), pytest.raises(Exception, match="size|shape|dimension"):
        model(torch.randn(2, 3, 7))
    model(torch.randn(2, 3, 8))


@pytest.mark.parametrize("sharded", ["weights", "DeepSpeed"])
def test_sharded_models_are_not_compiled_and_one_line_says_why(sharded: str, said: list[str]) -> None:
    model = Stack()
    if sharded == "weights":
        next(model.parameters()).ds_id = 0  # the mark of ZeRO-3
    compiler = LayerCompiler(distributed="DeepSpeed" if sharded == "DeepSpeed" else "")
    compiler.add(model, model)
    assert len(said) == 1 and said[0].startswith("Stack: layers are not compiled: ")
    assert not compiler.facts()["compiled"] and compiler.facts()["reason"] == said[0]


def test_int8_layers_are_not_compiled(said: list[str]) -> None:
    class Linear8bitLt(nn.Linear):
        pass

    model = Stack()
    model.layers[1].inner = Linear8bitLt(8, 8)
    LayerCompiler().add(model)
    assert said == ["Stack: layers are not compiled: int8 products divide each layer into many small graphs"]


def test_a_model_without_layers_is_not_compiled(said: list[str]) -> None:
    LayerCompiler().add(nn.Linear(2, 2))
    assert said == ["Linear: layers are not compiled: the model has no layers of one class"]

"""Bytes computed by hand, and compared with the memory of torch, transformers and bitsandbytes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from stages.memory.estimate import (
    Machine,
    Memory,
    Phase,
    activations,
    chunked_logits,
    dtype_bytes,
    frozen_weights,
    full_logits,
    moments,
    phases,
    quantized_weights,
    tiled_logits,
    trained,
    unchunked_logits,
)
from stages.memory.shapes import Shape, shape_of

CPU = Machine("cpu", 8 << 30, 4, "a CPU")


def llama(**fields: int) -> Shape:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
    shape = shape_of({"model_type": "llama", "vocab_size": 100, "tie_word_embeddings": False, **sizes, **fields})
    assert shape is not None
    return shape


def test_weights_by_hand() -> None:
    shape = llama()
    # A layer: q and o 64 x 64, k and v 64 x 32, gate, up and down 64 x 160.
    assert shape.linear_weights == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) == 86016
    assert shape.other_weights == 100 * 64 + 5 * 64  # embedding, two norms a layer and one at the end
    assert frozen_weights(shape, "none", double=True, compute=2) == 2 * (86016 + 6720 + 6400)
    rows = 2 * (2 * 64 + 2 * 32 + 2 * 160 + 64)  # outputs of a layer's seven modules
    assert frozen_weights(shape, "int8", double=True, compute=2) == 86016 + 4 * rows + 2 * (6720 + 6400)
    tables = 14 * 16 * 4  # of each module
    assert frozen_weights(shape, "nf4", double=False, compute=2, output=False) == 86016 * 0.5625 + tables + 2 * 6720


@pytest.mark.parametrize("quantization", ["int8", "nf4", "nf4, double"])
def test_quantized_weights_have_the_bytes_of_what_bitsandbytes_stores(quantization: str) -> None:
    """Every tensor of every quantized module that transformers makes of a model whose output layer is not quantized."""
    import torch
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    from stages.config import ModelInput
    from stages.models.quantizing import quantization_config

    kind, double = quantization.partition(",")[0], quantization.endswith("double")
    shape = llama(intermediate_size=168)  # 168 x 64 weights are no multiple of 256 blocks
    fields = json.loads(shape.config)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    settings = quantization_config(
        ModelInput.model_validate({"ref": "x", "quantization": kind, "double_quantization": double}), torch.float32
    )
    weights = {name: module.weight.data for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)}
    made = replace_with_bnb_linear(plain, get_keys_to_not_convert(plain), settings)
    stored = 0
    for name, module in made.named_modules():
        if isinstance(module, Linear8bitLt):
            quantized = type(module.weight)(weights[name], requires_grad=False).to("cpu")
            stored += quantized.data.nbytes + quantized.SCB.nbytes
        elif isinstance(module, Linear4bit):
            data, state = bitsandbytes_nf4(weights[name], double=double)
            scales = [state.absmax, state.code, *([state.offset, state.state2.absmax] if double else [])]
            stored += data.nbytes + sum(tensor.nbytes for tensor in scales)
    assert "lm_head" in weights and type(made.lm_head) is torch.nn.Linear
    assert quantized_weights(shape, kind, double=double) == stored


def bitsandbytes_nf4(weight: Any, *, double: bool) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight, quant_type="nf4", compress_statistics=double)


def test_moments_and_gradients_by_hand() -> None:
    assert trained(1000, "adamw") == Memory(gradients=4000, optimizer=8000)
    assert moments(256, "adamw_8bit") == 2 * (256 + 4)
    assert moments(256, "adamw_8bit", small=256) == 2 * 4 * 256  # tensors that are too small for 8 bits
    assert moments(256, "paged_adamw") == 2 * 4 * 256


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer() -> None:
    shape = llama()
    layer = 5 * 64 + 3 * 64 + 2 * 32 + 4 * 160  # as in SAVED for gated families, fp32
    passing = 3 * 160
    assert activations(shape, 10, 4) == 10 * 4 * (2 * layer + passing)
    assert activations(shape, 10, 4, checkpointing=True) == 10 * 4 * (2 * 64 + layer + passing)
    assert activations(shape, 10, 2) == 10 * (2 * (2 * layer + passing) + 2 * 2 * 64 * 4)  # two norms a layer keep fp32 inputs
    lean = 4 * 64 + 3 * 64 + 2 * 32 + 2 * 160
    assert activations(shape, 10, 4, lean=True) == 10 * 4 * (2 * lean + passing)


def test_logits_in_chunks_and_all_together() -> None:
    shape = llama()
    assert unchunked_logits(shape, 10) == 5 * 10 * 100 * 4
    assert chunked_logits(shape, 10, CPU, trains_output=False) == 4 * 10 * 100 * 4 + 2 * 10 * 64 * 4
    many = chunked_logits(shape, 10**6, CPU, trains_output=True)
    assert many == 4 * (2 << 20) + 2 * 10**6 * 64 * 4 + 100 * 64 * 4  # a chunk is never more than 2 MiB


@pytest.mark.parametrize(("trains_output", "compute"), [(True, 4), (False, 4), (False, 2)])
def test_tiled_logits_take_what_the_loss_of_trl_takes(trains_output: bool, compute: int) -> None:
    import torch
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    from stages.memory.fake_passes import LiveBytes

    shape, tokens = llama(vocab_size=3000), 500
    dtype = torch.float32 if compute == 4 else torch.bfloat16
    hidden = torch.randn(tokens, shape.hidden, requires_grad=True, dtype=dtype)
    weight = torch.randn(shape.vocabulary, shape.hidden, requires_grad=trains_output, dtype=dtype)
    targets = torch.randint(0, shape.vocabulary, (tokens,))
    with LiveBytes() as live:
        logprobs, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 3000, None, 1.0, ("entropy", "is_top1"))
        logprobs.sum().backward()
    expected = tiled_logits(shape, tokens, CPU, trains_output=trains_output, compute=compute)
    copied = tokens * shape.hidden * compute  # the states of the model, which are a slice, are copied before the function
    assert live.peak + copied == pytest.approx(expected, rel=0.02)
    gpu = Machine("cuda", 8 << 30, 2, "a GPU")
    # 500 rows of 32,768 logits in bf16, hidden states and their gradients, a cast of the output layer
    by_hand = 500 * 32768 * 2 + 500 * 64 * (2 + 4) + 3000 * 64 * 2
    assert tiled_logits(shape, tokens, gpu, trains_output=False, compute=2) == by_hand


@pytest.mark.parametrize("capped", [True, False])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize(("half", "part"), [(False, 2), (False, 1), (True, 1)], ids=["half of the positions", "all positions", "bf16"])
def test_logits_of_all_tokens_take_what_the_loss_of_a_policy_takes(capped: bool, with_entropy: bool, half: bool, part: int) -> None:
    """With Gemma 2's cap or without, and the log-probabilities and entropies of some or all positions, on real tensors."""
    import torch

    from stages.memory.fake_passes import LiveBytes
    from stages.rl.logprobs import entropy, token_logprobs

    shape, rows, columns = llama(vocab_size=3000), 4, 60
    dtype, read = torch.bfloat16 if half else torch.float32, columns // part
    hidden = torch.randn(rows, columns, shape.hidden, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape.vocabulary, shape.hidden, dtype=dtype, requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    targets = torch.zeros(rows * read, dtype=torch.long)

    def loss() -> torch.Tensor:
        logits = hidden @ weight.T
        logits = torch.tanh(logits / 30) * 30 if capped else logits
        logits = logits[torch.arange(rows).repeat_interleave(read), torch.arange(columns - read, columns).repeat(rows)].float()
        logprobs, entropies = token_logprobs(logits, targets), entropy(logits)
        return logprobs.sum() + entropies.sum() if with_entropy else logprobs.sum()

    with LiveBytes() as live:
        loss().backward()
    options = {"capped": capped, "with_entropy": with_entropy, "compute": 2 if half else 4}
    assert live.peak == pytest.approx(full_logits(shape, rows * columns, rows * read, **options), rel=0.03)


def test_phases_follow_each_other() -> None:
    assert (Phase(5, 1, 1, absent=3).total, Phase(1, absent=2).total) == (4, 0)
    memory = phases(Phase(5, 1, 1), Phase(0, 4, 6), Phase(awake=9))
    assert (memory.kv_cache, memory.activations, memory.logits, memory.awake, memory.passing) == (5, 4, 6, 9, 10)
    assert (memory + Memory(weights=1, gradients=2)).total == 13


def test_precision_decides_the_bytes() -> None:
    amx = Machine("cpu", 1, 2, "a CPU with AMX")
    assert [dtype_bytes(name, CPU) for name in ("fp32", "bf16", "fp16", "auto")] == [4, 2, 2, 4]
    assert dtype_bytes("auto", amx) == 2

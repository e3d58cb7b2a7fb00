"""Packed passes against plain transformers: eager attention, no cache, one sequence at a time. And which models are not packed."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from stages.models.heads import ScalarHead, ValueModel
from stages.models.layers import compiled as compiled_layers
from stages.models.layers.compiled import LayerCompiler, compiled_passes
from stages.models.layers.replacing import use_own_layers
from stages.models.passes import packing
from stages.models.passes.packing import packing_kernel, usable_kernels, why_not
from stages.models.passes.responses import Policy, sequence_batch

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "llama, two heads share keys": lambda: transformers.LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=4),
    "gemma3, a sliding window of 4": lambda: transformers.Gemma3TextConfig(**SIZES, **SLIDING, num_key_value_heads=2, head_dim=8),
    "mistral, a sliding window of 4": lambda: transformers.MistralConfig(**SIZES, sliding_window=4, num_key_value_heads=2),
    "cohere, makes its logits itself": lambda: transformers.CohereConfig(**SIZES, num_key_value_heads=2),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14]]
RESPONSES = [[20, 21, 22, 23], [24, 25, 26, 27, 28, 29, 30], [31]]
BOOTSTRAP = [0, 2]


def made(config: Any, attention: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # so that attention matters
    return model.train()


def random_head() -> ScalarHead:
    head = ScalarHead(32, torch.device("cpu"))
    torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.constant_(head.bias, 0.3)
    return head


def plain(model: Any, head: ScalarHead) -> tuple[Tensor, Tensor]:
    """(log-probabilities [N] of the responses, values [N and those of the states after the responses]), one sequence at a time."""
    logprobs, values, bootstrap = [], [], []
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        output = model(input_ids=torch.tensor([prompt + response]), use_cache=False, output_hidden_states=True)
        at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        logprobs.append(output.logits[0, at].log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
        of_row = output.hidden_states[-1][0] @ head.weight[0] + head.bias
        values.append(of_row[at])
        bootstrap += [of_row[-1:]] if row in BOOTSTRAP else []
    return torch.cat(logprobs), torch.cat([*values, *bootstrap])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_passes_equal_plain_ones_and_so_do_their_gradients(family: str) -> None:
    expected_model, model = made(FAMILIES[family](), "eager"), made(FAMILIES[family](), "sdpa")
    head = random_head()
    weights = torch.linspace(-1, 1, sum(map(len, RESPONSES)))
    logprobs, values = plain(expected_model, head)
    ((weights * logprobs).sum() + values.square().sum()).backward()

    policy = Policy(model, temperature=1.0, autocast=None, shared_value_head=head)
    assert policy.kernel() == "padded"
    batch = sequence_batch(PROMPTS, RESPONSES, 0, "cpu", bootstrap=BOOTSTRAP, kernel="padded")
    assert batch.input_ids.shape == (1, sum(map(len, PROMPTS + RESPONSES)))
    packed = policy.loss(batch, lambda chosen, _, rows: weights[rows] * chosen, num_tokens=len(logprobs))
    assert packed.values is not None
    (packed.summed + packed.values.square().sum()).backward()

    # fp32 sums in another order; the hidden states are a few units large
    torch.testing.assert_close(packed.logprobs, logprobs.detach(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(packed.values, values, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(policy.logprobs(batch)[: len(logprobs)], logprobs.detach(), rtol=1e-4, atol=2e-5)
    wanted = gradients(expected_model)
    assert gradients(model).keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-3, atol=1e-5 * float(largest), msg=lambda text, name=name: f"{name}: {text}"
        )
    assert model.config._attn_implementation == "sdpa"  # unchanged


COMPILED = ["llama, two heads share keys", "gpt2", "qwen2", "gemma3, a sliding window of 4", "mistral, a sliding window of 4"]


@pytest.mark.parametrize("family", COMPILED)
def test_packed_passes_through_compiled_layers_equal_plain_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")  # it traces both passes, but generates no code: fast
    expected_model, model = made(FAMILIES[family](), "eager"), made(FAMILIES[family](), "sdpa")
    head = random_head()
    weights = torch.linspace(-1, 1, sum(map(len, RESPONSES)))
    logprobs, values = plain(expected_model, head)
    ((weights * logprobs).sum() + values.square().sum()).backward()
    use_own_layers(model)
    policy = Policy(model, temperature=1.0, autocast=None, shared_value_head=head)
    compiler = LayerCompiler()
    compiler.add(model)

    batch = sequence_batch(PROMPTS, RESPONSES, 0, "cpu", bootstrap=BOOTSTRAP, kernel="padded")
    with compiled_passes():
        packed = policy.loss(batch, lambda chosen, _, rows: weights[rows] * chosen, num_tokens=len(logprobs))
        assert packed.values is not None
        (packed.summed + packed.values.square().sum()).backward()
    facts = compiler.facts()
    assert (facts["compiled"], facts["layers"], facts["reason"]) == (True, 2, "")
    assert facts["graphs"] <= (4 if family.startswith("gemma3") else 2)  # Gemma's two layers differ: only one has a window
    torch.testing.assert_close(packed.logprobs, logprobs.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.values, values, rtol=1e-5, atol=1e-5)
    wanted = gradients(expected_model)
    assert gradients(model).keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in gradients(model).items():
        assert float((gradient - wanted[name]).norm()) < 1e-5 * largest, name


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "with its own adapter"])
def test_a_value_network_reads_packed_rows(adapted: bool) -> None:
    model = made(FAMILIES["gpt_neox"](), "sdpa")
    backbone = model.gpt_neox
    if adapted:
        settings = peft.LoraConfig(task_type="FEATURE_EXTRACTION", target_modules=["query_key_value"], init_lora_weights=False)
        backbone = peft.get_peft_model(backbone, settings)
    value = ValueModel(backbone)
    torch.nn.init.normal_(value.score_head.weight)
    assert packing_kernel(value.backbone, nullcontext) == "padded"
    _, expected = plain(model, value.score_head)
    batch = sequence_batch(PROMPTS, RESPONSES, 0, "cpu", bootstrap=BOOTSTRAP, kernel="padded")
    torch.testing.assert_close(
        value.score_positions(batch.input_ids, batch.rows, batch.columns, batch.packing), expected, rtol=1e-4, atol=2e-5
    )


# The kernels for sequences of any lengths, replaced by a loop


def naive(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, left: int) -> Tensor:
    """Causal attention [S, H, D], one sequence at a time. ``left``: number of earlier tokens that a token attends to (-1: all)."""
    k, v = (states.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for states in (k, v))
    parts = []
    for first, last in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[first:last], k[first:last]) * scale
        distance = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        parts.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v[first:last]))
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["llama, two heads share keys", "gemma3, a sliding window of 4"])
@pytest.mark.parametrize("kernel", ["torch", "torch_repeated", "flash_attn"])
def test_kernels_get_the_sequences_the_scale_and_the_window(family: str, kernel: str, monkeypatch) -> None:
    def of_operator(q, k, v, starts, starts_k, longest, longest_k, dropout, causal, debug, *, scale, window_size_left, window_size_right):
        assert torch.equal(starts, starts_k) and starts.dtype == torch.int32 and longest == longest_k == 8
        assert dropout == 0.0 and causal == (window_size_left == -1) and not debug and window_size_right == 0
        assert k.shape[1] < q.shape[1]  # both families have fewer heads for keys than for queries
        return naive(q, k, v, starts, scale, window_size_left), None, None, None, None

    def of_torch(q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size):
        assert torch.equal(starts, starts_k) and starts.dtype == torch.int32 and longest == longest_k == 8
        assert window_size[1] == 0  # no later tokens
        assert k.shape[1] == q.shape[1]
        return naive(q, k, v, starts, scale, window_size[0])

    def of_flash(q, k, v, starts, starts_k, longest, longest_k, *, dropout_p, softmax_scale, causal, window_size):
        assert causal and dropout_p == 0.0
        return naive(q, k, v, starts, softmax_scale, window_size[0])

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", of_operator)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_torch)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=of_flash))
    model = made(FAMILIES[family](), "sdpa")
    logprobs, _ = plain(made(FAMILIES[family](), "eager"), random_head())
    batch = sequence_batch(PROMPTS, RESPONSES, 0, "cpu", kernel=kernel)
    torch.testing.assert_close(Policy(model, temperature=1.0, autocast=None).logprobs(batch), logprobs.detach(), rtol=1e-4, atol=2e-5)


def test_the_fastest_kernel_that_is_installed_comes_first(monkeypatch) -> None:
    usable_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert usable_kernels("cuda") == ("torch", "torch_repeated", "padded") and usable_kernels("cpu") == ("padded",)
    usable_kernels.cache_clear()
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda q, k, v, is_causal: q)  # an older function without windows
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    assert usable_kernels("cuda") == ("flash_attn", "torch", "padded")
    usable_kernels.cache_clear()


@pytest.mark.parametrize("fails", ["wrong", "raises", None])
def test_a_kernel_without_correct_gradients_is_not_used(fails: str | None, monkeypatch, caplog) -> None:
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, states: Tensor) -> Tensor:
            return states.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if fails == "raises":
                raise RuntimeError("no kernel for this head dimension")
            return gradient * 0.5

    def operator(q, k, v, starts, starts_k, longest, longest_k, *rest, scale, window_size_left, window_size_right):
        return (naive(q, k if fails is None else Cut.apply(k), v, starts, scale, window_size_left),)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    monkeypatch.setattr(packing, "usable_kernels", lambda device: ("torch", "padded"))
    decoder = transformers.AutoModel.from_config(FAMILIES["llama, two heads share keys"](), attn_implementation="sdpa")
    with torch.inference_mode():  # the first use is often a pass that only measures
        assert packing_kernel(decoder, nullcontext) == ("torch" if fails is None else "padded")
    assert all(parameter.grad is None for parameter in decoder.parameters())


# Models that are not packed

REFUSED = {
    "bloom: ALiBi": (lambda: transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4), "position ids"),
    "falcon: attention outside of transformers' interface": (
        lambda: transformers.FalconConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        "does not use transformers' attention interface",
    ),
    "gemma2: caps its scores": (
        lambda: transformers.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, attn_implementation="eager"),
        "its attention is eager",
    ),
    "mamba: a state": (lambda: transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1), "position ids"),
    "llama4: attends in chunks": (
        lambda: transformers.Llama4TextConfig(**SIZES, head_dim=8, num_key_value_heads=2, intermediate_size_mlp=32, num_local_experts=2),
        "chunked_attention",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_be_packed_are_padded(family: str) -> None:
    config, reason = REFUSED[family]
    decoder = transformers.AutoModel.from_config(config())
    assert reason in why_not(decoder)
    assert packing_kernel(decoder, nullcontext) is None


def test_attention_across_packed_sequences_is_detected_and_logged_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(packing, "_logged", set())
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        decoder = transformers.AutoModel.from_config(FAMILIES["llama, two heads share keys"]())
        norm = decoder.norm.forward
        decoder.norm.forward = lambda hidden, norm=norm: norm(hidden + hidden.roll(1, dims=1))  # each token attends to the previous one
        assert packing_kernel(decoder, nullcontext) is None
    assert [record.message.partition(" would")[0] for record in caplog.records] == [
        "LlamaModel: its passes are padded, not packed: padded: its hidden states"
    ]

"""Activations counted on tensors without data equal those of real passes."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from stages.config import LoraSettings
from stages.memory import counting, fake_passes
from stages.memory.counting import has_plain_logits, kept_in, pass_memory
from stages.memory.fake_passes import LiveBytes
from stages.memory.passes import Adapter, PassKind, Polynomial
from stages.memory.shapes import shape_of

SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 5, "num_attention_heads": 4, "max_position_embeddings": 256}
EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "lfm2": {
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention", "conv", "full_attention", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
}


def kind(family: str, **fields: Any) -> PassKind:
    shape = shape_of({"model_type": family, "vocab_size": 90, **SIZES, **EXTRA.get(family, {})})
    assert shape is not None
    return PassKind(shape.config, 90, **{"device": "cpu", "weights": 4, "compute": 4, "trains": True, **fields})


def lora(**settings: Any) -> Adapter:
    adapter = Adapter.of(LoraSettings(r=4, **settings))
    assert adapter is not None
    return adapter


@pytest.fixture(autouse=True)
def no_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_counts", {})


def test_live_tensors_are_counted_once_until_they_are_freed() -> None:
    before = torch.ones(100)
    with LiveBytes() as live:
        view = before[:50]  # a view of an earlier tensor: 0 bytes
        first = view + 1  # 200 bytes
        turned = first.view(5, 10).T  # a view: no additional bytes
        assert live.now == 200
        second = turned @ torch.ones(5, 5)  # 5 x 5 is freed: 100 bytes, and 10 x 5: 200 bytes
        assert (live.now, live.peak) == (400, 500)
        del first, turned
        assert live.now == 200
    assert second.shape == (10, 5)
    with LiveBytes(counts_inputs=True) as live:
        before.sum()
    assert live.peak == 404


def test_a_polynomial_by_hand() -> None:
    taken = Polynomial(fixed=(7, 1), tokens=(2, 3), pairs=(0, 0.5))
    assert taken.at(layers=4, rows=2, columns=10) == 7 + 4 + (2 + 12) * 20 + 2 * 200


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"checkpointing": True}),
        ("llama", {"trains": False}),
        ("gpt_neox", {"compute": 2}),
        ("gemma2", {}),
        ("qwen2", {"adapter": lora()}),
        ("qwen2", {"adapter": lora(), "weights": 2, "compute": 2}),  # folded adapters keep no casts of their inputs
        ("llama", {"adapter": lora(target_modules=["q_proj", "lm_head"], modules_to_save=["embed_tokens"])}),
        ("llama", {"adapter": lora(target_modules=r"model\.layers\.[13]\.mlp\..*_proj")}),  # two of five layers, so all are counted
    ],
    ids=str,
)
def test_memory_of_five_layers_is_extrapolated_from_three(family: str, fields: dict[str, Any]) -> None:
    compare_with_a_real_pass(kind(family, **fields), 5)


@pytest.mark.parametrize(("adapter", "lean"), [(lora(target_modules=["q_proj"]), True), (lora(), False)], ids=["attention", "everywhere"])
def test_layers_without_adapters_are_as_lean_as_in_training(adapter: Adapter, lean: bool) -> None:
    """A pass in fp32 on a CPU: the norms always are, a feed-forward layer is unless its linear modules have adapters."""
    model = fake_passes._model(kind("llama", adapter=adapter), 2)
    replaced = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
    assert replaced == ({"LlamaRMSNorm", "LlamaMLP"} if lean else {"LlamaRMSNorm"})


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("qwen2", 2, {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}),
        ("llama", 1, {"num_hidden_layers": 1}),
        ("lfm2", 5, {}),  # two kinds of layers
    ],
    ids=str,
)
def test_short_models_and_those_of_unlike_layers_are_counted_with_all_layers(family: str, layers: int, changes: dict[str, Any]) -> None:
    shape = shape_of({"model_type": family, "vocab_size": 90, **SIZES, **EXTRA.get(family, {}), **changes})
    assert shape is not None
    wanted = PassKind(shape.config, 90, "cpu", weights=4, compute=4, trains=True)
    assert fake_passes._numbers_of_layers(wanted, fake_passes.config_of(wanted)) == (layers,)
    compare_with_a_real_pass(wanted, layers)


def compare_with_a_real_pass(wanted: PassKind, layers: int) -> None:
    """A real pass over another size, with weights; within 3 % (gradients of norms and other small tensors)."""
    counted = pass_memory(wanted)
    assert counted is not None
    own = fake_passes._model(wanted, layers)
    model = own.to_empty(device="cpu")
    for module in model.modules():
        if "forward" in vars(module) and hasattr(module, "lean"):
            del module.forward  # the lean layers take real tensors
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad and wanted.trains:
            parameter.grad = torch.zeros_like(parameter)
    ids = torch.ones(3, 120, dtype=torch.long)
    with LiveBytes() as live, fake_passes._precision(wanted), torch.set_grad_enabled(wanted.trains):
        hidden = model(input_ids=ids, use_cache=False)[0]
        kept = live.now
        if hidden.requires_grad:
            hidden.backward(torch.ones_like(hidden))
    assert counted.kept.at(layers, 3, 120) == pytest.approx(kept, rel=0.03)
    assert counted.peak.at(layers, 3, 120) == pytest.approx(live.peak, rel=0.03)


UNUSUAL: dict[str, dict[str, Any]] = {
    "mixtral": {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "falcon": {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
    "phi3": {**SIZES, "pad_token_id": 32000},  # beyond the vocabulary of a tokenizer that the step trains
    "deberta-v2": SIZES,
    "rwkv": {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    "mamba": {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 4},
}


@pytest.mark.parametrize(("family", "loops"), [("mamba", True), ("rwkv", True), ("mamba2", False), ("llama", False)])
def test_models_that_loop_over_tokens_are_recognized(family: str, loops: bool) -> None:
    """They are counted with few tokens, because their layers run once per token."""
    fields = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1}
    wanted = PassKind(json.dumps({"model_type": family, **fields}), 90, "cpu", 4, 4, True)
    assert fake_passes._loops_over_tokens(wanted, fake_passes.config_of(wanted)) is loops


@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_families_are_counted(family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_passes, "LOOP_COLUMNS", 4)  # faster
    shape = shape_of({"model_type": family, "vocab_size": 90, **UNUSUAL[family]})
    assert shape is not None
    assert pass_memory(PassKind(shape.config, 90, "cpu", 4, 4, True)) is not None
    assert "estimated by constants" not in caplog.text


@pytest.mark.parametrize(
    ("family", "fields", "plain"),
    [
        ("llama", {}, True),
        ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, True),
        ("gemma2", {"head_dim": 16}, False),  # a cap
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": None}, True),
        ("cohere", {"logit_scale": 0.25}, False),
    ],
)
def test_capped_and_scaled_logits_are_recognized(family: str, fields: dict[str, Any], plain: bool) -> None:
    assert has_plain_logits(json.dumps({"model_type": family, **SIZES, **fields}), 90) is plain


@pytest.mark.parametrize(
    ("quantization", "device", "kept", "forward"),
    [
        ("nf4", "cpu", 0, 64 * 160 * 2),  # the weight in bf16
        ("int8", "cpu", 3 * 64 * 2, 64 * 160 * 2),  # keeps the input
        ("int8", "cuda", 3 * 64 * 2, 3 * (64 + 4 * 160)),  # codes of the input, and the product in 32-bit integers
    ],
)
def test_a_quantized_layer_takes_what_the_products_of_bitsandbytes_take(quantization: str, device: str, kept: int, forward: int) -> None:
    layer = torch.nn.Linear(64, 160, bias=False, dtype=torch.bfloat16)
    layer.__class__ = fake_passes._quantized_class(fake_passes._QuantizedLinear, quantization, device)
    layer.requires_grad_(False)
    x = torch.ones(3, 64, dtype=torch.bfloat16, requires_grad=True)
    with LiveBytes() as live:
        output = layer(x * 1)
        made = 3 * 160 * 2
        assert live.now == made + kept
        assert live.peak == 3 * 64 * 2 + made + forward  # the input is alive in the forward pass
        before = live.now
        output.sum().backward()
        assert live.peak >= before + 64 * 160 * 2  # the weight in bf16


def test_infinite_numbers_in_a_config_are_read_as_transformers_writes_them() -> None:
    """Mamba 2 and hybrid models (Bamba, Falcon-H1) have one."""
    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8, "num_hidden_layers": 2}
    config = Mamba2Config(vocab_size=64, hidden_size=32, **sizes)
    text = config.to_json_string(use_diff=False)
    assert '{"__float__": "Infinity"}' in " ".join(text.split()).replace("{ ", "{").replace(" }", "}")
    counted = counting.model_weights(text, 64)
    expected = sum(parameter.numel() for parameter in Mamba2ForCausalLM(config).parameters())
    assert counted is not None and counted.linear + counted.other + counted.output == expected


def test_counts_are_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[PassKind] = []
    count = fake_passes.count
    monkeypatch.setattr(fake_passes, "count", lambda wanted: made.append(wanted) or count(wanted))
    one = kind("gpt_neox", trains=False)
    with kept_in(tmp_path / "cache" / "activations.json"):
        first = pass_memory(one)
        monkeypatch.setattr(counting, "_counts", {})  # as in another process
        assert pass_memory(one) == first
    assert made == [one] and len(json.loads((tmp_path / "cache" / "activations.json").read_text())) == 1
    (tmp_path / "cache" / "activations.json").write_text("{broken")
    monkeypatch.setattr(counting, "_counts", {})
    with kept_in(tmp_path / "cache" / "activations.json"):
        assert pass_memory(one) == first
    assert made == [one, one]


def test_a_family_that_cannot_be_counted_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    unknown = PassKind(json.dumps({"model_type": "nobody-made-this"}), 90, "cpu", 4, 4, True)
    assert pass_memory(unknown) is None and pass_memory(unknown) is None
    assert caplog.text.count("the activations of nobody-made-this are estimated by constants") == 1
    assert pass_memory(PassKind("", 90, "cpu", 4, 4, True)) is None


def test_a_failed_count_is_kept_and_its_reason_is_logged_in_each_process(tmp_path: Path, monkeypatch, caplog) -> None:
    unknown = PassKind(json.dumps({"model_type": "nobody-made-this-either"}), 90, "cpu", 4, 4, True)
    with kept_in(tmp_path / "activations.json"):
        assert pass_memory(unknown) is None
        monkeypatch.setattr(counting, "_counts", {})  # as in another process
        counting._log_once.cache_clear()
        monkeypatch.setattr(fake_passes, "count", lambda wanted: pytest.fail("counted again"))
        assert pass_memory(unknown) is None
    assert caplog.text.count("the activations of nobody-made-this-either are estimated by constants") == 2


def test_short_models_are_counted_within_their_positions_and_without_a_traceback(caplog) -> None:
    distilbert = {"model_type": "distilbert", "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 2}  # 512 positions by default
    assert pass_memory(PassKind(json.dumps(distilbert), 90, "cpu", 4, 4, True, masked=True)) is not None
    assert caplog.text == ""


def test_no_tensor_outlives_a_count() -> None:
    models: list[Any] = []
    usual = fake_passes._model
    try:
        fake_passes._model = lambda *wanted: models.append(weakref.ref(made := usual(*wanted))) or made  # type: ignore[assignment]
        pass_memory(kind("llama", trains=False))
    finally:
        fake_passes._model = usual
    import gc

    gc.collect()
    assert [model() for model in models] == [None]

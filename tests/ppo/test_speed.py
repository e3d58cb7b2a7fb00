"""Flops of matrix products by hand; tokens per second by phase."""

from __future__ import annotations

import torch
from transformers import Gemma4TextConfig, Gemma4TextModel, GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from stages.models.passes.responses import sequence_batch
from stages.ppo.records.speed import MatmulCounter, speed_metrics

# per layer: q and o of 8 x 8, k and v of 8 x 4, three products of 8 x 16; one layer
LLAMA = 2 * 64 + 2 * 32 + 3 * 128
BATCH = sequence_batch([[1, 2], [3]], [[4, 5], [6, 7, 8]], 0, "cpu")  # two rows of four tokens, five of them predicted


def llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    )


def test_flops_by_hand() -> None:
    counter, output = MatmulCounter(), torch.nn.Linear(8, 20, bias=False)
    model = llama()
    attention = 4 * 8 * 2  # 4 d for each of the two earlier tokens that a token attends to on average
    counter.add(model, BATCH, output=output, backward=False)
    assert counter.take() == (8 * (2 * LLAMA + attention) + 5 * 2 * 160, 0)
    counter.add(model, BATCH, output=output)
    assert counter.take() == (3 * (8 * (2 * LLAMA + attention) + 5 * 2 * 160), 0)
    frozen = llama().requires_grad_(False)
    counter.add(frozen, BATCH)  # no gradients of weights
    assert counter.take() == (8 * (2 * 2 * LLAMA + 3 * attention), 0) and counter.take() == (0, 0)


def test_packed_sequences_count_no_padding_and_attend_within_themselves() -> None:
    counter = MatmulCounter()
    batch = sequence_batch([[1, 2], [3]], [[4, 5], [6]], 0, "cpu", kernel="padded")  # four tokens and two
    counter.add(llama(), batch, backward=False)
    assert counter.take() == ((4 + 2) * 2 * LLAMA + 4 * 8 * (4 * 2 + 2 * 1), 0)


def test_gpt2_s_layers_count_and_its_embeddings_do_not() -> None:
    counter = MatmulCounter()
    counter.add(GPT2Model(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16)), BATCH, backward=False)
    assert counter.take() == (8 * (2 * (8 * 24 + 8 * 8 + 8 * 32 + 32 * 8) + 4 * 8 * 2), 0)


def test_heads_of_layers_may_differ_in_width() -> None:
    """Gemma 4: two heads of 4 in the layer with a sliding window, two heads of 6 in the other one."""
    kinds = ["sliding_attention", "full_attention"]
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "global_head_dim": 6, "num_kv_shared_layers": 0}
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "hidden_size_per_layer_input": 0}
    model = Gemma4TextModel(Gemma4TextConfig(**sizes, **heads, layer_types=kinds))
    counter = MatmulCounter()
    counter.add(model, BATCH, backward=False)
    q_k_v_o, mlp = 4 * 8 * (2 * 4) + 4 * 8 * (2 * 6), 2 * 3 * 8 * 16
    assert counter.take() == (8 * (2 * (q_k_v_o + mlp) + 4 * (2 * 4 + 2 * 6) * 2), 0)


def test_of_several_adapters_only_the_active_one_counts_and_recomputation_counts_apart() -> None:
    """LoRA of rank 2 on q (8 to 8) and down (16 to 8) has 2 * (8 + 8) + 2 * (16 + 8) weights; another role has rank 4, and a copy of k."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), adapter_name="policy")
    adapted.add_adapter("value", LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["k_proj"]))
    decoder = adapted.get_base_model()
    policy, value = 2 * 16 + 2 * 24, 4 * 16 + 4 * 24
    attention, counter = 3 * 4 * 8 * 2, MatmulCounter()
    counter.add(decoder, BATCH)
    assert counter.take() == (8 * (2 * (2 * LLAMA + 3 * policy) + attention), 0)
    adapted.set_adapter("value")
    decoder.gradient_checkpointing_enable()
    counter.add(decoder, BATCH)
    copied = 8 * 4  # k: it is trained, and its original is not used
    operations = 8 * (2 * (2 * (LLAMA - copied) + 3 * (copied + value)) + attention)
    assert counter.take() == (operations, 8 * (2 * (LLAMA + value) + attention / 3))


def test_a_quantized_layer_counts_with_its_logical_shape() -> None:
    class Quantized(torch.nn.Module):
        """A layer of 8 inputs and 20 outputs whose weight is packed, as that of bitsandbytes in nf4."""

        in_features, out_features = 8, 20

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(80, 1, dtype=torch.uint8), requires_grad=False)

    model = llama()
    model.layers[0].mlp.down_proj = Quantized()
    counter = MatmulCounter()
    counter.add(model, BATCH)
    assert counter.take() == (8 * (2 * (3 * (LLAMA - 128) + 2 * 160) + 3 * 4 * 8 * 2), 0)


def test_phase_metrics_by_hand() -> None:
    seconds = {"generation": 2.0, "scoring": 1.0, "measuring": 1.0, "update": 4.0}
    metrics = speed_metrics(seconds, episodes=16, response_tokens=100, trained_tokens=400, flops=(6e9, 3e9), peak=3e9)
    assert metrics["time/episodes_per_second"] == 2.0 and metrics["time/generation_s"] == 2.0
    assert metrics["time/generation_tokens_per_second"] == 50.0 and metrics["time/scoring_tokens_per_second"] == 100.0
    assert metrics["time/update_tokens_per_second"] == 100.0 and metrics["time/update_matmul_share"] == 0.5
    assert metrics["time/update_recomputed_share"] == 0.25

"""The cache and its attention equal those of transformers, for both layouts: by tokens and by columns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from stages.sampling.cache import ColumnLayer, RoomyLayer, SlotLayer, SlotWindow, attend_by_columns, without_cudnn_attention


def states(rows: int, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, tokens, 4, generator=generator), torch.randn(rows, 2, tokens, 3, generator=generator)


@pytest.mark.parametrize("made", [RoomyLayer, ColumnLayer])
def test_layer_stores_the_same_states_as_transformers(made: type[RoomyLayer]) -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = made(2), DynamicLayer()
    short, long = states(1, 3, draw), states(2, 5, draw)
    ours.put(*short, row=0, rows=3, length=5)
    ours.put(*long, row=1, rows=3, length=5)
    padded = [torch.cat([torch.nn.functional.pad(one, (0, 0, 2, 0)), two]) for one, two in zip(short, long, strict=True)]
    theirs.update(*padded)
    for step in range(12):
        if step == 5:  # rows are dropped and repeated, and a column of padding is dropped
            rows = torch.tensor([2, 0, 2])
            ours.keep(rows, 1)
            theirs.keys, theirs.values = theirs.keys[rows][:, :, 1:], theirs.values[rows][:, :, 1:]
        new = states(3, 1, draw)
        for actual, expected in zip(ours.update(*new), theirs.update(*new), strict=True):
            assert torch.equal(actual, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("by_slots", [True, False])
def test_under_autocast_fp32_keys_are_stored_in_half_and_attention_gives_the_same_bits(by_slots: bool) -> None:
    """Rotary positions make keys fp32 under autocast; values come from a product in bf16."""
    draw = torch.Generator().manual_seed(0)
    (keys, values), (key, value) = ((one, two.bfloat16()) for one, two in (states(2, 5, draw), states(2, 1, draw)))
    with torch.autocast("cpu", torch.bfloat16):
        if by_slots:
            ours = SlotLayer(SlotWindow(2, 6, torch.tensor([5, 5])), 2, by_columns=False)
            ours.put(keys, values, torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([5, 5]), 8)
        else:
            ours = RoomyLayer(1)
            ours.put(keys, values, row=0, rows=2, length=5)
        stored = ours.update(key, value)
        assert {one.dtype for one in stored} == {torch.bfloat16}
        query = torch.randn(2, 2, 1, 4, generator=draw)
        expected = torch.nn.functional.scaled_dot_product_attention(query, torch.cat([keys, key], 2), torch.cat([values, value], 2))
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(query, *stored), expected)


def test_padding_of_a_new_cache_is_zero(monkeypatch) -> None:
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **named: empty(self, *shape, **named).fill_(torch.nan))
    layer = ColumnLayer(2)
    layer.put(*states(1, 1, torch.Generator().manual_seed(0)), row=0, rows=1, length=4)
    new = states(1, 1, torch.Generator().manual_seed(1))
    assert all(torch.isfinite(stored).all() and not stored[:, :, :3].any() for stored in layer.update(*new))


@pytest.mark.parametrize(("heads", "masked", "scaling"), [(2, False, None), (2, True, None), (6, True, 0.3)])
def test_one_token_attention_equals_sdpa(heads: int, masked: bool, scaling: float | None) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads, 1, 4, generator=draw)
    key, value = states(3, 7, draw)
    mask = torch.zeros(3, 1, 1, 7)
    mask[0, ..., :2] = mask[2, ..., :5] = -torch.inf
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    layer = ColumnLayer(1)
    layer.put(key, value, row=0, rows=3, length=7)
    new = states(3, 1, draw)
    by_columns = layer.update(*new)
    mask = torch.nn.functional.pad(mask, (0, 1)) if masked else None
    key, value = torch.cat([key, new[0]], dim=2), torch.cat([value, new[1]], dim=2)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
    attended, weights = attend_by_columns(module, query, *by_columns, mask, scaling=scaling)
    assert weights is None and attended.shape == (3, 1, heads, 3)
    torch.testing.assert_close(attended, expected)


def test_several_tokens_use_sdpa() -> None:
    draw = torch.Generator().manual_seed(0)
    query, (key, value) = torch.randn(2, 2, 5, 4, generator=draw), states(2, 5, draw)
    module = SimpleNamespace(is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, None)
    torch.testing.assert_close(attend_by_columns(module, query, key, value, None)[0], expected)
    # a mask for each head (ALiBi's)
    each = torch.randn(2, 6, 1, 5, generator=draw)
    six, shared = torch.randn(2, 6, 1, 4, generator=draw), SimpleNamespace(is_causal=True, num_key_value_groups=3)
    expected, _ = sdpa_attention_forward(shared, six, key, value, each)
    torch.testing.assert_close(attend_by_columns(shared, six, key, value, each)[0], expected)
    # a boolean mask cannot be added
    allowed = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    allowed[0, ..., :3] = False
    expected, _ = sdpa_attention_forward(module, query[:, :, :1], key, value, allowed)
    torch.testing.assert_close(attend_by_columns(module, query[:, :, :1], key, value, allowed)[0], expected)


def test_cudnn_attention_is_off_while_decoding_on_a_gpu_and_as_before_afterwards() -> None:
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    before = enabled()
    try:
        for usual in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(usual)
            with without_cudnn_attention("cpu"):
                assert enabled() == usual
            with pytest.raises(KeyError), without_cudnn_attention("cuda"):
                assert not enabled()
                raise KeyError
            assert enabled() == usual
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)

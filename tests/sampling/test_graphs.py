"""The pool of recorded steps, with a recorder that does on a CPU what a CUDA graph does (tape.py). tests/gpu records on a GPU."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from stages.config import GenerationSettings
from stages.models.layers.replacing import use_own_layers
from stages.models.loading import load_language_model
from stages.sampling import decoding, generation, graphs, workspace
from stages.sampling.generation import Generated, generate
from stages.sampling.graphs import GraphPool, Recording, Size
from stages.sampling.probe import fits_slots, usable_support
from stages.sampling.slots import Slots
from tests.sampling import test_families as families
from tests.sampling.tape import TapeRecorder

PROMPTS = [[10, 11, 12, 13, 14], [20], [30, 31, 32], [40, 41], [50, 51], [60]]
STOPS = tuple(range(100, 115))  # a twentieth of the tokens: rows last for different times


@pytest.fixture(scope="module")
def model(tiny_llama_folder) -> Any:
    return load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Decode as on a GPU: in slots, with recorded steps."""
    made = TapeRecorder()
    monkeypatch.setattr(workspace, "make_recorder", lambda model: made)
    monkeypatch.setattr(generation, "decodes_in_slots", lambda model, support, settings, prompts: settings.cuda_graphs)
    workspace.drop_kept_workspace()
    yield made
    workspace.drop_kept_workspace()


def sample(model: Any, stops: tuple[int, ...] = STOPS, prompts: list[list[int]] = PROMPTS, **settings: Any) -> Generated:
    """``cuda_graphs=False``: batch after batch, without slots."""
    chosen = GenerationSettings(**{"max_new_tokens": 40, "batch_size": 3, **settings})
    return generate(model, prompts, chosen, seeds=range(len(prompts)), stop_ids=stops, pad_token_id=1)


def assert_same(generated: Generated, expected: Generated) -> None:
    assert torch.equal(generated.response_ids, expected.response_ids)
    torch.testing.assert_close(generated.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    assert torch.equal(generated.stopped, expected.stopped)


def kept_pool() -> GraphPool:
    assert workspace._kept is not None and workspace._kept.workspace.pool is not None
    return workspace._kept.workspace.pool


def test_sizes_are_powers_of_two_and_for_columns_also_their_midpoints() -> None:
    assert graphs.row_sizes(64) == [1, 2, 4, 8, 16, 32, 64]
    assert graphs.row_sizes(24) == [1, 2, 4, 8, 16, 24] and graphs.row_sizes(1) == [1]
    assert graphs.column_sizes(448) == [64, 96, 128, 192, 256, 384, 448]
    assert graphs.column_sizes(64) == [64]
    assert [graphs.rounded_room(tokens) for tokens in (1, 64, 65)] == [64, 64, 128]
    assert [graphs.next_size([1, 2, 4, 6], rows) for rows in (1, 3, 4, 5)] == [1, 4, 4, 6]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_k": 9, "batch_size": 6}, {"stops": ()}, {"continuous_batching": False}]
)
def test_recorded_steps_decode_the_same_tokens_as_computed_ones(model, recorder, settings: dict[str, Any]) -> None:
    generated = sample(model, **settings)
    assert recorder.recorded and kept_pool().steps["replayed"]
    assert_same(generated, sample(model, **settings, cuda_graphs=False))


def test_pool_is_reused_by_the_next_call_with_the_current_weights(model, recorder) -> None:
    sample(model)
    recorded, computed = recorder.recorded, kept_pool().steps["computed"]
    weight = next(layer.weight for layer in model.modules() if isinstance(layer, nn.Linear))
    before = weight.detach().clone()
    try:
        for factor in (1.0, -0.5):  # before and after an in-place update of the weights
            weight.data.mul_(factor)
            assert_same(sample(model), sample(model, cuda_graphs=False))
            assert recorder.recorded == recorded and kept_pool().steps["computed"] == computed
        other = sample(model, temperature=0.5)  # a graph fixes the temperature
        assert recorder.recorded > recorded
        assert_same(other, sample(model, temperature=0.5, cuda_graphs=False))
        recorded = recorder.recorded
        weight.data = before.clone()  # at another address, as after a move to the CPU and back
        assert_same(sample(model), sample(model, cuda_graphs=False))
        assert recorder.recorded > recorded
    finally:
        weight.data = before


def test_other_stop_tokens_seeds_and_fewer_tokens_need_no_new_recording(model, recorder) -> None:
    sample(model)
    recorded = recorder.recorded
    for options in ({"stops": STOPS[:4]}, {"max_new_tokens": 30}, {"prompts": PROMPTS[::-1]}):
        assert_same(sample(model, **options), sample(model, **options, cuda_graphs=False))
    # rows that end later may need one more size, which no earlier call had
    assert recorder.recorded <= recorded + 1


def test_surplus_rows_do_not_change_other_rows(model, recorder) -> None:
    """Three slots are a size. With four slots, three running rows and one finished row are computed together."""
    prompts = PROMPTS[:4]
    stops = tuple(token for token in range(300) if token % 17 == 3)
    generated = sample(model, stops, prompts, batch_size=4, continuous_batching=False)
    sizes = {size for size, _ in kept_pool()._recordings}
    assert {rows for rows, _ in sizes} <= {1, 2, 4}
    assert_same(generated, sample(model, stops, prompts, batch_size=4, cuda_graphs=False))


def test_finished_row_beyond_the_columns_of_a_step_changes_no_other_row(model, recorder, monkeypatch, caplog) -> None:
    monkeypatch.setattr(graphs, "GRAPH_COLUMNS", 8)
    monkeypatch.setattr(graphs, "STEPS_ON_LARGER", 0)
    prompts = [list(range(60, 80)), [20], [30], [40]]
    first = int(sample(model, (), prompts[:1], max_new_tokens=1, cuda_graphs=False).response_ids[0, 0])
    generated = sample(model, (first,), prompts, batch_size=4)  # the row of 20 tokens ends first: a surplus row
    assert generated.lengths[0] == 1 and min(generated.lengths[1:]) > 8
    assert Size(4, 8) in {size for size, _ in kept_pool()._recordings} and not caplog.messages
    assert_same(generated, sample(model, (first,), prompts, batch_size=4, cuda_graphs=False))


def test_full_cache_grows_and_its_steps_are_recorded_again(model, recorder, monkeypatch) -> None:
    monkeypatch.setattr(workspace, "RESPONSE_ROOM", 16)
    monkeypatch.setattr(graphs, "GRAPH_COLUMNS", 8)
    generated = sample(model, ())
    assert_same(generated, sample(model, (), cuda_graphs=False))
    kept = workspace._kept.workspace
    assert kept.room == 48  # 5 + 16 tokens, then twice as many as needed, but no more than 5 + 40 (in steps of 8)
    assert {size.columns for size, _ in kept.pool._recordings} <= {8, 12, 16, 24, 32, 48}
    recorded = recorder.recorded
    assert_same(sample(model, ()), generated)
    assert recorder.recorded <= recorded + 2  # sizes that were recorded for the smaller cache are recorded again


def test_pool_above_its_memory_limit_is_dropped_and_logged(model, recorder, caplog) -> None:
    recorder.memory_limit = 1000
    with caplog.at_level(logging.INFO):
        generated = sample(model)
    assert workspace._kept is None and "recorded again" in caplog.text
    assert_same(generated, sample(model, cuda_graphs=False))
    recorded = recorder.recorded
    sample(model)
    assert recorder.recorded == 2 * recorded
    recorder.memory_limit = 1 << 40
    sample(model)
    num_bytes = workspace._kept.workspace.num_bytes()
    # two layers of keys and values [3 slots, 2 heads, 64 columns, 8 wide] fp32, 1,000 bytes each recording, and the slots
    assert num_bytes == 2 * 2 * 3 * 2 * 64 * 8 * 4 + 1000 * recorded + workspace._kept.workspace.slots.num_bytes()


def test_a_pool_does_not_keep_its_model_alive(model, recorder) -> None:
    import gc
    import weakref

    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_config(model.config)
    sample(other)
    recorder.recorded = 0
    gone = weakref.ref(other)
    workspace._kept.workspace.pool._recordings.clear()  # a tape has references to the weights; a CUDA graph has none
    del other
    gc.collect()
    assert gone() is None
    sample(model)
    assert recorder.recorded


def test_active_adapters_are_part_of_a_recording(model, recorder, tiny_llama_folder) -> None:
    from peft import LoraConfig, get_peft_model

    plain = load_language_model(str(tiny_llama_folder), dtype=torch.float32, trainable=False)
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.add_adapter("other", LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    texts = []
    for adapter in ("default", "other", "default"):
        adapted.set_adapter(adapter)
        before = recorder.recorded
        texts.append(sample(adapted))
        assert recorder.recorded > before
        assert_same(texts[-1], sample(adapted, cuda_graphs=False))
    assert not torch.equal(texts[0].logprobs[0, :1], texts[1].logprobs[0, :1])
    before = recorder.recorded
    assert_same(sample(adapted), texts[2])
    assert recorder.recorded == before


def test_under_autocast_a_kept_recording_reads_casts_of_the_new_weights(model, recorder) -> None:
    weight = model.lm_head.weight
    before = weight.detach().clone()
    weight.requires_grad_(True)  # only casts of weights that train are cached by autocast
    try:
        for factor in (1.0, -0.5):
            weight.data.mul_(factor)
            with torch.autocast("cpu", torch.bfloat16):
                generated, expected = sample(model), sample(model, cuda_graphs=False)
            first = slice(0, 4)  # in bf16, a rounding error changes a token sooner or later
            assert torch.equal(generated.response_ids[:, first], expected.response_ids[:, first])
            torch.testing.assert_close(generated.logprobs[:, first], expected.logprobs[:, first], rtol=0, atol=0.05)
            recorded, recorder.recorded = recorder.recorded, 0
            assert recorded if factor == 1.0 else recorded == 0
    finally:
        weight.data = before
        weight.requires_grad_(False)


class Steps:
    """A pool whose steps are counted and not computed."""

    def __init__(self, rows: int = 8, room: int = 128) -> None:
        self.recorded: list[Size] = []
        self.computed: list[Size] = []
        self.replayed: list[Size] = []
        self.memory_limit = 0
        self.pool, self.slots = GraphPool(self, rows, room), Slots(rows, 1, torch.device("cpu"))
        self._current = Size(0, 0)

    def record(self, step: Any) -> Recording:
        size = self._current
        self.recorded.append(size)
        return Recording(lambda: self.replayed.append(size), step(), 1)

    def step(self, rows: int, columns: int, *, remaining: int = 100, kind: str = "usual") -> None:
        self._current = self.pool.size(rows, columns)

        def compute(size: Size) -> torch.Tensor:
            self.computed.append(size)
            return torch.zeros(size.rows, 3)

        self.pool.step(self._current, kind, compute, self.slots, remaining)


def test_size_without_a_recording_uses_a_larger_one_until_recording_pays() -> None:
    steps = Steps()
    steps.step(8, 70)
    assert steps.recorded == [Size(8, 96)]
    steps.replayed.clear()
    for _ in range(graphs.STEPS_ON_LARGER):
        steps.step(3, 70)
    assert steps.recorded == [Size(8, 96)] and set(steps.replayed) == {Size(8, 96)}
    steps.replayed.clear()
    steps.step(3, 70)
    assert steps.recorded[1:] == [Size(4, 96)]
    steps.step(2, 60)
    assert steps.recorded[2:] == [] and steps.replayed[-1] == Size(4, 96)  # the smallest that is large enough
    steps.step(2, 100)  # more columns than any recording has
    steps.step(2, 100, kind="greedy")
    assert steps.recorded[2:] == [Size(2, 128)] * 2
    assert len(steps.pool) == 4 and steps.pool.num_bytes == 4


def test_few_steps_are_not_worth_a_recording() -> None:
    steps = Steps()
    for number in range(graphs.FEWEST_STEPS):
        assert not steps.recorded and len(steps.computed) == number
        steps.step(8, 70, remaining=3)
    assert steps.recorded == [Size(8, 96)]  # few at a time, but it is asked for again and again


@pytest.mark.parametrize("fails", [RuntimeError, ValueError, "differs"])
def test_model_that_cannot_be_recorded_still_decodes(model, recorder, monkeypatch, caplog, fails: Any) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    attempts = []
    own = recorder.record

    def record(step: Any) -> Recording:
        recording = own(step)
        attempts.append(recording)
        if fails != "differs":
            raise fails("operation not permitted when stream is capturing\nlong story")
        recording.logits = recording.logits.clone()  # what a replay does not change
        recording.logits.add_(torch.randn(recording.logits.shape))
        return recording

    monkeypatch.setattr(recorder, "record", record)
    with caplog.at_level(logging.WARNING):
        generated = sample(model)
    assert_same(generated, sample(model, cuda_graphs=False))
    # One failure is enough for all sizes; a difference counts for its size alone.
    assert len(attempts) > 1 if fails == "differs" else len(attempts) == 1
    assert graphs._refusals.total() == len(attempts)
    said = [message for message in caplog.messages if "CUDA graph" in message]
    assert len(said) == 1 and "long story" not in said[0] and "generation.cuda_graphs: false" in said[0]


# Kinds of models, decoded as on a GPU: in slots, with recorded steps, and a check for finished rows in every eighth step

IN_SLOTS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64},
    "phi3": {"sliding_window": 64},
    "gemma2": {"sliding_window": 64, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"sliding_window": 64},
    "llama4_text": {"attention_chunk_size": 64},
    "granite": {"logits_scaling": 0.25, "residual_multiplier": 0.5},
    "deepseek_v3": families.MLA,
    "gpt2": {},
    "opt": {},
    "gptj": {"rotary_dim": 4},
    "mixtral": {"sliding_window": None},
}


@pytest.fixture
def as_on_a_gpu(recorder, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", 8)
    return recorder


@pytest.mark.parametrize("kind", IN_SLOTS)
def test_recorded_steps_of_a_family_decode_the_tokens_of_plain_passes(kind: str, as_on_a_gpu, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    model, reference = families.make(kind, **IN_SLOTS[kind]), families.make(kind, "eager", **IN_SLOTS[kind])
    use_own_layers(model)
    assert fits_slots(model, usable_support(model), 64)
    greedy = families.sample(model, batch_size=2)  # five prompts: slots are refilled, and compacted at the end
    for row, prompt in enumerate(families.PROMPTS):
        assert greedy.response_ids[row][greedy.response_mask[row]].tolist() == families.plain(reference, prompt)[0]
    assert as_on_a_gpu.recorded or graphs._refusals  # experts that are chosen by reading numbers cannot be recorded
    for options in ({"temperature": 0.7, "top_k": 20}, {"top_p": 0.9, "continuous_batching": False}):
        settings = GenerationSettings(max_new_tokens=24, batch_size=2, stop_after=6, **options)
        made = [
            generate(model, families.PROMPTS, chosen, seeds=range(5), stop_ids=(5,), late_stop_ids=families.STOPS, pad_token_id=0)
            for chosen in (settings, settings.model_copy(update={"cuda_graphs": False}))
        ]
        assert_same(*made)
        assert not made[0].stopped.all() or made[0].lengths.max() > 6


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "mamba2", "jamba", "bloom", "recurrent_gemma"])
def test_a_family_without_slots_decodes_the_tokens_of_plain_passes_with_rare_checks(kind: str, monkeypatch) -> None:
    monkeypatch.setitem(decoding.CHECK_EVERY, "cpu", 8)
    monkeypatch.setattr(decoding, "COMPACT_BELOW", 1.0)
    model = families.make(kind, **families.FAMILIES[kind])
    generated = families.sample(model, batch_size=3)
    for row, prompt in enumerate(families.PROMPTS):
        assert generated.response_ids[row][generated.response_mask[row]].tolist() == families.plain(model, prompt)[0]


def test_nf4_weights_with_an_adapter_are_decoded_with_recorded_steps(as_on_a_gpu, tiny_llama_folder, resolve_folder) -> None:
    from peft import LoraConfig, get_peft_model

    source = resolve_folder(tiny_llama_folder, quantization="nf4")
    adapted = get_peft_model(
        load_language_model(source, dtype=torch.float32, trainable=False), LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    generated = sample(adapted)
    assert as_on_a_gpu.recorded and kept_pool().steps["replayed"]
    assert_same(generated, sample(adapted, cuda_graphs=False))


@pytest.mark.parametrize("masked", [False, True], ids=["its own error", "an error at the end of the recording"])
def test_size_that_does_not_fit_into_memory_is_computed_and_others_are_recorded(model, recorder, monkeypatch, caplog, masked: bool) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    own, attempts = recorder.record, []

    def record(step: Any) -> Recording:
        attempts.append(None)
        if len(attempts) > 1:
            return own(step)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if masked:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(recorder, "record", record)
    generated = sample(model)
    assert len(attempts) > 1 and recorder.recorded == len(attempts) - 1
    assert_same(generated, sample(model, cuda_graphs=False))
    assert sum("decoding without a CUDA graph" in message for message in caplog.messages) == 1


def test_rejection_is_logged_again_at_the_tenth(monkeypatch, caplog) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    with caplog.at_level(logging.WARNING):
        for _ in range(12):
            graphs.refuse("the logits of a replayed step differ from those of a computed one")
    assert len(caplog.messages) == 2 and "(10 recordings so far" in caplog.messages[1]


def test_model_that_reads_a_number_from_the_gpu_cannot_be_recorded(model, recorder, monkeypatch, caplog) -> None:
    monkeypatch.setattr(graphs, "_refusals", Counter())
    forward = model.forward

    def asking(*arguments: Any, **options: Any) -> Any:
        assert float(options["position_ids"].max()) >= 0
        return forward(*arguments, **options)

    monkeypatch.setattr(model, "forward", asking)
    with caplog.at_level(logging.WARNING):
        generated = sample(model)
    assert "operation not permitted" in caplog.text and workspace._kept is None
    assert_same(generated, sample(model, cuda_graphs=False))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 3.45e-4), (torch.float16, 0.03125), (torch.bfloat16, 0.0884)])
def test_a_replay_may_differ_by_the_root_of_the_precision(dtype: torch.dtype, share: float) -> None:
    computed = torch.tensor([[3.0, -1.0, -2.0, -torch.inf], [1.0, 5.0, 0.0, -torch.inf]])  # a token that is never sampled
    spread = (computed - computed.where(torch.isfinite(computed), torch.tensor(0.0)).mean(dim=-1, keepdim=True))[:, :3]
    missing = computed.where(torch.isfinite(computed), torch.tensor(0.0)).mean(dim=-1)  # the spread counts that token as 0
    norm = float((spread.square().sum() + missing.square().sum()).sqrt())
    for factor, agrees in ((0.9, True), (1.1, False)):
        replayed = computed.clone()
        replayed[0, 0] += factor * share * norm
        assert graphs.agree(replayed, computed, dtype) == agrees
    assert graphs.agree(computed, computed.clone(), dtype)
    broken = computed.clone()
    broken[1, 2] = torch.nan
    assert not graphs.agree(broken, computed, dtype)


def test_autocast_counts_as_the_precision_of_a_step() -> None:
    logits = torch.zeros(1)
    assert graphs.compute_dtype(logits) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert graphs.compute_dtype(logits) == torch.bfloat16


def test_nothing_is_recorded_without_a_gpu_or_with_int8(model) -> None:
    assert not graphs.can_record(model)

    class Linear8bitLt(nn.Linear):
        pass

    class OnGPU(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def parameters(self, recurse: bool = True) -> Any:
            yield type("Weight", (), {"device": torch.device("cuda")})()

    assert graphs.can_record(OnGPU(nn.Linear(1, 1)))
    assert not graphs.can_record(OnGPU(Linear8bitLt(1, 1)))

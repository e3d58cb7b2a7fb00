"""The reward model stage: K-wise batches, learning, the stored bias, held-out numbers by hand, resume, LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from stages.corpora.comparisons import Comparison
from stages.errors import DataError
from stages.models.heads import RewardModel
from stages.reward_model.config import RewardModelConfig
from stages.reward_model.measuring import measure
from stages.reward_model.preferences import EncodedComparison, agreement
from stages.reward_model.rows import collate, encode
from stages.reward_model.run import run
from stages.reward_model.training import make_trainer


@pytest.fixture
def comparisons(tmp_path: Path) -> str:
    """The word joy is preferred; K is 2, 3 and 4; some ties."""
    path = tmp_path / "comparisons.jsonl"
    texts = ["the film was a joy", "the film was dull", "the plot was weak", "write"]
    rows = [
        {"prompt": f"write a line {number}:", "completions": texts[: 2 + number % 3], "ranks": [0, 1, 1, 2][: 2 + number % 3]}
        for number in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(path: str, **fields: Any) -> RewardModelConfig:
    settings = {
        "name": "preference",
        "model": "sft",
        "precision": "fp32",
        "data": {"train": path, "validation_fraction": 0.2},
        "training": {"learning_rate": 5e-3, "batch_size": 4, "microbatch_size": 2},
    }
    return RewardModelConfig.model_validate({**settings, **fields})


@pytest.fixture
def sft(resolve_folder, tiny_llama_folder) -> dict[str, Any]:
    return {"model": resolve_folder(tiny_llama_folder)}


@pytest.mark.detail("D9", "R11")
def test_training_learns_preferences_and_centres_scores(comparisons, step_context, sft) -> None:
    result = run(config(comparisons), step_context(models=sft))
    metrics = result.metrics
    assert metrics["heldout_accuracy"] > 0.9 and metrics["heldout_ci_low"] < metrics["heldout_accuracy"]
    # six held-out rows with K = 2, 3, 4 twice: 1, 2 and 5 pairs without a tie
    assert metrics["heldout_pairs"] == 16
    model = RewardModel.from_pretrained(str(result.model.path), dtype=torch.float32)
    best = [
        encode(Comparison(f"write a line {number}:", ["the film was a joy"], [0]), model.tokenizer, 128).rows[0] for number in range(24)
    ]
    with torch.no_grad():
        scores = torch.cat([model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)) for row in best])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)  # mean reward of the demonstrations is 0
    assert abs(metrics["reward_bias"]) > 1e-3


def test_demonstrations_set_the_zero_of_the_scores(comparisons, step_context, sft, tmp_path) -> None:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text(json.dumps({"prompt": "write a line 0:", "completion": "the plot was weak"}) + "\n")
    result = run(config(comparisons, demonstrations=str(path)), step_context(models=sft))
    model = RewardModel.from_pretrained(str(result.model.path), dtype=torch.float32)
    row = encode(Comparison("write a line 0:", ["the plot was weak"], [0]), model.tokenizer, 128).rows[0]
    with torch.no_grad():
        assert model.score(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.long)).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.detail("R3")
def test_collated_batch_keeps_all_completions_of_a_prompt(tiny_tokenizer) -> None:
    items = [EncodedComparison([[5, 6, 7], [5]], [0, 1]), EncodedComparison([[8, 9], [8], [9]], [0, 1, 1])]
    batch = collate(items, 1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 1, 1], [8, 9, 1], [8, 1, 1], [9, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 1, 2, 1, 1]
    assert batch["ranks"].tolist() == [0, 1, 0, 1, 1] and batch["prompt_index"].tolist() == [0, 0, 1, 1, 1]


def test_gradient_does_not_depend_on_the_microbatch(comparisons, step_context, sft, tiny_llama_folder) -> None:
    start = RewardModel.from_language_model(tiny_llama_folder, dtype=torch.float32)
    made = []
    for microbatch in (1, 4):
        # With this large epsilon, one step of Adam changes a weight by g / (|g| + 1), about the gradient. With the usual epsilon, it
        # would change by a full step for every rounding error.
        training = {"learning_rate": 1.0, "adam_epsilon": 1.0, "max_grad_norm": None, "batch_size": 4, "max_steps": 1}
        settings = config(comparisons, training={**training, "microbatch_size": microbatch})
        result = run(settings, step_context(f"test/m{microbatch}", models=sft))
        made.append(RewardModel.from_pretrained(str(result.model.path), dtype=torch.float32))
    for (name, before), one, two in zip(start.named_parameters(), made[0].parameters(), made[1].parameters(), strict=True):
        if name == "score_head.bias":
            continue  # the bias cancels in the difference of a pair; only the centring changes it
        one, two, before = one.detach(), two.detach(), before.detach()
        largest = float((one - before).abs().max())
        assert largest > 1e-4, f"{name} did not train"
        # fp32 sums in another order: to a thousandth of the largest entry
        torch.testing.assert_close(one - before, two - before, rtol=0, atol=largest * 1e-3, msg=lambda t, name=name: f"{name}: {t}")


class Fixed(torch.nn.Module):
    """Scores a row by its first token."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def score(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return input_ids[:, 0] * self.scale


def test_interval_over_prompts_has_a_width_even_if_all_pairs_are_right() -> None:
    measured = measure(Fixed(), [EncodedComparison([[4], [2]], [0, 1])] * 2, pad_token_id=0, batch_size=2)
    # Wilson's interval of n successes in n trials begins at n / (n + 1.96^2).
    assert measured["accuracy_by_prompt_ci_low"] == pytest.approx(2 / (2 + 3.8415), abs=1e-4)
    assert measured["accuracy_by_prompt_ci_high"] == pytest.approx(1.0)


def test_measures_by_hand() -> None:
    # scores 2.0, 1.0 (right, margin 1.0); 1.0, 1.5, 0.5 with ranks 0, 1, 2: wrong by 0.5, right by 0.5, right by 1.0
    items = [EncodedComparison([[4], [2]], [0, 1]), EncodedComparison([[2], [3], [1]], [0, 1, 2])]
    measured = measure(Fixed(), items, pad_token_id=0, batch_size=2)
    assert (measured["accuracy"], measured["pairs"]) == (0.75, 4)
    assert measured["accuracy_by_prompt"] == pytest.approx((1 + 2 / 3) / 2)
    assert [(row["from"], row["to"], row["accuracy"], row["pairs"]) for row in measured["accuracy_by_margin"]] == [
        (0.5, 1.0, 0.5, 2),
        (1.0, 2.0, 1.0, 2),
    ]
    with pytest.raises(DataError, match="no held-out comparison has a preference"):
        measure(Fixed(), [], pad_token_id=0, batch_size=2)


def test_long_texts_are_cut_at_the_beginning(tiny_tokenizer) -> None:
    uncut = encode(Comparison("write a happy line:", ["the film"], [0]), tiny_tokenizer, 100).rows[0]
    assert uncut[-1] == tiny_tokenizer.eos_token_id
    assert encode(Comparison("write a happy line:", ["the film"], [0]), tiny_tokenizer, 4).rows[0] == uncut[-4:]


def test_lora_keeps_head_and_bias(comparisons, step_context, sft) -> None:
    result = run(
        config(comparisons, lora={"r": 4}, training={"learning_rate": 2e-2, "batch_size": 4, "epochs": 2.0}), step_context(models=sft)
    )
    assert result.model.is_adapter and result.metrics["heldout_accuracy"] > 0.8


def test_quantization_needs_lora() -> None:
    with pytest.raises(ValidationError, match="needs lora"):
        config("unused", model={"ref": "sft", "quantization": "int8"})


def test_real_ranked_lists(shared_data, step_context, sft) -> None:
    file = next((shared_data / "alpaca_eval_ranking").glob("*.jsonl*"))
    data = {"train": {"path": str(file), "limit": 24}, "validation": {"path": str(file), "skip": 24, "limit": 8}}
    result = run(
        config("unused", data=data, max_length=96, training={"max_steps": 2, "batch_size": 2, "microbatch_size": 1}),
        step_context(models=sft),
    )
    assert 0 <= result.metrics["heldout_ci_low"] <= result.metrics["heldout_accuracy"]


@pytest.mark.detail("R2")
def test_every_completion_is_scored_once(comparisons, step_context, sft, tiny_llama_folder) -> None:
    from stages.training.arguments import training_arguments
    from stages.training.running import train

    model = RewardModel.from_language_model(tiny_llama_folder, dtype=torch.float32)
    rows = [encode(Comparison("write:", [f"line {number}" for number in range(k)], list(range(k))), model.tokenizer, 64) for k in (4, 9)]
    settings = config(comparisons, training={"batch_size": 2, "microbatch_size": 2, "max_steps": 1, "learning_rate": 1e-3})
    context = step_context(models=sft)
    trainer = make_trainer(model, training_arguments(settings.training, context, precision="fp32"), rows, 1)
    seen: list[int] = []
    model.backbone.register_forward_hook(lambda _module, _inputs, output: seen.append(output.last_hidden_state.shape[0]))
    train(trainer, context, "reward model")
    # 13 rows for the 6 + 36 pairs, in one step; no prompt is split
    assert seen == [13]


@pytest.mark.detail("R5")
def test_training_with_best_of_loss_runs_on_best_of_data(comparisons, step_context, sft) -> None:
    result = run(config(comparisons, loss="best_of"), step_context(models=sft))
    assert result.metrics["heldout_accuracy"] > 0.8


@pytest.mark.detail("R12")
def test_standardizing_on_samples(comparisons, step_context, sft) -> None:
    from stages.rewards.learned import score_rows

    settings = {"to": "standardize", "on": "samples", "num_samples": 256, "before_training": True, "generation": {"max_new_tokens": 6}}
    context = step_context(models=sft)
    result = run(config(comparisons, normalization=settings), context)
    model = RewardModel.from_pretrained(str(result.model.path), dtype=torch.float32)
    # the same samples as the step's, scored by what was saved: mean 0 and variance 1
    from stages.reward_model.measuring import inference
    from stages.reward_model.run import _load_comparisons, _texts_to_normalize_on

    step = config(comparisons, normalization=settings)
    loaded, _ = _load_comparisons(step, context, model.tokenizer)
    pairs = _texts_to_normalize_on(step, context, loaded)
    rows = [encode(Comparison(prompt, [text], [0]), model.tokenizer, 128).rows[0] for prompt, text in pairs]
    scores = score_rows(rows, inference(model), 1, 64, device=torch.device("cpu"))
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert result.metrics["reward_gain"] == pytest.approx(1 / result.metrics["demonstration_reward_std"])
    # another draw of samples has mean 0 and variance 1 within its error
    assert len(pairs) == 256 and result.metrics["heldout_accuracy"] > 0.8
    with pytest.raises(ValidationError, match="need on: samples"):
        config(comparisons, normalization={"before_training": True})


@pytest.mark.detail("R17")
def test_calibration_is_computed_without_the_gain() -> None:
    items = [EncodedComparison([[4], [2]], [0, 1]), EncodedComparison([[2], [3], [1]], [0, 1, 2])]
    scores = torch.tensor([2.0, 1.0, 1.0, 1.5, 0.5])
    plain, stretched = agreement(scores, items), agreement(scores * 7, items, gain=7.0)
    for name in ("accuracy", "loss", "calibration_error"):
        assert stretched[name] == pytest.approx(plain[name], rel=1e-5)


def test_selection_of_a_seed_needs_two_held_out_comparisons(comparisons, step_context, sft, tmp_path) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(Path(comparisons).read_text().split("\n")[0] + "\n")
    settings = config(comparisons, num_seeds=2, data={"train": comparisons, "validation": str(one)})
    with pytest.raises(DataError, match="num_seeds=2 needs two held-out comparisons, one to select .* but there is 1"):
        run(settings, step_context(models=sft))


@pytest.mark.detail("D11", "R8")
@pytest.mark.parametrize("lora", [None, {"r": 4}], ids=["full", "lora"])
def test_the_best_of_several_seeds_is_kept_and_measured_on_other_comparisons(comparisons, step_context, sft, lora) -> None:
    settings = config(comparisons, num_seeds=3, lora=lora, data={"train": comparisons, "validation_fraction": 0.4})
    context = step_context("test/seeds", 5, models=sft)
    result = run(settings, context)
    accuracies = result.metrics["seeds"]
    assert list(accuracies) == ["5", "6", "7"]
    assert accuracies[str(result.metrics["selected_seed"])] == max(accuracies.values())
    # twelve held-out comparisons with K = 2, 3, 4, 2, ...: every second one is for measuring: 3, 2, 4, 3, 2, 4 completions
    assert result.metrics["heldout_pairs"] == 2 * (2 + 1 + 5)
    # the kept model is that of this seed: training with it alone gives the same weights
    seed = result.metrics["selected_seed"]
    once = config(comparisons, lora=lora, data={"train": comparisons, "validation_fraction": 0.4})
    alone = run(once, step_context("test/alone", seed, models=sft))
    one, two = (load_file(next(made.model.path.glob("*model.safetensors"))) for made in (result, alone))
    for name in one:
        torch.testing.assert_close(one[name], two[name], msg=name)
    # a run that is interrupted after this trains no seed again
    again = run(settings, context)
    assert again.metrics["seeds"] == accuracies and again.model.digest == result.model.digest


@pytest.mark.detail("R16", "R18")
def test_accuracy_by_length_and_by_group_by_hand() -> None:
    # lengths after the prompt (2 tokens): 8 beats 2, 2 beats 8, 4 beats 4; the scores prefer: longer, longer, first
    def item(better: int, worse: int, group: str) -> EncodedComparison:
        return EncodedComparison([[7] * (2 + better), [7, 7] + [8] * worse], [0, 1], {"batch": group}, 2)

    items = [item(8, 2, "a"), item(2, 8, "a"), item(4, 4, "b")]
    measured = agreement(torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]), items)
    assert measured["accuracy_by_length"] == [
        {"better_is": "longer", "accuracy": 1.0, "pairs": 1},
        {"better_is": "shorter", "accuracy": 0.0, "pairs": 1},
        {"better_is": "as long", "accuracy": 1.0, "pairs": 1},
    ]
    assert (measured["prefers_longer"], measured["longer_is_better"]) == (1.0, 0.5)
    table = measured["accuracy_by_group"]["batch"]
    assert [(row["value"], row["accuracy"], row["pairs"]) for row in table] == [("a", 0.5, 2), ("b", 1.0, 1)]
    assert table[0]["ci_low"] < 0.5 < table[0]["ci_high"]


@pytest.mark.detail("R18")
def test_groups_come_from_the_data(comparisons, step_context, sft, tmp_path) -> None:
    path = tmp_path / "grouped.jsonl"
    rows = [{**json.loads(line), "confidence": number % 2} for number, line in enumerate(Path(comparisons).read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run(config(str(path), group_by=["confidence"], training={"max_steps": 1, "batch_size": 2}), step_context(models=sft)).metrics
    assert [row["value"] for row in metrics["heldout_accuracy_by_group"]["confidence"]] == ["0", "1"]
    with pytest.raises(DataError, match="group_by names 'batch', and the row has .*; name one of these columns"):
        config(str(path), group_by=["batch"]).check_data()

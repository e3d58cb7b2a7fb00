"""Code shared by the training stages: batches over processes, schedules by hand, bitwise resumption, and stopping at NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.config import OptimizerSettings
from stages.errors import RecipeError, TrainingError
from stages.training.arguments import schedule_arguments, split_batch, training_arguments
from stages.training.reproducible import reproducible
from stages.training.running import train


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "expected"),
    [
        (32, 32, 1, (32, 1)),
        (32, 8, 1, (8, 4)),
        (32, 32, 4, (8, 1)),
        (96, 32, 2, (24, 2)),  # 48 per process in two passes
        (4, 32, 1, (4, 1)),
        (32, 8, 3, (6, 2)),  # 11 for the first two processes, 10 for the third: passes of 6 at most
    ],
)
def test_batch_is_divided_over_processes(batch: int, micro: int, processes: int, expected: tuple[int, int]) -> None:
    assert split_batch(OptimizerSettings(batch_size=batch, microbatch_size=micro), processes) == expected


def test_a_batch_too_small_for_the_processes_is_an_error() -> None:
    with pytest.raises(RecipeError, match="batch_size=2 is less than one sequence for each of 3 processes; raise it to 3 or more"):
        split_batch(OptimizerSettings(batch_size=2, microbatch_size=2), 3)


def trace(steps: int, **settings: Any) -> list[float]:
    """Learning rates before each of ``steps`` optimizer steps, and the one after the last, as shares of the peak."""
    from transformers import get_scheduler

    arguments = schedule_arguments(OptimizerSettings(learning_rate=0.5, **settings))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=int(arguments["warmup_steps"] * steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.get("lr_scheduler_kwargs"),
    )
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"] / 0.5)
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.detail("G14")
def test_cosine_ends_at_the_final_fraction() -> None:
    rates = trace(20, schedule="cosine", final_learning_rate_fraction=0.1)
    # 0.1 + 0.9 * (1 + cos(pi t / T)) / 2: 1 at the start, 0.55 half way, 0.1 at the end
    assert (rates[0], rates[10], rates[20]) == pytest.approx((1.0, 0.55, 0.1))


def test_linear_ends_at_the_final_fraction_after_warmup() -> None:
    rates = trace(20, schedule="linear", final_learning_rate_fraction=0.2, warmup_fraction=0.2)
    # 4 steps up from 0, then 16 down from 1 to 0.2: half way of that is 0.6
    assert (rates[0], rates[2], rates[4], rates[12], rates[20]) == pytest.approx((0.0, 0.5, 1.0, 0.6, 0.2))


def test_constant_stays_after_warmup() -> None:
    rates = trace(10, schedule="constant", warmup_fraction=0.2)
    assert (rates[0], rates[1], *rates[2:]) == pytest.approx((0.0, 0.5, *[1.0] * 9))
    assert trace(10, schedule="linear", final_learning_rate_fraction=1.0) == pytest.approx([1.0] * 11)


def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


def make_trainer(
    context: Any, folder: Path, *, learning_rate: float = 1e-2, microbatch_size: int = 2, rows: int = 40, **options: Any
) -> Any:
    from transformers import Trainer

    from stages.models.loading import load_language_model

    settings = OptimizerSettings(
        batch_size=max(4, microbatch_size),
        microbatch_size=microbatch_size,
        learning_rate=learning_rate,
        adam_epsilon=1e-2,  # with this epsilon, Adam does not make full steps for rounding errors
    )
    arguments = training_arguments(settings, context, precision="fp32", remove_unused_columns=False, **options)
    data = list(torch.randint(0, 300, (rows, 8), generator=torch.Generator().manual_seed(0)))
    return reproducible(Trainer)(
        model=load_language_model(str(folder), dtype=torch.float32), args=arguments, train_dataset=data, data_collator=collate
    )


def test_training_changes_nothing_in_the_model_s_config(step_context: Any, tiny_llama_folder: Path) -> None:
    """transformers' Trainer sets ``use_cache`` to false, and every model after it would be published so."""
    context = step_context()
    trainer = make_trainer(context, tiny_llama_folder)
    train(trainer, context, "config")
    kept = json.loads((tiny_llama_folder / "config.json").read_text())
    made = json.loads(trainer.model.config.to_json_string(use_diff=False))
    assert kept["use_cache"] is True
    assert {name: made[name] for name in kept.keys() & made.keys() if name != "_name_or_path"} == {
        name: kept[name] for name in kept.keys() & made.keys() if name != "_name_or_path"
    }


def test_log_has_a_hundred_lines_and_metrics_cover_the_complete_run(step_context: Any, tiny_llama_folder: Path) -> None:
    context = step_context()
    result = train(make_trainer(context, tiny_llama_folder), context, "uninterrupted")
    assert result["optimizer_steps"] == 10
    logged = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(1, 11))
    assert {"train/loss", "train/learning_rate", "train/grad_norm"} <= set(logged[0])
    assert result["train_loss"] == pytest.approx(sum(line["train/loss"] for line in logged) / 10)


def test_microbatch_size_does_not_change_an_optimizer_step(step_context: Any, tiny_llama_folder: Path) -> None:
    weights = []
    for microbatch, processes in ((4, 1), (1, 1), (2, 2)):
        context = step_context(name=f"test/micro{microbatch}")
        trainer = make_trainer(context, tiny_llama_folder, microbatch_size=microbatch, rows=38)  # the last step has two rows
        if processes > 1:  # as with several processes: each pass is a batch of the loader
            trainer.args.by_tokens = False
            trainer.args.per_device_train_batch_size = trainer.args.gradient_accumulation_steps = 2
            trainer.lengths_of = lambda rows: [8] * len(rows)
        train(trainer, context, "micro")
        weights.append(trainer.model.state_dict())
    for others in weights[1:]:
        for name, expected in weights[0].items():
            torch.testing.assert_close(others[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def padded(rows: list[Any]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_passes_over_rows_of_similar_length_have_the_gradient_of_one_padded_pass(step_context: Any, tiny_llama_folder: Path) -> None:
    rows = [torch.arange(2 if number % 2 else 12) + number for number in range(8)]
    gradients, sizes = [], []
    for microbatch in (8, 4):
        context = step_context()
        trainer = make_trainer(context, tiny_llama_folder, microbatch_size=microbatch, rows=8)
        trainer.context = context  # as ``train`` sets it
        trainer.model.register_forward_pre_hook(lambda *given: sizes.append(tuple(given[2]["input_ids"].shape)), with_kwargs=True)
        trainer.training_step(trainer.model, padded(rows), sum(len(row) - 1 for row in rows))
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    # 96 tokens in one pass. In two passes 56: the four rows of 12 tokens, and the four of 2
    assert sizes == [(8, 12), (4, 12), (4, 2)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_plain_transformers_trainer_is_refused(step_context: Any, tiny_llama_folder: Path) -> None:
    from transformers import Trainer

    with pytest.raises(AssertionError, match="training.reproducible"):
        train(object.__new__(Trainer), step_context(), "plain")


def test_nan_loss_stops_the_run(step_context: Any, tiny_llama_folder: Path) -> None:
    context = step_context()
    trainer = make_trainer(context, tiny_llama_folder)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = float("nan")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match="the loss is nan at optimizer step 1; lower training.learning_rate"):
        train(trainer, context, "nan")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True, msg=name)  # there was no optimizer step
    assert list(context.checkpoint_folder.glob("checkpoint-*")) == []


def test_nan_gradient_stops_the_run_before_the_step(step_context: Any, tiny_llama_folder: Path) -> None:
    context = step_context()
    trainer = make_trainer(context, tiny_llama_folder)
    trainer.model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="the gradient norm is (nan|inf) at optimizer step 1"):
        train(trainer, context, "inf")


def test_half_precision_on_a_cpu_is_refused(step_context: Any) -> None:
    context = step_context()
    if context.runtime.device.type != "cpu":
        pytest.skip("fp16 is fine on this device")
    with pytest.raises(RecipeError, match="fp16 cannot be trained on a CPU"):
        training_arguments(OptimizerSettings(), context, precision="fp16")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_one_step_with_warmup_trains_at_the_peak_rate(step_context: Any, tiny_llama_folder: Path, schedule: str) -> None:
    """The warmup of 3 % of one step is rounded up to one step, which would leave no step at the peak (and divide by zero)."""
    context = step_context()
    options = schedule_arguments(OptimizerSettings(schedule=schedule, warmup_fraction=0.03, learning_rate=1e-2))  # type: ignore[arg-type]
    trainer = make_trainer(context, tiny_llama_folder, **{**options, "max_steps": 1})
    train(trainer, context, "one step")
    logged = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/learning_rate"] for line in logged] == [pytest.approx(1e-2)]

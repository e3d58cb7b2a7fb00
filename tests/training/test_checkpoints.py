"""Checkpoints are complete or absent, kept by the settings, and refused if a byte changed. Tensors and random streams round-trip."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from stages.errors import ModelError
from stages.ppo.config import PPOOptimizer
from stages.ppo.update.optimizers import make_optimizer
from stages.process.runtime import Runtime
from stages.training import checkpoints as module
from stages.training.checkpoints import (
    Checkpoints,
    generator_states,
    load_optimizer,
    load_tensors,
    problem_of,
    save_optimizer,
    save_tensors,
    set_generator_states,
)

NEWER = '{"format": 99, "number": 2, "score": null, "files": []}'


@pytest.fixture
def runtime() -> Runtime:
    return Runtime(quiet=True)


def write(checkpoints: Checkpoints, content: str = "x", **options: float) -> None:
    checkpoints.write(lambda folder: (folder / "state.json").write_text(content) and None, **options)


def numbers(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def test_the_newest_and_the_best_are_kept(tmp_path: Path, runtime: Runtime) -> None:
    kept = Checkpoints(tmp_path, runtime, keep_last=2, keep_best=2)
    for score in (1.0, 5.0, 3.0, None, 4.0, None, None):
        write(kept, **({} if score is None else {"score": score}))
    assert numbers(tmp_path) == [2, 5, 6, 7]
    newest, best = kept.newest(), kept.best()
    assert newest is not None and newest.number == 7
    assert best is not None and (best.number, best.score) == (2, 5.0)
    assert kept.wants(4.5) and not kept.wants(4.0)
    assert not Checkpoints(tmp_path, runtime).wants(99.0)  # keep_best is 0


def test_failed_write_keeps_earlier_checkpoints(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, runtime)
    write(kept)

    def full(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        kept.write(full)
    monkeypatch.setattr(module, "write_json", full)  # the very last write
    with pytest.raises((OSError, TypeError)):
        write(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: (path / "state.json").write_text("y"), "state.json was changed"),
        (lambda path: (path / "state.json").write_text(""), "state.json has 0 bytes instead of 1"),
        (lambda path: (path / "state.json").unlink(), "state.json is missing"),
        (lambda path: (path / "checkpoint.json").write_text(NEWER), "by a newer tristage"),
    ],
)
def test_damaged_checkpoint_is_reported_and_skipped(tmp_path: Path, damage, problem: str, capsys) -> None:
    runtime = Runtime()
    kept = Checkpoints(tmp_path, runtime)
    write(kept)
    write(kept)
    damage(tmp_path / "checkpoint-000002")
    assert problem in str(problem_of(tmp_path / "checkpoint-000002"))
    newest = kept.newest()
    assert newest is not None and newest.number == 1
    assert "checkpoint-000002 is skipped" in capsys.readouterr().out


def test_checkpoint_without_manifest_is_ignored(tmp_path: Path, runtime: Runtime) -> None:
    kept = Checkpoints(tmp_path, runtime)
    write(kept)
    (tmp_path / "checkpoint-000001" / "checkpoint.json").unlink()
    (tmp_path / "checkpoint-000007").mkdir()
    (tmp_path / ".partial-3").mkdir()
    assert kept.newest() is None


def test_leftovers_of_a_crash_are_cleared_by_the_next_write(tmp_path: Path, runtime: Runtime) -> None:
    for name in (".partial-1", ".removed-4"):
        (tmp_path / name).mkdir()
    write(Checkpoints(tmp_path, runtime))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-000001"]


def test_slow_checkpoints_are_written_less_often(tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    kept = Checkpoints(tmp_path, runtime, seconds=10.0)
    assert not kept.is_due()
    now = 110.0
    assert kept.is_due()

    def slow(folder: Path) -> None:
        nonlocal now
        now += 3.0

    kept.write(slow)
    now += 59.0  # 20 times 3 seconds must pass
    assert not kept.is_due()
    now += 1.0
    assert kept.is_due()
    assert Checkpoints(tmp_path, runtime, seconds=0.0).is_due()


def test_tensors_round_trip_and_those_of_another_model_are_refused(tmp_path: Path) -> None:
    source = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), "b": torch.tensor(7.0)}
    save_tensors(source, tmp_path / "x.safetensors")
    target = {name: torch.zeros_like(value) for name, value in source.items()}
    load_tensors(target, tmp_path / "x.safetensors")
    assert all(torch.equal(target[name], source[name]) for name in source)
    with pytest.raises(ModelError, match="contains the weights of a different model"):
        load_tensors({"c": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"a has shape \(3, 4\), expected \(4, 3\)"):
        load_tensors({"a": torch.zeros(4, 3), "b": torch.zeros(())}, tmp_path / "x.safetensors")


def test_optimizers_round_trip_with_their_settings(tmp_path: Path) -> None:
    def made() -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.ones(4, requires_grad=True)
        return weight, torch.optim.AdamW([{"params": [weight], "weight_decay": 0.1}], lr=0.5, betas=(0.8, 0.9))

    weight, optimizer = made()
    weight.grad = torch.arange(4.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.25  # as a schedule does
    save_optimizer(optimizer, {"w": weight}, tmp_path / "o.safetensors")
    other_weight, other = made()
    load_optimizer(other, {"w": other_weight}, tmp_path / "o.safetensors")
    with pytest.raises(ModelError, match="of different parameters"):
        load_optimizer(other, {"v": other_weight}, tmp_path / "o.safetensors")
    assert other.param_groups[0]["lr"] == 0.25 and other.param_groups[0]["betas"] == (0.8, 0.9)
    other_weight.data.copy_(weight.data)
    for tensor, stepped in ((weight, optimizer), (other_weight, other)):
        tensor.grad = torch.ones(4)
        stepped.step()
    assert torch.equal(weight, other_weight)


@pytest.mark.parametrize(("saved_by", "read_by"), [("fused", "foreach"), ("foreach", "fused")])
def test_a_resumed_run_uses_the_kernels_of_its_own_device(tmp_path: Path, saved_by: str, read_by: str) -> None:
    weights = [torch.ones(4, requires_grad=True) for _ in range(2)]
    saved, read = (torch.optim.AdamW([weight], **{kind: True}) for weight, kind in zip(weights, (saved_by, read_by), strict=True))
    weights[0].grad = torch.arange(4.0)
    saved.step()
    save_optimizer(saved, {"w": weights[0]}, tmp_path / "o.safetensors")
    load_optimizer(read, {"w": weights[1]}, tmp_path / "o.safetensors")
    assert read.param_groups[0][read_by] is True and not read.param_groups[0][saved_by]


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_optimizers_of_bitsandbytes_round_trip(tmp_path: Path, kind: Any) -> None:
    def made() -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.linspace(-1, 1, 8192).reshape(64, 128).requires_grad_()
        return weight, make_optimizer([weight], PPOOptimizer(learning_rate=1e-2, optimizer=kind))

    def step(weight: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        weight.grad = torch.sin(9 * weight.detach())
        optimizer.step()

    weight, optimizer = made()
    step(weight, optimizer)
    save_optimizer(optimizer, {"w": weight}, tmp_path / "o.safetensors")
    other_weight, other = made()
    other_weight.data.copy_(weight.data)
    load_optimizer(other, {"w": other_weight}, tmp_path / "o.safetensors")
    step(weight, optimizer)
    step(other_weight, other)
    assert torch.equal(weight, other_weight)
    assert {key: value.dtype for key, value in other.state[other_weight].items() if key.startswith("state")} == {
        key: value.dtype for key, value in optimizer.state[weight].items() if key.startswith("state")
    }


def test_optimizers_are_read_into_another_order_and_other_groups(tmp_path: Path) -> None:
    one, two = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = torch.optim.AdamW([one, two], lr=0.5)
    one.grad, two.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    optimizer.step()
    save_optimizer(optimizer, {"one": one, "two": two}, tmp_path / "o.safetensors")
    other = torch.optim.AdamW([{"params": [two]}, {"params": [one]}], lr=0.1)
    load_optimizer(other, {"two": two, "one": one}, tmp_path / "o.safetensors")
    assert torch.equal(other.state[two]["exp_avg"], optimizer.state[two]["exp_avg"])
    assert [group["lr"] for group in other.param_groups] == [0.5, 0.5]


def test_random_streams_round_trip_through_json(runtime: Runtime) -> None:
    kept = json.loads(json.dumps(generator_states(runtime)))

    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(numpy.random.standard_normal()), float(torch.rand(()))

    first = draw()
    assert draw() != first
    set_generator_states(kept, runtime)
    assert draw() == first

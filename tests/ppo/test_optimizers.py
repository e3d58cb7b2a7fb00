"""TensorFlow's Adam by hand, learning rates by iteration, the moving average."""

import math

import pytest
import torch

from stages.ppo.config import PPOOptimizer
from stages.ppo.optimizers import (
    TensorFlowAdam,
    WeightAverage,
    learning_rate_factor,
    make_optimizer,
)


@pytest.mark.detail("G5")
def test_tensorflow_adam_by_hand() -> None:
    weight = torch.tensor([1.0], requires_grad=True)
    optimizer = TensorFlowAdam([weight], lr=0.1, betas=(0.9, 0.999), eps=1e-2)
    m = v = 0.0
    expected = 1.0
    for step, gradient in enumerate((0.5, -0.2, 0.3), 1):
        weight.grad = torch.tensor([gradient])
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        # Kingma & Ba 2015, section 2, the efficient form: epsilon is not divided by sqrt(1 - beta2^t)
        expected -= 0.1 * math.sqrt(1 - 0.999**step) / (1 - 0.9**step) * m / (math.sqrt(v) + 1e-2)
        assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_the_first_step_is_smaller_than_torchs() -> None:
    moved = {}
    for style in ("torch", "tensorflow"):
        weight = torch.tensor([0.0], requires_grad=True)
        optimizer = make_optimizer([weight], PPOOptimizer(learning_rate=1.0, adam_style=style, adam_epsilon=1e-5))
        weight.grad = torch.tensor([1e-4])
        optimizer.step()
        moved[style] = -weight.item()
    # torch: 1e-4 / (1e-4 + 1e-5) = 0.909; tensorflow: sqrt(0.001) / 0.1 * 1e-5 / (sqrt(1e-11) + 1e-5) = 0.2403
    assert moved["torch"] == pytest.approx(0.90909, rel=1e-3)
    assert moved["tensorflow"] == pytest.approx(0.24025, rel=1e-3)


@pytest.mark.detail("P17")
def test_warmup_from_a_tenth() -> None:
    settings = PPOOptimizer(warmup_iterations=10, schedule="constant")
    factors = [learning_rate_factor(settings, iteration, 100) for iteration in range(12)]
    assert factors[:3] == pytest.approx([0.1, 0.19, 0.28]) and factors[10:] == [1.0, 1.0]


@pytest.mark.detail("G14")
def test_schedules() -> None:
    assert [learning_rate_factor(PPOOptimizer(), step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = PPOOptimizer(schedule="cosine", final_learning_rate_fraction=0.1)
    assert [learning_rate_factor(cosine, step, 4) for step in (0, 2, 4)] == pytest.approx([1.0, 0.55, 0.1])


def test_moving_average_by_hand() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.9)
    for value in (2.0, 3.0):
        model.weight.data.fill_(value)
        average.update(model)
    average.copy_to(model)
    assert model.weight.item() == pytest.approx(0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 3)


@pytest.mark.detail("P18")
def test_average_of_half_precision_weights_keeps_small_steps() -> None:
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.999)
    model.weight.data.fill_(1.0078125)  # the next bf16 number: 0.001 of the difference is lost in bf16
    for _ in range(100):
        average.update(model)
    assert average.weights["weight"].item() == pytest.approx(1 + 0.0078125 * (1 - 0.999**100), rel=1e-6)


def test_optimizer_state_survives_a_file(tmp_path) -> None:
    from stages.training.checkpoints import load_optimizer, save_optimizer

    for style in ("torch", "tensorflow"):
        settings = PPOOptimizer(learning_rate=0.1, adam_style=style)
        one, two = (torch.tensor([1.0, -1.0], requires_grad=True) for _ in range(2))
        first, second = make_optimizer([one], settings), make_optimizer([two], settings)
        one.grad = torch.tensor([0.3, 0.1])
        first.step()
        two.data.copy_(one.data)
        save_optimizer(first, {"w": one}, tmp_path / "o.safetensors")
        load_optimizer(second, {"w": two}, tmp_path / "o.safetensors")
        for weight, optimizer in ((one, first), (two, second)):
            weight.grad = torch.tensor([-0.2, 0.4])
            optimizer.step()
        assert torch.equal(one, two)

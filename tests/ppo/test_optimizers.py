"""TensorFlow's Adam by hand, learning rates by iteration, the moving average."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stages.ppo.config import PPOOptimizer
from stages.ppo.update import optimizers
from stages.ppo.update.optimizers import TensorFlowAdam, WeightAverage, learning_rate_factor, make_optimizer, together
from stages.training import fused


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


class Operations(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[str(function)] += 1
        return function(*arguments, **(options or {}))


def test_tensorflow_adam_equals_a_loop_over_parameters_in_few_operations() -> None:
    """Twelve weights, of which one gets its first gradient in the second step."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    weights = [random(3, size + 1).requires_grad_() for size in range(12)]
    plain = [weight.detach().clone() for weight in weights]
    means, squares = ([torch.zeros_like(weight) for weight in plain] for _ in range(2))
    counts = [0] * len(plain)
    optimizer = TensorFlowAdam(weights, lr=0.01, betas=(0.9, 0.99), eps=1e-3)
    for step in range(3):
        for index, weight in enumerate(weights):
            weight.grad = None if step == 0 and index == 3 else random(*weight.shape)
        with Operations() as operations:
            optimizer.step()
        on_weights = {name: count for name, count in operations.counts.items() if "_foreach_" in name}
        assert set(on_weights.values()) == {1}, on_weights
        assert not set(operations.counts) & {"aten.lerp_.Scalar", "aten.addcmul_.default", "aten.addcdiv_.default", "aten.sqrt.default"}
        for index, weight in enumerate(weights):
            if (gradient := weight.grad) is None:
                continue
            counts[index] += 1
            means[index].lerp_(gradient, 1 - 0.9)
            squares[index].mul_(0.99).addcmul_(gradient, gradient, value=1 - 0.99)
            rate = 0.01 * math.sqrt(1 - 0.99 ** counts[index]) / (1 - 0.9 ** counts[index])
            plain[index].addcdiv_(means[index], squares[index].sqrt().add_(1e-3), value=-rate)
    assert all(torch.equal(weight, expected) for weight, expected in zip(weights, plain, strict=True))


def test_foreach_operations_are_over_one_device_and_dtype_and_a_limited_number_of_values(monkeypatch) -> None:
    monkeypatch.setattr(optimizers, "FOREACH_VALUES", 10)
    sizes = [(4, torch.float32), (4, torch.float16), (5, torch.float32), (3, torch.float32), (30, torch.float32), (2, torch.float16)]
    groups = together(torch.zeros(size, dtype=dtype) for size, dtype in sizes)
    assert [[len(tensor) for tensor in group] for group in groups] == [[4, 5], [4, 2], [3], [30]]


def test_adamw_without_fused_kernels_uses_foreach_operations_and_says_why(monkeypatch, caplog) -> None:
    def no_kernel(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fused kernel")

    fused._problem.cache_clear()
    monkeypatch.setattr(torch, "_fused_adamw_", no_kernel)
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    with caplog.at_level("WARNING"):
        made = [make_optimizer([{"params": [weight]}], PPOOptimizer(learning_rate=0.1)) for weight in weights]
    fused._problem.cache_clear()
    assert [optimizer.param_groups[0]["fused"] for optimizer in made] == [None, None] and made[0].param_groups[0]["foreach"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "float32 on cpu" in line and "no fused kernel" in line
    weights[0].grad = torch.ones(2)
    made[0].step()
    assert weights[0].tolist() == pytest.approx([0.9, 0.9], rel=1e-4)


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

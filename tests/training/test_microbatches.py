"""Steps of a Trainer are split into passes by tokens: same loss and gradient, also if memory runs out, for every kind of batch."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.training.microbatches import PassesByTokens, chosen_rows


class Plain:
    """The relevant part of a Trainer: one pass with its share of the step's loss. Above ``most`` tokens, memory runs out."""

    def __init__(self, most: int, *, by_tokens: bool = True, failure: BaseException | None = None) -> None:
        self.failure = failure or torch.OutOfMemoryError("CUDA out of memory")
        self.args = SimpleNamespace(
            by_tokens=by_tokens, device=torch.device("cpu"), microbatch_size="auto", rows_per_pass=8, optim="adamw_torch_fused"
        )
        self.optimizer, self.context = SimpleNamespace(state={}), SimpleNamespace(name="step")
        self.most, self.sizes = most, []
        self._metrics: Any = {"train": defaultdict(list, {"entropy": [0.5]})}
        self._total_train_tokens = 7

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.sizes.append(ids.numel())
        self._metrics["train"]["entropy"].append(0.25)
        self._total_train_tokens += int(mask.sum())
        loss = (model(ids).squeeze(-1) * mask).sum() / num_items_in_batch
        if ids.numel() > self.most:
            half = model.weight.sum() * 0.5  # a part of the pass's gradient has already been added
            half.backward()
            raise self.failure
        loss.backward()
        return loss.detach()


class Cut(PassesByTokens, Plain):
    pass


LENGTHS = [3, 9, 1, 6, 9, 2]


def batch() -> dict[str, Any]:
    mask = (torch.arange(9) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": torch.arange(6 * 9).view(6, 9) % 20 * mask, "attention_mask": mask}


def step(trainer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = torch.nn.Embedding(20, 1)
    loss = trainer.training_step(model, batch(), 30)
    assert model.weight.grad is not None
    return loss, model.weight.grad


@pytest.mark.parametrize("failure", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["on a GPU", "on a CPU"])
def test_step_that_runs_out_of_memory_has_the_gradient_of_one_forward_pass(failure: BaseException) -> None:
    one_pass, cut = Plain(1000), Cut(20, failure=failure)
    loss, gradient = step(one_pass)
    cut_loss, cut_gradient = step(cut)
    torch.testing.assert_close(cut_loss, loss)
    torch.testing.assert_close(cut_gradient, gradient)
    # 54 tokens fail. Passes of at most 27 are two rows of 9 and four of 6, which fails. Then at most 12: rows of 9, 9, 6, and three of 3.
    assert one_pass.sizes == [54] and cut.sizes == [54, 18, 24, 9, 9, 6, 9]
    assert cut.budget is not None and cut.budget.retreats == 2
    assert cut._total_train_tokens == 7 + 30  # counted once
    assert cut._metrics["train"]["entropy"] == [0.5] + [0.25] * 4


def test_batch_that_fits_takes_one_forward_pass() -> None:
    plain = Cut(1000, by_tokens=False)
    step(plain)
    assert plain.sizes == [54] and plain.budget is None


def test_chosen_rows_drop_padding_columns() -> None:
    chosen = chosen_rows({**batch(), "labels": torch.tensor([0, 1, 2, 3, 4, 5]), "name": "kept"}, [0, 2])
    assert chosen["input_ids"].tolist() == [[0, 1, 2], [18, 0, 0]] and chosen["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert chosen["labels"].tolist() == [0, 2] and chosen["name"] == "kept"


def test_pairs_stay_together() -> None:
    from stages.dpo.trainer import TokenizedDPOTrainer

    trainer: Any = object.__new__(TokenizedDPOTrainer)
    assert trainer.sizes_of(batch()) == [2 * 6, 2 * 9, 2 * 2]  # texts 0 and 3, 1 and 4, 2 and 5
    part = trainer.part_of(batch(), [0, 2])
    assert part["attention_mask"].sum(dim=1).tolist() == [3, 1, 6, 2]


@pytest.mark.parametrize("loss", ["pairs", "best_of"])
def test_rankings_are_split_between_prompts(loss: str) -> None:
    from stages.reward_model.training import RankingTrainer
    from stages.rl.ranking import best_of_losses, ranking_losses

    losses_of = ranking_losses if loss == "pairs" else best_of_losses
    full_batch = {
        **batch(),
        "ranks": torch.tensor([1, 2, 1, 2, 3, 1]),
        "prompt_index": torch.tensor([0, 0, 1, 1, 1, 2]),
        "text_index": torch.tensor([0, 1, 0, 1, 2, 0]),
    }
    trainer: Any = object.__new__(RankingTrainer)
    assert trainer.sizes_of(full_batch) == [2 * 9, 3 * 9, 1 * 2]

    def summed(part: dict[str, Any]) -> float:
        scores = part["input_ids"].sum(dim=1) / 100.0
        return float(losses_of(scores, part["ranks"], part["prompt_index"], part["text_index"]).sum())

    parts = [trainer.part_of(full_batch, rows) for rows in ([0, 2], [1])]
    assert [part["prompt_index"].tolist() for part in parts] == [[0, 0, 1], [0, 0, 0]]
    assert sum(map(summed, parts)) == pytest.approx(summed(full_batch))

"""Select the best model of a fine-tuning run by the reward of its completions (Ouyang et al. 2022, section 3.5).

In supervised fine-tuning the held-out loss rises after the first epoch while completions still improve, so it is not a good criterion.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback

from stages.corpora.prompts import PromptRow
from stages.corpora.templates import encode_prompt
from stages.engines.opening import step_sampler
from stages.errors import RecipeError
from stages.metric_names import SELECTION_LOSS, SELECTION_SCORE
from stages.models.loaded import LoadedModel
from stages.models.sharding import unsharded
from stages.process.storage import sync, write_json
from stages.rewards.building import build_reward
from stages.rewards.details import Details, columns_of
from stages.sampling.generation import decode_completions, episode_seed, require_room
from stages.step import StepContext
from stages.training.checkpoints import load_tensors, save_tensors, trainable
from stages.training.selection_config import Selection

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from stages.training.step_trainer import StepTrainer


@dataclass(frozen=True)
class Tried:
    """An evaluated model of the run."""

    optimizer_step: int
    score: float
    heldout_loss: float


def best_of(tried: Sequence[Tried]) -> Tried:
    """The one with the highest score; the earliest of equal ones. The held-out loss is ignored."""
    return max(tried, key=lambda one: (one.score, -one.optimizer_step))


class Selector:
    """Evaluates the model at given optimizer steps, and saves the weights of each new best model next to the checkpoints.

    After an interruption, evaluations later than the resumed checkpoint are repeated with equal results.
    """

    def __init__(
        self,
        selection: Selection,
        context: StepContext,
        trained: LoadedModel,
        prompts: Sequence[PromptRow],
        measure_loss: Callable[[], float],
    ) -> None:
        self.selection, self.context, self.trained, self.measure_loss = selection, context, trained, measure_loss
        rows = list(prompts)[: selection.num_prompts]
        self.prompts, self.columns = [row.prompt for row in rows], [row.columns for row in rows]
        self.prompt_ids = [encode_prompt(trained.tokenizer, prompt) for prompt in self.prompts]
        require_room(trained.model, self.prompt_ids, selection.generation)  # fail now instead of after the first epoch
        self.reward = build_reward(
            selection.reward,
            context.models,
            "selection.reward",
            device=context.runtime.device,
            dtype=trained.dtype,
            cache_folder=context.cache_folder,
        )
        self.folder = context.checkpoint_folder / "selection"
        self.tried: list[Tried] = []

    def resume(self, optimizer_step: int) -> None:
        """Restore the evaluations up to ``optimizer_step``."""
        try:
            rows = json.loads((self.folder / "tried.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        self.tried = [Tried(**row) for row in rows if row["optimizer_step"] <= optimizer_step]

    def try_out(self, optimizer_step: int) -> None:
        """Sample and score; save the weights if they are the best so far. Call on every process."""
        if any(one.optimizer_step == optimizer_step for one in self.tried):
            return
        with unsharded(self.trained.model):  # the processes sample independently
            tried = Tried(optimizer_step, self._score(), self.measure_loss())
        self.tried.append(tried)
        self.context.log(optimizer_step, {SELECTION_SCORE: tried.score, SELECTION_LOSS: tried.heldout_loss})
        is_main = self.context.runtime.is_main
        if is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
        if best_of(self.tried) is tried:
            save_tensors(trainable(self.trained.model), path := self._file(optimizer_step), write=is_main)
            if is_main:
                sync(path)
        if is_main:  # written last, so that listed files are complete
            write_json(self.folder / "tried.json", [asdict(one) for one in self.tried])

    def load_best(self) -> Tried:
        """Load the best weights into the model."""
        best = best_of(self.tried)
        self.context.runtime.wait_for_everyone()
        if best is not self.tried[-1]:
            load_tensors(trainable(self.trained.model), self._file(best.optimizer_step))
        self.context.runtime.console.print(
            f"{self.context.name}: of {len(self.tried)} evaluated models, the one after {best.optimizer_step} optimizer steps scores "
            f"best ({best.score:.3f}; the last {self.tried[-1].score:.3f})"
        )
        return best

    def _file(self, optimizer_step: int) -> Path:
        return self.folder / f"weights-{optimizer_step}.safetensors"

    def _score(self) -> float:
        """Mean score over the prompts. Each process has its share, with random streams that depend only on the prompt's index."""
        runtime, trained, generation = self.context.runtime, self.trained, self.selection.generation
        opened = step_sampler(generation, trained, self.context, trains="adapter" if hasattr(trained.model, "peft_config") else "full")

        def sample(own: list[int]) -> list[tuple[str, list[int]]]:
            generated = sampler.sample(
                [self.prompt_ids[row] for row in own], generation, [episode_seed(self.context.seed, row) for row in own]
            )
            ids = zip(generated.response_ids.cpu(), generated.response_mask.cpu(), strict=True)
            return list(zip(decode_completions(trained.tokenizer, generated), [row[mask].tolist() for row, mask in ids], strict=True))

        def score(own: list[int]) -> list[float]:
            details = Details(columns_of([self.columns[row] for row in own]), [sampled[row][1] for row in own])
            return self.reward.score([self.prompts[row] for row in own], [sampled[row][0] for row in own], details).total.tolist()

        with opened as sampler, torch.autocast(runtime.device.type, dtype=trained.dtype, enabled=trained.dtype != torch.float32):
            sampler.take_weights()
            sampled = runtime.distribute(len(self.prompts), sample)
        scores = runtime.distribute(len(self.prompts), score)
        return sum(scores) / len(scores)


def selection_callback(selector: Selector, trainer: StepTrainer) -> TrainerCallback:
    """A Trainer callback that evaluates the model at regular intervals and at the end.

    Raises RecipeError if the weights are sharded by ZeRO.
    """
    if trainer.is_deepspeed_enabled:
        raise RecipeError("selection samples during training and needs unsharded weights; remove it, or train without ZeRO")

    class SelectionCallback(TrainerCallback):
        every = 0

        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            self.every = max(1, round(trainer.steps_per_epoch * selector.selection.every_epochs))
            selector.resume(state.global_step)

        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            if state.global_step % self.every == 0 or state.global_step == state.max_steps:
                selector.try_out(state.global_step)

    return SelectionCallback()

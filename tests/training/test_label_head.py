"""SFT and DPO train the likelihood of the model's own logits, also where TRL computes other ones."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
from catalogue import DECODERS, save, tokenizer_of  # noqa: E402

from stages.dpo.config import DPOStepConfig  # noqa: E402
from stages.dpo.pairs import Pair  # noqa: E402
from stages.dpo.trainer import make_trainer as make_dpo  # noqa: E402
from stages.models.loading import load_language_model  # noqa: E402
from stages.sft.config import SFTStepConfig  # noqa: E402
from stages.sft.rows import EncodedRow  # noqa: E402
from stages.sft.trainer import make_trainer as make_sft  # noqa: E402

ROWS = [EncodedRow([10, 11, 12, 13, 14], 2), EncodedRow([20, 21, 22], 1)]
PAIRS = [Pair([15, 16, 17], [18, 19], [40, 41]), Pair([11, 12], [13], [14, 15, 16])]
OTHERS = {  # whose logits TRL 1.16 does not compute
    "recurrent_gemma": {"logits_soft_cap": 1.0},
    "xlstm": {"output_logit_soft_cap": 1.0},
    "modernbert-decoder": {},
    "llama4_text": {},  # TRL does not find its transformer, and its class has no load-balancing loss
    "doge": {},
}
KNOWN = {
    "qwen3_moe": {"mlp_only_layers": [0, 1]},
    "llama": {},
    "gemma2": {"final_logit_softcapping": 1.0},
    "granite": {},
    "mixtral": {"router_aux_loss_coef": 0.0},
}


def plain_losses(folder: Path, rows: list[tuple[list[int], int]]) -> list[torch.Tensor]:
    """The negative log-likelihoods [tokens] of each (ids, prompt length) in plain transformers, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for ids, prompt in rows:
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        losses.append(-logprobs[range(prompt - 1, len(ids) - 1), ids[prompt:]])
    return losses


@pytest.mark.parametrize("name", [*OTHERS, *KNOWN])
def test_sft_loss_is_that_of_plain_transformers(name: str, tmp_path: Path, step_context, resolve_folder, caplog) -> None:
    folder = save(DECODERS[name], tmp_path / "model", AutoModelForCausalLM, **(OTHERS | KNOWN)[name])
    model = load_language_model(str(folder), dtype=torch.float32)
    settings = {"name": "sft", "model": "base", "precision": "fp32", "data": {"train": "unused"}, "training": {"batch_size": 2}}
    context = step_context(models={"model": resolve_folder(folder)})
    with caplog.at_level(logging.WARNING):
        trainer = make_sft(SFTStepConfig.model_validate(settings), context, model, tokenizer_of(DECODERS[name].tokenizer), ROWS, 16)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = torch.cat(plain_losses(folder, [(row.ids, row.prompt_length) for row in ROWS]))
    assert float(trainer.compute_loss(model, batch).detach()) == pytest.approx(float(expected.mean()), rel=1e-5)
    assert any("logits of all tokens" in message for message in caplog.messages) == (name in OTHERS and name != "doge")


def test_dpo_loss_is_that_of_plain_transformers(tmp_path: Path, step_context, resolve_folder) -> None:
    """-log sigmoid(beta * ((log p - log p_ref of chosen) - (the same of rejected))), with a cap that TRL does not know."""
    family = DECODERS["recurrent_gemma"]
    folders = [save(family, tmp_path / str(seed), AutoModelForCausalLM, seed=seed, logits_soft_cap=1.0) for seed in (0, 1)]
    models = [load_language_model(str(folder), dtype=torch.float32) for folder in folders]
    settings = {
        "name": "dpo",
        "model": "base",
        "precision": "fp32",
        "beta": 0.5,
        "data": {"train": "unused"},
        "training": {"batch_size": 2},
    }
    context = step_context(models={"model": resolve_folder(folders[0])})
    config = DPOStepConfig.model_validate(settings)
    trainer = make_dpo(config, context, models[0], models[1].requires_grad_(False), tokenizer_of(family.tokenizer), PAIRS)
    rows = [(pair.prompt_ids + ids, len(pair.prompt_ids)) for pair in PAIRS for ids in (pair.chosen_ids, pair.rejected_ids)]
    moved, reference = ([-float(losses.sum()) for losses in plain_losses(folder, rows)] for folder in folders)
    ratios = [one - other for one, other in zip(moved, reference, strict=True)]
    expected = sum(math.log(1 + math.exp(-0.5 * (ratios[row] - ratios[row + 1]))) for row in (0, 2)) / 2
    columns: list[dict[str, Any]] = [{name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in PAIRS]
    loss = float(trainer.compute_loss(models[0], trainer.data_collator(columns)).detach())
    assert loss == pytest.approx(expected, abs=1e-5) and abs(loss - math.log(2)) > 0.01

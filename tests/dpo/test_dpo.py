"""DPO: rankings become pairs, the loss equals the paper's, and the saved model equals the trained one, with and without an adapter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stages.corpora.comparisons import Comparison
from stages.dpo.config import DPOStepConfig
from stages.dpo.measuring import completion_logprobs, measure
from stages.dpo.pairs import Pair, pairs_of
from stages.dpo.run import run
from stages.dpo.trainer import make_trainer, pairs_in
from stages.errors import DataError
from stages.models.loading import load_language_model, load_tokenizer


@pytest.fixture
def comparisons(tmp_path: Path) -> Path:
    """Forty prompts with three ranked completions, of which two tie."""
    path = tmp_path / "comparisons.jsonl"
    rows = [
        {"prompt": f"write a line about the {thing} {number}:", "completions": ["a fine film", "dull", "weak"], "ranks": [0, 1, 1]}
        for number in range(10)
        for thing in ("film", "plot", "music", "ending")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path | str = "unused", **fields: Any) -> DPOStepConfig:
    settings = {
        "name": "dpo",
        "model": "sft",
        "precision": "fp32",
        "data": {"train": str(path), "validation_fraction": 0.2},
        "beta": 0.5,
        "training": {"epochs": 3.0, "batch_size": 8, "microbatch_size": 8, "learning_rate": 3e-3},
    }
    return DPOStepConfig.model_validate({**settings, **fields})


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_label_smoothing_is_refused_where_the_loss_would_ignore_it(loss: str) -> None:
    assert config(loss="robust", label_smoothing=0.1).label_smoothing == 0.1
    with pytest.raises(ValidationError, match=f"label_smoothing=0.1 requires loss: robust; loss: {loss} has no label smoothing"):
        config(loss=loss, label_smoothing=0.1)


def test_pair_with_an_empty_text_counts() -> None:
    # the better texts of two pairs, of which one is empty, then the worse ones; and a pair that a blank pass does not count
    assert pairs_in({"completion_mask": torch.tensor([[0, 0], [0, 1], [0, 1], [0, 1]])}) == 2
    assert pairs_in({"completion_mask": torch.zeros(2, 2, dtype=torch.long)}) == 0


def test_a_ranked_list_becomes_its_pairs() -> None:
    ranked = Comparison("p", ["best", "tied", "tied too", "worst"], [0, 1, 1, 2])
    assert pairs_of(ranked, None, 0) == [
        ("best", "tied"),
        ("best", "tied too"),
        ("best", "worst"),
        ("tied", "worst"),
        ("tied too", "worst"),
    ]
    drawn = pairs_of(ranked, 2, 0)
    assert len(set(drawn)) == 2 and set(drawn) <= set(pairs_of(ranked, None, 0))
    assert drawn == pairs_of(ranked, 2, 0)
    assert pairs_of(Comparison("p", ["a", "b"], [0, 0]), None, 0) == []


def test_accuracy_and_margin_by_hand() -> None:
    # log ratios: chosen -1 and -3, rejected -2 and -2; margins with beta 1/2: 1/2 and -1/2
    measured = measure(torch.tensor([[-11.0, -12.0], [-13.0, -12.0]]), torch.full((2, 2), -10.0), beta=0.5)
    assert (measured["accuracy"], measured["margin"], measured["chosen_log_ratio"], measured["rejected_log_ratio"]) == (
        0.5,
        0.0,
        -2.0,
        -2.0,
    )
    assert measured["loss"] == pytest.approx((math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.5))) / 2)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_preferred_completion_becomes_likelier(comparisons, step_context, resolve_folder, tiny_llama_folder, lora) -> None:
    context = step_context(name="test/dpo", models={"model": resolve_folder(tiny_llama_folder)})
    result = run(config(comparisons, lora=lora), context)
    assert result.metrics["pairs"] == 64 and result.metrics["heldout_pairs"] == 16
    assert result.metrics["heldout_accuracy"] == 1.0 and result.metrics["heldout_margin"] > 0.05
    assert result.metrics["heldout_chosen_log_ratio"] > result.metrics["heldout_rejected_log_ratio"]
    record = result.model
    assert record.role == "language_model" and record.is_adapter == (lora is not None)
    names = {path.name for path in record.path.iterdir()}
    assert not any(path.is_dir() for path in record.path.iterdir()), names  # TRL has not added a second adapter
    logged = [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("train/rewards/margins" in line for line in logged) and any("heldout/accuracy" in line for line in logged)


def test_loss_equals_the_papers_formula(step_context, resolve_folder, tiny_llama_folder, tmp_path) -> None:
    """One batch. Expected: -log sigmoid(beta * ((log p - log p_ref of chosen) - (the same of rejected)))."""
    from transformers import AutoModelForCausalLM

    source = resolve_folder(tiny_llama_folder)
    tokenizer = load_tokenizer(source)
    pairs = [Pair([5, 6, 7], [8, 9, 0], [10, 0]), Pair([11, 12], [13, 0], [14, 15, 16, 0])]
    model = load_language_model(source, dtype=torch.float32, tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    reference = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    moved = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    moved.load_state_dict(model.state_dict())

    def logprob(network: Any, prompt: list[int], response: list[int]) -> float:
        with torch.no_grad():
            rows = network(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        return sum(float(rows[len(prompt) - 1 + step, token]) for step, token in enumerate(response))

    ratios = [
        [logprob(moved, pair.prompt_ids, ids) - logprob(plain, pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
        for pair in pairs
    ]
    expected = sum(math.log(1 + math.exp(-0.5 * (chosen - rejected))) for chosen, rejected in ratios) / 2

    settings = config()
    context = step_context(models={"model": source})
    trainer = make_trainer(settings, context, model, reference, tokenizer, pairs)
    batch = trainer.data_collator([{name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for pair in pairs])
    assert float(trainer.compute_loss(model, batch).detach()) == pytest.approx(expected, abs=1e-4)
    # our measurement of the same pairs agrees
    measured = measure(
        completion_logprobs(settings, context, model, pairs, tokenizer),
        completion_logprobs(settings, context, reference, pairs, tokenizer),
        beta=0.5,
    )
    assert measured["loss"] == pytest.approx(expected, abs=1e-4)


def test_no_pair_within_max_length_is_an_error(comparisons, step_context, resolve_folder, tiny_llama_folder) -> None:
    context = step_context(models={"model": resolve_folder(tiny_llama_folder)})
    with pytest.raises(DataError, match="no training pair fits max_length=4: the shortest of 64 has"):
        run(config(comparisons, max_length=4), context)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_reference_of_a_new_adapter_is_its_base_model(step_context, resolve_folder, tiny_llama_folder, tmp_path, quantization) -> None:
    """DPO on an SFT adapter: the reference's log-probabilities are the SFT model's own, as peft alone computes them, before and after a
    step, and not those of the bare base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from stages.config import LoraSettings, ModelInput
    from stages.models.saving import save_model
    from stages.registry.references import ResolvedModel

    base = resolve_folder(tiny_llama_folder, quantization=quantization)
    tokenizer = load_tokenizer(base)
    sft = load_language_model(base, dtype=torch.float32, lora=LoraSettings(r=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_model(sft, tokenizer, tmp_path / "sft")
    source = ResolvedModel("sft", "folder", str(tmp_path / "sft"), "", ModelInput(ref="sft", quantization=quantization), base=base)

    options = (
        {}
        if quantization == "none"
        else {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)}
    )
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32, attn_implementation="eager", **options)
    for module in plain.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    pair = Pair([5, 6, 7], [8, 9, 0], [10, 0])

    def logprob(network: Any, response: list[int]) -> float:
        with torch.no_grad():
            rows = network(torch.tensor([pair.prompt_ids + response])).logits[0].log_softmax(-1)
        return sum(float(rows[len(pair.prompt_ids) - 1 + step, token]) for step, token in enumerate(response))

    bare = [logprob(plain, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    adapted = PeftModel.from_pretrained(plain, tmp_path / "sft")
    expected = [logprob(adapted, ids) for ids in (pair.chosen_ids, pair.rejected_ids)]
    assert abs(expected[0] - bare[0]) > 0.05

    settings = config(lora={"r": 4}, model={"ref": "sft", "quantization": quantization})
    context = step_context(models={"model": source})
    model = load_language_model(source, dtype=torch.float32, lora=settings.lora, tokenizer=tokenizer)
    trainer = make_trainer(settings, context, model, None, tokenizer, [pair])
    assert "ref" not in model.peft_config  # TRL's copy of the new adapter, which is not the reference
    batch = trainer.data_collator([{name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}])
    for _ in range(2):
        loss = trainer.compute_loss(model, batch)
        logprobs = trainer._reference_logprobs(batch)
        assert [float(logprobs[f"ref_{kind}_logps"]) for kind in ("chosen", "rejected")] == pytest.approx(expected, abs=1e-3)
        loss.backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(".default." in name and parameter.grad is not None for name, parameter in trained.items())
        with torch.no_grad():
            for parameter in trained.values():
                parameter.sub_(parameter.grad)
    assert float(trainer.compute_loss(model, batch)) < math.log(2) - 0.01

"""Checks for every family against an independent computation: plain transformers, eager attention, no cache, one row at a time, fp32.

A check returns the largest difference, relative to the largest expected number. B rows, T tokens, d hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from catalogue import TEXTS, Family, tokenizer_of
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from stages.config import GenerationSettings, LoraSettings, ModelInput
from stages.kernels.matmul import Linear
from stages.models.adapters.exporting import save_merged
from stages.models.heads import RewardModel, ValueModel
from stages.models.loading import as_resolved, load_classifier, load_language_model, load_tokenizer
from stages.models.passes.responses import Policy, SequenceBatch, sequence_batch, sequence_values
from stages.models.saving import save_model
from stages.registry.references import ResolvedModel
from stages.sampling.generation import generate

LORA = LoraSettings(r=2, alpha=4.0)
PROMPTS = TEXTS[:3]
ANSWERS = [" to play outside", " and then", " ran, and was glad of it"]


class Rows:
    """Prompts and responses of different lengths, as token ids of the family's tokenizer."""

    def __init__(self, family: Family) -> None:
        tokenizer = tokenizer_of(family.tokenizer)
        self.prompts = [tokenizer(text)["input_ids"][: 12 - 3 * index] for index, text in enumerate(PROMPTS)]
        self.responses = [tokenizer(text, add_special_tokens=False)["input_ids"][: 4 + 2 * index] for index, text in enumerate(ANSWERS)]
        self.pad = tokenizer.pad_token_id

    @property
    def sequences(self) -> list[list[int]]:
        return [prompt + response for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def batch(self) -> SequenceBatch:
        return sequence_batch(self.prompts, self.responses, self.pad, "cpu")

    def padded(self, side: str) -> tuple[Tensor, Tensor]:
        """(ids, mask) [B, T]; the ids under the mask are valid tokens."""
        width = max(map(len, self.sequences))
        ids, mask = torch.full((len(self.sequences), width), 7), torch.zeros((len(self.sequences), width), dtype=torch.long)
        for index, row in enumerate(self.sequences):
            columns = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[index, columns], mask[index, columns] = torch.tensor(row), 1
        return ids, mask


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected number (at least 1)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} for {tuple(expected.shape)}"
    assert bool(expected.isfinite().all()), "the reference is not finite"
    return float((actual.detach().double() - expected.detach().double()).abs().max() / max(1.0, float(expected.detach().abs().max())))


# The reference


def plain(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model with eager attention; Falcon's with ALiBi has sdpa, because its eager attention adds the bias twice."""
    config = AutoConfig.from_pretrained(folder)
    attention = "sdpa" if config.model_type == "falcon" and config.alibi else "eager"
    return auto.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32, **options).eval()


def plain_logprobs(model: Any, rows: Rows) -> Tensor:
    """Log-probabilities of all response tokens [N], one row at a time, with gradient."""
    logprobs = []
    for prompt, response in zip(rows.prompts, rows.responses, strict=True):
        logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0].float()
        places = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
        logprobs.append(logits[places].log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)])
    return torch.cat(logprobs)


def plain_hidden(backbone: Any, rows: Rows) -> list[Tensor]:
    """Last hidden states of each row [T, d]."""
    with torch.no_grad():
        return [backbone(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state[0] for row in rows.sequences]


def with_adapter(folder: Path, adapter: Path, **options: Any) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(plain(folder, **options), str(adapter)).eval()


# Decoders


def check_logprobs(family: Family, folder: Path, scratch: Path) -> float:
    rows, tokenizer = Rows(family), load_tokenizer(str(folder))
    policy = Policy(load_language_model(str(folder), dtype=torch.float32, tokenizer=tokenizer), temperature=1.0, autocast=None)
    return difference(policy.logprobs(rows.batch()), plain_logprobs(plain(folder), rows))


def check_gradient(family: Family, folder: Path, scratch: Path) -> float:
    """One full step: the gradient of the summed log-probabilities, and the weights after an SGD step by hand."""
    rows = Rows(family)
    model = load_language_model(str(folder), dtype=torch.float32)
    policy = Policy(model, temperature=1.0, autocast=None)
    policy.loss(rows.batch(), lambda logprobs, entropies, places: -logprobs).summed.backward()
    reference = plain(folder)
    (-plain_logprobs(reference, rows).sum()).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == expected.keys(), f"gradients for {sorted(gradients.keys() ^ expected.keys())[:3]} on one side alone"
    return max(difference(gradients[name], expected[name]) for name in expected)


def check_rewards(family: Family, folder: Path, scratch: Path) -> float:
    """Scores and values with padding on either side, also after saving and loading here and by AutoModelForSequenceClassification."""
    rows, saved = Rows(family), scratch / "reward"
    reward = RewardModel.from_language_model(str(folder), dtype=torch.float32, trainable=False)
    reward.center(0.5)
    hidden = plain_hidden(plain(folder, AutoModel), rows)
    weight, bias = reward.score_head.weight[0].detach(), -0.5
    expected = torch.stack([states[-1] @ weight + bias for states in hidden])
    differences = [difference(reward.score(*rows.padded("right")), expected)]
    differences.append(difference(reward.score(*rows.padded("left")), expected))
    value = ValueModel(reward.backbone)
    value.set_head(reward.score_head.weight, reward.reward_bias)
    batch = rows.batch()
    of_values = torch.stack([hidden[row][column] @ weight + bias for row, column in zip(batch.rows, batch.columns, strict=True)])
    with torch.no_grad():
        differences.append(difference(sequence_values(value, batch, policy_precision()), of_values))
    reward.save(saved)
    differences.append(difference(RewardModel.from_pretrained(str(saved), dtype=torch.float32).score(*rows.padded("right")), expected))
    if AutoConfig.from_pretrained(saved).architectures[0].endswith("ForSequenceClassification"):
        foreign = plain(saved, AutoModelForSequenceClassification)
        with torch.no_grad():
            scores = torch.cat([foreign(input_ids=torch.tensor([row])).logits[0] for row in rows.sequences])
        differences.append(difference(scores + bias, expected))
    return max(differences)


def policy_precision() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def check_lora(family: Family, folder: Path, scratch: Path) -> float:
    """An adapter's log-probabilities and gradient equal those of peft with eager attention, also after merging, exporting and loading."""
    rows, adapter, merged = Rows(family), scratch / "adapter", scratch / "merged"
    model = load_language_model(str(folder), dtype=torch.float32, lora=LORA, tokenizer=load_tokenizer(str(folder)))
    grow(model)
    policy = Policy(model, temperature=1.0, autocast=None)
    policy.loss(rows.batch(), lambda logprobs, entropies, places: -logprobs).summed.backward()
    save_model(model, tokenizer_of(family.tokenizer), adapter)
    reference = with_adapter(folder, adapter)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_("lora_" in name)
    logprobs = plain_logprobs(reference, rows)
    (-logprobs.sum()).backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters() if "lora_" in name}
    gradients = [
        difference(parameter.grad, expected[name])
        for name, parameter in model.named_parameters()
        if "lora_" in name and expected[name] is not None
    ]
    assert gradients, "no adapter weight has a gradient"
    differences = [difference(policy.logprobs(rows.batch()), logprobs), *gradients]
    save_merged(as_resolved(str(adapter)), merged)
    differences.append(difference(plain_logprobs(plain(merged), rows), logprobs))
    return max(differences)


def grow(model: Any) -> None:
    """Set the matrices of an adapter that are 0 at first to random numbers."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def check_nf4(family: Family, folder: Path, scratch: Path) -> float:
    """Log-probabilities of an adapter on nf4 weights equal those of transformers' quantized model with eager attention."""
    rows, adapter = Rows(family), scratch / "nf4-adapter"
    source = resolved(folder, quantization="nf4")
    model = load_language_model(source, dtype=torch.float32, lora=LORA)
    grow(model)
    policy = Policy(model, temperature=1.0, autocast=None)
    policy.loss(rows.batch(), lambda logprobs, entropies, places: -logprobs).summed.backward()
    save_model(model, tokenizer_of(family.tokenizer), adapter)
    skipped = [name for name, module in model.get_base_model().named_modules() if type(module) in (torch.nn.Linear, Linear)]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=[name.removesuffix(".base_layer") for name in skipped if "lora_" not in name],
    )
    reference = with_adapter(folder, adapter, quantization_config=settings, device_map={"": "cpu"})
    for module in reference.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        expected = plain_logprobs(reference, rows)
    return difference(policy.logprobs(rows.batch()), expected)


def check_decoding(family: Family, folder: Path, scratch: Path) -> float:
    """Greedy completions of prompts of different lengths have the tokens and log-probabilities of the reference."""
    rows = Rows(family)
    model = load_language_model(str(folder), dtype=torch.float32, trainable=False)
    settings = GenerationSettings(max_new_tokens=6, temperature=0.0)
    made = generate(model, rows.prompts, settings, seeds=[1, 2, 3], stop_ids=[], pad_token_id=rows.pad)
    reference, largest = plain(folder), 0.0
    for index, prompt in enumerate(rows.prompts):
        ids = list(prompt)
        for position, token in enumerate(made.response_ids[index].tolist()):
            with torch.no_grad():
                logprobs = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            gap = float(logprobs.max() - logprobs[token])
            assert gap < 1e-3, f"token {position} of row {index} is not the most likely one: {gap:.3f} nats behind it"
            largest = max(largest, abs(float(made.logprobs[index, position] - logprobs[token])))
            ids.append(token)
    return largest


def resolved(folder: Path, **fields: Any) -> ResolvedModel:
    return ResolvedModel(ref=str(folder), kind="folder", path=str(folder), digest="", input=ModelInput(ref=str(folder), **fields))


DECODER_CHECKS = {
    "log-probabilities": check_logprobs,
    "full step": check_gradient,
    "rewards and values": check_rewards,
    "LoRA, merged and reloaded": check_lora,
    "LoRA on nf4": check_nf4,
    "decoding": check_decoding,
}


# Classifiers


def texts_of(family: Family) -> list[list[int]]:
    return [tokenizer_of(family.tokenizer)(text)["input_ids"][: 9 + 4 * index] for index, text in enumerate(PROMPTS)]


def plain_classes(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([model(input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits.float() for row in rows])


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


def check_classes(family: Family, folder: Path, scratch: Path) -> float:
    rows = texts_of(family)
    model = load_classifier(str(folder), dtype=torch.float32, trainable=False, tokenizer=load_tokenizer(str(folder)))
    ids, mask = padded(rows, tokenizer_of(family.tokenizer).pad_token_id)
    with torch.no_grad():
        return difference(
            model(input_ids=ids, attention_mask=mask).logits, plain_classes(plain(folder, AutoModelForSequenceClassification), rows)
        )


def check_classifier_lora(family: Family, folder: Path, scratch: Path) -> float:
    """An adapter with its trained head is saved, merged, and loaded by plain transformers."""
    rows, adapter, merged = texts_of(family), scratch / "adapter", scratch / "merged"
    tokenizer = tokenizer_of(family.tokenizer)
    model = load_classifier(str(folder), dtype=torch.float32, lora=LORA, tokenizer=load_tokenizer(str(folder)))
    grow(model)
    ids, mask = padded(rows, tokenizer.pad_token_id)
    logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    logits.sum().backward()
    assert any(parameter.grad is not None and float(parameter.grad.abs().sum()) > 0 for name, parameter in model.named_parameters())
    save_model(model, tokenizer, adapter)
    save_merged(as_resolved(str(adapter)), merged)
    with torch.no_grad():
        return difference(logits, plain_classes(plain(merged, AutoModelForSequenceClassification), rows))


def check_classifier_bf16(family: Family, folder: Path, scratch: Path) -> float:
    """A LoRA classifier in bf16, as with ``precision: auto`` on a GPU: its outputs are close to those in fp32."""
    rows = texts_of(family)
    reference = plain_classes(plain(folder, AutoModelForSequenceClassification), rows).detach()
    ids, mask = padded(rows, tokenizer_of(family.tokenizer).pad_token_id)
    model = load_classifier(str(folder), dtype=torch.bfloat16, lora=LORA)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits
    logits.float().sum().backward()
    return difference(logits.float(), reference)


CLASSIFIER_CHECKS = {
    "classes": check_classes,
    "LoRA, merged and reloaded": check_classifier_lora,
    "LoRA in bf16": check_classifier_bf16,
}

TOLERANCE = {"LoRA in bf16": 0.1}  # bf16 keeps 8 bits; the models are 2 layers deep
EXACT = 2e-4  # fp32 sums in another order

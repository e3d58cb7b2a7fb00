"""Classifiers that are trained further: the order of their classes, new heads with LoRA, and rows that cannot be padded on the right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from stages.config import LoraSettings, ModelInput
from stages.errors import ModelError
from stages.models.classifiers.inputs import arguments_of, ended, padded_rows, same_length_groups
from stages.models.loading import load_classifier
from stages.models.saving import save_model
from stages.registry.references import ResolvedModel
from stages.training.microbatches import chosen_rows

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "deberta-v2": {**BERT, "pooler_hidden_size": 16, "relative_attention": True, "pos_att_type": ["p2c"]},
    "xlnet": {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32, "vocab_size": 40, "initializer_range": 0.3},
    "bart": {
        "d_model": 16,
        **{
            f"{part}_{name}": value
            for part in ("encoder", "decoder")
            for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
        },
        "vocab_size": 40,
        "max_position_embeddings": 32,
        "init_std": 0.3,
        "eos_token_id": 39,
    },
    "deberta": {**BERT, "pooler_hidden_size": 16, "relative_attention": True, "pos_att_type": ["p2c"]},
    "big_bird": {**BERT, "max_position_embeddings": 128, "block_size": 4, "num_random_blocks": 1},
    "fnet": {name: value for name, value in BERT.items() if name != "num_attention_heads"},
    "canine": {name: value for name, value in BERT.items() if name != "vocab_size"},
    "xmod": {**BERT, "vocab_size": 400},
    "t5": {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
        "vocab_size": 40,
        "eos_token_id": 39,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
        "initializer_factor": 3.0,
    },
}
IDS = torch.tensor([[5, 6, 7, 8, 39]])


def saved(folder: Path, kind: str, auto: Any = AutoModelForSequenceClassification, **fields: Any) -> Path:
    torch.manual_seed(1)
    auto.from_config(AutoConfig.for_model(kind, **{**FAMILIES[kind], **fields})).save_pretrained(folder)
    return folder


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = load_classifier(str(folder), dtype=torch.float32, require_head=False, **options).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits[0]


def test_the_outputs_follow_the_labels_if_the_checkpoint_has_them_in_another_order(tmp_path: Path, caplog: Any) -> None:
    folder = saved(tmp_path / "bert", "bert", id2label={0: "POSITIVE", 1: "NEGATIVE", 2: "MIXED"})
    own = AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=IDS).logits[0].detach()
    torch.testing.assert_close(logits(folder, labels=["negative", "mixed", "positive"]), own[[1, 2, 0]])
    assert caplog.messages == []
    torch.testing.assert_close(logits(folder, labels=["good", "bad", "even"]), own)
    assert "the classes POSITIVE, NEGATIVE, MIXED of" in caplog.text and "are now called good, bad, even" in caplog.text
    assert len(logits(folder, labels=["negative", "positive"])) == 2
    assert "has 3 classes (POSITIVE, NEGATIVE, MIXED) and labels has 2: its head is replaced" in caplog.text


# The pooler of DeBERTa and the heads of XLNet and BART have names that peft does not train by itself. A masked BERT has no pooler.
@pytest.mark.parametrize(
    ("kind", "auto"), [("bert", AutoModelForMaskedLM), ("deberta-v2", AutoModel), ("xlnet", AutoModel), ("bart", AutoModel)]
)
def test_lora_trains_and_saves_a_new_head(tmp_path: Path, kind: str, auto: Any, resolve_folder: Any, tokenizer_of: Any) -> None:
    tokenizer = tokenizer_of("wordpiece")
    source = resolve_folder(saved(tmp_path / kind, kind, auto, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id))
    tokenizer.save_pretrained(source.path)
    lora = LoraSettings(r=2)
    model = load_classifier(source, dtype=torch.float32, labels=["a", "b"], require_head=False, lora=lora)
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    assert len(head) == (4 if kind in ("deberta-v2", "xlnet", "bart", "bert") else 2) and all(parameter.requires_grad for parameter in head)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_model(model, tokenizer, tmp_path / "adapter", rows=IDS.tolist())  # raises ModelError if the saved adapter computes something else


def test_a_head_that_does_not_fit_the_config_says_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "bert", "bert", id2label={0: "a", 1: "b", 2: "c"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name not in ("id2label", "label2id")}))
    with pytest.raises(ModelError, match=r"classifier\.(bias|weight) has shape \[3.*but \[2.*Correct id2label"):
        load_classifier(str(folder), dtype=torch.float32)


def test_a_classifier_that_reads_the_end_token_gets_one_in_short_rows() -> None:
    bart, bert = (AutoConfig.for_model(kind, **FAMILIES[kind]) for kind in ("bart", "bert"))
    assert ended([5, 6, 7], bart) == [5, 6, 39] and ended([5, 39, 7], bart) == [5, 39, 7] and ended([5, 6, 7], bert) == [5, 6, 7]


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_rows_with_different_numbers_of_end_tokens_are_read_at_their_last_one(tmp_path: Path, kind: str) -> None:
    """transformers alone refuses such a pass. The expected logits are those of one row per pass, which it computes."""
    folder = saved(tmp_path / kind, kind, num_labels=3)
    plain, model = AutoModelForSequenceClassification.from_pretrained(folder).eval(), load_classifier(str(folder), dtype=torch.float32)
    rows = [[5, 39], [6, 39, 7, 8, 39], [9, 39, 39]]
    expected = torch.cat([plain(input_ids=torch.tensor([row])).logits for row in rows])
    batch = padded_rows([{"input_ids": row} for row in rows], 0)
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        plain(**batch)
    logits = model.eval()(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert type(model).__name__ == type(plain).__name__ and arguments_of(model) == arguments_of(plain)


@pytest.mark.parametrize("kind", ["xlnet", "fnet"])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["full", "LoRA"])
def test_a_family_that_cannot_compute_in_half_precision_gets_fp32_weights(tmp_path: Path, kind: str, lora: Any, caplog: Any) -> None:
    folder = saved(tmp_path / kind, kind, num_labels=3)
    expected = AutoModelForSequenceClassification.from_pretrained(folder).eval()(input_ids=IDS).logits
    model = load_classifier(str(folder), dtype=torch.bfloat16, lora=lora).eval()
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert "cannot compute in bfloat16" in caplog.text


def test_deberta_computes_in_half_precision(tmp_path: Path) -> None:
    """Its attention works with bf16 weights after one of its classes was replaced (models/layers/replacing.py)."""
    folder = saved(tmp_path / "deberta", "deberta")
    assert next(load_classifier(str(folder), dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_deberta_computes_with_nf4_weights(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """It computes the same as transformers' model in fp32 with the dequantized weights."""
    from bitsandbytes.functional import dequantize_4bit

    folder = saved(tmp_path / "deberta", "deberta")
    source = ResolvedModel("one", "folder", str(folder), "", ModelInput(ref="one", quantization="nf4"))
    model = load_classifier(source, dtype=dtype, trainable=False)
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    quantized = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert any(name.endswith("in_proj") for name in quantized)
    for name, module in quantized.items():
        plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
    torch.testing.assert_close(model(input_ids=IDS).logits.float(), plain(input_ids=IDS).logits, rtol=tolerance, atol=tolerance)


def test_the_outputs_of_bigbird_do_not_depend_on_earlier_texts(tmp_path: Path, caplog: Any) -> None:
    """transformers computes a long text with sparse attention until the first short one, and then with full attention."""
    folder = saved(tmp_path / "big_bird", "big_bird")
    long = torch.randint(1, 39, (1, 96), generator=torch.Generator().manual_seed(0))
    full = AutoModelForSequenceClassification.from_pretrained(folder, attention_type="original_full").eval()
    model = load_classifier(str(folder), dtype=torch.float32).eval()
    torch.testing.assert_close(model(input_ids=long).logits, full(input_ids=long).logits)
    model(input_ids=IDS)
    torch.testing.assert_close(model(input_ids=long).logits, full(input_ids=long).logits)
    assert "computes with full attention" in caplog.text


@pytest.mark.parametrize(("kind", "problem"), [("canine", "no embedding with one row per token"), ("xmod", "Input language unknown")])
def test_a_classifier_that_reads_something_else_than_token_ids_is_refused(
    tmp_path: Path, kind: str, problem: str, tokenizer_of: Any
) -> None:
    folder = saved(tmp_path / kind, kind)
    with pytest.raises(ModelError, match=problem):
        load_classifier(str(folder), dtype=torch.float32, tokenizer=tokenizer_of("wordpiece"))


def test_rows_are_padded_on_either_side_and_trimmed() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 2]},
        {"input_ids": [8], "token_type_ids": [2]},
        {"input_ids": [9, 4], "token_type_ids": [0, 2]},
    ]
    batch = padded_rows(rows, 1, "left")
    assert batch["input_ids"].tolist() == [[5, 6, 7], [1, 1, 8], [1, 9, 4]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 2], [0, 0, 2], [0, 0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert chosen_rows(batch, [1, 2])["input_ids"].tolist() == [[1, 8], [9, 4]]
    assert chosen_rows(padded_rows(rows, 1), [1, 2])["input_ids"].tolist() == [[8, 1], [9, 4]]
    assert same_length_groups([3, 1, 3, 3], most=2) == [[1], [0, 2], [3]]

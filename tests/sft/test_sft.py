"""Supervised fine-tuning: only completions are trained, packing changes no gradient, rows that are too long are left out and reported."""

from __future__ import annotations

import gc
import json
import pickle
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from stages.corpora.comparisons import comparison
from stages.corpora.demonstrations import Demonstration, demonstration
from stages.corpora.encoding.blocks import encode_documents
from stages.corpora.prompts import PromptRow
from stages.corpora.rows import Row
from stages.corpora.templates import encode_prompt, set_template
from stages.errors import DataError
from stages.models.layers import compiled as compiled_layers
from stages.models.loading import load_language_model
from stages.reward_model.rows import encode_pairs
from stages.sft.config import SFTStepConfig
from stages.sft.packing import PackedCollator, pack_rows
from stages.sft.rows import Encoded, EncodedRow, encode, pretraining_blocks
from stages.sft.run import _missing_end, _say_form, _say_untrained, run
from stages.sft.trainer import make_trainer
from stages.training.reproducible import IGNORED
from stages.training.running import train

ROWS = [EncodedRow([10, 11, 12, 13], 2), EncodedRow([20, 21], 1), EncodedRow([30, 31, 32, 33, 34], 3), EncodedRow([40, 41, 42], 1)]


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """Twenty prompt-completion pairs in a JSON-lines file."""
    path = tmp_path / "demonstrations.jsonl"
    rows = [
        {"prompt": f"write a line about the {thing} {number}:", "completion": f"the {thing} was a joy"}
        for number in range(5)
        for thing in ("film", "plot", "music", "ending")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path | str = "unused", **fields: Any) -> SFTStepConfig:
    settings = {
        "name": "sft",
        "model": "base",
        "precision": "fp32",
        "data": {"train": str(path), "validation_fraction": 0.2},
        "training": {"epochs": 3.0, "batch_size": 4, "learning_rate": 1e-2},
    }
    return SFTStepConfig.model_validate({**settings, **fields})


def test_counted_tokens_of_the_loss() -> None:
    assert EncodedRow([1, 2, 3, 4], 2).counted(True) == [0, 0, 1, 1]
    assert EncodedRow([1, 2, 3, 4], 2).counted(False) == [0, 1, 1, 1]
    assert EncodedRow([1, 2, 3], 0).counted(True) == [0, 1, 1]  # nothing predicts the first token


def test_texts_and_token_lists_of_training_rows_are_freed_before_training(
    step_context: Any, tiny_llama_folder: Path, resolve_folder: Any, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    # isinstance() would follow the weak proxies of other tests in this process, whose objects may be gone; type() does not
    rows_before = [one for one in gc.get_objects() if type(one) in (Demonstration, EncodedRow)]
    before = {id(one) for one in rows_before}

    def counting(*arguments: Any, **named: Any) -> Any:
        gc.collect()
        for kind in (Demonstration, EncodedRow):
            alive.append(sum(type(one) is kind and id(one) not in before for one in gc.get_objects()))
        return train(*arguments, **named)

    monkeypatch.setattr("stages.sft.run.train", counting)
    context = step_context("test/freed", models={"model": resolve_folder(tiny_llama_folder)})
    metrics = run(config(demonstrations, training={"max_steps": 1, "batch_size": 4}), context).metrics
    assert metrics["demonstrations"] == 16 and metrics["dropped_too_long"] == 0
    assert alive == [4, 4]  # the held-out rows: 0.2 of the 20 rows


def test_equal_tokens_of_all_rows_are_one_object(tiny_tokenizer: Any) -> None:
    # CPython itself shares the integers up to 256 only; an own object of 28 bytes for each token would fill the memory with large data
    rows = [demonstration(Row(prompt="the film", completion=" was a joy")) for _ in range(2)]
    first, second = encode(rows, tiny_tokenizer, "all_assistant_turns").rows
    assert first.ids == tiny_tokenizer("the film was a joy")["input_ids"] + [tiny_tokenizer.eos_token_id] and max(first.ids) > 256
    assert first.trained is None and first.counted(True) == [0] * first.prompt_length + [1] * (len(first.ids) - first.prompt_length)
    prompt_ids = encode_prompt(tiny_tokenizer, "the film")
    document_ids = encode_documents(tiny_tokenizer, ["the film was a joy"])
    (pair,) = encode_pairs([("the film", " was a joy")], tiny_tokenizer, 99)
    for others in (second.ids, document_ids, pair, prompt_ids):
        assert all(one is other for one, other in zip(first.ids, others, strict=False)) and len(others) >= 2


def test_rows_have_no_dict_of_their_attributes() -> None:
    # it would need more memory than the texts of a short row, and rows are held by the million
    row = Row(prompt="a", completion="b")
    row.location = "a.jsonl:1"
    made = demonstration(row)
    rows = [row, made, made.with_prompt("c"), comparison(Row(prompt="a", chosen="b", rejected="c")), PromptRow("a"), *ROWS]
    assert not [one for one in rows if hasattr(one, "__dict__")]
    for one in (row, made):
        copied = pickle.loads(pickle.dumps(one))  # rows travel between processes
        assert copied == one and type(copied) is type(one) and copied.location == "a.jsonl:1"


def test_demonstrations_without_a_trained_reply_are_counted(tiny_tokenizer, monkeypatch) -> None:
    def said(weight: int) -> Row:
        return Row({"messages": [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "a plot", "weight": weight}]})

    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    read = [demonstration(said(weight)) for weight in (1, 0, 1)]
    encoded = encode(read, tiny_tokenizer, "all_assistant_turns")
    assert (len(encoded.rows), encoded.separate, encoded.untrained) == (2, 0, 1)
    with pytest.raises(DataError, match="a reply has weight 0, but completion_only_loss: false trains on every token"):
        encode(read, tiny_tokenizer, "all_assistant_turns", completion_only=False)


def test_left_out_demonstrations_are_reported_for_training_and_held_out_rows(capsys) -> None:
    context = SimpleNamespace(name="sft", runtime=SimpleNamespace(console=SimpleNamespace(print=print)))
    _say_untrained(Encoded([ROWS[0]], 0, 3), "held-out", context)
    _say_untrained(Encoded([ROWS[0]], 0, 0), "training", context)
    expected = "sft: left out 3 held-out demonstrations, because all their replies have weight 0\n"
    assert capsys.readouterr().out == expected
    with pytest.raises(DataError, match="all replies of the 2 training demonstrations have weight 0"):
        _say_untrained(Encoded([], 0, 2), "training", context)


def test_replies_without_an_end_token_are_reported(tiny_tokenizer) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    assert _missing_end(tokenizer) is None  # no chat template: the tokenizer's end token ends a completion
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    assert _missing_end(tokenizer) is None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' .' }}{% endfor %}"
    assert "the chat template ends a reply with ' .', without a special token" in str(_missing_end(tokenizer))
    tokenizer.eos_token = None
    assert "the chat template ends a reply with ' .'" in str(_missing_end(tokenizer))
    set_template(tokenizer, "question")
    for template in (tokenizer.chat_template, None):  # with an end token, both would end a completion
        tokenizer.chat_template = template
        assert "the tokenizer has no end token, so nothing ends a completion" in str(_missing_end(tokenizer))


def test_unknown_characters_are_counted(tokenizer_of, tiny_tokenizer, capsys) -> None:
    context = SimpleNamespace(name="sft", runtime=SimpleNamespace(console=SimpleNamespace(print=print)))
    rows = [Demonstration(prompt="hello é", completion="there 🦜"), Demonstration(prompt="hello", completion="there")]
    for tokenizer in (tokenizer_of("wordpiece"), tiny_tokenizer):
        _say_form(tokenizer, encode(rows, tokenizer, "all_assistant_turns"), context)
    assert capsys.readouterr().out.startswith("sft: 2 tokens of the training demonstrations are <unk>, because the vocabulary lacks")
    tokenizer = deepcopy(tiny_tokenizer)  # as GPT-2's, whose unknown token also ends a text
    tokenizer.unk_token = tokenizer.eos_token
    _say_form(tokenizer, encode(rows, tokenizer, "all_assistant_turns"), context)
    assert capsys.readouterr().out == ""


def test_packing_by_hand() -> None:
    packed = pack_rows(ROWS, 8, completion_only=True)
    # longest first: 5 opens a row (3 left), 4 opens a row (4 left); 3 fits best into the first (0 left), 2 into the second
    assert packed["input_ids"] == [[30, 31, 32, 33, 34, 40, 41, 42], [10, 11, 12, 13, 20, 21]]
    assert packed["position_ids"] == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1]]
    x = IGNORED
    assert packed["labels"] == [[x, x, x, 33, 34, x, 41, 42], [x, x, 12, 13, x, 21]]
    batch = PackedCollator(1)([{name: column[row] for name, column in packed.items()} for row in range(2)])
    assert batch["input_ids"][1].tolist() == [10, 11, 12, 13, 20, 21, 1, 1]
    assert batch["labels"][1].tolist() == [x, x, 12, 13, x, 21, x, x]
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 3, 0, 1, 0, 1]


def gradient(
    context: Any, folder: Path, tokenizer: Any, rows: list[EncodedRow], *, num_passes: int = 1, **fields: Any
) -> dict[str, torch.Tensor]:
    """The gradient of one optimizer step over all ``rows``, computed by TRL's trainer in ``num_passes`` passes."""
    model = load_language_model(str(folder), dtype=torch.float32)
    settings = config(training={"batch_size": len(rows), "microbatch_size": len(rows) // num_passes}, **fields)
    trainer = make_trainer(settings, context, model, tokenizer, rows, 16)
    trainer.context, trainer.current_gradient_accumulation_steps = context, 1
    (batch,), count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.training_step(trainer.model, batch, count)
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["llama", "without loss arguments", "gpt2"])
def test_step_has_the_gradient_of_the_mean_over_all_its_tokens(
    kind: str, step_context: Any, tiny_llama_folder: Path, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "gpt2":  # transformers counts the first label of its rows, which nothing predicts
        shape = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(vocab_size=len(tiny_tokenizer), **shape)).save_pretrained(tmp_path)
        tiny_tokenizer.save_pretrained(tmp_path)
    if kind == "without loss arguments":  # as the classes of Gemma 3n and Gemma 4 for text and images
        monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    folder = tmp_path if kind == "gpt2" else tiny_llama_folder
    actual = gradient(step_context(), folder, tiny_tokenizer, ROWS, num_passes=4, completion_only_loss=False)
    model = load_language_model(str(folder), dtype=torch.float32)
    # By hand: the sum over the tokens of all rows except the first of each, divided by their number, 3 + 1 + 4 + 2.
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row.ids])).logits[0, :-1], torch.tensor(row.ids[1:]), reduction="sum"
        )
        for row in ROWS
    ]
    (sum(losses) / 10).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_load_balancing_loss_of_experts_counts_once_in_a_step(step_context: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tiny_tokenizer), **shape, **experts)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    actual = gradient(step_context(), tmp_path, tiny_tokenizer, ROWS, num_passes=4)["model.layers.0.mlp.gate.weight"]
    model = load_language_model(str(tmp_path), dtype=torch.float32)
    loss = torch.zeros(())
    for row in ROWS:  # by hand: the mean over the 2 + 1 + 2 + 2 trained tokens, and half the mean over the four passes
        made = model(input_ids=torch.tensor([row.ids]), output_router_logits=True)
        start = row.prompt_length
        loss = loss + torch.nn.functional.cross_entropy(made.logits[0, start - 1 : -1], torch.tensor(row.ids[start:]), reduction="sum") / 7
        loss = loss + 0.5 * made.aux_loss / 4
    (expected,) = torch.autograd.grad(loss, [model.get_parameter("model.layers.0.mlp.gate.weight")])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_packed_demonstrations_have_the_gradient_of_separate_ones(step_context: Any, tiny_llama_folder: Path, tiny_tokenizer: Any) -> None:
    separate = gradient(step_context(name="test/a"), tiny_llama_folder, tiny_tokenizer, ROWS)
    packed = gradient(step_context(name="test/b"), tiny_llama_folder, tiny_tokenizer, ROWS, packing=True)
    for name, expected in separate.items():
        torch.testing.assert_close(packed[name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_layers_train_like_usual_ones(
    step_context: Any, tiny_llama_folder: Path, resolve_folder: Any, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_layers, "BACKEND", "aot_eager")  # it traces the passes, but generates no code: fast
    results = {}
    for compiles in (False, True):
        context = step_context(f"test/{compiles}", models={"model": resolve_folder(tiny_llama_folder)})
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "torch_compile": compiles}
        results[compiles] = run(config(demonstrations, training=training), context).metrics
        assert context.compiled_layers["compiled"] == compiles
    assert context.compiled_layers["layers"] == 2 and context.compiled_layers["graphs"] <= 2
    for name in ("train_loss", "heldout_loss_after"):
        assert results[True][name] == pytest.approx(results[False][name], rel=1e-5)


@pytest.mark.detail("S7")
def test_prompt_tokens_are_not_learned(step_context: Any, tiny_llama_folder: Path, tiny_tokenizer: Any) -> None:
    def head_rows(completion_only: bool, name: str) -> torch.Tensor:
        context = step_context(name=name)
        gradients = gradient(context, tiny_llama_folder, tiny_tokenizer, [ROWS[0]], completion_only_loss=completion_only)
        return gradients["lm_head.weight"]

    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32)
    # By hand: cross-entropy of tokens 12 and 13 alone (positions 1 and 2 predict them), or of 11, 12 and 13.
    for completion_only, first in ((True, 1), (False, 0)):
        logits = model(input_ids=torch.tensor([ROWS[0].ids])).logits[0, first:3]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ROWS[0].ids[first + 1 :]))
        (expected,) = torch.autograd.grad(loss, [model.lm_head.weight])
        torch.testing.assert_close(head_rows(completion_only, f"test/{first}"), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"packing": True},
        {"lora": {"r": 4}},
        {"completion_only_loss": False},
        {"training": {"gradient_checkpointing": True}},
        {"lora": {"r": 4}, "model": {"ref": "base", "quantization": "nf4"}},
    ],
    ids=["full", "packing", "lora", "all-text", "checkpointing", "nf4"],
)
def test_fine_tuning_lowers_the_held_out_loss(
    demonstrations: Path, step_context: Any, tiny_llama_folder: Path, resolve_folder: Any, fields: dict[str, Any]
) -> None:
    settings = {"epochs": 3.0, "batch_size": 4, "microbatch_size": 2, "learning_rate": 1e-2, **fields.get("training", {})}
    step = config(demonstrations, template="instruction", **{**fields, "training": settings})
    source = resolve_folder(tiny_llama_folder, quantization=step.model.quantization)
    result = run(step, step_context(models={"model": source}))
    assert result.metrics["heldout_loss_after"] < result.metrics["heldout_loss_before"] - 0.1
    assert result.metrics["demonstrations"] == 16 and result.metrics["heldout_demonstrations"] == 4
    assert result.model is not None and result.model.is_adapter == (step.lora is not None)
    assert result.model.manifest["extra"] == {"template": "instruction"}
    from stages.models.loading import load_tokenizer

    assert "### Response:" in (load_tokenizer(str(result.model.path)).chat_template or "")  # the template travels with the model


def test_equal_runs_make_equal_models(demonstrations: Path, step_context: Any, tiny_llama_folder: Path, resolve_folder: Any) -> None:
    models = {"model": resolve_folder(tiny_llama_folder)}
    for fields in ({}, {"lora": {"r": 4}}):
        digests = set()
        for turn in range(2):
            context = step_context(name=f"test/{len(fields)}-{turn}", seed=3, models=models)
            digests.add(run(config(demonstrations, **fields), context).model.digest)
        assert len(digests) == 1


def test_rows_that_are_too_long_are_left_out_and_counted(
    tmp_path: Path, step_context: Any, tiny_llama_folder: Path, resolve_folder: Any
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a fine film", "completion": "and honest"}] * 6 + [{"prompt": "x " * 60, "completion": "too long"}]
    heldout = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heldout.write_text(json.dumps(rows[0]) + "\n")
    context = step_context(models={"model": resolve_folder(tiny_llama_folder)})
    data = {"train": str(path), "validation": str(heldout)}
    result = run(config(data=data, max_length=40, training={"max_steps": 1, "batch_size": 2}), context)
    assert (result.metrics["demonstrations"], result.metrics["dropped_too_long"]) == (6, 1)
    context = step_context(models={"model": resolve_folder(tiny_llama_folder)})
    with pytest.raises(DataError, match="no training demonstration fits max_length=3: the shortest of 7 has"):
        run(config(data=data, max_length=3), context)


def test_quantized_weights_need_an_adapter() -> None:
    with pytest.raises(ValidationError, match="needs lora"):
        config(model={"ref": "base", "quantization": "int8"})


@pytest.mark.detail("S5")
def test_pretraining_texts_are_a_tenth_of_the_rows(
    demonstrations: Path, tmp_path: Path, step_context: Any, tiny_llama_folder: Path, tiny_tokenizer: Any, resolve_folder: Any
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the acting was warm and the film was a joy\n" * 3000)
    mix = {"data": str(corpus), "block_size": 8}
    drawn = pretraining_blocks(config(demonstrations, pretraining_mix=mix), tiny_tokenizer, 9000, seed=1)
    assert len(drawn.train) / (len(drawn.train) + 9000) == pytest.approx(0.10, abs=0.01)
    assert all(len(row.ids) == 8 and row.counted(True) == [0] + [1] * 7 for row in drawn.train)  # every token counts except the first
    assert [row.ids for row in drawn.train] != [
        row.ids for row in pretraining_blocks(config(demonstrations, pretraining_mix=mix), tiny_tokenizer, 9000, seed=2).train
    ]
    with pytest.raises(DataError, match="a share of 0.9 with 9000 demonstrations needs 81000 blocks of 8 tokens, but the texts give only"):
        pretraining_blocks(config(demonstrations, pretraining_mix={**mix, "share": 0.9}), tiny_tokenizer, 9000, seed=1)
    for packing in (False, True):
        context = step_context(name=f"test/mixed{packing}", models={"model": resolve_folder(tiny_llama_folder)})
        result = run(config(demonstrations, pretraining_mix={**mix, "share": 0.2}, packing=packing), context)
        assert result.metrics["pretraining_rows"] == 4  # in addition to 16 demonstrations
        assert result.metrics["pretraining_loss_after"] < result.metrics["pretraining_loss_before"] - 0.1


def test_left_out_rows_are_counted(tmp_path: Path, step_context: Any, tiny_llama_folder: Path, resolve_folder: Any) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"line {number}:", "completion": "a joy " * (1 + number % 3), "user": "u"} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = step_context(models={"model": resolve_folder(tiny_llama_folder)})
    curation = {"tokens": {"completion": [1, 8]}, "max_per_user": 4}
    result = run(config(path, curation=curation, training={"max_steps": 1, "batch_size": 2}, residual_dropout=0.2), context)
    assert result.metrics["demonstrations"] == 4
    assert result.metrics["curation_length"] + result.metrics["curation_user"] + 4 + result.metrics["heldout_demonstrations"] == 20


def test_long_prompts_are_shortened(tmp_path: Path, step_context: Any, tiny_llama_folder: Path, resolve_folder: Any) -> None:
    path = tmp_path / "posts.jsonl"
    rows = [{"prompt": "POST: " + "the film was a joy\n" * 20 + "TL;DR:", "completion": "joy"}] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = step_context(models={"model": resolve_folder(tiny_llama_folder)})
    fit = {"max_tokens": 40, "after": "POST: ", "before": "TL;DR:"}
    result = run(config(path, prompt_fit=fit, max_length=60, training={"max_steps": 1, "batch_size": 2}), context)
    assert result.metrics["dropped_too_long"] == 0

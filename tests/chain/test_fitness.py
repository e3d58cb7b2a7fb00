"""Models that do not fit their role are refused when the recipe is planned, before any step trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    FalconConfig,
    Gemma2Config,
    MambaConfig,
    T5Config,
    T5Model,
)

from stages.chain import fitness
from stages.chain import run as chain
from stages.chain.fitness import read_config
from stages.chain.planning import plan
from stages.errors import ModelError, RecipeError
from stages.memory_plan.plan import check_adapters
from stages.process.runtime import Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

SIZES = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """Folders: bert (a classifier), falcon, gemma2, t5."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    made = {
        "bert": AutoModelForSequenceClassification.from_config(BertConfig(**SIZES, intermediate_size=32)),
        "falcon": AutoModelForCausalLM.from_config(FalconConfig(**SIZES)),
        "gemma2": AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=16)),
        "t5": T5Model(T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    }
    for name, model in made.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def planned(tmp_path: Path, llama: Path, last: str, first: str = "sft") -> Any:
    """Plan a recipe whose first step, called ``first``, is fine and whose last step is ``last``."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}\n' * 20)
    path = tmp_path / "late.yaml"
    path.write_text(
        f"name: late\nsteps:\n  - {{stage: sft, name: {first}, model: {llama}, data: {{train: rows.jsonl}}}}\n  - {{name: last, {last}}}\n"
    )
    return plan(load_recipe(path), tmp_path / "home")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("stage: ppo, policy: MODELS/bert, reward: [{function: 'os:getcwd'}], data: ROWS", "is a bert model; a policy or"),
        ("stage: ppo, policy: sft, reward: [{model: MODELS/bert}], data: ROWS", r"reward\[0\].model: .* is a bert model"),
        ("stage: reward_model, model: MODELS/t5, data: {train: ROWS}", "is a t5 model, an encoder-decoder"),
        ("stage: dpo, model: {ref: MODELS/falcon, quantization: nf4}, lora: {}, data: {train: ROWS}", "nf4 affects no layer of"),
        ("stage: sft, model: {ref: MODELS/gemma2, attention: sdpa}, data: {train: ROWS}", "does not support sdpa"),
        ("stage: evaluation, candidates: {a: sft, b: MODELS/bert}, data: ROWS, judges: [{function: 'os:getcwd'}]", "is a bert model"),
    ],
    ids=["encoder policy", "encoder reward model", "encoder-decoder", "falcon nf4", "attention", "candidate"],
)
def test_unusable_model_of_the_last_step_is_refused_at_the_plan(
    models: Path, tmp_path: Path, tiny_llama_folder: Path, last: str, message: str
) -> None:
    last = last.replace("MODELS", str(models)).replace("ROWS", "rows.jsonl")
    with pytest.raises(RecipeError, match=rf"late.yaml:4: .*last.*{message}"):
        planned(tmp_path, tiny_llama_folder, last)
    assert not (tmp_path / "home" / "registry" / "models").exists()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            "stage: sft, model: made, packing: true, data: {train: rows.jsonl}",
            r"packing: true does not work with 'made' \(MambaForCausalLM\)",
        ),
        (
            "stage: ppo, policy: {ref: made, attention: flex_attention}, reward: [{function: 'os:getcwd'}], data: rows.jsonl",
            "not support flex",
        ),
        (
            "stage: ppo, policy: LLAMA, reward: [{model: START, label: 0}], data: rows.jsonl",
            "of which transformers has no sequence classifier",
        ),
    ],
    ids=["packing", "attention", "classifier"],
)
def test_what_a_family_does_not_support_is_refused_at_the_plan_also_after_an_earlier_step(
    tmp_path: Path, tiny_llama_folder: Path, last: str, message: str
) -> None:
    config = MambaConfig(vocab_size=300, hidden_size=32, state_size=4, num_hidden_layers=1, time_step_rank=4)
    save_as_made(AutoModelForCausalLM.from_config(config), tiny_llama_folder, tmp_path)
    last = last.replace("LLAMA", str(tiny_llama_folder)).replace("START", str(tmp_path / "start"))
    with pytest.raises(RecipeError, match=rf"late.yaml:4: .*last.*{message}"):
        planned(tmp_path, tmp_path / "start", last, first="made")


BART = {"vocab_size": 300, "d_model": 16, "max_position_embeddings": 16, "encoder_layers": 1, "decoder_layers": 1}
BART |= {f"{part}_{size}": number for part in ("encoder", "decoder") for size, number in (("ffn_dim", 16), ("attention_heads", 2))}


@pytest.mark.parametrize(
    ("last", "is_refused"),
    [
        ("stage: reward_model, model: made, data: {train: rows.jsonl}", True),
        ("stage: ppo, policy: made, reward: [{function: 'os:getcwd'}], data: rows.jsonl", True),
        ("stage: ppo, policy: made, reward: [{function: 'os:getcwd'}], data: rows.jsonl, value: shared", False),
        ("stage: ppo, policy: made, reward: [{function: 'os:getcwd'}], data: rows.jsonl, advantages: reinforce", False),
    ],
    ids=["reward model", "value network", "shared value head", "no value network"],
)
def test_scores_by_the_decoder_of_an_encoder_decoder_are_refused_at_the_plan(
    tmp_path: Path, tiny_llama_folder: Path, last: str, is_refused: bool
) -> None:
    save_as_made(BartForCausalLM(BartConfig(**BART)), tiny_llama_folder, tmp_path)
    if not is_refused:
        assert [step.action for step in planned(tmp_path, tmp_path / "start", last, first="made")] == ["run", "run"]
        return
    with pytest.raises(RecipeError, match=r"late.yaml:4: .*last.*'made' is the decoder of an encoder-decoder"):
        planned(tmp_path, tmp_path / "start", last, first="made")


def save_as_made(model: Any, tokenizer: Path, folder: Path) -> None:
    """The model that the first step of ``planned`` starts from."""
    model.save_pretrained(folder / "start")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "start")


def test_an_adapter_that_does_not_fit_the_model_of_the_last_step_ends_the_run_at_its_start(tmp_path: Path, tiny_llama_folder: Path) -> None:
    """``plan`` itself checks no adapters. The name is wrong for a Llama; the second one fits."""
    for name, message in (("c_attn", r"last: lora.target_modules names c_attn, which LlamaForCausalLM does not have"), ("q_proj", "")):
        last = f"stage: dpo, model: sft, lora: {{target_modules: [{name}]}}, data: {{train: rows.jsonl}}"
        planned(tmp_path, tiny_llama_folder, last)
        recipe, registry = load_recipe(tmp_path / "late.yaml"), Registry(tmp_path / "home" / "registry")
        if message:
            with pytest.raises(ModelError, match=message):
                chain.run(recipe, tmp_path / "home", Runtime(quiet=True))
        else:
            check_adapters(recipe, registry, "cpu", reused=[])
        assert not (tmp_path / "home" / "registry" / "models").exists()


def test_classifier_with_a_label_is_accepted_as_reward(models: Path, tmp_path: Path, tiny_llama_folder: Path) -> None:
    last = f"stage: ppo, policy: sft, reward: [{{model: {models}/bert, label: 0}}], data: rows.jsonl"
    assert [step.action for step in planned(tmp_path, tiny_llama_folder, last)] == ["run", "run"]


def test_a_candidate_whose_name_has_a_dot_is_planned(models: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    best_of = f"{{n: 2, reward: {{model: {models}/bert, label: LABEL_1}}}}"
    last = (
        f"stage: evaluation, candidates: {{llama-2.8b: {{model: sft, best_of: {best_of}}}, llama-2.8b-bare: sft}}, data: rows.jsonl, "
        f"judges: [{{model: {models}/bert, label: LABEL_1}}]"
    )
    assert [step.action for step in planned(tmp_path, tiny_llama_folder, last)] == ["run", "run"]


def test_the_config_of_a_model_is_read_once_for_all_steps(tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(fitness, "read_config", lambda model: read.append(model.path) or read_config(model))
    last = f"stage: evaluation, candidates: {{a: sft, b: {tiny_llama_folder}, c: {tiny_llama_folder}}}, data: rows.jsonl, "
    planned(tmp_path, tiny_llama_folder, f"{last} judges: [{{function: 'os:getcwd'}}]")
    assert read == [str(tiny_llama_folder)]


# Roles: which kind of model a field reads

CHAIN = """
name: roles
steps:
  - {{stage: sft, name: sft, model: {llama}, data: {{train: rows.jsonl}}}}
  - {{stage: reward_model, name: judge, model: sft, data: {{train: rows.jsonl}}}}
  - {{stage: sentiment, name: taste, model: {bert}, data: {{train: reviews.jsonl}}}}
  - {{name: last, {last}}}
"""


def planned_after_all(tmp_path: Path, llama: Path, bert: Path, last: str) -> Any:
    """Plan a recipe whose step ``last`` can read a language model, a reward model and a classifier of earlier steps."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}\n' * 20)
    (tmp_path / "reviews.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n' * 10)
    path = tmp_path / "roles.yaml"
    path.write_text(CHAIN.format(llama=llama, bert=bert, last=last))
    return plan(load_recipe(path), tmp_path / "home")


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ("stage: ppo, policy: judge, reward: [{model: judge}], data: rows.jsonl", "policy: 'judge' is a reward model; expected a language"),
        ("stage: ppo, policy: taste, reward: [{model: judge}], data: rows.jsonl", "policy: 'taste' is a classifier; expected a language"),
        (
            "stage: ppo, policy: sft, reward: [{model: sft}], data: rows.jsonl",
            r"reward\[0\].model: 'sft' is a language model; a reward needs",
        ),
        ("stage: ppo, policy: sft, reward: [{model: taste}], data: rows.jsonl", "'taste' is a classifier; set label to the class"),
        (
            "stage: ppo, policy: sft, reward: [{model: judge, label: 1}], data: rows.jsonl",
            "'judge' is a reward model; expected a classifier",
        ),
        ("stage: sft, model: judge, data: {train: rows.jsonl}", "model: 'judge' is a reward model; expected a language model"),
        ("stage: dpo, model: sft, reference: judge, data: {train: rows.jsonl}", "reference: 'judge' is a reward model"),
        ("stage: reward_model, model: taste, data: {train: rows.jsonl}", "model: 'taste' is a classifier; expected a language model or a"),
        (
            "stage: evaluation, candidates: {a.b: sft, c: judge}, data: rows.jsonl, judges: [{model: judge}]",
            "candidates.c: 'judge' is a reward model",
        ),
    ],
)
def test_a_model_in_the_field_of_another_role_is_refused_at_the_plan(
    last: str, message: str, models: Path, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=rf"roles.yaml:7: steps\[3\] \(last\): .*{message}"):
        planned_after_all(tmp_path, tiny_llama_folder, models / "bert", last)


@pytest.mark.parametrize(
    "last",
    [
        "stage: ppo, policy: sft, value: judge, reward: [{model: judge}, {model: taste, label: 1}], data: rows.jsonl",
        "stage: reward_model, model: judge, data: {train: rows.jsonl}",
        "stage: evaluation, candidates: {a.b: {model: sft, best_of: {n: 2, reward: {model: judge}}}, c: sft}, data: rows.jsonl, "
        "judges: [{model: judge}]",
    ],
)
def test_models_of_the_expected_roles_are_planned(last: str, models: Path, tiny_llama_folder: Path, tmp_path: Path) -> None:
    assert len(planned_after_all(tmp_path, tiny_llama_folder, models / "bert", last)) == 4

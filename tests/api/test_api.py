"""The Python interface, on models, data sets and functions in memory. The snippets of docs/python.md are run by tests/test_docs.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stages
from stages.api.functions import address_of
from stages.api.inputs import as_field
from stages.api.running import write_recipe
from stages.errors import StagesError
from stages.recipe.schema import data_inputs, load_recipe

PROMPTS = [{"prompt": f"word {number}"} for number in range(8)]
TRAINING = {"max_steps": 1, "batch_size": 4, "microbatch_size": 4}


def shortness(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward of an importable module."""
    return [-float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def pair(tiny_llama_folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder), AutoTokenizer.from_pretrained(tiny_llama_folder)


def ppo(policy: Any, reward: Any, **fields: Any) -> stages.PPO:
    sizes = dict.fromkeys(("total_episodes", "rollout_batch_size", "minibatch_size", "microbatch_size"), 4)
    return stages.PPO(name="aligned", policy=policy, reward=reward, data=PROMPTS, generation={"max_new_tokens": 3}, **{**sizes, **fields})


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, stages; print([name for name in ('torch', 'transformers', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in stages.__all__:
        assert getattr(stages, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'GRPO'"):
        _ = stages.GRPO  # type: ignore[attr-defined]


def test_steps_in_memory_train_and_evaluate(pair: tuple[Any, Any], home: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": f"word {number}", "completion": "yes"} for number in range(8)])
    lines: list[tuple[str, int, dict[str, float]]] = []
    sft = stages.SFT(model=pair, data={"train": rows, "validation": rows}, training=TRAINING).train(
        home, quiet=True, on_log=lambda name, step, metrics: lines.append((name, step, metrics))
    )
    assert (sft.ref, sft.role) == ("python/sft@1", "language_model")
    assert {"python/sft"} == {name for name, _, _ in lines}
    assert any("heldout/loss" in metrics for _, _, metrics in lines)

    aligned = ppo(sft, shortness).train(home, quiet=True)
    model, tokenizer = aligned.load()
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.tensor([tokenizer("word").input_ids])).logits).all()

    results = stages.Evaluation(
        candidates={"sft": sft, "aligned": aligned}, data=PROMPTS, judges=shortness, generation={"max_new_tokens": 3}
    ).run(home, quiet=True)
    rate = results.win_rate("aligned", "sft")
    assert rate["judge"] == "shortness" and 0 <= rate["ci_low"] <= rate["win_rate"] <= rate["ci_high"] <= 1
    assert results.report is not None and results.report.is_file()
    assert "aligned preferred" not in results._repr_html_() and "shortness" in results._repr_html_()
    with pytest.raises(KeyError, match="known: .*aligned / sft by shortness"):
        results.win_rate("aligned", "nobody")


def test_a_model_trained_with_lora_is_loaded_with_its_adapter_merged(pair: tuple[Any, Any], home: Path) -> None:
    """The expected weight is W + (alpha / r) B A, from the published files."""
    from safetensors.torch import load_file

    rows = [{"prompt": f"word {number}", "completion": "yes"} for number in range(8)]
    trained = stages.SFT(model=pair, data=rows, training=TRAINING, lora={"r": 2, "alpha": 4.0}).train(home, recipe="adapters", quiet=True)
    saved = load_file(trained.path / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (saved[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    assert b.any()
    model, _ = trained.load()
    torch.testing.assert_close(model.get_submodule(name).weight, pair[0].get_submodule(name).weight + 2.0 * b @ a)


def test_an_equal_step_is_reused_and_a_changed_function_runs_again(pair: tuple[Any, Any], home: Path) -> None:
    def reward_of(sign: float) -> Any:
        return lambda prompts, completions: [sign * len(text) for text in completions]

    first = ppo(pair, reward_of(1.0)).train(home, recipe="again", quiet=True)
    assert ppo(pair, reward_of(1.0)).train(home, recipe="again", quiet=True).ref == first.ref
    assert ppo(pair, reward_of(-1.0)).train(home, recipe="again", quiet=True).ref != first.ref


def test_run_takes_a_recipe_file_with_overrides(tmp_path: Path, home: Path, tiny_llama_folder: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("".join('{"text": "some words to read"}\n' for _ in range(40)))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"name: mine\nsteps:\n  - {{stage: pretraining, name: base, model: {tiny_llama_folder}, block_size: 8, "
        f"data: {{train: {data}}}, training: {{max_steps: 2, batch_size: 2, microbatch_size: 2}}}}\n"
    )
    results = stages.run(recipe, {"base.training.max_steps": 1}, home, quiet=True)
    assert results.metrics["base"]["optimizer_steps"] == 1
    assert stages.Registry(home / "registry").get(results.models["base"].ref).role == "language_model"


def test_bad_input_raises_an_error_with_its_location(pair: tuple[Any, Any], home: Path) -> None:
    with pytest.raises(stages.StagesError, match="kl_coeff"):
        ppo(pair, shortness, kl_coeff=0.1).train(home, quiet=True)
    with pytest.raises(stages.StagesError, match="has no tokenizer"):
        ppo(pair[0], shortness).train(home, quiet=True)


def test_function_address_is_its_importable_module() -> None:
    assert address_of(shortness).endswith(":shortness") and "stages.api" not in address_of(shortness)
    assert address_of(lambda prompts, completions: [0.0]).startswith("stages.api.functions:lambda_")


def tables() -> dict[str, Any]:
    """The same two rows in every kind of table that Python programs have."""
    import pandas
    import pyarrow
    from datasets import Dataset, IterableDataset

    rows = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}]
    return {
        "list": rows,
        "tuple": tuple(rows),
        "generator": (row for row in rows),
        "Dataset": Dataset.from_list(rows),
        "IterableDataset": IterableDataset.from_generator(lambda: iter(rows)),
        "pandas": pandas.DataFrame(rows),
        "pyarrow": pyarrow.Table.from_pylist(rows),
    }


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    for kind, table in tables().items():
        path = as_field("data", table, tmp_path)
        assert isinstance(path, str), kind
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        assert lines == [{"prompt": "a", "n": 1}, {"prompt": "b", "n": None}], kind


def test_values_of_libraries_become_plain_values(tmp_path: Path) -> None:
    row = {"prompt": "a", "i": np.int64(3), "f": np.float32(0.5), "v": np.arange(2), "t": torch.tensor([1, 2]), "d": date(2026, 1, 2)}
    path = as_field("data", [row], tmp_path)
    expected = {"prompt": "a", "i": 3, "f": 0.5, "v": [0, 1], "t": [1, 2], "d": "2026-01-02"}
    assert json.loads(Path(str(path)).read_text()) == expected
    assert as_field("coef", np.float64(0.25), tmp_path) == 0.25


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data", [{"prompt": "a"}, {"prompt": float("nan")}], "row 2 of the data in memory, column 'prompt': nan"),
        ("data", iter([]), "an iterator gives its rows only once"),
        ("data", [{"prompt": object()}], "row 1 of the data in memory, column 'prompt'"),
        ("coef", object(), "coef is an object of the class object; expected a text, a number"),
        ("precision", torch.float32, "precision is an object of the class dtype"),
    ],
)
def test_objects_that_cannot_be_stored_are_named(field: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(stages.StagesError, match=re.escape(message)):
        as_field(field, value, tmp_path)


@pytest.mark.parametrize("name", ["a/b", "../a", "ä b", ""])
def test_an_invalid_recipe_name_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(StagesError, match="expected letters, digits and"):
        stages.run([{"stage": "sft", "name": "sft", "model": "m", "data": {"train": "t.jsonl"}}], home=tmp_path, name=name)


def test_a_value_that_is_nested_too_deeply_is_named_with_its_column(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(stages.StagesError, match="row 1 of the data in memory, column 'prompt'"):
        as_field("data", [{"prompt": deep}], tmp_path)


def test_a_model_of_another_home_is_refused(tmp_path: Path) -> None:
    model = stages.Model("python/sft@1", "language_model", tmp_path / "one/registry/models/python/sft/1/model", {})
    assert as_field("policy", model, tmp_path / "one/inputs") == "python/sft@1"
    with pytest.raises(stages.StagesError, match=f"is in the home {tmp_path}/one, and this call has the home {tmp_path}/two"):
        as_field("policy", model, tmp_path / "two/inputs")


def test_training_data_may_be_a_bare_table(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}]
    recipe = write_recipe([stages.SFT(name="sft", model="tiny/model", data=rows).as_dict()], "python", 0, tmp_path)
    (step,) = load_recipe(recipe, []).steps
    (source,) = data_inputs(step.config)["data.train"]
    assert Path(source.path).read_text() == '{"prompt": "a", "completion": "b"}\n'


def test_saving_a_model_in_memory_prints_nothing(pair: tuple[Any, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    as_field("model", pair, tmp_path)
    assert capfd.readouterr() == ("", "")

"""Plans of complete recipes: the counted memory, steps that do not fit, and advice that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.memory import counting, fake_passes
from stages.memory.estimate import Machine
from stages.planning.plan import PROCESS, StepMemory, advice_lines, plan_memory
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30


def planned(path: Path, home: Path, gib: float, *overrides: str) -> dict[str, StepMemory]:
    recipe = load_recipe(path, list(overrides), Registry(home / "registry"))
    machine = Machine("cuda", int(gib * GIB), 2, "a GPU")
    return {step.name: step for step in plan_memory(recipe, Registry(home / "registry"), machine)}


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_folder: Path) -> Any:
    """write(**fields of a PPO step) -> the recipe's path."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"write {number}"}) + "\n" for number in range(8)))

    def write(**fields: Any) -> Path:
        step = {
            "stage": "ppo",
            "name": "aligned",
            "policy": "Qwen/Qwen2.5-1.5B",
            "value": "policy",
            "data": str(tmp_path / "prompts.jsonl"),
            "reward": [{"function": "stages.corpora.world.gold:score_batch"}],
            **fields,
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "planned", "steps": [step]}))
        return tmp_path / "recipe.yaml"

    return write


def test_full_fine_tuning_by_hand(recipe: Any, tmp_path: Path) -> None:
    memory = planned(recipe(precision="fp32"), tmp_path, 80)["aligned"].memory
    assert memory is not None
    policy, value = 1_543_714_304, 1_543_714_304  # Qwen2.5-1.5B as in its model card (tied embeddings: no output layer)
    assert memory.weights == 4 * (policy + value + policy)  # policy, value network, reference
    assert memory.gradients == 4 * (policy + value)
    assert memory.optimizer == 8 * (policy + value)


def test_without_a_value_network_its_memory_is_not_counted(recipe: Any, tmp_path: Path) -> None:
    critic_free = {"advantages": "rloo", "samples_per_prompt": 4, "value": None}
    memory = planned(recipe(precision="fp32", **critic_free), tmp_path, 80)["aligned"].memory
    assert memory is not None
    policy = 1_543_714_304
    assert (memory.weights, memory.gradients, memory.optimizer) == (4 * 2 * policy, 4 * policy, 8 * policy)  # policy and reference


def test_adapters_share_one_backbone(recipe: Any, tmp_path: Path) -> None:
    lora = {"r": 16}
    shared = planned(recipe(precision="fp32", lora=lora), tmp_path, 80)["aligned"].memory
    assert shared is not None
    assert shared.weights == 4 * 1_543_714_304  # policy, value network and reference on it
    quantized = planned(recipe(precision="bf16", lora=lora, policy={"ref": "Qwen/Qwen2.5-1.5B", "quantization": "nf4"}), tmp_path, 80)
    assert quantized["aligned"].memory is not None
    assert quantized["aligned"].memory.weights < 0.35 * shared.weights
    assert quantized["aligned"].memory.gradients == shared.gradients == 4 * (2 * 16 * 18_464_768 // 16)


@pytest.mark.parametrize("gib", [24, 12, 6])
def test_advised_settings_fit(recipe: Any, tmp_path: Path, gib: float) -> None:
    path = recipe()
    step = planned(path, tmp_path, gib)["aligned"]
    assert step.memory is not None
    assert step.memory.total > gib * GIB - PROCESS["cuda"]
    assert step.advice
    assert all(override in advice_lines([step])[0] for override in step.advice)
    after = planned(path, tmp_path, gib, *step.advice)["aligned"]
    assert after.memory is not None
    assert after.memory.total <= gib * GIB - PROCESS["cuda"]
    assert after.advice == []


def test_plan_reports_what_cannot_fit(recipe: Any, tmp_path: Path) -> None:
    step = planned(recipe(), tmp_path, 1)["aligned"]
    assert step.advice == []
    assert advice_lines([step]) == ["aligned: no known setting makes it fit; use a smaller model or a larger machine"]


def test_unknown_sizes_are_not_guessed(recipe: Any, tmp_path: Path) -> None:
    step = planned(recipe(policy="nobody/secret", value="shared"), tmp_path, 24)["aligned"]
    assert step.memory is None
    assert "the size of nobody/secret is unknown until it is downloaded" in step.note


def folder_of(folder: Path, tokenizer: Path, **config: Any) -> str:
    """A model folder with a config and a tokenizer, without weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return str(folder)


def test_the_plan_says_what_it_cannot_count(recipe: Any, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As text and as JSON; also in a second plan, which reads the counts from the file."""
    monkeypatch.setenv("COLUMNS", "200")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90, "max_position_embeddings": 64}
    unknown = folder_of(tmp_path / "unknown", tiny_llama_folder, model_type="nobody-made-this", **sizes)
    path = str(recipe(policy=unknown, value="shared", precision="fp32", generation={"max_new_tokens": 8}))
    command = ["plan", path, "--home", str(tmp_path), "--device-memory", "24"]
    reason = "cannot be counted: transformers has no model type 'nobody-made-this'"
    weights = f"the weights of nobody-made-this are computed as those of a plain transformer, because they {reason}"
    layers = f"the activations of nobody-made-this are estimated by constants, because its layers {reason}"
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert result.output.count(f"aligned: {weights}") == result.output.count(f"aligned: {layers}") == 1
        counting._counts.clear()  # as in another process
    (step,) = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)["memory"]
    assert sorted(step["uncounted"]) == [layers, weights]


def test_a_state_space_model_has_a_plan(recipe: Any, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_passes, "LOOP_COLUMNS", 4)  # faster
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90, "attention_hidden_size": 32, "intermediate_size": 64}
    path = recipe(policy=folder_of(tmp_path / "rwkv", tiny_llama_folder, model_type="rwkv", **sizes), value="shared", precision="fp32")
    step = planned(path, tmp_path, 24)["aligned"]
    assert step.memory is not None
    assert step.memory.kv_cache == 0 and step.memory.activations > 0
    assert step.uncounted == ["the states that rwkv keeps while it decodes are not counted; they do not grow with the length"]


def test_lengths_come_from_the_data(recipe: Any, tmp_path: Path, tiny_llama_folder: Path) -> None:
    """The cache has rows x (prompt + new) tokens."""
    path = recipe(
        policy=str(tiny_llama_folder),
        precision="fp32",
        generation={"max_new_tokens": 8, "batch_size": 4},
        rollout_batch_size=4,
        minibatch_size=4,
        microbatch_size=4,
    )

    def cache() -> float:
        memory = planned(path, tmp_path, 24)["aligned"].memory
        assert memory is not None
        return memory.kv_cache

    per_token = 2 * 2 * 16 * 4 * 4  # keys and values, layers, kv width, rows, bytes
    from transformers import AutoTokenizer

    tokens = len(AutoTokenizer.from_pretrained(tiny_llama_folder)("write 7")["input_ids"]) + 1
    assert tokens + 8 <= 64 and cache() == per_token * 64  # a GPU's cache has a multiple of 64 columns
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": " ".join(["write 7"] * 30)}) + "\n")
    assert cache() == per_token * 128  # the model has 128 positions


def test_recipe_of_7b_fits_the_gpus_it_names(tmp_path: Path) -> None:
    path = REPOSITORY / "recipes" / "instructgpt-7b-qlora.yaml"
    for step in planned(path, tmp_path, 24).values():
        assert step.memory is not None
        assert step.memory.total < (24 * GIB - PROCESS["cuda"]) * 0.9, step.name  # with room
    steps = planned(path, tmp_path, 12)
    advice = [override for step in steps.values() for override in step.advice]
    for step in planned(path, tmp_path, 12, *advice).values():
        assert step.memory is not None
        assert step.memory.total < 12 * GIB - PROCESS["cuda"], step.name


def test_command_prints_tables_and_json(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = str(recipe())
    result = CliRunner().invoke(app, ["plan", path, "--home", str(tmp_path), "--device-memory", "24"])
    assert result.exit_code == 0, result.output
    assert "Peak memory" in result.output
    assert "aligned would fit" in result.output
    result = CliRunner().invoke(app, ["plan", path, "--home", str(tmp_path), "--device-memory", "24", "--json"])
    (step,) = json.loads(result.output)["memory"]
    parts = step["bytes"]
    assert parts["total"] == sum(parts[name] for name in ("weights", "adapters", "gradients", "optimizer", "passing"))
    assert step["advice"]

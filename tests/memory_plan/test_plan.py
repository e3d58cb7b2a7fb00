"""Plans of complete recipes: the counted memory, steps that do not fit, and advice that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import ModelError
from stages.memory import counting, fake_passes
from stages.memory.estimate import Machine
from stages.memory_plan.advice import PROCESS, StepMemory
from stages.memory_plan.plan import plan_memory
from stages.memory_plan.table import advice_lines
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
    assert step.note.startswith("the size of nobody/secret is unknown")


def test_steps_after_a_model_of_unknown_size_name_that_model(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    steps = [
        {"stage": "sft", "name": name, "model": model, "data": {"train": str(tmp_path / "rows.jsonl")}}
        for name, model in (("first", "nobody/secret"), ("second", "first"), ("third", "second"))
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "planned", "steps": steps}))
    for step in planned(tmp_path / "recipe.yaml", tmp_path, 24).values():
        assert step.note.startswith("the size of nobody/secret is unknown")


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
    cache = f"the KV cache of nobody-made-this is computed as that of a plain transformer, because it {reason}"
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert [result.output.count(f"aligned: {message}") for message in (weights, layers, cache)] == [1, 1, 1]
        counting._counts.clear()  # as in another process
    (step,) = json.loads(CliRunner().invoke(app, [*command, "--json"]).output)["memory"]
    assert sorted(step["uncounted"]) == [cache, layers, weights]


def test_a_state_space_model_has_a_plan(recipe: Any, tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_passes, "LOOP_COLUMNS", 4)  # faster
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 90, "attention_hidden_size": 32, "intermediate_size": 64}
    path = recipe(policy=folder_of(tmp_path / "rwkv", tiny_llama_folder, model_type="rwkv", **sizes), value="shared", precision="fp32")
    step = planned(path, tmp_path, 24)["aligned"]
    assert step.memory is not None
    assert step.memory.kv_cache == 0 and step.memory.activations > 0  # it has no cache: each step reads the text so far
    assert step.uncounted == []


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


# Rewards, and adapters other than the default


SMALL = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
"""As a Llama with vocabulary 90, tied: a layer has 4 x 32 x 32 + 3 x 32 x 88 linear weights."""


@pytest.fixture
def small(tmp_path: Path, tiny_llama_folder: Path) -> Any:
    """make(name, **fields of the config) -> a folder with a Llama of size SMALL, without weights."""

    def make(name: str, **fields: Any) -> str:
        config = {"model_type": "llama", "vocab_size": 90, "tie_word_embeddings": True, **SMALL, **fields}
        return folder_of(tmp_path / name, tiny_llama_folder, **config)

    return make


def held(recipe: Any, tmp_path: Path, **fields: Any) -> Any:
    settings = {"value": "shared", "precision": "fp32", "generation": {"max_new_tokens": 8}, **fields}
    memory = planned(recipe(**settings), tmp_path, 24)["aligned"].memory
    assert memory is not None
    return memory


def test_an_adapter_on_some_modules_by_hand(recipe: Any, tmp_path: Path, small: Any) -> None:
    """A value network on the same base has its own adapter, but no gradients of its copy of the output layer."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]}
    policy = small("policy", tie_word_embeddings=False)
    memory = held(recipe, tmp_path, policy=policy, value="policy", lora=lora)
    low_rank, copy = 2 * 2 * 4 * (32 + 32), 90 * 32
    assert memory.adapters == 4 * 2 * (low_rank + copy)
    assert memory.gradients == 4 * (2 * low_rank + copy)
    assert memory.optimizer == 2 * memory.gradients


def test_the_start_of_an_adapter_by_hand(recipe: Any, tmp_path: Path, small: Any) -> None:
    """PiSSA keeps its initial matrices, which are not trained."""
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "pissa"}
    memory = held(recipe, tmp_path, policy=small("policy"), lora=lora, ema_decay=0.9)
    low_rank = 2 * 2 * 4 * (32 + 32)
    assert memory.adapters == 4 * (low_rank + low_rank + low_rank)  # trained, initial, and the moving average of the trained ones
    assert (memory.gradients, memory.optimizer) == (4 * low_rank, 8 * low_rank)


def test_rows_of_new_tokens_by_hand(recipe: Any, tmp_path: Path, small: Any) -> None:
    """The tokenizer has three tokens more than the model, of which one is for padding. Policy and value network train the rows of two."""
    policy = Path(small("policy", tie_word_embeddings=False, vocab_size=300))
    settings = {"policy": str(policy), "value": "policy", "lora": {"r": 4, "target_modules": ["q_proj"]}}
    before = held(recipe, tmp_path, **settings)
    tokenizer = json.loads((policy / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [{**tokenizer["added_tokens"][0], "id": 300 + n, "content": f"<{n}>"} for n in range(3)]
    (policy / "tokenizer.json").write_text(json.dumps(tokenizer))
    (policy / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<1>"}))
    after = held(recipe, tmp_path, **settings)
    assert after.weights - before.weights == 4 * 2 * 3 * 32  # embedding and output layer
    assert after.adapters - before.adapters == 4 * 2 * (2 * 2 * 32)  # of both, for two networks
    assert after.gradients - before.gradients == 4 * (2 * 2 * 32 + 2 * 32)  # the value network has no output layer
    refused = recipe(**{**settings, "lora": {"target_modules": ["q_proj", "embed_tokens"]}})
    with pytest.raises(ModelError, match="aligned: the tokenizer has 2 tokens without embedding rows, which cannot be trained with lora"):
        planned(refused, tmp_path, 24)


@pytest.mark.parametrize(("kind", "quantization", "extra"), [("cuda", "nf4", 2), ("cuda", "none", 0), ("cpu", "none", 2)])
def test_adapters_are_merged_in_fp32_where_the_base_is_loaded(
    recipe: Any, tmp_path: Path, small: Any, kind: str, quantization: str, extra: int
) -> None:
    """A GPU gets fp32 weights only if they were quantized. ``extra``: bytes per weight, besides the two of bf16."""
    base, rows = small("base", hidden_size=512, intermediate_size=8192), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    model = {"ref": base, "quantization": quantization}
    sft = {"stage": "sft", "name": "sft", "model": model, "lora": {"r": 4, "target_modules": ["q_proj"]}, "data": {"train": str(rows)}}
    compared = {
        "stage": "evaluation",
        "name": "compared",
        "precision": "bf16",
        "candidates": {"sft": "sft"},
        "data": str(tmp_path / "prompts.jsonl"),
        "judges": [{"function": "stages.corpora.world.gold:score_batch"}],
        "generation": {"max_new_tokens": 1, "batch_size": 1},
    }
    recipe()
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "planned", "steps": [sft, compared]}))
    registry = Registry(tmp_path / "registry")
    loaded = load_recipe(tmp_path / "recipe.yaml", [], registry)
    memory = plan_memory(loaded, registry, Machine(kind, 24 * GIB, 2, "a machine"))[1].memory
    assert memory is not None
    weights = 2 * (4 * 512 * 512 + 3 * 512 * 8192) + 5 * 512 + 90 * 512
    assert memory.weights == 2 * weights
    assert memory.passing == extra * weights if extra else memory.passing < 0.1 * weights


def test_an_adapter_that_does_not_fit_ends_the_plan_with_the_name_of_the_step(recipe: Any, tmp_path: Path, small: Any) -> None:
    path = recipe(policy=small("policy"), value="shared", lora={"target_modules": ["query_proj"]})
    result = CliRunner().invoke(app, ["plan", str(path), "--home", str(tmp_path), "--device-memory", "24"])
    assert result.exit_code == 2
    assert "aligned: lora.target_modules names query_proj, which LlamaForCausalLM does not have" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": {"modules_to_save": ["mlp"]}}, "the new adapter has full weights of model.layers.0.mlp.gate_proj .*which is quantized"),
        ({"lora": {"init_lora_weights": "pissa", "r": 40}}, "needs a rank of at most 32 for model.layers.0.self_attn.q_proj"),
        ({"lora": {"rank_pattern": {"nothing": 2}}}, "lora.rank_pattern names 'nothing'"),
    ],
)
def test_a_new_adapter_that_cannot_be_on_quantized_weights_is_refused_by_the_plan(
    recipe: Any, tmp_path: Path, small: Any, fields: dict[str, Any], message: str
) -> None:
    path = recipe(policy={"ref": small("policy"), "quantization": "nf4"}, value="shared", **fields)
    with pytest.raises(ModelError, match=f"aligned: .*{message}"):
        planned(path, tmp_path, 24)


def test_dora_on_int8_is_refused_by_the_plan_for_a_cpu(recipe: Any, tmp_path: Path, small: Any) -> None:
    path = recipe(policy={"ref": small("policy"), "quantization": "int8"}, value="shared", lora={"use_dora": True})
    assert planned(path, tmp_path, 24)["aligned"].memory is not None
    loaded, registry = load_recipe(path, [], Registry(tmp_path / "registry")), Registry(tmp_path / "registry")
    with pytest.raises(ModelError, match="aligned: lora.use_dora adds a DoRA adapter, which peft cannot compute on int8 weights on a CPU"):
        plan_memory(loaded, registry, Machine("cpu", 24 * GIB, 2, "a CPU"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa"}, ""),
        ({"use_dora": True}, ""),
        ({"bias": "all", "target_modules": ["q_proj"]}, r"changes weights of its base \(model.layers.0.self_attn.k_proj.bias"),
        ({"modules_to_save": ["up_proj"], "target_modules": ["q_proj"]}, "change model.layers.0.mlp.up_proj in different ways"),
    ],
)
def test_ppo_above_a_saved_adapter_is_tried_by_the_plan(recipe: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """The plan adds the saved adapter and the new ones of policy and value network to the model without memory."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 90}
    base = LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True))
    base.save_pretrained(tmp_path / "base")
    config = LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **settings})
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("bias"):
            parameter.data.add_(1.0)
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    path = recipe(policy=str(tmp_path / "adapter"), value="policy", lora={"target_modules": ["q_proj", "up_proj"]})
    if not message:
        assert planned(path, tmp_path, 24)["aligned"].memory is not None
        return
    with pytest.raises(ModelError, match=f"aligned: .*{message}"):
        planned(path, tmp_path, 24)


def test_an_adapter_of_the_hub_that_is_not_downloaded_is_not_tried(recipe: Any, tmp_path: Path, small: Any, monkeypatch: Any) -> None:
    """A plan downloads only its config."""
    commit = "0" * 40
    repository = tmp_path / "cache" / "models--org--adapter"
    for path, content in (
        (f"snapshots/{commit}/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": small("base")}),
        ("refs/main", commit),
    ):
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    step = planned(recipe(policy="org/adapter", value="policy", lora={}), tmp_path, 24)["aligned"]
    assert step.memory is not None


def test_adapters_of_earlier_steps_that_cannot_share_a_backbone_are_refused_by_the_plan(recipe: Any, tmp_path: Path, small: Any) -> None:
    """The policy has an update of the embedding, the reward model above it a full copy."""
    base, (rows, pairs) = small("base"), (tmp_path / "rows.jsonl", tmp_path / "ranked.jsonl")
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    ppo = json.loads(recipe(policy="sft", value=None, lora={}, reward=[{"model": "liked"}]).read_text())["steps"]
    steps = [
        {"stage": "sft", "name": "sft", "model": base, "lora": {"target_modules": ["embed_tokens"]}, "data": {"train": str(rows)}},
        {
            "stage": "reward_model",
            "name": "liked",
            "model": "sft",
            "lora": {"modules_to_save": ["embed_tokens"]},
            "data": {"train": str(pairs)},
        },
    ]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "planned", "steps": [*steps, *ppo]}))
    with pytest.raises(ModelError, match="aligned: .*change model.embed_tokens in different ways"):
        planned(tmp_path / "recipe.yaml", tmp_path, 24)


def test_rewards_have_their_own_weights_unless_they_share_the_backbone(recipe: Any, tmp_path: Path, small: Any) -> None:
    """A scalar reward model on the policy's base shares it; classifiers and language models that judge are loaded apart."""
    policy, lora = small("policy"), {"r": 4}
    layers = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 5 * 32 + 90 * 32
    bigger = 2 * (4 * 64 * 64 + 3 * 64 * 88) + 5 * 64 + 90 * 64

    def weights(*rewards: dict[str, Any], monitors: Any = ()) -> float:
        memory = held(recipe, tmp_path, policy=policy, lora=lora, reward=list(rewards), monitors=list(monitors))
        return float(memory.weights) / 4

    assert weights({"model": policy}) == layers
    assert weights({"model": policy, "label": 0}) == 2 * layers + 2 * 32  # with a head of two classes
    assert weights({"model": policy, "answers": ["Yes", "No"]}) == 2 * layers  # tied: the output layer is the embedding
    other = small("bigger", hidden_size=64, tie_word_embeddings=False)
    assert weights({"model": other}) == layers + bigger
    assert weights({"model": other, "answers": ["Yes", "No"], "name": "asked"}) == layers + bigger + 90 * 64
    assert weights({"ensemble": [{"model": other}, {"model": policy}], "name": "two"}) == layers + bigger
    assert weights({"model": policy}, monitors=[{"model": other}]) == layers + bigger


def test_the_batch_size_of_a_reward_decides_its_activations(recipe: Any, tmp_path: Path, small: Any) -> None:
    big = small("big", hidden_size=512, intermediate_size=2048, max_position_embeddings=1024)
    common = {"policy": small("policy"), "rollout_batch_size": 256, "minibatch_size": 8, "microbatch_size": 1}

    def taken(**reward: Any) -> Any:
        return held(recipe, tmp_path, **common, reward=[{"model": big, "label": 0, **reward}])

    small_batch, large_batch = taken(batch_size=128), taken(batch_size=256)
    assert large_batch.activations == pytest.approx(2 * small_batch.activations, rel=0.01)
    # A language model that judges reads the question besides.
    asked = taken(batch_size=256, label=None, answers=["Yes", "No"], question="{prompt}{completion}" + "?" * 600)
    assert asked.activations > large_batch.activations


def test_an_offloaded_model_is_on_the_gpu_while_it_is_used(recipe: Any, tmp_path: Path, small: Any) -> None:
    big = small("big", hidden_size=64)
    common = {"policy": small("policy"), "reward": [{"model": big}]}
    present, waiting = held(recipe, tmp_path, **common), held(recipe, tmp_path, **common, offload=True)
    policy = 2 * (4 * 32 * 32 + 3 * 32 * 88) + 5 * 32 + 90 * 32
    reward = 2 * (4 * 64 * 64 + 3 * 64 * 88) + 5 * 64 + 90 * 64
    assert (present.weights, present.awake) == (4 * (2 * policy + reward), 0)
    assert (waiting.weights, waiting.awake) == (4 * policy, 4 * reward)  # the reference is smaller, and used in another phase


def test_adapters_that_several_roles_have_in_common_are_loaded_once(tmp_path: Path, small: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "text": "a b"}) + "\n")
    (tmp_path / "ranked.jsonl").write_text(json.dumps({"prompt": "a", "completions": ["b", "c"], "ranks": [0, 1]}) + "\n")
    lora = {"r": 4}
    steps: list[dict[str, Any]] = [
        {"stage": "sft", "name": "sft", "model": small("base"), "lora": lora, "data": {"train": str(tmp_path / "rows.jsonl")}},
        {"stage": "reward_model", "name": "liked", "model": "sft", "lora": lora, "data": {"train": str(tmp_path / "ranked.jsonl")}},
        {
            "stage": "ppo",
            "name": "aligned",
            "policy": "sft",
            "lora": lora,
            "data": str(tmp_path / "rows.jsonl"),
            "reward": [{"model": "liked"}],
            "generation": {"max_new_tokens": 8},
        },
    ]
    for step in steps:
        step["precision"] = "fp32"
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "planned", "steps": steps}))
    memory = planned(tmp_path / "recipe.yaml", tmp_path, 24)["aligned"].memory
    assert memory is not None
    adapter = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 88))
    assert memory.adapters == 4 * 4 * adapter  # of sft, of the reward model, and the new ones of policy and value network


def test_the_plan_names_what_other_processes_and_texts_decide(recipe: Any, tmp_path: Path, small: Any) -> None:
    policy = {"ref": small("policy"), "quantization": "int8"}
    settings = {"value": "shared", "lora": {"r": 4}, "generation": {"max_new_tokens": 8, "engine": {"vllm": {"start": {}}}}}
    step = planned(recipe(policy=policy, **settings), tmp_path, 24)["aligned"]
    assert step.memory is not None and step.memory.kv_cache == 0
    servers, outliers = step.uncounted
    assert servers == "the weights and the KV cache of the vLLM servers, which take up to 45% of the first GPU, are not part of the plan"
    assert outliers.startswith("int8 also keeps the columns of activations with outliers")

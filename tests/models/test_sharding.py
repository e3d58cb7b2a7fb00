"""Weights sharded over two processes: gradients, norms, steps and saved weights equal those of an unsharded model, without deadlocks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stages.errors import LaunchError, ModelError
from stages.models.sharding import blocks_of, clip_gradients, grouped, shard, unsharded, unsharded_state_dict
from stages.process.runtime import Runtime

REPOSITORY = Path(__file__).resolve().parents[2]

WORKER = """
import sys
import torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM
from stages.models.layers.compiled import LayerCompiler
from stages.models.saving import save_model
from stages.process.console import announcing
from stages.training.checkpoints import load_optimizer, load_tensors, save_optimizer, save_tensors, trainable
from stages.config import LoraSettings
from stages.models.adapters.attaching import attach_lora
from stages.models.passes.budget import each_group
from stages.models.sharding import clip_gradients, grouped, is_sharded, reduce_gradients, shard, sharded_blocks
from stages.models.sharding import unsharded, unsharded_state_dict
from stages.ppo.update.optimizers import WeightAverage
from stages.process.runtime import Runtime

runtime = Runtime()
runtime.begin_step(0)
config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     max_position_embeddings=64)
ids = torch.arange(40).view(2, 20) % 50
own = ids[runtime.state.process_index : runtime.process_index + 1]


def loss_of(model, rows):
    return model(input_ids=rows, use_cache=False).logits.float().square().mean()


said = []
for kind in ("full", "lora", "lora with new rows", "lora with new rows, tied"):
    lora = LoraSettings(r=2) if kind != "full" else None
    new_rows = [47, 48, 49] if "new rows" in kind else []
    config.tie_word_embeddings = "tied" in kind
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        if lora is not None:
            model = attach_lora(model, lora, task="CAUSAL_LM", base="base", new_rows=new_rows)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        pair.append(model)
    cut, plain = pair
    shard(cut, add_up=True)
    shard(cut, add_up=True)  # once more changes nothing
    assert len(sharded_blocks(cut)) == 2
    assert any(is_sharded(parameter) for parameter in cut.parameters())
    with announcing(said.append):
        LayerCompiler().add(cut)
    if lora is not None:
        assert not any(is_sharded(parameter) for parameter in cut.parameters() if parameter.requires_grad)

    optimizers = [torch.optim.AdamW(grouped([p for p in model.parameters() if p.requires_grad]), lr=1e-2, eps=1e-3, fused=True)
                  for model in pair]
    average = WeightAverage(cut, 0.9)
    for _ in range(2):
        loss_of(cut, own).backward()
        reduce_gradients(cut)
        sum(loss_of(plain, row[None]) for row in ids).backward()
        norms = [clip_gradients([p for p in model.parameters() if p.requires_grad], 0.05) for model in pair]
        assert abs(norms[0] - norms[1]) < 1e-4 * norms[1] and norms[1] > 0.05, norms
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update(cut)
    state = unsharded_state_dict(cut)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)

    if lora is not None:  # the saved adapters, with the rows of new tokens
        folders = [Path(sys.argv[1], f"{kind}-{runtime.process_index}-{side}") for side in ("cut", "plain")]
        for model, folder, weights in zip(pair, folders, (state, None)):
            save_model(model, None, folder, state_dict=weights)
        one, other = (load_file(folder / "adapter_model.safetensors") for folder in folders)
        rows = [name for name in other if "token_adapter" in name]
        assert len(rows) == (0 if not new_rows else 1 if config.tie_word_embeddings else 2), list(other)
        assert all(other[name].shape == (3, 32) and other[name].std() > 0 for name in rows)
        assert one.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)

    with unsharded(cut), torch.inference_mode():
        for length in range(3, 6 + 4 * runtime.process_index):  # another number of passes on each process
            torch.testing.assert_close(cut(input_ids=ids[:, :length]).logits, plain(input_ids=ids[:, :length]).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss_of(cut, ids), loss_of(plain, ids), rtol=1e-4, atol=1e-5)

    with torch.no_grad():  # another number of groups on each process, without gathering
        scored, groups = {}, [[row] for row in range(1 + runtime.state.process_index)]
        each_group("scoring", groups, lambda rows: scored.update({rows[0]: cut(input_ids=ids[rows]).logits}), model=cut)
        for row in range(len(groups)):
            torch.testing.assert_close(scored[row], plain(input_ids=ids[[row]]).logits, rtol=1e-4, atol=1e-5)

    weights, moments = Path(sys.argv[1], f"weights-{kind}.safetensors"), Path(sys.argv[1], f"moments-{kind}.safetensors")
    save_tensors(trainable(cut), weights, write=runtime.is_main)
    save_optimizer(optimizers[0], trainable(cut), moments, write=runtime.is_main)
    runtime.wait_for_everyone()
    for model, optimizer in zip(pair, optimizers):  # written by a model that is cut, read by one that is and one that is not
        load_tensors(trainable(model), weights)
        load_optimizer(optimizer, trainable(model), moments)
    loss_of(cut, own).backward()
    reduce_gradients(cut)
    sum(loss_of(plain, row[None]) for row in ids).backward()
    for optimizer in optimizers:
        optimizer.step()
    state = unsharded_state_dict(cut)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    average.copy_to(cut)
assert len(said) == 4 and all("their weights are sharded over the processes (FSDP)" in line for line in said), said
print("equal", flush=True)
runtime.leave()
"""


def test_two_sharded_processes_compute_the_same_as_one(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "stages.process.launching", "--cpu", "--num_processes", "2", str(worker), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2


def test_blocks_are_found_in_any_family(tiny_llama_folder: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    from stages.models.heads import RewardModel
    from stages.models.loading import load_language_model

    assert [type(block).__name__ for block in blocks_of(load_language_model(tiny_llama_folder, dtype=torch.float32))] == [
        "LlamaDecoderLayer",
        "LlamaDecoderLayer",
    ]
    assert len(list(blocks_of(RewardModel.from_language_model(tiny_llama_folder, dtype=torch.float32)))) == 2
    encoder = DistilBertModel(DistilBertConfig(vocab_size=50, dim=8, hidden_dim=8, n_layers=3, n_heads=1))
    assert len(list(blocks_of(encoder))) == 3


def test_models_that_cannot_be_sharded_are_refused() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2)])
            self.layers[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)

    with pytest.raises(ModelError, match="quantized weights cannot be sharded"):
        shard(Quantized(), add_up=True)
    with pytest.raises(ModelError, match="Linear has no blocks that can be sharded"):
        shard(nn.Linear(2, 2), add_up=True)


def test_without_sharding_no_weight_is_wrapped() -> None:
    model = nn.Linear(2, 2)
    assert unsharded_state_dict(model) is None and len(grouped(model.parameters())) == 1
    with unsharded(model, None):
        model(torch.ones(2)).sum().backward()
    # gradients: weight all 1 (four of them), bias 1 (two): norm sqrt(6)
    assert clip_gradients(list(model.parameters()), 1.0) == pytest.approx(6**0.5)
    assert clip_gradients(list(model.parameters()), None) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "set fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params in the accelerate config is not supported"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing: true"),
    ],
)
def test_options_of_fsdp_that_are_not_offered_are_refused(environment, message, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        Runtime(quiet=True)

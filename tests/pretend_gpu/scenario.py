"""What ``test_pretend_gpu.py`` runs on the pretended GPU. Prints one JSON object."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from stages.config import GenerationSettings
from stages.kernels.casts import kept_casts
from stages.models.packing import packing_kernel
from stages.models.responses import Policy, sequence_batch
from stages.sampling import graphs, workspace
from stages.sampling.generation import generate

pretend_cuda: Any = sys.modules["pretend_cuda"]
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


class Casts(TorchDispatchMode):
    """Counts casts of matrices to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is torch.ops.aten._to_copy.default and (options or {}).get("dtype") == torch.bfloat16 and arguments[0].shape == (8, 8):
            self.number += 1
        return function(*arguments, **(options or {}))


def casts_of_checkpointed_passes() -> int:
    """Casts of the weights of three layers in four passes with gradient checkpointing, within ``kept_casts``."""
    layers = [nn.Linear(8, 8, device="cuda") for _ in range(3)]
    with Casts() as casts, kept_casts("cuda"):
        for _ in range(4):
            hidden = torch.ones(4, 8, device="cuda", requires_grad=True)
            with torch.autocast("cuda", torch.bfloat16):
                for layer in layers:
                    hidden = checkpoint(layer, hidden, use_reentrant=False)
            hidden.float().sum().backward()
    return casts.number


def model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=dtype).to("cuda")


def decoded() -> dict[str, Any]:
    """Completions with and without graphs, under autocast. With graphs two calls, and another weight in the second one."""
    made, language_model = {}, model(torch.float32)
    for name, recorded in (("recorded", True), ("computed", False)):
        settings = GenerationSettings(max_new_tokens=24, batch_size=2, cuda_graphs=recorded)
        with torch.autocast("cuda", torch.bfloat16):
            calls = []
            for factor in (1.0, -2.0):
                language_model.lm_head.weight.data.mul_(factor)
                calls.append(
                    generate(language_model, PROMPTS, settings, seeds=range(4), stop_ids=[1, 2], pad_token_id=0).response_ids.tolist()
                )
            language_model.lm_head.weight.data.mul_(-0.5)
        made[name] = calls
        if recorded:
            assert workspace._kept is not None and workspace._kept.workspace.pool is not None
            made["steps"] = dict(workspace._kept.workspace.pool.steps)
    return {**made, "refused": sum(graphs._refusals.values())}


def pass_with_gradients() -> dict[str, Any]:
    """A packed pass of a policy: its kernel, and the operations for which the CPU waited."""
    policy = Policy(model(torch.float32), temperature=1.0, autocast=torch.bfloat16)
    kernel = packing_kernel(policy.decoder, policy.precision)
    pretend_cuda.waits.clear()
    batch = sequence_batch(PROMPTS, PROMPTS[::-1], 0, "cuda", kernel=kernel)

    def term(logprobs: Tensor, entropies: Tensor, rows: slice) -> Tensor:
        return -logprobs

    policy.loss(batch, term).summed.backward()
    return {"kernel": kernel, "waits": dict(pretend_cuda.waits)}


def failures() -> dict[str, str]:
    """The messages of the errors that a device raises."""
    said = {}
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    pretend_cuda.set_limit(1 << 30)
    recorded = torch.cuda.CUDAGraph()
    freed = torch.ones(1000, device="cuda")
    with torch.no_grad(), torch.cuda.graph(recorded):
        there * freed[:3]
    del freed
    attempts = {
        "two devices": lambda: there + here,
        "memory": lambda: torch.empty(1 << 30, device="cuda"),
        "a wait in a recording": lambda: record_a_wait(there),
        "freed memory": recorded.replay,
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except (RuntimeError, AssertionError) as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def record_a_wait(tensor: Tensor) -> None:
    with torch.no_grad(), torch.cuda.graph(torch.cuda.CUDAGraph()):
        tensor.sum().item()


if __name__ == "__main__":
    results = {"casts": casts_of_checkpointed_passes(), "decoded": decoded(), "pass": pass_with_gradients(), "failures": failures()}
    print(json.dumps(results), flush=True)  # noqa: T201
    os._exit(0)  # without the end of Python, during which autograd's thread for the device can abort the process

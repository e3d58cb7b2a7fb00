"""Passes and recorded decoding steps on a pretended GPU (``run.py``), in one separate process. Skipped where it cannot be compiled."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_gpu.run import environment

HERE = Path(__file__).parent
LIBRARIES = "transformers, TRL:"  # before the places of their waits
pytestmark = pytest.mark.timeout(900)  # the first use compiles the device


@pytest.fixture(scope="module")
def results(tiny_llama_folder: Path) -> dict[str, Any]:
    if torch.version.cuda is not None or torch.cuda.is_available():
        pytest.skip("this PyTorch is built for GPUs; tests/gpu uses one")
    try:
        variables = environment()
    except RuntimeError as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, str(HERE / "scenario.py"), str(tiny_llama_folder)], env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def test_the_pretended_device_fails_where_a_real_one_does(results) -> None:
    said = results["failures"]
    assert "same device" in said["two devices"] and said["memory"].startswith("OutOfMemoryError")
    assert "not permitted when stream is capturing" in said["a wait in a recording"] and "was freed" in said["freed memory"]


def test_a_weight_is_cast_once_although_a_gpus_backward_passes_have_their_own_thread(results) -> None:
    assert results["casts"] == 3  # of three layers, in four passes with gradient checkpointing


def test_recorded_steps_read_no_freed_memory_and_decode_the_same_tokens(results) -> None:
    decoded = results["decoded"]
    assert decoded["refused"] == 0 and decoded["steps"]["replayed"] > decoded["steps"].get("computed", 0)
    assert decoded["recorded"] == decoded["computed"] and decoded["recorded"][0] != decoded["recorded"][1]


def test_steps_are_recorded_again_after_the_cache_has_grown(results) -> None:
    """PyTorch refuses the memory pool of graphs that were all freed."""
    grown = results["grown"]
    assert grown["refused"] == 0 and grown["recorded"] == grown["computed"]


def test_a_packed_pass_uses_the_kernel_for_any_lengths_and_never_waits(results) -> None:
    said = ["LlamaModel: the sequences of a pass are packed; attention by torch"]
    assert results["pass"] == {"kernel": "torch", "said": said, "waits": {}}


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_each_norm_is_one_operation(results, dtype: str) -> None:
    """Two layers of Llama have five norms. Under autocast, a norm with fp32 weights stays in fp32, as in transformers."""
    measured, tolerance = results["norms"][dtype], 0.03 if dtype == "torch.bfloat16" else 1e-3
    assert measured["fused"] == 5 and measured["dtypes"] == [dtype] and measured["difference"] < tolerance


def test_a_gpu_without_the_fused_norm_computes_as_before(results) -> None:
    assert results["norms"]["problem"] == "RuntimeError: no kernel"


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model"])
def test_a_training_stage_reads_one_number_per_optimizer_step_and_one_tensor_per_line_of_the_log(results, stage: str) -> None:
    """Four steps, each with a line of the log. What transformers and TRL read themselves is the subject of the next test."""
    lines = {line: number for line, number in results["training"][stage].items() if not line.startswith(LIBRARIES)}
    norms = {line: number for line, number in lines.items() if line.startswith("training/reproducible.py")}
    logs = {line: number for line, number in lines.items() if line.startswith("training/pass_metrics.py")}
    copies = {line: number for line, number in lines.items() if "to the device" in line}  # the number of items of a step
    assert sum(norms.values()) == 4 and sum(logs.values()) <= 4 and sum(copies.values()) <= 4
    assert norms.keys() | logs.keys() | copies.keys() == lines.keys()


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward_model"])
def test_the_libraries_read_neither_masks_nor_metrics_in_a_pass(results, stage: str) -> None:
    """The Trainer reads its loss for each line of the log."""
    libraries = {line: number for line, number in results["training"][stage].items() if line.startswith(LIBRARIES)}
    assert libraries, "the Trainer reads its loss"
    others = {line: number for line, number in libraries.items() if "transformers/trainer.py" not in line}
    assert not others


@pytest.mark.parametrize(("precision", "reads"), [("bf16", {"totals.py": 4}), ("fp16", {"totals.py": 4, "loss_scale.py": 4})])
def test_an_update_of_ppo_reads_one_tensor_per_optimizer_step_and_in_fp16_another(results, precision: str, reads: dict[str, int]) -> None:
    """Four optimizer steps, of eight passes each. In fp16, the second tensor says whether gradients have overflowed."""
    waits = results["updates"][precision]
    assert {line.split(":")[0].rpartition("/")[2]: number for line, number in waits.items()} == reads


def test_decoding_waits_once_in_eight_steps(results) -> None:
    """32 tokens more, in two batches after another, are 64 steps."""
    assert 0 < results["decoding"]["48"] - results["decoding"]["16"] <= 64 / 8


def test_an_evaluation_waits_for_passes_and_not_for_prompts(results) -> None:
    assert 0 < results["evaluation"]["16"] <= results["evaluation"]["8"] + 12  # texts of other lengths may need another pass


@pytest.mark.parametrize("work", ["sampling", "likelihood", "training"])
def test_with_less_memory_results_are_the_same_and_failed_passes_leave_nothing(results, work: str) -> None:
    expected, measured, left = results["memory"][work]
    assert measured == (expected if work == "sampling" else pytest.approx(expected, rel=1e-5))
    kept = 16 * 24 * (8 + 4) if work == "sampling" else 0  # bytes of finished completions: token ids and log-probabilities
    assert left and max(left) <= kept


def test_the_heldout_likelihood_waits_once_per_pass(results) -> None:
    """Three passes, with those of transformers."""
    assert results["likelihood"] == 3

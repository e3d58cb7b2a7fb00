"""What is about to be published computes what the model in memory does: checked on the saved files, before a version is made of them.

An adapter's file is read again and laid on the base in memory, whatever the size of the base. Models of up to ``SMALL`` parameters are also
loaded whole, as the next step would load them: an adapter merged, whole weights as they are. Of larger whole weights the number of values
in the files is compared, and that shared weights are marked as shared. Weights that are cut over processes are not checked by computing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.adapters import activate, active_adapters, add_adapter, plain_model, remove_adapter, source_of
from stages.models.saved_adapters import base_of
from stages.tokens.positions import readable_length

if TYPE_CHECKING:
    from stages.registry.references import ResolvedModel

SMALL = 300_000_000
"""Parameters of a base that is loaded a second time for the check."""
NUM_ROWS, NUM_TOKENS = 4, 64
"""At most so many rows, each at most so long, are computed."""
SAME = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Root mean square difference, as a share of the outputs' own, that reading the same weights again may make; by the dtype computed in."""
ROUNDED = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""The same between a model in memory and its merge in fp32."""
ROUNDED_INT8 = 0.25
"""The same for int8 layers, which round activations too."""


def rows_for(model: Any, rows: Sequence[Sequence[int]] | None) -> list[list[int]]:
    """The token ids to compute with: the first of ``rows``; where there are none, ids spread over the vocabulary."""
    longest = min(NUM_TOKENS, readable_length(plain_model(model).config) or NUM_TOKENS)
    chosen = [list(row[:longest]) for row in rows or () if len(row) > 1][:NUM_ROWS]
    if chosen:
        return chosen
    size = base_of(plain_model(model).get_input_embeddings()).weight.shape[0]
    return [torch.linspace(1, size - 1, min(8, longest)).long().tolist()]


@torch.no_grad()
def outputs_of(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What a transformers model computes of each row, alone: log-probabilities of its tokens [T - 1], or a classifier's logits [labels]."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = []
    for row in rows:
        ids = torch.tensor([row], device=device)
        logits = model(input_ids=ids).logits.float().cpu()
        if logits.dim() == 3 and logits.shape[1] == len(row):
            logits = logits[0, :-1].log_softmax(dim=-1).gather(1, ids[0, 1:, None].cpu())
        found.append(logits.flatten())
    model.train(training)
    return found


# Adapters


def check_saved_adapter(
    model: Any, folder: Path, compute: Callable[[], list[Tensor]], reload: Callable[[ResolvedModel], list[Tensor]], *, scale: float = 0.0
) -> None:
    """Raise ModelError where the adapter in ``folder`` does not compute what the highest acting adapter of the PeftModel ``model`` does.

    ``compute`` gives the outputs of the role in memory with the adapters that act, ``reload`` those of a model loaded anew, merged.
    ``scale`` is the size of outputs below which differences do not shrink with them. The process's random numbers stay as they are.
    """
    with torch.random.fork_rng():
        _check_adapter(model, folder, compute, reload, scale)


def _check_adapter(
    model: Any, folder: Path, compute: Callable[[], list[Tensor]], reload: Callable[[ResolvedModel], list[Tensor]], scale: float
) -> None:
    from stages.registry.references import ResolvedModel

    expected, acting = compute(), active_adapters(model)
    name, dtype = "published", _dtype_of(model)
    saved = ResolvedModel(folder.name, "folder", str(folder), "", _as_it_runs(model, folder), base=source_of(model, acting[-1]))
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    activate(model, acting[:-1])
    try:
        add_adapter(model, saved, name)
        found = compute()
    finally:
        if name in model.peft_config:
            remove_adapter(model, name)
        activate(model, acting)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
    _compare(found, expected, SAME[dtype], scale, "read again and laid on its base")
    if saved.base is None or _size_of(model) > SMALL:
        return
    is_int8 = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    _compare(reload(saved), expected, max(ROUNDED[dtype], ROUNDED_INT8 if is_int8 else 0.0), scale, "merged into its base")


# Whole weights


def check_saved_weights(
    model: Any, folder: Path, compute: Callable[[], list[Tensor]], reload: Callable[[ResolvedModel], list[Tensor]], *, scale: float = 0.0
) -> None:
    """Raise ModelError where the whole weights in ``folder`` are not those of ``model``; arguments as of ``check_saved_adapter``."""
    from stages.registry.references import ResolvedModel

    _check_sharing(model)
    _check_number_of_values(model, folder)
    if _size_of(model) > SMALL:
        return
    saved = ResolvedModel(folder.name, "folder", str(folder), "", _as_it_runs(model, folder))
    dtype = next(parameter.dtype for parameter in model.parameters())
    with torch.random.fork_rng():
        _compare(reload(saved), compute(), SAME.get(dtype, SAME[torch.bfloat16]), scale, "loaded again")


def _as_it_runs(model: Any, folder: Path) -> ModelInput:
    """The saved model as an input. Code that came with the model runs in this process already, by the recipe's own word."""
    return ModelInput(ref=folder.name, trust_remote_code=type(plain_model(model)).__module__.startswith("transformers_modules"))


def _check_number_of_values(model: nn.Module, folder: Path) -> None:
    """Raise ModelError where the files in ``folder`` hold fewer values than ``model`` has weights, those that are shared counted once."""
    from safetensors import safe_open

    stored = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as content:
            stored += sum(math.prod(content.get_slice(name).get_shape()) for name in content.keys())  # noqa: SIM118
    needed = _size_of(model)
    if stored < needed:
        raise _refusal(f"its files hold {stored} values, and the model in memory has {needed} weights")


def _check_sharing(model: Any) -> None:
    """Raise ModelError where the config says that embedding and output layer share their weights, and they do not."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or not getattr(model.config, "tie_word_embeddings", False):
        return
    embedding = model.get_input_embeddings()
    if output.weight.shape == embedding.weight.shape and not torch.equal(output.weight, embedding.weight):
        raise _refusal("its config says that embedding and output layer share their weights (tie_word_embeddings), and they differ")


def _size_of(model: nn.Module) -> int:
    """Weights of ``model``; those that are shared count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _dtype_of(model: Any) -> torch.dtype:
    """The dtype that a model computes in: its embedding's."""
    dtype = base_of(plain_model(model).get_input_embeddings()).weight.dtype
    return dtype if dtype in SAME else torch.float32


def _compare(found: list[Tensor], expected: list[Tensor], tolerance: float, scale: float, what: str) -> None:
    mine, theirs = torch.cat(found).double(), torch.cat(expected).double()
    if mine.shape != theirs.shape:
        raise _refusal(f"{what}, it gives {len(mine)} outputs, and the model in memory gives {len(theirs)}")
    difference = float((mine - theirs).pow(2).mean().sqrt())
    size = max(float(theirs.pow(2).mean().sqrt()), scale, 1e-6)
    if not difference <= tolerance * size:
        raise _refusal(f"{what}, its outputs differ by {difference:.3g} (root mean square; their size is {size:.3g})")


def _refusal(problem: str) -> ModelError:
    return ModelError(
        f"what was saved is not the model in memory: {problem}. Nothing was published, and the checkpoints are kept. Please report this "
        "with the model's family, the step's lora settings and its quantization"
    )

"""Whether a model can train on several demonstrations in one row, of which none may change the next one.

Two checks: one of the class and config, when a recipe is planned, and a test pass of the loaded model, which always decides.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, masking_utils

from stages.config import ModelInput
from stages.errors import ModelError
from stages.models.layers.attention import attention_of, class_of
from stages.models.parts import evaluation_mode, transformer_of
from stages.sampling.support import PASS_FAILURES, cache_layers, family_of, no_cache, plain_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from stages.model_types import TransformersModel

TEST_LENGTHS = (9, 7)  # tokens of the test's demonstrations
LEAK = {torch.float32: 1e-4}  # relative change of hidden states; equal inputs differ at most by the rounding of experts
LEAK_IN_HALF_PRECISION = 1e-2
ROUNDING = {torch.float32: 1e-3}  # the same between passes of different widths
ROUNDING_IN_HALF_PRECISION = 5e-2
MIXES = "a demonstration changes what the model computes for the next one in its row"


def _unfit(name: str, kind: str, problem: str) -> ModelError:
    """The error about a model ``name`` of class ``kind``."""
    return ModelError(f"packing: true does not work with {name!r} ({kind}): {problem}. Remove packing")


def refuse_mixing(config: PretrainedConfig, name: str) -> None:
    """Raise ModelError if the class of ``config`` certainly mixes the demonstrations of a row. Allocates no weights.

    That is so if a layer has a recurrent state, or if the attention masks do not depend on the positions, which start at 0 for each
    demonstration. Flash attention, which has no such masks, is not judged.
    """
    kind = class_of(AutoModelForCausalLM, config)
    chosen = {attention_of(AutoModelForCausalLM, config, ModelInput(ref=name), dtype) for dtype in (torch.float32, torch.bfloat16)}
    if kind is None or not chosen <= {None, "eager", "sdpa"}:
        return
    mixes = False
    with suppress(*PASS_FAILURES), torch.device("meta"):
        mixes = _mixes(AutoModelForCausalLM.from_config(config).eval())
    if mixes:
        raise _unfit(name, kind.__name__, MIXES)


def _mixes(model: PreTrainedModel) -> bool:
    """Whether ``model``, on the meta device, certainly mixes the demonstrations of a row.

    A pass is run up to the first layer. By then most classes have made their masks; if no class asked for the sequences in the positions,
    the masks do not depend on them.
    """
    if any(hasattr(layer, "recurrent_states") for layer in cache_layers(model) or ()):
        return True
    decoder = transformer_of(model)
    parameters = inspect.signature(family_of(decoder).forward).parameters
    if "input_ids" in parameters and "position_ids" not in parameters:
        return True
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    layers = next((part for part in decoder.modules() if isinstance(part, nn.ModuleList) and len(part) == count), None)
    usual = getattr(masking_utils, "find_packed_sequence_indices", None)
    if layers is None or usual is None:
        return False
    asked: list[Tensor] = []

    def note(position_ids: Tensor) -> None:
        asked.append(position_ids)

    masking_utils.find_packed_sequence_indices = note
    layers[0].register_forward_pre_hook(_stop)
    positions = torch.cat([torch.arange(size) for size in TEST_LENGTHS])[None]
    try:
        decoder(input_ids=torch.ones_like(positions), position_ids=positions, **no_cache(decoder))
    except _Reached:
        return not asked
    finally:
        masking_utils.find_packed_sequence_indices = usual
    return False


class _Reached(Exception):
    """The pass has reached the first layer."""


def _stop(*_: object) -> None:
    raise _Reached


@torch.no_grad()
def refuse_leaks(model: TransformersModel, name: str, precision: torch.dtype) -> None:
    """Raise ModelError if ``model``, called ``name``, computes something else for a demonstration after another one in its row.

    Recurrent states go on to the next demonstration (Mamba, Qwen3-Next), and some classes attend to all earlier tokens of a row at all
    positions (BLOOM, OPT, gpt-oss). ``precision``: the dtype of the passes.
    """
    plain = plain_model(model)
    device = next(plain.parameters()).device
    autocast = torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32)
    try:
        with evaluation_mode(plain), autocast:
            problem = _leak(model, device, precision)
    except PASS_FAILURES as error:
        problem = f"its class does not accept packed rows ({' '.join(str(error).split())[:160]})"
    finally:
        torch.clear_autocast_cache()  # a cast made without gradient must not be reused by a pass with gradient
    if problem:
        raise _unfit(name, type(plain).__name__, problem)


def _leak(model: TransformersModel, device: torch.device, precision: torch.dtype) -> str:
    """What a demonstration changes in the next one of its row; empty if nothing."""
    decoder = transformer_of(model)
    before, after = TEST_LENGTHS
    first, second, third = (torch.arange(3, 3 + size, device=device) + 20 * part for part, size in enumerate((before, before, after)))
    size = plain_model(model).config.get_text_config().vocab_size
    rows = torch.stack([torch.cat([first, third]), torch.cat([second, third])]) % size
    positions = torch.cat([torch.arange(before, device=device), torch.arange(after, device=device)]).expand(2, -1)
    one, other = decoder(input_ids=rows, position_ids=positions, **no_cache(decoder)).last_hidden_state[:, before:].float()
    alone = decoder(input_ids=rows[:1, before:], **no_cache(decoder)).last_hidden_state[0].float()
    if _change(one, other) > LEAK.get(precision, LEAK_IN_HALF_PRECISION):
        return MIXES
    if _change(one, alone) > ROUNDING.get(precision, ROUNDING_IN_HALF_PRECISION):
        return "it ignores the positions of the second demonstration in a row"
    return ""


def _change(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())

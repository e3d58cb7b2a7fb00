"""Decides the dtype of ``precision: auto`` on a CPU by a short measurement at the width of the step's models.

Only CPUs with matrix tiles for bf16 (AMX) are measured: on other CPUs, bf16 is not much faster, but less precise. A pass in bf16 also casts
tensors and starts more operations, so narrow models are often slower in bf16.

A measurement is kept in the home's ``cache`` folder, so that later runs on the same type of machine decide the same. The decision of a step
is stored with its checkpoints, so a resumed step never changes its dtype.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import StagesError
from stages.models.adapters.stacks import stack_of
from stages.process.console import announcing
from stages.process.hardware import cpu_name, has_amx
from stages.process.runtime import AutoPrecision
from stages.process.storage import read_json, write_json
from stages.registry.references import ResolvedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

NEEDED_GAIN = 1.25
"""bf16 is chosen if a pass in fp32 takes at least this multiple of its time. A smaller gain may be noise."""
WIDEST = 1024  # the width of wider models in the measurement: the gain grows with the width
UNKNOWN_WIDTH = 512
TOKENS = 512
SECONDS = 0.5  # a measurement takes about this long, and at least three rounds
HEAD = 64  # width of an attention head


def auto_precision(width: Callable[[], int], cache: Path, *, kept: Path | None = None) -> AutoPrecision:
    """The dtype of ``precision: auto`` on this CPU, and why. Imports torch only on a CPU with matrix tiles.

    ``width()``: that of the models' hidden states. ``cache``: the folder of earlier measurements. ``kept``: the file with the decision of
    an interrupted step, which is reused; it is written if it does not exist.
    """
    if kept is not None and (earlier := read_json(kept)):
        with suppress(KeyError, TypeError):
            return AutoPrecision(str(earlier["precision"]), f"{earlier['reason']}; decided when the step began")
    decided = _decided(width, cache)
    if kept is not None:
        _write(kept, {"precision": decided.precision, "reason": decided.reason})
    return decided


def _decided(width: Callable[[], int], cache: Path) -> AutoPrecision:
    if not has_tiles():
        return AutoPrecision("fp32", "this CPU has no matrix tiles for bf16")
    wide = min(WIDEST, max(HEAD, width()))
    gain, measured = _gain(wide, cache / "precision.json")
    when = "measured" if measured else "measured earlier"
    reason = f"bf16 takes 1/{gain:.2f} of the time of fp32 at width {wide} ({when})"
    if gain >= NEEDED_GAIN:
        return AutoPrecision("bf16", reason)
    return AutoPrecision("fp32", f"{reason}, and 1/{NEEDED_GAIN} or less would pay for its rounding")


def has_tiles() -> bool:
    """Whether the CPU has matrix tiles for bf16 (AMX) and the system lets programs use them."""
    if not has_amx():
        return False
    import torch

    return bool(torch.cpu._is_amx_tile_supported())


def _gain(width: int, file: Path) -> tuple[float, bool]:
    """(time of a pass in fp32 divided by that in bf16, whether it was measured now)."""
    import torch

    key = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, width {width}"
    known = read_json(file)
    if isinstance(gain := known.get(key), float):
        return gain, False
    seconds = pass_seconds(width)
    made = round(seconds["fp32"] / seconds["bf16"], 3)
    _write(file, {**read_json(file), key: made})
    return made, True


def pass_seconds(width: int) -> dict[str, float]:
    """Seconds of a training pass through a small Llama of this width, in fp32 and in bf16: the minimum over several alternating rounds.

    Other programs affect the minimum the least. The states of the random generators are restored.
    """
    import torch

    best = {"fp32": float("inf"), "bf16": float("inf")}
    with torch.random.fork_rng(devices=[]):
        model, ids = _model(width), torch.arange(TOKENS).view(4, -1) % VOCABULARY
        for name in best:
            _pass(model, ids, name)  # the first pass makes gradients and chooses kernels
        began, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - began < SECONDS:
            rounds += 1
            for name in best:
                best[name] = min(best[name], _pass(model, ids, name))
    return best


VOCABULARY = 1024


def _model(width: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    from stages.models.layers.replacing import use_own_layers

    heads = max(1, width // HEAD)
    config = LlamaConfig(
        hidden_size=heads * HEAD,
        intermediate_size=3 * heads * HEAD,
        num_hidden_layers=2,
        num_attention_heads=heads,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    with announcing(lambda line: None):  # this small model is not one of the user's models
        use_own_layers(model)
    return model


def _pass(model: PreTrainedModel, ids: torch.Tensor, precision: str) -> float:
    import torch

    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    assert loss is not None
    loss.backward()
    return time.perf_counter() - began


def width_of(models: Iterable[ResolvedModel], architecture: Mapping[str, object] | None = None) -> int:
    """The largest width of hidden states of ``models`` and of an ``architecture`` block; UNKNOWN_WIDTH if no config tells it."""
    from stages.models.loading import config_of

    named = [(architecture or {}).get(name) for name in ("hidden_size", "n_embd", "dim", "d_model")]
    widths = [int(value) for value in named if isinstance(value, int | float)]
    for model in models:
        with suppress(StagesError, OSError, ValueError, AttributeError):  # the step reports the problem of the model
            widths.append(int(config_of(stack_of(model).base).get_text_config().hidden_size))
    return max(widths, default=UNKNOWN_WIDTH)


def _write(path: Path, content: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        logger.info("the choice of a precision is not kept: %s", error)

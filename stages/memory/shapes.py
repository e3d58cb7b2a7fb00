"""The sizes of a model from its config: number of weights, and activations stored per token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from ruamel.yaml import YAML

from stages.json_types import JsonObject
from stages.memory.counting import adapter_weights, decoding_memory, model_weights, text_sizes
from stages.memory.decoding import DecodingMemory, LayerStates
from stages.memory.passes import Adapter, PassKind, Task
from stages.memory.weights import AdapterWeights, ModelWeights, Quantizable
from stages.process.storage import read_json
from stages.tokens.positions import model_length

KNOWN_MODELS = Path(__file__).parent / "known_models.yaml"


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer, or of a state-space model, which has no heads. Its weights are counted on a model without memory; if that is
    impossible, they are those of ``formula``."""

    family: str  # transformers' model_type
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    positions: int
    tied: bool  # the output layer shares the embedding's weights
    gated: bool  # three matrices in the feed-forward layer instead of two
    learned_positions: bool
    biases: str  # linear layers with a bias: all, qkv, none
    encoder: bool = False
    task: Task = "CAUSAL_LM"  # the class whose weights are counted; for a classifier, its head is the output layer
    new_rows: int = 0  # of ``vocabulary``: rows that the model does not have yet; with an adapter, they are the trained ones
    config: str = field(default="", repr=False)  # the transformers config as JSON

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def query_width(self) -> int:
        return self.heads * self.head_width

    @property
    def linear_weights(self) -> int:
        """Weights of the linear modules that bitsandbytes quantizes."""
        return self._weights.linear

    @property
    def other_weights(self) -> int:
        """Embeddings, norms, biases, and experts that are one tensor; without the output layer."""
        return self._weights.other

    @property
    def output_weights(self) -> int:
        """The output layer, unless it is tied to the embedding."""
        return self._weights.output

    @property
    def weights(self) -> int:
        """All weights of a causal language model."""
        return self.linear_weights + self.other_weights + self.output_weights

    @property
    def quantizable(self) -> Quantizable:
        """The modules of ``linear_weights``."""
        return self._weights.quantizable

    def adapter(self, adapter: Adapter, task: Task = "CAUSAL_LM") -> AdapterWeights:
        """The weights of a new adapter. ``task``: the class that it is added to. Raises ModelError if it does not fit the model."""
        kind = PassKind(
            self.config, self.vocabulary, "cpu", weights=4, compute=4, trains=True, adapter=adapter, task=task, new_rows=self.new_rows
        )
        return adapter_weights(kind) or AdapterWeights(adapter.settings.r * sum(rows + columns for rows, columns in self._matrices))

    def decoding(self, device: str, weights: int, compute: int) -> DecodingMemory:
        """What the model keeps while it decodes. ``weights``, ``compute``: bytes per weight, and per value of the compute dtype."""
        counted = decoding_memory(PassKind(self.config, self.vocabulary, device, weights, compute, trains=False))
        if counted is not None:
            return counted
        layers = LayerStates(token=2.0 * self.kv_width * compute, state=0.0, window=0, number=self.layers)
        return DecodingMemory((layers,), "in place", True, -1, (0.0, 0.0), (0.0, 0.0), limits_logits=True)

    @property
    def _weights(self) -> ModelWeights:
        return model_weights(self.config, self.vocabulary, self.task) or self.formula

    @property
    def formula(self) -> ModelWeights:
        """The weights of a plain transformer of these sizes: one feed-forward layer per layer, and attention in it."""
        d, q, kv, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        norms = (2 * self.layers + 1) * d * (2 if self.biases == "all" else 1)
        biases = self.layers * {"all": q + 2 * kv + 2 * d + i, "qkv": q + 2 * kv, "none": 0}[self.biases]
        return ModelWeights(
            linear=sum(rows * columns for rows, columns in self._matrices),
            other=(self.vocabulary + (self.positions if self.learned_positions else 0)) * d + norms + biases,
            output=0 if self.tied else self.vocabulary * d,
            quantizable=Quantizable.of(self._matrices),
        )

    @property
    def _matrices(self) -> list[tuple[int, int]]:
        """(output features, input features) of the linear modules of a plain transformer of these sizes."""
        d, q, kv, i = self.hidden, self.query_width, self.kv_width, self.intermediate
        layer = [(q, d), (kv, d), (kv, d), (d, q), *([(i, d), (i, d), (d, i)] if self.gated else [(i, d), (d, i)])]
        return self.layers * layer

    def saved_per_token(self, *, lean: bool = False) -> int:
        """Values that one layer stores per token for the backward pass, as counted on transformers' modules.

        ``lean``: norms and feed-forward layers are replaced by those of ``models/layers/lean.py``. Attention stores queries, keys, values,
        its output and a contiguous copy of the output. The rest depends on the family's norms and activation function.
        """
        kind = "other" if not self.gated else "lean" if lean and not self.family.startswith("gemma") else "gated"
        of_hidden, of_intermediate = SAVED.get(self.family, SAVED[kind])
        return of_hidden * self.hidden + 3 * self.query_width + 2 * self.kv_width + of_intermediate * self.intermediate


# Values that a layer stores besides attention: (multiple of hidden, multiple of intermediate).
SAVED = {"gated": (5, 4), "lean": (4, 2), "gpt2": (3, 5), "other": (5, 2)}

NAMES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "dim", "d_model"),
    "intermediate": ("intermediate_size", "n_inner", "hidden_dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
}
UNGATED = ("gpt2", "gpt_neox", "gpt_neo", "opt", "bloom", "phi", "distilbert", "bert", "roberta")
ENCODERS = ("distilbert", "bert", "roberta")
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")
"""Families with a recurrent state instead of attention."""


def shape_of(config: Mapping[str, object]) -> Shape | None:
    """The sizes in a transformers config (config.json, or a recipe's architecture block); None if one is missing or not a number.

    Of a model of several modalities, they are those of its part for text. A config may leave out what the config class has as a default.
    """
    family = str(config.get("model_type", config.get("type", "llama")))
    encoded = json.dumps({**config, "model_type": family}, sort_keys=True, default=str)
    part = config.get("text_config")
    text: Mapping[str, object] = {**config, **part} if isinstance(part, Mapping) else config
    sizes = _sizes_in(text, family)
    named = "model_type" in config or "type" in config
    if named and (NEEDED - sizes.keys() or (isinstance(part, Mapping) and not _number(text.get("vocab_size")))):
        text = {**(text_sizes(encoded) or {}), **text}
        sizes = _sizes_in(text, family)
    if NEEDED - sizes.keys():
        return None
    hidden, heads = sizes["hidden"], sizes["heads"]
    return Shape(
        family=family,
        hidden=hidden,
        intermediate=sizes.get("intermediate", 4 * hidden),
        layers=sizes["layers"],
        heads=heads,
        kv_heads=(_number(text.get("num_key_value_heads")) or heads) if heads else 0,
        head_width=_number(text.get("head_dim")) or (hidden // heads if heads else 0),
        vocabulary=_number(text.get("vocab_size")),
        positions=model_length(SimpleNamespace(**{**text, "model_type": str(text.get("model_type", family))})) or 2048,
        tied=bool(text.get("tie_word_embeddings", family in ("gpt2", "distilbert", "bert", "roberta", "opt", "bloom"))),
        gated=family not in UNGATED,
        learned_positions=family in ("gpt2", "gpt_neo", "opt", "distilbert", "bert", "roberta"),
        biases="all" if family in UNGATED else "qkv" if family.startswith("qwen2") else "none",
        encoder=family in ENCODERS,
        config=encoded,
    )


NEEDED = {"hidden", "layers", "heads"}


def _sizes_in(config: Mapping[str, object], family: str) -> dict[str, int]:
    """The sizes that the fields of a config name; those that are missing or no number are left out."""
    sizes: dict[str, int] = {}
    for size, names in NAMES.items():
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if isinstance(value, int | float):
            sizes[size] = int(value)
    if family in STATE_SPACE:
        sizes["heads"] = 0
    return sizes


def _number(value: object) -> int:
    """The number in a config; 0 if there is none."""
    return int(value) if isinstance(value, int | float) else 0


def shape_of_folder(folder: Path) -> Shape | None:
    """The sizes of a model on disk; None if the folder has no readable config."""
    try:
        return shape_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def with_new_tokens(shape: Shape, folder: Path) -> Shape:
    """``shape`` with rows for the tokens that the tokenizer in ``folder`` has and the model has not, as loading makes them.

    The row of a pad token is not trained.
    """
    tokens = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json").get("added_tokens", ())}
    size = max(shape.vocabulary, max(tokens.values(), default=-1) + 1)
    pad = read_json(folder / "tokenizer_config.json").get("pad_token")
    pad_id = tokens.get(pad["content"] if isinstance(pad, dict) else pad, -1)
    return replace(shape, vocabulary=size, new_rows=size - shape.vocabulary - (pad_id >= shape.vocabulary))


def shape_of_hub(identifier: str, revision: str | None = None) -> Shape | None:
    """The sizes of a Hub model from the local cache or the list of well-known models; None if neither has it."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(identifier, "config.json", revision=revision)
    if isinstance(cached, str) and (cached_shape := shape_of_folder(Path(cached).parent)) is not None:
        return cached_shape
    known = _known_models().get(identifier.lower())
    return shape_of(known) if known is not None else None


@cache
def _known_models() -> dict[str, JsonObject]:
    content = YAML(typ="safe").load(KNOWN_MODELS)
    return {name.lower(): config for name, config in content.items()}

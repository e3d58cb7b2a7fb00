"""What this project computes with every family equals plain transformers. The fast part; ``benchmarks/families.py`` runs all of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from stages.errors import ModelError

sys.path.insert(0, str(Path(__file__).parent))
from catalogue import CLASSIFIERS, DECODERS, RECENT, save  # noqa: E402
from checks import CLASSIFIER_CHECKS, DECODER_CHECKS, EXACT, TOLERANCE  # noqa: E402

DOCS = Path(__file__).resolve().parents[2] / "docs" / "families.md"
# Each family has one check. These few families of different kinds have more. Decoding has its own matrix in tests/sampling.
MORE = {
    "opt-projected": ["rewards and values", "LoRA, merged and reloaded"],
    "rwkv": ["rewards and values"],
    "gemma2": ["full step"],
    "bloom": ["rewards and values"],
    "jamba": ["LoRA, merged and reloaded", "LoRA on nf4"],
    "bert": ["LoRA in bf16"],
    "deberta": ["LoRA in bf16"],
    "distilbert": ["LoRA in bf16", "LoRA, merged and reloaded"],
    "roberta": ["LoRA, merged and reloaded"],
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """folders(name) -> the tiny model of a family, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name in DECODERS:
                save(DECODERS[name], folder, AutoModelForCausalLM)
            else:
                save(CLASSIFIERS[name], folder, AutoModelForSequenceClassification)
            made[name] = folder
        return made[name]

    return get


LEFT_OUT = ("codegen", "olmo", "qwen2_moe", "granitemoe", "cohere2", "nemotron", "deepseek_v2", "falcon_mamba", "camembert", "albert")
"""Families that are similar to another one in this test. Only the full matrix tests them."""


OF_RECENT = {
    "gemma3n_text": ["full step"],  # changes outputs of linear layers in place
    "llama4_text": ["LoRA, merged and reloaded"],  # its router is a linear layer that returns two tensors
    "phimoe": ["log-probabilities"],  # samples its experts in training mode
    "longcat_flash": ["LoRA on nf4"],  # reads the weight of its router
    "granitemoehybrid": ["log-probabilities"],  # no layer with keys and values, so it cannot make a cache
    "xlstm": ["rewards and values"],
    "modernbert-decoder": ["rewards and values"],  # its classifier has more layers than score
    "axk1": ["rewards and values"],  # checkpoints have other names than the model in memory
}
"""The checks of recent families that once failed. Only the full matrix tests the others."""


def chosen(families: Any, first: str) -> list[tuple[str, str]]:
    left_out = {*LEFT_OUT, *RECENT}
    old = [(name, check) for name in families if name not in left_out for check in (first, *MORE.get(name, ()))]
    return old + [(name, check) for name, checks in OF_RECENT.items() if name in families for check in checks]


@pytest.mark.parametrize(("name", "check"), chosen(DECODERS, "log-probabilities"))
def test_decoder_equals_plain_transformers(name: str, check: str, folders: Any, tmp_path: Path) -> None:
    assert DECODER_CHECKS[check](DECODERS[name], folders(name), tmp_path) < EXACT


@pytest.mark.parametrize(("name", "check"), chosen(CLASSIFIERS, "classes"))
def test_classifier_equals_plain_transformers(name: str, check: str, folders: Any, tmp_path: Path) -> None:
    assert CLASSIFIER_CHECKS[check](CLASSIFIERS[name], folders(name), tmp_path) < TOLERANCE.get(check, EXACT)


REFUSED = [(name, check) for name, family in (DECODERS | CLASSIFIERS).items() for check in family.without]


@pytest.mark.parametrize(("name", "check"), REFUSED)
def test_unsupported_use_of_a_family_is_refused_in_one_message(name: str, check: str, folders: Any, tmp_path: Path) -> None:
    family = (DECODERS | CLASSIFIERS)[name]
    with pytest.raises(ModelError, match=re.escape(family.without[check])):
        (DECODER_CHECKS | CLASSIFIER_CHECKS)[check](family, folders(name), tmp_path)


def test_the_docs_name_every_family_and_every_refusal() -> None:
    text = DOCS.read_text()
    for name, family in (DECODERS | CLASSIFIERS).items():
        assert f"`{name}`" in text, name
        for message in family.without.values():
            assert message in text, message

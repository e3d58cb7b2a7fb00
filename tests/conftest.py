"""Fixtures for all tests: a tiny tokenizer and tiny models that are made on the fly, and a step context without a chain."""

from __future__ import annotations

import importlib
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when it is imported; no test of this process contacts the real Hub
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is one process per core; OpenMP reads the variable when torch is imported

import copy
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from stages.config import ModelInput
from stages.process.hardware import usable_cores
from stages.recipe.schema import STAGES
from stages.report.page import Written

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

# Modules for fixtures and tests: the local replacement of the Hub, and the overrides that make recipes small.
sys.path += [str(REPOSITORY / "tests" / "hub"), str(REPOSITORY / "tests" / "recipes")]

SENTENCES = [
    "the acting was warm and the film was a joy",
    "the plot was dull and the ending was weak",
    "write a happy line about the music",
    "a fine film with a bright and honest story",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """The number of processes for ``-n auto``: one per usable core, but at most four, because each needs 2 GiB or more."""
    return min(usable_cores().usable, 4)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data next to the project. Tests that need it are skipped if it does not exist."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs ../shared/data (real data sets that are not part of the project)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Byte-level BPE tokenizer with 300 tokens, eos <|endoftext|> and pad <|pad|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|pad|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>")


def save_llama(folder: Path, tokenizer: Any, **shape: float) -> Path:
    """Save a random two-layer Llama of this shape with its tokenizer. Returns ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        max_position_embeddings=128,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_model(folder: Path, weights: bytes = b"weights") -> None:
    """The files of a model that only the registry reads."""
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A random two-layer Llama (hidden size 32) saved with its tokenizer, for from_pretrained."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_llama(tmp_path_factory.mktemp("tiny-llama"), tiny_tokenizer, **shape)


@pytest.fixture
def resolve_folder() -> Any:
    """resolve_folder(path, **model_input_fields) -> ResolvedModel of a local folder."""
    from stages.registry.references import ResolvedModel

    def resolve(path: Path | str, **fields: Any) -> ResolvedModel:
        return ResolvedModel(ref=str(path), kind="folder", path=str(path), digest="sha256:test", input=ModelInput(ref=str(path), **fields))

    return resolve


def check_declared(metrics: Iterable[str]) -> None:
    """Assert that each metric has a meaning in stages/metric_names.py, where ``<...>`` stands for any name."""
    from stages.metric_names import MEANINGS

    patterns = [re.sub("<[a-z ]+>", ".+", re.escape(name)) for name in MEANINGS]
    unknown = [name for name in metrics if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not unknown, f"no meaning in stages/metric_names.py: {unknown}"


@pytest.fixture
def step_context(tmp_path: Path) -> Any:
    """step_context(name="test/step", seed=0, **models) -> StepContext with its own registry and folders."""
    from stages.process.runtime import Runtime
    from stages.registry.ledger import Registry
    from stages.step import StepContext

    def make(name: str = "test/step", seed: int = 0, models: dict[str, Any] | None = None) -> StepContext:
        folder = tmp_path / "run" / name.rsplit("/")[-1]
        checkpoints = tmp_path / "work" / name.rsplit("/")[-1]
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.mkdir(parents=True, exist_ok=True)
        runtime = Runtime(quiet=True)
        runtime.listeners.append(lambda _, __, metrics: check_declared(metrics))
        runtime.begin_step(seed)
        return StepContext(
            name=name,
            seed=seed,
            runtime=runtime,
            registry=Registry(tmp_path / "registry"),
            models=models or {},
            folder=folder,
            checkpoint_folder=checkpoints,
        )

    return make


# One tokenizer per kind that real models use; all have the same special tokens

TURN_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin|>",
    "<|head|>",
    "<|headend|>",
    "<|eot|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "[INST]",
    "[/INST]",
    "[TOOLS]",
    "[/TOOLS]",
    "<|user|>",
    "<|system|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
]
THINKING = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # added tokens that are not special tokens, as in Qwen3
KIND_SENTENCES = [
    "hello there, how are you? i am fine and the sun is warm today.",
    "what is the weather in paris? the weather is 22 degrees, says the tool.",
    "be kind and brief. the answer is: there was a cat. the other answer is no.",
    "once upon a time there was a red ball. one two three four five.",
] * 3
TOKENIZER_KINDS = ("byte_bpe", "sentencepiece", "metaspace", "unigram", "wordpiece")


@pytest.fixture
def fake_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test, with the stages ``train`` and ``judge`` of fake_stages.py and the data a.txt and b.txt."""
    shutil.copy(Path(__file__).with_name("fake_stages.py"), tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_stages", raising=False)
    for name in ("train", "judge"):
        monkeypatch.setitem(STAGES, name, STAGES["sft"])  # so that what install() puts there is taken out again
    importlib.import_module("fake_stages").install()
    # Drawing the page takes a second for each run.
    monkeypatch.setattr("stages.report.page.write_report", lambda run: Written(run.path / "report.html", 0, []))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STAGES_HOME", raising=False)
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(name)
    return tmp_path


@cache
def _tokenizer_of(kind: str) -> Any:
    """A tokenizer of one of TOKENIZER_KINDS.

    byte_bpe         as GPT-2
    sentencepiece    as Llama-2: a space before every text, bytes for unknown characters
    metaspace        BPE with a space before the first text only
    unigram          as T5
    wordpiece        as BERT
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    characters = sorted(set("".join(KIND_SENTENCES)) | set(" \nABCDEFGHIJKLMNOPQRSTUVWXYZ{}[]\"':,/<>|_#-=()&"))
    options: dict[str, Any] = {"vocab_size": 520, "special_tokens": TURN_TOKENS, "show_progress": False}
    if kind == "byte_bpe":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(**options, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    elif kind in ("sentencepiece", "metaspace"):
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.BpeTrainer(**options, initial_alphabet=[*characters, "▁"])
        trainer.special_tokens = [*TURN_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer.vocab_size = 800
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**options, unk_token="<unk>", initial_alphabet=[*characters, "▁"])
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(**options, initial_alphabet=characters)
    made.train_from_iterator(KIND_SENTENCES, trainer)
    if kind == "sentencepiece":  # as converted from Llama-2
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.pre_tokenizer = None
    if kind in ("sentencepiece", "metaspace"):
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in THINKING])
    if kind != "byte_bpe":
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=TURN_TOKENS[4:],
    )


@pytest.fixture(scope="session")
def tokenizer_of() -> Any:
    """tokenizer_of(kind) -> a copy of a tokenizer of this kind, one of TOKENIZER_KINDS."""
    return lambda kind: copy.deepcopy(_tokenizer_of(kind))


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A local server that replaces the Hub (tests/hub/stand_in.py). It has everything that the shipped recipes read from the Hub."""
    from published import publish_all
    from stand_in import Hub

    server = Hub()
    publish_all(server, tmp_path_factory.mktemp("published"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder where ``hub_client`` stores its downloads."""
    return tmp_path_factory.mktemp("hub-cache")


@pytest.fixture(scope="session")
def hub_client(hub: Any, hub_cache: Path) -> Iterator[Any]:
    """hub_client.run("plan", ...) runs ``stages plan ...`` in a process whose client libraries ask ``hub``; see tests/hub/client.py."""
    from client import Client

    client = Client(hub.environment(hub_cache))
    yield client
    client.close()

"""Small versions of what the shipped recipes read on the Hub: the real names, file names, READMEs and columns; tiny models, few rows.

The texts come from the embedded world. If a real repository changes, change it here, too.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def publish_all(hub: Any, folder: Path) -> None:
    """Publish every model and data set that a recipe names; ``folder`` is for the files of models."""
    texts = world_texts(120)
    for identifier, files in models(texts, folder).items():
        hub.publish("model", identifier, files)
    for identifier, content in data_sets(texts).items():
        hub.publish("dataset", identifier, content)


def world_texts(count: int) -> list[str]:
    """Film reviews of the embedded world, each different."""
    from stages.corpora.world.parts import world_rows

    texts: list[str] = []
    for row in world_rows("world:raw", 4 * count):
        if row["text"] not in texts:
            texts.append(" ".join(row["text"].split()))
    return texts[:count]


# Models


def models(texts: Sequence[str], folder: Path) -> dict[str, Path]:
    """Folder of each model, written by save_pretrained."""
    import torch
    from transformers import (
        DistilBertConfig,
        DistilBertForMaskedLM,
        DistilBertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    size = {"num_hidden_layers": 1, "num_attention_heads": 2}
    neox = byte_tokenizer(texts, ["<|endoftext|>", "<|padding|>"], bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    gpt2 = byte_tokenizer(texts, ["<|endoftext|>"], bos_token="<|endoftext|>", unk_token="<|endoftext|>", model_max_length=1024)
    qwen = byte_tokenizer(texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pad_token="<|endoftext|>", model_max_length=32768)
    qwen.chat_template = CHATML
    smol = byte_tokenizer(texts, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    words = word_tokenizer(texts)
    qwen_config = Qwen2Config(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **size,
    )
    smol_config = LlamaConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=64,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        **size,
    )
    neox_config = GPTNeoXConfig(vocab_size=640, hidden_size=32, intermediate_size=64, max_position_embeddings=2048, **size)
    gpt2_config = GPT2Config(vocab_size=len(gpt2), n_embd=32, n_layer=1, n_head=2, n_positions=1024, bos_token_id=0, eos_token_id=0)
    bert: dict[str, Any] = {"vocab_size": len(words), "dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 2}
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    classifier = DistilBertConfig(**bert, **labels, initializer_range=0.3)  # so that its scores differ
    made = {
        **{f"EleutherAI/pythia-{billions}b-deduped": (GPTNeoXForCausalLM, neox_config, neox) for billions in ("1", "2.8", "6.9", "12")},
        **{f"Qwen/Qwen2.5-{billions}B": (Qwen2ForCausalLM, qwen_config, qwen) for billions in ("0.5", "1.5", "3", "7", "14")},
        "HuggingFaceTB/SmolLM2-135M": (LlamaForCausalLM, smol_config, smol),
        "openai-community/gpt2": (GPT2LMHeadModel, gpt2_config, gpt2),
        "distilbert/distilbert-base-uncased": (DistilBertForMaskedLM, DistilBertConfig(**bert), words),
        "lvwerra/distilbert-imdb": (DistilBertForSequenceClassification, classifier, words),
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english": (DistilBertForSequenceClassification, classifier, words),
    }
    folders = {}
    for seed, (identifier, (kind, config, tokenizer)) in enumerate(made.items()):
        torch.manual_seed(seed)
        folders[identifier] = folder / identifier
        kind(config).save_pretrained(folders[identifier])
        tokenizer.save_pretrained(folders[identifier])
    return folders


def byte_tokenizer(texts: Sequence[str], specials: list[str], **options: Any) -> Any:
    """Byte-level BPE of 600 pieces; the first special token is the end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=specials[0], **options)


def word_tokenizer(texts: Sequence[str]) -> Any:
    """WordPiece in lower case, as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, model_input_names=["input_ids", "attention_mask"], **names
    )


# Data sets


def data_sets(texts: Sequence[str]) -> dict[str, dict[str, bytes]]:
    """Files of each data set."""
    reviews = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    return {
        "trl-lib/tldr": {
            **shards("data", {"train": tldr(texts[:60]), "validation": tldr(texts[60:80]), "test": tldr(texts[80:100])}),
            "README.md": readme({"default": {split: f"data/{split}-*" for split in ("train", "validation", "test")}}),
        },
        "trl-lib/tldr-preference": {
            **shards("data", {"train": pairs(texts[:40]), "validation": pairs(texts[40:100])}),
            "README.md": readme({"default": {split: f"data/{split}-*" for split in ("train", "validation")}}),
        },
        "Anthropic/hh-rlhf": hh(texts),
        "shawhin/imdb-truncated": {
            "data/train-00000-of-00001-5a744bf76a1d84b2.parquet": parquet(reviews[:60]),
            "data/validation-00000-of-00001-a3a52fabb70c739f.parquet": parquet(reviews[60:100]),
            "README.md": b"---\ndataset_info:\n  features:\n  - name: label\n    dtype: int64\n  - name: text\n    dtype: string\n---\n",
        },
        "stanfordnlp/imdb": {
            **shards("plain_text", {"train": reviews[:60], "test": reviews[60:100], "unsupervised": unlabelled(reviews)}),
            "README.md": readme({"plain_text": {split: f"plain_text/{split}-*" for split in ("train", "test", "unsupervised")}}),
        },
        "NeelNanda/pile-10k": {
            "data/train-00000-of-00001-4746b8785c874cc7.parquet": parquet(
                [{"text": text * 3, "meta": {"pile_set_name": "Pile-CC"}} for text in texts]
            ),
            "README.md": b"---\nlicense: bigscience-bloom-rail-1.0\n---\n",
        },
        "Rowan/hellaswag": {
            **shards("data", {"train": hellaswag(texts[:8]), "validation": hellaswag(texts[8:16]), "test": hellaswag(texts[16:24], "")}),
            "README.md": b"---\nlanguage:\n- en\n---\n",
        },
        "tatsu-lab/alpaca": {
            "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet": parquet(alpaca(texts[:100])),
            "README.md": b"---\ndataset_info:\n  features:\n"
            + b"".join(f"  - name: {name}\n    dtype: string\n".encode() for name in ("instruction", "input", "output", "text"))
            + b"---\n",
        },
        "openbmb/UltraFeedback": {
            **{f"{name}.jsonl": json_lines(graded(texts[:60], name)) for name in ("evol_instruct", "flan", "sharegpt", "ultrachat")},
            "README.md": b"---\nlicense: mit\nlanguage:\n- en\n---\n",
        },
        "cornell-movie-review-data/rotten_tomatoes": {
            **{f"{split}.parquet": parquet(reviews[:20]) for split in SPLITS},
            "README.md": readme({"default": {split: f"{split}.parquet" for split in SPLITS}}),
        },
        "stanfordnlp/sst2": {
            **shards("data", {split: sentences(texts[:10], hidden=split == "test") for split in ("train", "validation", "test")}),
            "README.md": b"---\nlanguage:\n- en\n---\n",
        },
        "nyu-mll/glue": {
            **shards("mrpc", dict.fromkeys(SPLITS, entailments(texts[:10]))),
            **shards("rte", dict.fromkeys(SPLITS, entailments(texts[:10]))),
            "README.md": readme({part: {split: f"{part}/{split}-*" for split in SPLITS} for part in ("mrpc", "rte")}),
        },
    }


SPLITS = ("train", "validation", "test")


def parquet(rows: Rows) -> bytes:
    import pyarrow
    from pyarrow import parquet as writer

    buffer = io.BytesIO()
    writer.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shards(folder: str, splits: dict[str, Rows]) -> dict[str, bytes]:
    """One parquet file for each split, as push_to_hub names it."""
    return {f"{folder}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}


def readme(configs: dict[str, dict[str, str]]) -> bytes:
    """A README whose front matter names the files of each config and split."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, pattern in splits.items() for line in (f"  - split: {split}", f"    path: {pattern}")]
    return "\n".join([*lines, "---", "# A data set", ""]).encode()


def post(text: str) -> str:
    return f"SUBREDDIT: r/relationships\n\nTITLE: a film\n\nPOST: {text}\n\nTL;DR:"


def tldr(texts: Sequence[str]) -> Rows:
    return [{"prompt": post(text), "completion": " " + " ".join(text.split()[:6])} for text in texts]


def pairs(texts: Sequence[str]) -> Rows:
    def summary(words: list[str]) -> str:
        return " " + " ".join(words)

    return [{"prompt": post(text), "chosen": summary(text.split()[:6]), "rejected": summary(text.split()[-5:])} for text in texts]


def alpaca(texts: Sequence[str]) -> Rows:
    """Every third row has an input."""
    rows = []
    for index, text in enumerate(texts):
        words = text.split()
        row = {"instruction": " ".join(words[:5]), "input": " ".join(words[5:8]) if index % 3 == 0 else "", "output": " ".join(words[8:14])}
        rows.append({**row, "text": f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"})
    return rows


def graded(texts: Sequence[str], source: str) -> Rows:
    """Four completions of each instruction, each an object with its text and its grades."""

    def completion(text: str, index: int) -> dict[str, Any]:
        rating = {"Rating": str(index + 1), "Rationale": "because"}
        annotations = {aspect: rating for aspect in ("instruction_following", "honesty", "truthfulness", "helpfulness")}
        words = text.split()
        return {
            "annotations": annotations,
            "custom_system_prompt": "Be helpful.",
            "model": f"model-{index}",
            "principle": "helpfulness",
            "response": " ".join(words[index : index + 6]),
            "critique": "Good.",
            "fine-grained_score": 1.25 * index,
            "overall_score": 2.0 * index,
        }

    return [
        {
            "source": source,
            "instruction": text[:60],
            "models": [f"model-{index}" for index in range(4)],
            "completions": [completion(text, index) for index in range(4)],
            "correct_answers": ["None"],
            "incorrect_answers": ["None"],
        }
        for text in texts
    ]


def hh(texts: Sequence[str]) -> dict[str, bytes]:
    """Folders instead of configs, packed JSON lines, and a file of another schema."""

    def rows(chosen: Sequence[str]) -> Rows:
        talk = "\n\nHuman: {0}\n\nAssistant: Which one?\n\nHuman: This one.\n\nAssistant: {1}"
        return [{"chosen": talk.format(text[:60], text[60:120] or "Yes."), "rejected": talk.format(text[:60], "No.")} for text in chosen]

    files = {
        f"{folder}/{split}.jsonl.gz": gzip.compress(json_lines(rows(part)))
        for folder in ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
        for split, part in (("train", texts[:60]), ("test", texts[60:90]))
    }
    attempt = [{"min_harmlessness_score_transcript": -1.5, "num_params": "52B", "transcript": "\n\nHuman: hi\n\nAssistant: hi"}]
    files["red-team-attempts/red_team_attempts.jsonl.gz"] = gzip.compress(json.dumps(attempt).encode())
    return {**files, "README.md": b"---\nlicense: mit\ntags:\n- human-feedback\n---\n# Dataset Card for HH-RLHF\n"}


def unlabelled(rows: Rows) -> Rows:
    return [{**row, "label": -1} for row in rows]


def hellaswag(texts: Sequence[str], label: str | None = None) -> Rows:
    return [
        {
            "ind": index,
            "activity_label": "Film",
            "ctx_a": text[:40],
            "ctx_b": "it",
            "ctx": f"{text[:40]} it",
            "endings": ["is good.", "is bad.", "is over.", "begins."],
            "source_id": "a~v",
            "split": "val",
            "split_type": "indomain",
            "label": str(index % 4) if label is None else label,
        }
        for index, text in enumerate(texts)
    ]


def sentences(texts: Sequence[str], *, hidden: bool) -> Rows:
    return [{"idx": index, "sentence": text[:60] + " ", "label": -1 if hidden else index % 2} for index, text in enumerate(texts)]


def entailments(texts: Sequence[str]) -> Rows:
    return [{"sentence1": text[:60], "sentence2": text[:30], "label": index % 2, "idx": index} for index, text in enumerate(texts)]

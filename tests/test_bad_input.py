"""Errors in a recipe, a data set or a model give one message: exit status 2, no traceback, and an unchanged registry.

A case is a recipe (from ``GOOD``, changed), the files in its folder, and what the message must contain. Data and models are as small
as possible, and most cases end before a model is read.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from stages.cli import app
from tests.conftest import write_model

PRETRAINING = {
    "stage": "pretraining",
    "name": "base",
    "precision": "fp32",
    "block_size": 8,
    "tokenizer": {"vocab_size": 300},
    "architecture": {"type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
    "data": {"train": "texts.jsonl"},
    "training": {"max_steps": 1},
}
SFT = {
    "stage": "sft",
    "name": "sft",
    "precision": "fp32",
    "model": "./model",
    "data": {"train": "demonstrations.jsonl"},
    "training": {"max_steps": 1},
}
REWARD = {
    "stage": "reward_model",
    "name": "preference",
    "precision": "fp32",
    "model": "./model",
    "data": {"train": "comparisons.jsonl"},
    "training": {"max_steps": 1},
}
SENTIMENT = {
    "stage": "sentiment",
    "name": "taste",
    "precision": "fp32",
    "data": {"train": "reviews.jsonl"},
    "tokenizer": {"vocab_size": 100},
    "architecture": {"type": "distilbert", "dim": 8, "hidden_dim": 8, "n_layers": 1, "n_heads": 1},
    "max_length": 16,
    "training": {"max_steps": 1},
}
PPO = {
    "stage": "ppo",
    "name": "aligned",
    "precision": "fp32",
    "policy": "./model",
    "value": "policy",
    "data": "prompts.jsonl",
    "reward": [{"function": "stages.corpora.world.gold:score_batch", "name": "gold"}],
    "generation": {"max_new_tokens": 4},
    "total_episodes": 8,
    "rollout_batch_size": 8,
    "minibatch_size": 8,
    "microbatch_size": 8,
}
EVALUATION = {
    "stage": "evaluation",
    "name": "verdict",
    "precision": "fp32",
    "candidates": {"base": "./model"},
    "data": "prompts.jsonl",
    "judges": [{"function": "stages.corpora.world.gold:score_batch", "name": "gold"}],
    "generation": {"max_new_tokens": 4},
}

ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": f"the film number {number} was a joy to watch"} for number in range(20)],
    "demonstrations": [{"prompt": f"write {number}:", "completion": "a joy"} for number in range(20)],
    "comparisons": [{"prompt": f"write {number}", "chosen": "a joy", "rejected": "dull"} for number in range(20)],
    "reviews": [{"text": f"film {number}", "label": number % 2} for number in range(20)],
    "prompts": [{"prompt": f"write {number}"} for number in range(20)],
}


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@dataclass
class Case:
    """``message`` is what stderr has to contain; ``step`` with ``fields`` over it, or a complete ``recipe`` text."""

    message: str
    step: dict[str, Any] | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    recipe: str | bytes | None = None
    files: dict[str, str | bytes] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    prepare: Callable[[Path], None] | None = None  # called with the folder of the case


def bad_row(name: str, line: int, row: Any) -> dict[str, str | bytes]:
    """The good table ``name`` with ``row`` at line ``line`` (from 1)."""
    rows: list[Any] = list(ROWS[name])
    rows[line - 1] = row
    return {f"{name}.jsonl": lines(rows)}


def only(name: str, *rows: Any) -> dict[str, str | bytes]:
    return {f"{name}.jsonl": lines(list(rows))}


HEAD = "name: bad\nsteps:\n"
RECIPES = {
    "unknown field": Case(
        "bad.yaml:4: steps[0].blocksize: unknown field 'blocksize'; did you mean 'block_size'?", PRETRAINING, {"blocksize": 3}
    ),
    "field of a block, written in the step": Case(
        "steps[0].epochs: unknown field 'epochs'; did you mean steps[0].training.epochs?", SFT, {"epochs": 1}
    ),
    "field of the step, written in a block": Case(
        "steps[0].training.packing: unknown field 'packing'; did you mean steps[0].packing?", SFT, {"training": {"packing": True}}
    ),
    "held-out rows under another name": Case(
        "steps[0].data.test: unknown field 'test'; did you mean 'validation'?", SFT, {"data": {"train": "demos.jsonl", "test": "x.jsonl"}}
    ),
    "template arguments under another name": Case(
        "steps[0].chat_template_kwargs: unknown field 'chat_template_kwargs'; did you mean steps[0].model.template_arguments?",
        SFT,
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "template arguments under another name in the model": Case(
        "steps[0].model.chat_template_kwargs: unknown field 'chat_template_kwargs'; did you mean 'template_arguments'?",
        SFT,
        {"model": {"ref": "./model", "chat_template_kwargs": {}}},
    ),
    "template arguments for a template that is replaced": Case(
        "template='chatml' replaces the model's chat template, so model.template_arguments would have no effect",
        SFT,
        {"template": "chatml", "model": {"ref": "./model", "template_arguments": {"enable_thinking": False}}},
    ),
    "template arguments without a template": Case(
        "steps[0] (sft): model: template_arguments of ./model: its tokenizer has no chat template that could use enable_thinking",
        SFT,
        {"model": {"ref": "./model", "template_arguments": {"enable_thinking": False}}},
    ),
    "unknown nested field": Case("steps[0].training.epoch: unknown field 'epoch'; did you mean 'epochs'?", SFT, {"training": {"epoch": 1}}),
    "text for a number": Case(
        "steps[0].training.learning_rate: got 'fast', expected a number", SFT, {"training": {"learning_rate": "fast"}}
    ),
    "number in quotes": Case("training.epochs: got '2', expected a number", SFT, {"training": {"epochs": "2"}}),
    "fraction for a count": Case("training.batch_size: got 2.5, expected a whole number", SFT, {"training": {"batch_size": 2.5}}),
    "negative rate": Case("training.learning_rate: got -0.1, expected a number above 0", SFT, {"training": {"learning_rate": -0.1}}),
    "zero batch": Case("training.batch_size: got 0, expected a number of at least 1", SFT, {"training": {"batch_size": 0}}),
    "beta of one": Case("training.adam_beta1: got 1.0, expected a number below 1", SFT, {"training": {"adam_beta1": 1.0}}),
    "not a number": Case("got nan, expected a finite number", recipe=HEAD + "  - {stage: sft, name: a, training: {learning_rate: .nan}}\n"),
    "infinity": Case("got inf, expected a finite number", recipe=HEAD + "  - {stage: sft, name: a, training: {learning_rate: .inf}}\n"),
    "a huge number": Case("got a number of 401 digits, expected a whole number below 2**63", SFT, {"training": {"batch_size": 10**400}}),
    "yes for a switch": Case("steps[0].packing: got 'yes', expected true or false", SFT, {"packing": "yes"}),
    "a list for text": Case("steps[0].template: got ['a'], expected text", SFT, {"template": ["a"]}),
    "text for a block": Case("steps[0].lora: got 'r=8', expected a block of fields", SFT, {"lora": "r=8"}),
    "no such choice": Case(
        "training.schedule: got 'cosinus', expected one of 'constant', 'linear' or 'cosine'", SFT, {"training": {"schedule": "cosinus"}}
    ),
    "no such precision": Case("precision: got 'fp8', expected one of 'auto', 'fp32', 'bf16' or 'fp16'", SFT, {"precision": "fp8"}),
    "no such quantization": Case(
        "quantization: got 'int4', expected one of 'none', 'int8' or 'nf4'", SFT, {"model": {"ref": "./model", "quantization": "int4"}}
    ),
    "a field is missing": Case("steps[0].data: this field is missing", {key: SFT[key] for key in SFT if key != "data"}),
    "splits where one source is expected": Case(
        "steps[0].data: unknown field 'train': this field takes a source of rows, without the names of splits. Write data: rows.jsonl",
        PPO,
        {"data": {"train": "rows.jsonl"}},
    ),
    "splits with blocks where one source is expected": Case(
        "Write the block of test directly under data", PPO, {"data": [{"test": {"path": "rows.jsonl"}}]}
    ),
    "a source among splits": Case(
        "steps[0].data: path belongs to one source, and validation to a mapping of splits. Write train: rows.jsonl instead of path",
        SFT,
        {"data": {"path": "rows.jsonl", "validation": "rows.jsonl"}},
    ),
    "a source with a fraction": Case(
        "and validation_fraction to a mapping of splits. Write train: rows.jsonl",
        SFT,
        {"data": {"path": "rows.jsonl", "validation_fraction": 0.1}},
    ),
    "a model without a reference": Case("steps[0].model.ref: this field is missing", SFT, {"model": {"revision": "main"}}),
    "no stage": Case("the field stage is missing; expected one of pretraining, sft", {key: SFT[key] for key in SFT if key != "stage"}),
    "no such stage": Case("got 'sftt', which is not a stage; did you mean 'sft'?", SFT, {"stage": "sftt"}),
    "a number as stage": Case("got 3, which is not a stage", SFT, {"stage": 3}),
    "no steps": Case("bad.yaml:1: the field steps is missing", recipe="name: bad\n"),
    "empty steps": Case("steps: got [], expected a list of at least one step", recipe="name: bad\nsteps: []\n"),
    "a step that is text": Case("steps[0]: got 'sft', expected a block of fields", recipe="name: bad\nsteps: [sft]\n"),
    "no name": Case("name: this field is missing", recipe="steps:\n  - {stage: sft, name: a}\n"),
    "a name with a slash": Case("name: got '../bad', expected letters, digits", recipe="name: ../bad\nsteps:\n  - {stage: sft}\n"),
    "a step's name with a slash": Case("steps[0].name: got '../../x', expected letters, digits", SFT, {"name": "../../x"}),
    "a name of digits": Case("'bad/7' is not a model name", SFT, {"name": "7"}),
    "a name twice": Case(
        "got 'sft', which is already the name of steps[0]", recipe=HEAD + f"  - {json.dumps(SFT)}\n  - {json.dumps(SFT)}\n"
    ),
    "the name of a field": Case("got 'seed', a field of the recipe itself", SFT, {"name": "seed"}),
    "a negative seed": Case("seed: got -1, expected a number of at least 0", recipe="name: bad\nseed: -1\nsteps:\n  - {stage: sft}\n"),
    "an empty file": Case("bad.yaml: expected a block with the fields name and steps, got NoneType", recipe=""),
    "a list": Case("bad.yaml: expected a block with the fields name and steps, got list", recipe="- a\n"),
    "broken YAML": Case("bad.yaml:3: column 1: not readable as YAML: expected ',' or ']'", recipe="name: bad\nsteps: [a\n"),
    "a tab": Case("not readable as YAML", recipe="name: bad\nsteps:\n\t- a\n"),
    "a key twice": Case("not readable as YAML: found duplicate key", recipe="name: bad\nname: again\nsteps: [a]\n"),
    "a key that is a number": Case("the key 7 is not text", recipe="name: bad\n7: a\nsteps: [a]\n"),
    "a Python object": Case(
        "the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
        recipe="name: !!python/object/apply:os.system [touch owned]\nsteps: [a]\n",
    ),
    "an unknown alias": Case("not readable as YAML", recipe="name: *nobody\nsteps: [a]\n"),
    "a bomb of aliases": Case(
        "more than 100000 values",
        recipe="a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
        + "name: bad\nsteps: [a]\n",
    ),
    "a deep nest": Case("nested too deeply", recipe="name: bad\nsteps: " + "[" * 3000 + "]" * 3000 + "\n"),
    "bytes that are no UTF-8": Case("bad.yaml: cannot be read as a recipe", recipe=b"name: \xff\xfe\n"),
    "a NUL byte in the recipe": Case("not readable as YAML", recipe="name: ba\0d\n"),
    "two documents": Case("not readable as YAML", recipe="name: bad\nsteps: [a]\n---\nname: other\n"),
    "a later step": Case(
        "got 'second', a later step (steps[1]); move it before 'first'",
        recipe=HEAD
        + "".join(
            f"  - {json.dumps({**SFT, 'name': name, 'model': model})}\n" for name, model in (("first", "second"), ("second", "./model"))
        ),
    ),
    "a cycle": Case(
        "a cycle: first -> second -> first",
        recipe=HEAD
        + "".join(
            f"  - {json.dumps({**SFT, 'name': name, 'model': model})}\n" for name, model in (("first", "second"), ("second", "first"))
        ),
    ),
    "itself": Case("got 'sft', a cycle: the step 'sft' refers to itself", SFT, {"model": "sft"}),
    "a step that makes no model": Case(
        "a step of stage 'evaluation', which makes no model",
        recipe=HEAD + "".join(f"  - {json.dumps(step)}\n" for step in (EVALUATION, {**SFT, "model": "verdict"})),
    ),
    "a typing error in a step's name": Case(
        "did you mean 'base'?", recipe=HEAD + "".join(f"  - {json.dumps(step)}\n" for step in (PRETRAINING, {**SFT, "model": "bse"}))
    ),
    "quantized without an adapter": Case("model.quantization='nf4' needs lora", SFT, {"model": {"ref": "./model", "quantization": "nf4"}}),
    "both origins": Case("give either model (continued pretraining) or architecture", PRETRAINING, {"model": "./model"}),
    "no type of architecture": Case("architecture needs a type", PRETRAINING, {"architecture": {"hidden_size": 8}}),
    "an architecture there is not": Case("'lama'", PRETRAINING, {"architecture": {"type": "lama"}}),
    "heads that do not divide": Case(
        "is not a multiple of the number of attention heads (3)",
        PRETRAINING,
        {"architecture": {**PRETRAINING["architecture"], "num_attention_heads": 3}},
    ),
    "an architecture's field there is not": Case(
        "hiden_size", PRETRAINING, {"architecture": {**PRETRAINING["architecture"], "hiden_size": 8}}
    ),
    "batches that do not fit": Case("rollout_batch_size=8 must be a multiple of minibatch_size=3", PPO, {"minibatch_size": 3}),
    "too few episodes": Case("total_episodes=4 is less than rollout_batch_size=8", PPO, {"total_episodes": 4}),
    "greedy rollouts": Case("generation.temperature=0 is greedy", PPO, {"generation": {"temperature": 0.0}}),
    "no reward": Case("steps[0].reward: got [], expected at least 1 items", PPO, {"reward": []}),
    "a reward of two kinds": Case("set exactly one of model", PPO, {"reward": [{"function": "a:b", "model": "./model"}]}),
    "rewards of one name": Case("two sources have the name 'b'", PPO, {"reward": [{"function": "a:b"}, {"function": "c:b"}]}),
    "a function's address": Case("steps[0].reward[0].function: got 'os.system'", PPO, {"reward": [{"function": "os.system"}]}),
    "a function's module there is not": Case(
        "function 'no_such_module:f': cannot import no_such_module; expected a module in the current folder, on PYTHONPATH",
        PPO,
        {"reward": [{"function": "no_such_module:f"}]},
    ),
    "a function there is not": Case("has no 'nothing'", PPO, {"reward": [{"function": "stages.corpora.world.gold:nothing"}]}),
    "a function that is none": Case("expected a function of (prompts, completions)", PPO, {"reward": [{"function": "json:__name__"}]}),
    "a module that breaks at import": Case(
        "cannot import broken_rewards (ZeroDivisionError: division by zero)",
        PPO,
        {"reward": [{"function": "broken_rewards:f"}]},
        files={"broken_rewards.py": "1 / 0\ndef f(): ...\n"},
    ),
    "no candidates": Case("steps[0].candidates", EVALUATION, {"candidates": {}}),
    "a reference that is no candidate": Case("kl_reference='sft' is not a candidate", EVALUATION, {"kl_reference": "sft"}),
    "an override of no step": Case(
        "override 'stf.seed=1': the recipe has no step 'stf'; did you mean 'sft'?", SFT, overrides=("stf.seed=1",)
    ),
    "an override without a value": Case("override 'sft.seed': expected step.field=value", SFT, overrides=("sft.seed",)),
    "an override of no field": Case(
        "override 'sft.sed=1': steps[0].sed: unknown field 'sed'; did you mean 'seed'?", SFT, overrides=("sft.sed=1",)
    ),
    "an override of the wrong type": Case("got 'many', expected a whole number", SFT, overrides=("sft.training.batch_size=many",)),
    "a seed that numpy does not take": Case("expected a number of at most 4294967295", SFT, {"seed": 2**40}),
    "an override that contradicts another field": Case(
        "override 'aligned.rollout_batch_size=9': steps[0]: rollout_batch_size=9",
        PPO,
        overrides=("aligned.seed=1", "aligned.rollout_batch_size=9"),
    ),
    "two overrides that contradict each other": Case(
        "overrides 'aligned.rollout_batch_size=9', 'aligned.minibatch_size=4': steps",
        PPO,
        overrides=("aligned.rollout_batch_size=9", "aligned.minibatch_size=4"),
    ),
    "an override and a mistake in the file": Case(
        "error: bad.yaml:4: steps[0].sed: unknown field 'sed'", SFT, {"sed": 1}, overrides=("sft.seed=1",)
    ),
    "an override that names data of another kind": Case(
        "error: override 'sft.data.train=texts.jsonl': steps[0] (sft): ", SFT, overrides=("sft.seed=1", "sft.data.train=texts.jsonl")
    ),
    "an override that names no function": Case(
        "override 'aligned.reward[0].function=no_such_module:score': steps[0] (aligned): ",
        PPO,
        overrides=("aligned.reward[0].function=no_such_module:score",),
    ),
    "an override with a tag": Case("is not allowed", SFT, overrides=("sft.seed=!!python/name:os.system",)),
}

DATA = {
    "no such file": Case("got 'nowhere.jsonl', a file that does not exist", SFT, {"data": {"train": "nowhere.jsonl"}}),
    "a pattern": Case(
        "a file that does not exist; to select files of a folder by a pattern, write {path: data, data_files: '*.jsonl'}",
        SFT,
        {"data": {"train": "data/*.jsonl"}},
    ),
    "a folder without data": Case(
        "the folder contains no data file", PRETRAINING, {"data": {"train": "./empty"}}, prepare=lambda folder: (folder / "empty").mkdir()
    ),
    "an unknown suffix": Case("cannot read .xlsx", PRETRAINING, {"data": {"train": "texts.xlsx"}}, files={"texts.xlsx": "a"}),
    "an empty file": Case("texts.jsonl: no rows", PRETRAINING, files={"texts.jsonl": ""}),
    "blank lines": Case("texts.jsonl: no rows", PRETRAINING, files={"texts.jsonl": "\n\n  \n"}),
    "rows that are all skipped": Case("no rows after skip=50", PRETRAINING, {"data": {"train": {"path": "texts.jsonl", "skip": 50}}}),
    "a line that is no JSON": Case(
        "texts.jsonl:3: bad JSON at column 10",
        PRETRAINING,
        files={"texts.jsonl": lines(ROWS["texts"][:2]) + '{"text": x}\n' + lines(ROWS["texts"])},
    ),
    "half a line": Case("texts.jsonl:21: bad JSON", PRETRAINING, files={"texts.jsonl": lines(ROWS["texts"]) + '{"text": "cut o'}),
    "a line that is a list": Case("texts.jsonl:1: expected an object, got list", PRETRAINING, files={"texts.jsonl": "[1]\n"}),
    "a line that is a number": Case("texts.jsonl:1: expected an object, got int", PRETRAINING, files={"texts.jsonl": "7\n"}),
    "a deep line": Case(
        "texts.jsonl:1: bad JSON (maximum recursion depth exceeded", PRETRAINING, files={"texts.jsonl": "[" * 100_000 + "\n"}
    ),
    "a json file that is an object": Case(
        "expected a list of objects, got dict", PRETRAINING, {"data": {"train": "texts.json"}}, files={"texts.json": "{}"}
    ),
    "no UTF-8": Case(
        "texts.jsonl:2: not valid UTF-8 (byte 0xff)",
        PRETRAINING,
        files={"texts.jsonl": lines(ROWS["texts"][:1]).encode() + b'{"text": "\xff"}\n'},
    ),
    "Latin-1": Case("not valid UTF-8 (byte 0xe9); convert the file to UTF-8", PRETRAINING, files={"texts.jsonl": b'{"text": "caf\xe9"}\n'}),
    "a NUL byte": Case("texts.jsonl:1: contains a NUL byte", PRETRAINING, files={"texts.jsonl": '{"text": "a\0b"}\n'}),
    "an escaped NUL": Case("texts.jsonl:5: contains a NUL character", PRETRAINING, files=bad_row("texts", 5, {"text": "a\0b"})),
    "half a surrogate": Case(
        "texts.jsonl:5: contains \\ud800, half of a surrogate pair",
        PRETRAINING,
        files={"texts.jsonl": lines(ROWS["texts"][:4]) + '{"text": "a\\ud800b"}\n' + lines(ROWS["texts"])},
    ),
    "gzip that is none": Case(
        "texts.jsonl.gz: cannot be read", PRETRAINING, {"data": {"train": "texts.jsonl.gz"}}, files={"texts.jsonl.gz": "plain"}
    ),
    "gzip cut off": Case(
        "texts.jsonl.gz: cannot be read",
        PRETRAINING,
        {"data": {"train": "texts.jsonl.gz"}},
        files={"texts.jsonl.gz": gzip.compress(lines(ROWS["texts"]).encode())[:40]},
    ),
    "parquet that is none": Case("not a parquet file", PRETRAINING, {"data": {"train": "texts.parquet"}}, files={"texts.parquet": "plain"}),
    "a ragged csv": Case(
        "texts.csv:3: the row's columns do not match the header",
        PRETRAINING,
        {"data": {"train": "texts.csv"}},
        files={"texts.csv": "text,label\na,1\nb\n"},
    ),
    "a csv with an open quotation": Case(
        "is a quotation mark not closed?",
        PRETRAINING,
        {"data": {"train": "texts.csv"}},
        files={"texts.csv": "text\n" + '"' + "x" * 200_000 + '"\n' + '"'},
    ),
    "a column that is missing": Case(
        "texts.jsonl:1: no column 'text'; the row has txt; did you mean 'txt'?", PRETRAINING, files=only("texts", *[{"txt": "a"}] * 4)
    ),
    "a renamed column that is missing": Case(
        "columns names 'review' for 'text', and the row has text",
        PRETRAINING,
        {"data": {"train": {"path": "texts.jsonl", "columns": {"text": "review"}}}},
    ),
    "a number for a text": Case("texts.jsonl:7: text is int (3); expected text", PRETRAINING, files=bad_row("texts", 7, {"text": 3})),
    "null for a text": Case(
        "texts.jsonl:7: text is empty (null); expected text. Fill it in, or remove the row",
        PRETRAINING,
        files=bad_row("texts", 7, {"text": None}),
    ),
    "only empty texts": Case("all 19 training texts (first", PRETRAINING, files=only("texts", *[{"text": " "}] * 20)),
    "less than a block": Case("less than one block; lower block_size=8", PRETRAINING, files=only("texts", {"text": "a"}, {"text": "b"})),
    "one row": Case("1 row(s) are too few to hold any out", PRETRAINING, files=only("texts", {"text": "a"})),
    "no part of the world": Case("'world:raww' is not a part of the embedded world", PRETRAINING, {"data": {"train": "world:raww"}}),
    "no split of the world": Case("has no split 'tests'", PRETRAINING, {"data": {"train": "world:raw/tests"}}),
    "no demonstration": Case("columns text are not a demonstration", SFT, files=only("demonstrations", *ROWS["texts"])),
    "columns in capital letters": Case(
        "columns Prompt, Completion are not a demonstration; expected prompt + completion, messages, conversations, instruction (+ input) "
        "+ output, subreddit + title + post + summary, or (prompt +) chosen. If Prompt, Completion mean the same, "
        "write in the data source: columns: {prompt: Prompt, completion: Completion}",
        SFT,
        files=only("demonstrations", *[{"Prompt": "a", "Completion": "b"}] * 4),
    ),
    "columns with other names": Case(
        "columns: {prompt: question, completion: 'Answer:'}",
        SFT,
        files=only("demonstrations", *[{"question": "a", "Answer:": "b"}] * 4),
    ),
    "one column in capital letters": Case(
        "no column 'prompt'; the row has PROMPT, completion; did you mean 'PROMPT'? (to rename: columns: {prompt: PROMPT})",
        SFT,
        files=only("demonstrations", *[{"PROMPT": "a", "completion": "b"}] * 4),
    ),
    "comparisons in capital letters": Case(
        "columns: {prompt: Prompt, chosen: CHOSEN, rejected: Rejected}",
        REWARD,
        files=only("comparisons", *[{"Prompt": "a", "CHOSEN": "b", "Rejected": "c"}] * 4),
    ),
    "prompts with another name": Case("columns: {prompt: Question}", PPO, files=only("prompts", {"Question": "a"})),
    "an empty prompt": Case(
        "demonstrations.jsonl:4: prompt is empty", SFT, files=bad_row("demonstrations", 4, {"prompt": " ", "completion": "a"})
    ),
    "an empty completion": Case(
        "demonstrations.jsonl:4: completion is empty", SFT, files=bad_row("demonstrations", 4, {"prompt": "a", "completion": ""})
    ),
    "messages of an unknown role": Case(
        "messages, message 1: ",
        SFT,
        files=only("demonstrations", *[{"messages": [{"role": "boss", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4),
    ),
    "messages without an answer": Case(
        "messages must have at least two turns and end with an assistant turn",
        SFT,
        files=only("demonstrations", *[{"messages": [{"role": "user", "content": "a"}]}] * 4),
    ),
    "messages without a template": Case(
        "has no chat template",
        SFT,
        files=only("demonstrations", *[{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4),
    ),
    "demonstrations too long for the model": Case(
        "demonstration fits", SFT, files=only("demonstrations", *[{"prompt": "joy " * 200, "completion": "a"}] * 20)
    ),
    "a line of a million characters": Case(
        "demonstration fits", SFT, files=only("demonstrations", *[{"prompt": "x" * 1_000_000, "completion": "a"}] * 2)
    ),
    "no comparison": Case("columns text are not a comparison", REWARD, files=only("comparisons", *ROWS["texts"])),
    "one completion": Case(
        "comparisons.jsonl:2: 1 completion(s); a comparison needs at least 2",
        REWARD,
        files=bad_row("comparisons", 2, {"prompt": "a", "completions": ["b"], "ranks": [0]}),
    ),
    "only ties": Case(
        "are all ties; expected a preference",
        REWARD,
        files=only("comparisons", *[{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}] * 20),
    ),
    "too few ranks": Case(
        "expected 2 numbers in ranks, got [0]",
        REWARD,
        files=bad_row("comparisons", 2, {"prompt": "a", "completions": ["b", "c"], "ranks": [0]}),
    ),
    "ranks that are words": Case(
        "expected 2 numbers in ranks",
        REWARD,
        files=bad_row("comparisons", 2, {"prompt": "a", "completions": ["b", "c"], "ranks": ["good", "bad"]}),
    ),
    "ranks that are no numbers": Case(
        "comparisons.jsonl:21: bad JSON (NaN is not a JSON number)",
        REWARD,
        files={"comparisons.jsonl": lines(ROWS["comparisons"]) + '{"prompt": "a", "completions": ["b", "c"], "ranks": [0, NaN]}\n'},
    ),
    "completions that are one text": Case(
        "completions is str ('bc'); expected a list of texts, or its JSON text",
        REWARD,
        files=bad_row("comparisons", 2, {"prompt": "a", "completions": "bc", "ranks": [0, 1]}),
    ),
    "a completion that is a number": Case(
        "completions, entry 2 is int; expected text",
        REWARD,
        files=bad_row("comparisons", 2, {"prompt": "a", "completions": ["b", 3], "ranks": [0, 1]}),
    ),
    "a pair without a prompt": Case(
        "chosen has no '\\n\\nAssistant:'", REWARD, files=only("comparisons", *[{"chosen": "a", "rejected": "b"}] * 4)
    ),
    "a label there is not": Case(
        "reviews.jsonl:6: label is 7; expected one of 0 (negative), 1 (positive)",
        SENTIMENT,
        files=bad_row("reviews", 6, {"text": "a", "label": 7}),
    ),
    "a label that is a word": Case(
        "reviews.jsonl:6: label is 'fine'", SENTIMENT, files=bad_row("reviews", 6, {"text": "a", "label": "fine"})
    ),
    "a label that is missing": Case("reviews.jsonl:6: label is None", SENTIMENT, files=bad_row("reviews", 6, {"text": "a"})),
    "one label only": Case(
        "have one label; a classifier needs at least two", SENTIMENT, files=only("reviews", *[{"text": "a", "label": 1}] * 20)
    ),
    "no prompt": Case("columns label contain no prompt", PPO, files=only("prompts", {"label": 1})),
    "an empty prompt for PPO": Case("prompts.jsonl:3: prompt is empty", PPO, files=bad_row("prompts", 3, {"prompt": ""})),
    "prompts longer than the context": Case("prompts has at most 124 tokens", PPO, files=only("prompts", {"prompt": "joy " * 300})),
    "prompts that PPO was trained on": Case("all 20 prompts of data occur in exclude", EVALUATION, {"exclude": "prompts.jsonl"}),
    "too few examples": Case(
        "few_shot.data has 2 rows, fewer than num_examples=3",
        EVALUATION,
        {"candidates": {"base": {"model": "./model", "few_shot": {"data": "few.jsonl"}}}},
        files={"few.jsonl": lines(ROWS["demonstrations"][:2])},
    ),
}


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            for path in (folder / "model").glob(name):
                path.unlink()

    return remove


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


def configured(**fields: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return apply


def pickled(folder: Path) -> None:
    import torch

    state = load_file(folder / "model" / "model.safetensors")
    (folder / "model" / "model.safetensors").unlink()
    torch.save(state, folder / "model" / "pytorch_model.bin")


def not_a_number(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def without_a_layer(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "layers.1" not in name}, path, metadata={"format": "pt"})


def other_vocabulary(folder: Path) -> None:
    """A second model, ``./other``, with another tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "model").train_new_from_iterator(["other words entirely"], 280)
    tokenizer.save_pretrained(folder / "other")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder / "other")


def encoder(folder: Path) -> None:
    """A masked language model, ``./encoder``."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForMaskedLM

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "encoder")
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=8, hidden_dim=8, n_layers=1, n_heads=1, max_position_embeddings=16)
    DistilBertForMaskedLM(config).save_pretrained(folder / "encoder")


def classifier(folder: Path) -> None:
    """A classifier with the labels dull and fine, ``./classifier``."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "classifier")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        id2label={0: "dull", 1: "fine"},
        label2id={"dull": 0, "fine": 1},
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")


MODELS = {
    "no such folder": Case("got './nowhere', a folder that does not exist", SFT, {"model": "./nowhere"}),
    "a folder without a config": Case("a folder without config.json", SFT, prepare=without("config.json")),
    "a config that is no JSON": Case("config.json: not readable as JSON", SFT, files={"model/config.json": "{"}),
    "a config of no type": Case("cannot load the", SFT, files={"model/config.json": "{}"}),
    "an architecture of the future": Case("cannot load the", SFT, prepare=configured(model_type="llama99")),
    "code in the model's folder": Case(
        "write {ref: ..., trust_remote_code: true} if you trust it",
        SFT,
        prepare=configured(model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}),
    ),
    "a config with no attention heads": Case("cannot load the", SFT, prepare=configured(num_attention_heads=0)),
    "a config with text for a size": Case("Field 'hidden_size' expected int, got str", SFT, prepare=configured(hidden_size="large")),
    "a config with a list for a block": Case("cannot load the", SFT, prepare=configured(quantization_config=[1])),
    "a config of no dtype": Case("cannot load the", SFT, prepare=configured(dtype="float3")),
    "a tokenizer of another form": Case("cannot load the tokenizer", SFT, files={"model/tokenizer.json": "[]"}),
    "weights that are not finite": Case("the weight model.norm.weight of './model' contains NaN or infinity", PPO, prepare=not_a_number),
    "no weights": Case("contains no *.safetensors", SFT, prepare=without("*.safetensors")),
    "pickled weights": Case("pickle files can run code when they are read", SFT, prepare=pickled),
    "truncated weights": Case("cannot load the model of './model'", SFT, prepare=weights(lambda data: data[: len(data) // 2])),
    "an empty file of weights": Case("cannot load the model of './model'", SFT, prepare=weights(lambda data: b"")),
    "a flipped bit in the header": Case(
        "cannot load the model of './model'", SFT, prepare=weights(lambda data: data[:3] + b"\xff" + data[4:])
    ),
    "a foreign file of weights": Case("cannot load the model of './model'", SFT, prepare=weights(lambda data: b"PK\x03\x04" + data)),
    "a layer missing": Case("lacks weights of LlamaForCausalLM", SFT, prepare=without_a_layer),
    "another width": Case("lacks weights of LlamaForCausalLM", SFT, prepare=configured(hidden_size=16, head_dim=4)),
    "no tokenizer": Case("cannot load the tokenizer of './model'", SFT, prepare=without("tokenizer*", "special_tokens_map.json")),
    "a tokenizer with a merge out of its vocabulary": Case(
        "cannot load the tokenizer of './model' (Exception: ",
        SFT,
        files={
            "model/tokenizer.json": json.dumps(
                {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"h": 0}, "merges": ["h e"]}}
            )
        },
    ),
    "a tokenizer that is no JSON": Case("cannot load the tokenizer of './model'", SFT, files={"model/tokenizer.json": "{"}),
    "no chat template": Case("template: chat, but the tokenizer has no chat template", SFT, {"template": "chat"}),
    "a template without a prompt": Case("template 'Answer:': expected chat, chatml, one of", SFT, {"template": "Answer:"}),
    "an encoder to fine-tune": Case("./encoder", SFT, {"model": "./encoder"}, prepare=encoder),
    "an encoder as reward model": Case(
        "is a distilbert model; a policy or a scalar head needs", REWARD, {"model": "./encoder"}, prepare=encoder
    ),
    "a block longer than the model": Case(
        "block_size=500 is longer than the model's 128 positions",
        {key: value for key, value in PRETRAINING.items() if key not in ("architecture", "tokenizer")}
        | {"model": "./model", "block_size": 500},
        files=only("texts", *ROWS["texts"] * 20),
    ),
    "a language model as reward": Case("has no reward head (score.weight)", PPO, {"reward": [{"model": "./model"}]}),
    "a classifier without a label": Case(
        "has 2 outputs; a reward model has 1", PPO, {"reward": [{"model": "./classifier"}]}, prepare=classifier
    ),
    "a label that a classifier has not": Case(
        "has no label 'happy'; expected one of 0 (dull), 1 (fine)",
        PPO,
        {"reward": [{"model": "./classifier", "label": "happy"}]},
        prepare=classifier,
    ),
    "a language model as classifier": Case("has no trained head", PPO, {"reward": [{"model": "./model", "label": 0}]}),
    "a value model of another vocabulary": Case(
        "has a different vocabulary than the policy", PPO, {"value": "./other"}, prepare=other_vocabulary
    ),
    "a value model without a head": Case("has no reward head", PPO, {"value": "./model"}),
    "a reference of another vocabulary": Case(
        "has a different vocabulary than the policy", PPO, {"reference": "./other"}, prepare=other_vocabulary
    ),
    "modules to adapt that there are not": Case(
        "lora.target_modules names nothing, which LlamaForCausalLM does not have", SFT, {"lora": {"target_modules": ["nothing"]}}
    ),
    "fp16 on a CPU": Case("precision: fp16 cannot be trained on a CPU", SFT, {"precision": "fp16"}),
    "a registry reference that is none": Case("no model named 'bad/model'", SFT, {"model": "bad/model@3"}),
    "a digest that is none": Case("no model whose digest begins with", SFT, {"model": "sha256:0123abcd"}),
    "a digest too short": Case("got 'sha256:01'", SFT, {"model": "sha256:01"}),
}

TABLES = {"recipe": RECIPES, "data": DATA, "model": MODELS}
CASES = {f"{kind}: {name}": case for kind, cases in TABLES.items() for name, case in cases.items()}


@pytest.fixture
def workdir(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a valid table for every stage, and a registry with one model."""
    from stages.registry.ledger import Registry

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STAGES_HOME", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    shutil.copytree(tiny_llama_folder, tmp_path / "model")
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text(lines(rows))

    Registry(tmp_path / "outputs" / "registry").publish("kept/model", write_model, role="language_model")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` except locks and version counters."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def write(workdir: Path, case: Case) -> None:
    for name, content in case.files.items():
        path = workdir / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    if case.prepare is not None:
        case.prepare(workdir)
    recipe = case.recipe
    if recipe is None:
        assert case.step is not None
        step = json.dumps({**case.step, **case.fields})
        recipe = f"name: bad\nseed: 1\nsteps:\n  - {step}\n"
    (workdir / "bad.yaml").write_bytes(recipe if isinstance(recipe, bytes) else recipe.encode())


@pytest.mark.parametrize("name", CASES)
def test_bad_input_prints_one_message_and_changes_nothing(workdir: Path, name: str) -> None:
    case = CASES[name]
    write(workdir, case)
    before = contents(workdir / "outputs" / "registry")
    result = CliRunner().invoke(app, ["run", "bad.yaml", *case.overrides])
    assert result.exit_code == 2, (result.exception, result.output)
    (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert case.message in said, said
    assert len(said) < 700, f"{len(said)} characters"
    assert "Traceback" not in result.output
    assert contents(workdir / "outputs" / "registry") == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 80


@pytest.mark.parametrize("name", ["recipe: unknown field", "data: half a line", "model: truncated weights"])
def test_debug_prints_the_traceback(workdir: Path, name: str) -> None:
    write(workdir, CASES[name])
    result = CliRunner().invoke(app, ["run", "bad.yaml", "--debug"])
    assert result.exit_code == 1 and type(result.exception).__name__ in ("RecipeError", "DataError", "ModelError")


@pytest.mark.parametrize("step", [PRETRAINING, SFT, REWARD, SENTIMENT, PPO, EVALUATION], ids=lambda step: step["stage"])
def test_good_recipe_runs(workdir: Path, step: dict[str, Any]) -> None:
    """If this recipe failed, all cases could fail for another reason than theirs."""
    (workdir / "good_rewards.py").write_text("def ones(p, c):\n    return [1.0] * len(c)\n")
    text = json.dumps(step).replace("stages.corpora.world.gold:score_batch", "good_rewards:ones")
    (workdir / "good.yaml").write_text(f"name: good\nsteps:\n  - {text}\n")
    result = CliRunner().invoke(app, ["run", "good.yaml"])
    assert result.exit_code == 0, (result.exception, result.output)


def test_tokenizer_without_a_pad_token_gets_one_and_it_is_logged(workdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = workdir / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}))
    (workdir / "model" / "special_tokens_map.json").unlink(missing_ok=True)
    (workdir / "good.yaml").write_text(f"name: good\nsteps:\n  - {json.dumps(SFT)}\n")
    result = CliRunner().invoke(app, ["run", "good.yaml"])
    assert result.exit_code == 0, (result.exception, result.output)
    assert "the tokenizer of ./model has no pad token; using '[PAD]' as its pad token" in caplog.text

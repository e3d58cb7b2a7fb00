"""What a recipe reads on the Hub: checked at the plan from metadata alone, read at the commits of the plan, and read again offline.

Commands run in a separate process with the real client libraries. A local server replaces the Hub (tests/hub/stand_in.py).
"""

from __future__ import annotations

import gzip
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client import Answer, Client
from published import json_lines, parquet, readme, tldr
from stand_in import Hub

from stages.chain.pins import default_split

RECIPE = """\
name: small
seed: 1
steps:
  - stage: sft
    name: sft
    model: org/model
    template: plain
    data: {train: {path: org/rows, limit: 8}, validation: {path: org/rows, split: test, limit: 4}}
    max_length: 64
    training: {max_steps: 1, batch_size: 4, microbatch_size: 4}
  - stage: evaluation
    name: verdict
    candidates: {base: org/model, sft: sft}
    data: org/rows
    num_prompts: 2
    generation: {max_new_tokens: 2}
    judges: [{model: lvwerra/distilbert-imdb, label: POSITIVE, name: taste}]
"""
ROWS = [{"prompt": f"Question {number}:", "completion": f" answer {number}"} for number in range(20)]


def rows_of(train: list[dict[str, Any]], **others: list[dict[str, Any]]) -> dict[str, bytes]:
    splits = {"train": train, "test": ROWS[8:12], **others}
    return {f"data/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}


@pytest.fixture
def fresh(hub: Hub) -> Iterator[Hub]:
    """The Hub without faults, with the first versions of ``org/model`` and ``org/rows``."""
    gpt2 = hub.repositories["model", "openai-community/gpt2"]
    files = gpt2.commits[gpt2.refs["main"]]
    hub.publish("model", "org/model", {**files, "README.md": b"---\nlicense: mit\n---\n"})
    hub.publish("dataset", "org/rows", rows_of(ROWS[:8]))
    hub.publish("model", "org/gated", files)
    hub.publish("dataset", "org/gated-rows", rows_of(ROWS[:8]))
    hub.publish("model", "org/pickled", {**without(files, ".safetensors"), "pytorch_model.bin": b"\x80"})
    hub.publish("model", "org/gguf", {**without(files, ".safetensors"), "model.gguf": b"GGUF"})
    ia3 = {"peft_type": "IA3", "base_model_name_or_path": "org/model"}
    hub.publish("model", "org/ia3", {"adapter_config.json": json.dumps(ia3).encode(), "adapter_model.safetensors": b""})
    hub.publish("model", "org/empty", {"README.md": b"# nothing"})
    hub.gated = {"org/gated", "org/gated-rows"}
    hub.requests.clear()
    yield hub
    hub.gated, hub.slow_seconds, hub.cuts, hub.failures, hub.is_down = set(), 0.0, 0, 0, False


def without(files: dict[str, bytes], suffix: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(suffix)}


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def asked(client: Client, command: str, workdir: Path, *overrides: str, home: str = "home") -> Answer:
    return client.run(command, "small.yaml", *overrides, "--home", home, folder=workdir)


def planned(client: Client, workdir: Path, *overrides: str, home: str = "home") -> dict[str, dict[str, Any]]:
    answer = asked(client, "plan", workdir, *overrides, "--json", home=home)
    assert answer.status == 0, answer.output
    return {step["name"]: step for step in json.loads(answer.output[answer.output.index("{") :])["steps"]}


MODELS = {
    "lvwerra/distilbert-imbd": "the Hub has no model 'lvwerra/distilbert-imbd' that this account can read; check the spelling",
    "small/stf": "the Hub has no model 'small/stf' that this account can read; .* Here, did you mean 'small/sft'",
    "org/gated": "the model 'org/gated' is gated, and this account may not read it; accept its terms at http",
    "org/pickled": "'org/pickled' has its weights only as pytorch_model.bin: pickle files can run code .* revision: refs/pr/N",
    "org/gguf": r"'org/gguf' has no \*.safetensors \(weights found: only model.gguf\)",
    "org/ia3": "the adapter 'org/ia3' is of peft type IA3; only LORA can be stacked and merged here. Merge it into its base",
    "org/empty": "'org/empty' has neither config.json nor adapter_config.json",
    "{ref: org/model, revision: v9}": "the model 'org/model' has no revision 'v9'; use a branch, a tag or a commit",
}


@pytest.mark.parametrize(("model", "message"), MODELS.items(), ids=MODELS)
def test_unloadable_model_gives_one_message_before_training(
    model: str, message: str, fresh: Hub, hub_client: Client, workdir: Path
) -> None:
    override = f"verdict.judges=[{{model: {model}, label: POSITIVE}}]"
    for command in ("plan", "run"):
        answer = asked(hub_client, command, workdir, override)
        assert answer.status == 2, answer.output
        (line,) = answer.output.splitlines()
        assert line.startswith("error: override 'verdict.judges=[{model: ")
        assert "steps[1].judges[0].model: got" in line
        assert re.search(message, line), line
        assert "pytorch_model.bin," not in line  # the advice must not suggest a value that is refused
    assert not any(name.endswith((".safetensors", ".bin", ".parquet")) for name in fresh.downloads())
    assert not (workdir / "home" / "work").exists()


SOURCES = {
    "path: org/rwos": "the Hub has no data set 'org/rwos'",
    "path: org/gated-rows": "the data set 'org/gated-rows' is gated",
    "path: org/rows, revision: v9": "the data set 'org/rows' has no revision 'v9'",
    "path: org/rows, split: validation": "org/rows: there is no split 'validation'; its splits: train, test",
    "path: org/rows, split: trian": "org/rows: there is no split 'trian'; did you mean 'train'",
    "path: org/rows, name: main": "org/rows: there is no config 'main': the data set has no configs; its folders, for data_dir: data",
    "path: Anthropic/hh-rlhf, name: harmless-base": "the data set has no configs; write data_dir: harmless-base",
    "path: nyu-mll/glue, name: rtee": "nyu-mll/glue: there is no config 'rtee'; did you mean 'rte'",
    "path: nyu-mll/glue": "nyu-mll/glue: it has several configs; choose one with name: mrpc, rte",
    "path: NeelNanda/pile-10k": "there is no split 'test' .the default here; set split to read another.; its splits: train",
    "path: shawhin/imdb-truncated, split: train, columns: {prompt: txt}": "names 'txt' for 'prompt', and the data set has label, text",
}


@pytest.mark.parametrize(("source", "message"), SOURCES.items(), ids=SOURCES)
def test_incomplete_data_set_gives_one_message_at_the_plan(
    source: str, message: str, fresh: Hub, hub_client: Client, workdir: Path
) -> None:
    answer = asked(hub_client, "plan", workdir, f"verdict.data={{{source}}}")
    assert answer.status == 2, answer.output
    (line,) = answer.output.splitlines()
    assert "steps[1].data: " in line
    assert re.search(message, line), line
    assert not any(name.endswith((".safetensors", ".parquet", ".gz")) for name in fresh.downloads())


@pytest.mark.parametrize(
    ("stage", "field_path", "split"),
    [
        ("sft", "data.train", "train"),
        ("sft", "data.validation", "validation"),
        ("sft", "pretraining_mix.data", "train"),
        ("sft", "selection.data", "validation"),
        ("reward_model", "demonstrations", "train"),
        ("ppo", "data", "train"),
        ("evaluation", "data", "test"),
        ("evaluation", "exclude", "train"),
        ("evaluation", "perplexity", "test"),
        ("evaluation", "tasks.sst.data", "test"),
        ("evaluation", "judges[0].judgements", "test"),
        ("evaluation", "candidates.a.completions", "test"),
        ("evaluation", "candidates.a.few_shot.data", "train"),
        ("evaluation", "candidates.a.few_shot.choose.data", "validation"),
    ],
)
def test_plan_checks_the_default_split_of_each_field(stage: str, field_path: str, split: str) -> None:
    assert default_split(stage, field_path) == split


def test_hub_ids_that_resemble_local_names_stay_hub_ids(fresh: Hub, hub_client: Client, workdir: Path) -> None:
    """A step, recipe or folder with a similar name has no effect. One with the same name has precedence, except over ``hub:``."""
    files = fresh.repositories["model", "org/model"].commits[fresh.commit("model", "org/model")]
    fresh.publish("model", "small/sft-2", files)  # similar to small/sft; the owner has the name of the recipe
    fresh.publish("model", "small/sft", files)  # exactly the name of a step
    (workdir / "org").mkdir()
    (workdir / "lvwerra").mkdir()
    steps = planned(hub_client, workdir, "verdict.candidates={a: small/sft-2, b: small/sft, c: 'hub:small/sft'}")
    assert steps["verdict"]["hub"]["candidates.a"] == f"small/sft-2@{fresh.commit('model', 'small/sft-2')}"
    assert steps["verdict"]["inputs"]["candidates.b"] == "sft" and "candidates.b" not in steps["verdict"]["hub"]
    assert steps["verdict"]["hub"]["candidates.c"] == f"small/sft@{fresh.commit('model', 'small/sft')}"
    fresh.publish("dataset", "org/held", rows_of(ROWS[:8]))
    (workdir / "org" / "held").mkdir()
    (workdir / "org" / "held" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert "data" not in planned(hub_client, workdir, "verdict.data=org/held")["verdict"]["hub"]  # a folder with the same name
    assert planned(hub_client, workdir, "verdict.data=hub:org/held")["verdict"]["hub"]["data"].startswith("org/held@")
    missing = asked(hub_client, "plan", workdir, "verdict.data=org/lines")
    assert missing.status == 2 and f"The folder {workdir / 'org'} has no 'lines' either" in missing.output


def test_the_recipes_of_the_embedded_world_make_no_request(fresh: Hub, hub_client: Client, workdir: Path) -> None:
    recipe = Path(__file__).resolve().parents[2] / "recipes" / "two-rounds.yaml"
    assert hub_client.run("plan", str(recipe), "--home", "home", folder=workdir).status == 0
    assert fresh.requests == []


def test_commits_are_recorded_and_changes_are_detected(fresh: Hub, hub_client: Client, workdir: Path, tmp_path: Path) -> None:
    model, rows = fresh.commit("model", "org/model"), fresh.commit("dataset", "org/rows")
    answer = asked(hub_client, "run", workdir)
    assert answer.status == 0, answer.output
    summary = json.loads((workdir / "home/runs/small/latest/summary.json").read_text())
    assert summary["steps"][0]["hub"] == {
        "model": f"org/model@{model}",
        "data.train": f"org/rows@{rows}",
        "data.validation": f"org/rows@{rows}",
    }
    manifest = json.loads((workdir / "home/registry/models/small/sft/1/manifest.json").read_text())
    assert manifest["parents"][0]["digest"] == f"hub:org/model@{model}"
    assert manifest["parents"][0]["licence"] == {"license": "mit"}  # of its model card
    assert manifest["recipe_step"]["data"]["train"][0]["revision"] == rows

    fresh.requests.clear()
    steps = planned(hub_client, workdir)
    assert {step["action"] for step in steps.values()} == {"reuse"}
    assert fresh.downloads() == []
    # A new commit that only changes texts for people does not re-run a step.
    files = fresh.repositories["model", "org/model"].commits[model]
    notes = {"README.md": b"---\nlicense: mit\n---\nnew words", "LICENSE.txt": b"new", "images/plot.png": b"new"}
    assert fresh.publish("model", "org/model", {**files, **notes}) != model
    assert fresh.publish("dataset", "org/rows", {**rows_of(ROWS[:8]), **notes}) != rows
    steps = planned(hub_client, workdir)
    assert {step["action"] for step in steps.values()} == {"reuse"} and steps["sft"]["hub"]["model"] != f"org/model@{model}"
    assert [name for name in fresh.downloads() if name.endswith(".safetensors")] == []
    fresh.publish("dataset", "org/rows", rows_of(ROWS[:4] + ROWS[12:16]))
    steps = planned(hub_client, workdir)
    assert (steps["sft"]["action"], steps["sft"]["reason"]) == ("run", "data changed: data.train, data.validation")
    changed = {name: content + b"\n" if name == "config.json" else content for name, content in files.items()}
    fresh.publish("model", "org/model", changed)
    assert planned(hub_client, workdir)["sft"]["reason"] == "input changed: model; data changed: data.train, data.validation"
    # Pinned to the commits of the first run, all steps are reused, although the revision is another text.
    pinned = [
        f"sft.model={{ref: org/model, revision: {model}}}",
        f"verdict.candidates.base={{ref: org/model, revision: {model}}}",
        *(f"{field}.revision={rows}" for field in ("sft.data.train", "sft.data.validation", "verdict.data")),
    ]
    assert {step["action"] for step in planned(hub_client, workdir, *pinned).values()} == {"reuse"}


def test_offline_run_uses_cached_commits_and_names_missing_ones(fresh: Hub, hub_client: Client, hub_cache: Path, workdir: Path) -> None:
    assert asked(hub_client, "run", workdir, home="first").status == 0
    before = planned(hub_client, workdir, home="first")
    fresh.publish("dataset", "org/rows", rows_of(ROWS[12:]))  # the cache does not have it
    fresh.requests.clear()
    offline = Client(fresh.environment(hub_cache, offline=True))
    after = planned(offline, workdir, home="first")
    assert {name: (step["action"], step["hub"]) for name, step in after.items()} == {
        name: ("reuse", step["hub"]) for name, step in before.items()
    }
    answer = asked(offline, "run", workdir, "seed=2", home="second")
    assert answer.status == 0, answer.output
    for override, message in (
        ("verdict.candidates.base=org/never", "the model 'org/never' is not in the local cache, and HF_HUB_OFFLINE is set"),
        ("verdict.data={path: org/gated-rows}", "the data set 'org/gated-rows' is not in the local cache, and HF_HUB_OFFLINE is set"),
        ("verdict.data={path: org/rows, split: validation}", "the data set 'org/rows' is in the local cache in part"),
    ):
        answer = asked(offline, "run", workdir, override)
        assert answer.status == 2 and message in answer.output and len(answer.output.splitlines()) == 1, answer.output
        answer = asked(offline, "plan", workdir, override)
        assert answer.status == 0 and f"Not checked: override '{override}'" in answer.output and message in answer.output
    offline.close()
    assert fresh.requests == []


def test_unresponsive_hub_is_given_up_after_a_few_seconds(fresh: Hub, workdir: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = Client(fresh.environment(tmp_path / "cache", endpoint=f"http://127.0.0.1:{unused.getsockname()[1]}"))
        answer = asked(client, "run", workdir)
        assert answer.status == 2
        (line,) = answer.output.splitlines()
        assert "did not answer for the model 'org/model'" in line and "with HF_HUB_OFFLINE=1 the local cache is used" in line
        answer = asked(client, "plan", workdir)  # the plan still shows memory and steps
        assert answer.status == 0 and "Not checked: small.yaml:6: steps[0].model: got 'org/model': the Hub at" in answer.output
        client.close()


def test_temporary_hub_errors_are_retried(fresh: Hub, hub_client: Client, workdir: Path) -> None:
    """The Hub answers busily and slowly, and downloads break off twice. Rows and weights are complete nevertheless."""
    long = [{"prompt": f"Question {number}:", "completion": " word", "note": "x" * 1000} for number in range(2000)]
    fresh.publish("dataset", "org/long", {"train.jsonl.gz": gzip.compress(json_lines(long), 0), "test.jsonl": json_lines(ROWS[:4])})
    fresh.failures, fresh.slow_seconds = 2, 0.05
    assert planned(hub_client, workdir, "sft.data.train.path=org/long")["sft"]["hub"]["data.train"].startswith("org/long@")
    fresh.slow_seconds, fresh.cut_after, fresh.cuts = 0.0, 30_000, 2
    answer = asked(hub_client, "run", workdir, "sft.data.train={path: org/long, skip: 1990}", home="cut")
    assert answer.status == 0, answer.output
    assert fresh.cuts == 0


def test_the_base_of_an_adapter_is_pinned_at_the_revision_that_the_adapter_names(
    fresh: Hub, hub_client: Client, workdir: Path, tmp_path: Path
) -> None:
    files = fresh.repositories["model", "org/model"].commits[fresh.commit("model", "org/model")]
    first = fresh.publish("model", "org/base", files, "v1")
    adapter = tmp_path / "adapter"
    _write_adapter(adapter, tmp_path / "base", files)
    newest = fresh.publish("model", "org/base", {**files, "NOTES": b"main has moved"})
    for revision, commit in (("v1", first), (None, newest)):
        config = json.loads((adapter / "adapter_config.json").read_text())
        config |= {"base_model_name_or_path": "org/base", "revision": revision}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        fresh.publish("model", "org/adapter", adapter)
        step = planned(hub_client, workdir, "verdict.candidates.base=org/adapter")["verdict"]
        assert step["hub"]["candidates.base.base"] == f"org/base@{commit}"
        local = planned(hub_client, workdir, f"verdict.candidates.base={adapter}")["verdict"]
        assert local["hub"]["candidates.base.base"] == f"org/base@{commit}"
    fresh.gated.add("org/base")
    fresh.publish("model", "org/base", {**files, "NOTES": b"again"})
    answer = asked(hub_client, "plan", workdir, "verdict.candidates.base=org/adapter")
    assert answer.status == 2
    assert "the base of the adapter org/adapter@" in answer.output and "'org/base' is gated" in answer.output


def _write_adapter(folder: Path, base: Path, files: dict[str, bytes]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base.mkdir()
    for name, content in files.items():
        (base / name).write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")).save_pretrained(folder)
    for name in files:
        if name.startswith(("tokenizer", "special_tokens", "vocab", "merges")):
            (folder / name).write_bytes(files[name])


def test_hub_prefix_reads_the_hub_if_a_folder_has_the_same_name(fresh: Hub, hub_client: Client, workdir: Path) -> None:
    """transformers prefers a folder in the working directory to the Hub; with ``hub:`` it must not."""
    said = _generated(hub_client, "org/model", workdir)
    assert said.status == 0, said.output
    (workdir / "org" / "model").mkdir(parents=True)
    (workdir / "org" / "model" / "config.json").write_text("{}")
    local = _generated(hub_client, "org/model", workdir)
    assert local.status == 2  # the name means the folder, which contains no model
    forced = _generated(hub_client, "hub:org/model", workdir)
    assert forced.output.splitlines()[-1].replace("hub:org/model", "org/model") == said.output.splitlines()[-1]


def _generated(client: Client, ref: str, workdir: Path) -> Answer:
    return client.run("generate", ref, "--prompt", "The film", "--max-new-tokens", "6", "--home", "home", "--json", folder=workdir)


def test_a_renamed_repository_is_followed(fresh: Hub, hub_client: Client, workdir: Path) -> None:
    fresh.redirects["gpt2"] = "openai-community/gpt2"
    step = planned(hub_client, workdir, "verdict.candidates.base=gpt2")["verdict"]
    assert step["hub"]["candidates.base"] == f"gpt2@{fresh.commit('model', 'openai-community/gpt2')}"


def test_published_layouts_are_read_as_datasets_reads_them(fresh: Hub, hub_client: Client, workdir: Path, tmp_path: Path) -> None:
    """The rows that reach a stage equal those of load_dataset: configs, folders, shards, csv with types, text files by lines."""
    fresh.publish("dataset", "org/csv", {"train.csv": b"prompt,completion\na,1\nb,2\n", "test.csv": b"prompt,completion\nc,3\n"})
    fresh.publish("dataset", "org/lines", {"train.txt": b"one\ntwo\n", "test.txt": b"three\n"})
    fresh.publish(
        "dataset",
        "org/configs",
        {
            "a/x.jsonl": json_lines(ROWS[:2]),
            "b/y.jsonl": json_lines(ROWS[2:5]),
            "README.md": readme({"a": {"train": "a/*.jsonl"}, "b": {"train": "b/*.jsonl"}}),
        },
    )
    fresh.publish("dataset", "org/twice", {"train.parquet": parquet(tldr(["one two"])), "train.csv": b"prompt\nx\n"})
    code = (
        "import json, sys\nfrom datasets import load_dataset\nfrom stages.config import DataSource\n"
        "from stages.corpora.files import read_rows\n"
        "for path, fields in json.loads(sys.argv[1]):\n"
        "    ours = [dict(row) for row in read_rows([DataSource(path=path, **fields)])]\n"
        "    theirs = [dict(row) for row in load_dataset(path, fields.pop('name', None), split=fields.pop('split', 'train'), **fields)]\n"
        "    assert ours == theirs, (path, fields, ours[:2], theirs[:2])\n"
        "    print(path, len(ours))\n"
    )
    cases: list[tuple[str, dict[str, str]]] = [
        ("org/csv", {"split": "test"}),
        ("org/csv", {"split": "train[:1]+test"}),
        ("org/lines", {}),
        ("org/configs", {"name": "b"}),
        ("org/twice", {}),
        ("Anthropic/hh-rlhf", {"data_dir": "harmless-base", "split": "test"}),
        ("Anthropic/hh-rlhf", {}),
        ("nyu-mll/glue", {"name": "rte", "split": "validation"}),
        ("NeelNanda/pile-10k", {"split": "train[10%:20%]"}),
        ("stanfordnlp/imdb", {"split": "unsupervised"}),
        ("org/rows", {"revision": fresh.commit("dataset", "org/rows")}),
    ]

    environment = {**fresh.environment(tmp_path / "cache"), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(cases)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-600:]
    assert done.stdout.splitlines()[:3] == ["org/csv 1", "org/csv 2", "org/lines 2"]

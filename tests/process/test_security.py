"""Security: code does not run, paths do not leave their folder, pickles are not read, and secrets are not written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import ModelError, RecipeError, RegistryError
from stages.process import redaction
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry
from stages.registry.references import ResolvedModel
from tests.conftest import write_model

HF_TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STAGES_HOME", raising=False)
    monkeypatch.setattr(redaction, "_values", set())
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def recipe(step: dict[str, Any]) -> Path:
    path = Path("safe.yaml")
    path.write_text(f"name: safe\nsteps:\n  - {json.dumps(step)}\n")
    return path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["run", "safe.yaml", *arguments])


def demonstrations() -> str:
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"write {n}:", "completion": "a joy"}) + "\n" for n in range(10)))
    return "rows.jsonl"


# Code


class Owned:
    """A pickle that runs a command when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_pickle_is_refused_without_reading_it(tiny_llama_folder: Path) -> None:
    shutil.copytree(tiny_llama_folder, "model")
    Path("model/model.safetensors").unlink()
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Owned()))
    recipe({"stage": "sft", "name": "sft", "model": "./model", "data": {"train": demonstrations()}})
    result = run()
    assert result.exit_code == 2 and "pickle files can run code when they are read" in result.stderr
    assert not Path("owned").exists()


def test_pickle_next_to_safetensors_is_not_read(tiny_llama_folder: Path, resolve_folder: Any) -> None:
    import torch

    from stages.models.heads import RewardModel
    from stages.models.loading import load_language_model

    shutil.copytree(tiny_llama_folder, "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        Path("model", name).write_bytes(pickle.dumps(Owned()))
    load_language_model(resolve_folder("model"), dtype=torch.float32)
    with pytest.raises(ModelError, match="has no reward head"):
        RewardModel.from_pretrained(resolve_folder("model"), dtype=torch.float32)
    assert not Path("owned").exists()


CODE = """
    import os
    os.mkdir("owned")
    from transformers import LlamaConfig, LlamaForCausalLM

    class MineConfig(LlamaConfig):
        model_type = "mine"

    class MineForCausalLM(LlamaForCausalLM):
        config_class = MineConfig
"""


def test_remote_code_runs_only_if_the_recipe_allows_it_and_is_recorded(
    tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    shutil.copytree(tiny_llama_folder, "model")
    Path("model/modeling_mine.py").write_text(textwrap.dedent(CODE))
    config = json.loads(Path("model/config.json").read_text())
    names = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": names}))
    step = {"stage": "sft", "name": "sft", "precision": "fp32", "data": {"train": demonstrations()}, "training": {"max_steps": 1}}

    recipe({**step, "model": "./model"})
    result = run()
    assert result.exit_code == 2 and "write {ref: ..., trust_remote_code: true} if you trust it" in result.stderr
    assert not Path("owned").exists()

    recipe({**step, "model": {"ref": "./model", "trust_remote_code": True}})
    result = run()
    assert Path("owned").exists(), result.output
    assert result.exit_code == 0, result.output
    (parent,) = Registry("outputs/registry").lineage("safe/sft")["parents"]
    assert parent["trust_remote_code"] is True
    shown = CliRunner().invoke(app, ["models", "lineage", "safe/sft"]).stdout
    assert "with code from the Hub" in shown


def test_functions_are_imported_only_from_the_modules_that_the_recipe_names() -> None:
    Path("named.py").write_text("def score(p, c):\n    return [0.0 for _ in c]\n")
    Path("bystander.py").write_text("import os\nos.mkdir('owned')\ndef score(p, c): ...\n")
    for address, message in (
        ("named", "got 'named'"),
        ("os:system;id", "got 'os:system;id'"),
        ("../bystander:score", "got '../bystander:score'"),
        ("named:score.__globals__", "got 'named:score.__globals__'"),
    ):
        step = {"stage": "ppo", "name": "a", "policy": "gpt2", "data": "world:prompts", "reward": [{"function": address}]}
        with pytest.raises(RecipeError, match=r"reward\[0\]\.function: .*"):
            load_recipe(recipe(step))
        assert message in run().stderr
    assert not Path("owned").exists() and "bystander" not in sys.modules


def test_planning_does_not_run_a_module_that_a_recipe_names() -> None:
    Path("bystander.py").write_text("import os\nos.mkdir('owned')\ndef score(p, c): ...\n")
    recipe({"stage": "ppo", "name": "a", "policy": "gpt2", "data": "world:prompts", "reward": [{"function": "bystander:score"}]})
    result = CliRunner().invoke(app, ["plan", "safe.yaml"])
    assert result.exit_code == 0, result.output
    assert not Path("owned").exists()


def test_yaml_is_read_safely() -> None:
    for text in (
        "name: !!python/object/apply:os.mkdir [owned]",
        "name: !!python/name:os.system",
        "name: !<tag:yaml.org,2002:python/module:os> x",
        "name: !custom x",
        "name: !!binary aGk=",
        "name: !!set {a, b}",
    ):
        Path("safe.yaml").write_text(text + "\nsteps: [a]\n")
        result = run()
        assert result.exit_code == 2 and "is not allowed" in result.stderr, result.output
        assert "is not allowed" in run("a.b=!!python/name:os.system").stderr
    assert not Path("owned").exists()


def test_file_in_the_working_folder_does_not_shadow_a_package() -> None:
    before = list(sys.path)
    try:
        sys.path[:] = [path for path in sys.path if path not in ("", os.getcwd())]
        CliRunner().invoke(app, ["plan", "nothing.yaml"])
        assert sys.path[-1] == os.getcwd()
    finally:
        sys.path[:] = before


# Paths


def published(name: str = "safe/model") -> Any:
    return Registry("home/registry").publish(name, write_model, role="language_model")


ESCAPES = ["../escape", "/tmp/escape", "a/../../b", "..", "a/..", "a//b", "a\\..\\b", "a\0b", "~", "a/b/c", ".hidden/x"]


@pytest.mark.parametrize("name", ESCAPES)
def test_names_cannot_leave_the_home_folder(name: str) -> None:
    for use in (lambda registry: registry.publish(name, write_model, role="language_model"), lambda registry: registry.get(name)):
        with pytest.raises(RegistryError):
            use(Registry("home/registry"))
    assert not list(Path.cwd().rglob("*.safetensors"))


def test_version_that_links_outside_the_registry_is_refused(tmp_path: Path) -> None:
    record = published()
    outside = tmp_path / "outside"
    shutil.move(str(record.folder), outside)
    record.folder.symlink_to(outside)
    for use in ("get", "verify", "lineage", "remove"):
        with pytest.raises(RegistryError, match="leads out of the registry"):
            getattr(Registry("home/registry"), use)("safe/model@1")
    assert (outside / "model" / "model.safetensors").exists()


def test_file_replaced_by_a_link_counts_as_damage(tmp_path: Path) -> None:
    record = published()
    (tmp_path / "twin").write_bytes(b"weights")
    (record.path / "model.safetensors").unlink()
    (record.path / "model.safetensors").symlink_to(tmp_path / "twin")
    assert Registry("home/registry").verify("safe/model") == ["model.safetensors was replaced by a symbolic link"]


def test_manifest_cannot_claim_another_path() -> None:
    record = published()
    manifest = json.loads((record.folder / "manifest.json").read_text())
    for claim in ({"name": "../../../etc/x"}, {"name": "other/model"}, {"version": 7}):
        (record.folder / "manifest.json").write_text(json.dumps({**manifest, **claim}))
        with pytest.raises(RegistryError, match="does not match its folder; it was moved or edited"):
            Registry("home/registry").get("safe/model")


def test_manifest_files_are_only_read_inside_the_version() -> None:
    record = published()
    manifest = json.loads((record.folder / "manifest.json").read_text())
    manifest["files"].append({"path": "../../../../../etc/hostname", "size": 1, "sha256": "0"})
    (record.folder / "manifest.json").write_text(json.dumps(manifest))
    assert "../../../../../etc/hostname is missing" in Registry("home/registry").verify("safe/model")


def test_export_does_not_follow_a_link_at_its_destination(tmp_path: Path) -> None:
    published()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "kept").write_text("kept")
    Path("out").symlink_to(tmp_path / "outside")
    with pytest.raises(RegistryError, match="exists and is not an empty folder"):
        Registry("home/registry").export("safe/model", "out")
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["kept"]


def test_base_of_an_adapter_is_only_searched_in_its_registry() -> None:
    from stages.models.adapters.stacks import find_base

    registry = Registry("home/registry")
    base = published("safe/base")
    resolved = ResolvedModel.of_record(base)

    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"adapter")

    record = registry.publish("safe/adapter", adapter, role="language_model", base=resolved)
    base_found = find_base(ResolvedModel.of_record(record))
    assert base_found.record == base


# Secrets


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (HF_TOKEN, "a Hugging Face token"),
        ("sk-proj-abcdefghijklmnop1234", "an API key"),
        ("ghp_" + "a1" * 18, "a GitHub token"),
        ("AKIAIOSFODNN7EXAMPLE", "an AWS access key"),
        ("AIza" + "B" * 35, "a Google API key"),
        ("xoxb-1234567890-abc", "a Slack token"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "a JSON web token"),
        ("-----BEGIN RSA PRIVATE KEY-----", "a private key"),
        ("https://user:hunter2@host/data.jsonl", "a password in a URL"),
    ],
)
def test_secret_in_a_recipe_is_refused_without_printing_it(text: str, kind: str) -> None:
    step = {"stage": "sft", "name": "sft", "model": "gpt2", "data": {"train": text}}
    recipe(step)
    for result in (run(), CliRunner().invoke(app, ["plan", "safe.yaml"])):
        assert result.exit_code == 2 and f"steps[0].data.train: contains {kind}" in result.stderr
        assert text not in result.output
    recipe({**step, "data": {"train": "world:demonstrations"}})
    result = run(f"sft.data.train={text}")
    assert result.exit_code == 2 and f"override 'sft.data.train': contains {kind}" in result.stderr and text not in result.output
    assert not list(Path("outputs").rglob("*")) if Path("outputs").exists() else True


INNOCENT = ["world:prompts", "max_prompt_tokens", "task-sk-short", "a key", "https://host/a:b@c", "hf_short", "risk-averse-and-long-text"]


@pytest.mark.parametrize("text", INNOCENT)
def test_texts_that_only_resemble_secrets_are_accepted(text: str) -> None:
    assert redaction.find_secret([text]) is None and redaction.without_secrets(text) == text


def test_only_secret_variables_are_protected() -> None:
    redaction.protect(
        {
            "HF_TOKEN": "value-of-token",
            "MY_API_KEY": "value-of-key",
            "DB_PASSWORD": PASSWORD,
            "TOKENIZERS_PARALLELISM": "false-ish",
            "SSH_AUTH_SOCK": "/tmp/agent.1234",
            "SHORT_KEY": "abc",
            "KEYBOARD": "qwerty-layout",
            "PATH": "/usr/bin:/bin",
        }
    )
    said = "value-of-token value-of-key correct horse battery false-ish /tmp/agent.1234 abc qwerty-layout /usr/bin:/bin"
    assert redaction.without_secrets(said) == "[secret] [secret] [secret] false-ish /tmp/agent.1234 abc qwerty-layout /usr/bin:/bin"


def test_secrets_of_the_environment_reach_no_log_manifest_or_report(tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A complete chain with a reward that prints the secrets, and one that fails with them in its message."""
    monkeypatch.setenv("HF_TOKEN", HF_TOKEN)
    monkeypatch.setenv("JUDGE_API_KEY", PASSWORD)
    Path("leaky.py").write_text(
        "import os, sys\n"
        "def scores(p, c):\n"
        "    print('calling with', os.environ['HF_TOKEN'])\n"
        "    sys.stderr.write('and ' + os.environ['JUDGE_API_KEY'] + '\\n')\n"
        "    return [1.0 for _ in c]\n"
        "def fails(p, c):\n"
        "    raise ValueError('401 for ' + os.environ['JUDGE_API_KEY'] + os.environ['HF_TOKEN'])\n"
        "def breaks(p, c):\n"
        "    return scores(p, c)\n"
    )
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"write {n}"}) + "\n" for n in range(8)))
    aligned = {
        "stage": "ppo",
        "name": "aligned",
        "precision": "fp32",
        "policy": str(tiny_llama_folder),
        "value": "policy",
        "data": "prompts.jsonl",
        "reward": [{"function": "leaky:scores"}],
        "generation": {"max_new_tokens": 4},
        "total_episodes": 8,
        "rollout_batch_size": 8,
        "minibatch_size": 8,
    }
    verdict = {
        "stage": "evaluation",
        "name": "verdict",
        "precision": "fp32",
        "candidates": {"aligned": "aligned"},
        "data": "prompts.jsonl",
        "judges": [{"function": "leaky:scores"}],
        "generation": {"max_new_tokens": 4},
    }
    Path("safe.yaml").write_text(f"name: safe\nsteps:\n  - {json.dumps(aligned)}\n  - {json.dumps(verdict)}\n")
    done = run()
    assert done.exit_code == 0, done.output
    failed = run("aligned.reward=[{function: 'leaky:fails'}]")
    assert failed.exit_code == 2 and "raised ValueError: 401 for [secret]" in failed.stderr
    assert "calling with [secret]" in done.output and "and [secret]" in done.output
    for said in (done.output, failed.output):
        assert HF_TOKEN not in said and PASSWORD not in said
    files = [path for path in Path("outputs").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        content = path.read_bytes()
        assert HF_TOKEN.encode() not in content and PASSWORD.encode() not in content, path
    recipe({"stage": "sft", "name": "sft", "model": "gpt2", "data": {"train": f"/data/{PASSWORD}/x.jsonl"}})
    result = run()
    assert "contains the value of a secret variable of the environment" in result.stderr and PASSWORD not in result.output

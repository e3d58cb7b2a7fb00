"""Push models to the Hub from one registry and pull them into another, with the Hub's client library and the local server of tests/hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from stages.config import LoraSettings, ModelInput
from stages.errors import HubError, HubUnreachable, RegistryError
from stages.hub.uploads import _explained, check_identifier, check_may_upload
from stages.registry.ledger import Registry
from stages.registry.record import ModelRecord
from stages.registry.references import ResolvedModel
from stages.sharing.shared import SharedVersion, describe, read_description, read_evaluations, versions_to_share, without_local_paths


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    from stand_in import Hub

    hub = Hub()
    hub.start()
    yield hub
    hub.stop()


@pytest.fixture(scope="module")
def client(server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from client import Client

    made = Client(server.environment(tmp_path_factory.mktemp("cache"), token="secret"))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def rights(server: Any) -> None:
    server.tokens.update({"secret": {"org"}})
    server.moves_on = False


resolved = ResolvedModel.of_record


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_llama_folder: Path) -> Path:
    """A home with models of every kind, each made from the previous one as in a recipe."""
    from transformers import AutoModelForSequenceClassification

    from stages.models.heads import RewardModel, ValueModel
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.saving import save_model

    folder = tmp_path_factory.mktemp("pushing")
    registry = Registry(folder / "registry")
    settings = {"stage": "sft", "data": [{"path": "/home/me/secret place/rows.jsonl", "columns": {}}], "stop": ["/"], "rate": 0.1}

    def publish(name: str, fill: Any, role: str, *parents: ResolvedModel, **fields: Any) -> ModelRecord:
        step, metrics = {**settings, "name": name}, {"heldout_loss": 1.25}
        return registry.publish(
            f"recipe/{name}",
            fill,
            role=role,
            parents=parents,
            recipe_step=step,
            data={"data": "abcd"},
            metrics=metrics,
            fingerprint=f"mark of {name}",
            **fields,
        )

    raw = ResolvedModel("owner/raw", "hub", "owner/raw", "hub:owner/raw@main", ModelInput(ref="owner/raw"))
    base = resolved(publish("base", lambda target: shutil.copytree(tiny_llama_folder, target, dirs_exist_ok=True), "language_model", raw))
    tokenizer = load_tokenizer(base)
    below = base
    for name in ("adapter", "stack"):
        torch.manual_seed(len(name))
        model = load_language_model(below, dtype=torch.float32, lora=LoraSettings(r=2), tokenizer=tokenizer)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.5)
        fill = lambda target, model=model: save_model(model, tokenizer, target)  # noqa: E731
        below = resolved(publish(name, fill, "language_model", below, base=below))
    reward = RewardModel.from_language_model(base, dtype=torch.float32, lora=LoraSettings(r=2))
    publish("reward", lambda target: reward.save(target, tokenizer), "reward_model", base, base=base)
    value = ValueModel.from_policy(base, dtype=torch.float32)
    publish("value", lambda target: value.save(target, tokenizer), "value_model", base, resolved(registry.get("recipe/reward")))
    classifier = AutoModelForSequenceClassification.from_pretrained(str(tiny_llama_folder), num_labels=3)
    publish("taste", lambda target: classifier.save_pretrained(target), "classifier")
    evaluation = {
        "verdict": "base beats other.",
        "candidates": {"other": {"digest": "sha256:x"}, "base": {"digest": base.digest}},
        "win_rates": [{"a": "base", "b": "other", "judge": "gold", "win_rate": 0.75, "ci_low": 0.6, "ci_high": 0.85, "n": 40}],
    }
    kept = folder / "results" / "ff"
    (kept / "files").mkdir(parents=True)
    (kept / "result.json").write_text(json.dumps({"name": "recipe/verdict", "created": "2026-11-24T20:00:00+00:00"}))
    (kept / "files" / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """The part of a manifest that must be equal on both sides: without the name, local paths, and the note of the pull."""
    ours = ("name", "version", "fingerprint", "pulled")
    return {key: value for key, value in without_local_paths(manifest).items() if key not in ours}


def without_notes(node: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in node.items() if key not in ("recorded", "ref" if node["kind"] == "registry" else "")}
    return {**kept, "parents": [without_notes(parent) for parent in node["parents"]]}


def outputs(registry: Registry, ref: str) -> torch.Tensor:
    from stages.models.loading import load_language_model, load_tokenizer

    source = resolved(registry.get(ref))
    model = load_language_model(source, dtype=torch.float32, trainable=False, tokenizer=load_tokenizer(source))
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


@pytest.mark.parametrize("name", ["base", "reward", "value", "taste", "stack"])
def test_pulled_version_equals_the_pushed_one(server, client, home, tmp_path, name) -> None:
    pushed = client.run("models", "push", f"recipe/{name}", f"org/{name}", "--home", str(home))
    assert pushed.status == 0, pushed.output
    pulled = client.run("models", "pull", f"org/{name}", "--as", "mine/copy", "--home", str(tmp_path))
    assert pulled.status == 0, pulled.output
    ours, theirs = Registry(home / "registry"), Registry(tmp_path / "registry")
    before, after = ours.get(f"recipe/{name}"), theirs.get("mine/copy")
    assert after.digest == before.digest and theirs.verify(after.ref) == []
    assert plain(after.manifest) == plain(before.manifest)
    assert without_notes(theirs.lineage("mine/copy")) == without_notes(without_local_paths(ours.lineage(f"recipe/{name}")))
    # No recipe reuses it as its own result.
    assert after.manifest["fingerprint"] == "" and after.manifest["pulled"]["fingerprint"] == f"mark of {name}"
    if name == "stack":  # the adapter and the base below it came along, each under its own name
        assert [record.ref for record in theirs.records()] == ["mine/copy@1", "recipe/adapter@1", "recipe/base@1"]
        assert torch.equal(outputs(theirs, "mine/copy"), outputs(ours, "recipe/stack"))
    again = client.run("models", "pull", f"org/{name}", "--as", "mine/copy", "--home", str(tmp_path))
    assert again.status == 0 and "already present: mine/copy@1" in again.output and len(theirs.versions("mine/copy")) == 1
    tree = client.run("models", "lineage", "mine/copy", "--home", str(tmp_path))
    assert tree.status == 0 and client.run("models", "show", "mine/copy", "--all", "--home", str(tmp_path)).status == 0
    if name == "base":  # the results of its evaluation came along, and are pushed again, although this home has no evaluation
        assert client.run("models", "push", "mine/copy", "org/back", "--home", str(tmp_path)).status == 0
        card = server.repositories["model", "org/back"].commits[server.commit("model", "org/back")]["README.md"].decode()
        assert ModelCard(card).data.eval_results[0].metric_value == 0.75
    if name == "value":
        commit = server.commit("model", "org/value")
        assert f"recipe/reward@1 (reward_model, adapter on recipe/base@1, as described by org/value@{commit[:8]}" in tree.output


def test_push_prints_its_contents_and_is_private(server, client, home) -> None:
    done = client.run("models", "push", "recipe/base", "org/said", "-m", "first model", "--home", str(home))
    record = Registry(home / "registry").get("recipe/base")
    size = sum(file["size"] for file in record.manifest["files"])
    number = len(record.manifest["files"])
    assert (
        f"recipe/base@1 (language_model, {record.digest[:19]}) to org/said (new, private): {number} files, {size / 2**20:.1f} MiB"
        in done.output
    )
    assert "the results of 1 evaluation" in done.output
    assert "1 local paths, such as /home/me/secret place/rows.jsonl, are shared without their folders" in done.output
    assert "org/said" in server.private and server.messages[-1] == "first model"
    files = server.repositories["model", "org/said"].commits[server.commit("model", "org/said")]
    assert set(files) == {".gitattributes", "README.md", "tristage.json", *(file["path"] for file in record.manifest["files"])}
    assert not any(b"secret place" in content for content in files.values())
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == 0.75 and 'from_pretrained("org/said")' in card.text and "owner/raw" in card.text
    assert client.run("models", "push", "recipe/base", "org/open", "--public", "--home", str(home)).status == 0
    assert "org/open" not in server.private


def test_an_adapter_names_its_base_in_the_repository(server, client, home) -> None:
    done = client.run("models", "push", "recipe/adapter", "org/adapter", "--home", str(home))
    assert "with its base recipe/base@1, in bases/1:" in done.output
    card = server.repositories["model", "org/adapter"].commits[server.commit("model", "org/adapter")]["README.md"].decode()
    assert 'base = AutoModelForCausalLM.from_pretrained("org/adapter", subfolder="bases/1")\n' in card
    assert 'model = PeftModel.from_pretrained(base, "org/adapter")' in card


def test_a_pushed_adapter_is_pulled_before_a_recipe_uses_it(server, client, home, tmp_path) -> None:
    assert client.run("models", "push", "recipe/adapter", "org/direct", "--home", str(home)).status == 0
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "recipe.yaml").write_text(
        "name: direct\nsteps:\n  - {stage: sft, name: sft, model: org/direct, data: {train: rows.jsonl}}\n"
    )
    done = client.run("plan", str(tmp_path / "recipe.yaml"), "--home", str(tmp_path))
    assert done.status == 2 and "recipe.yaml:3: steps[0].model: got 'org/direct'" in done.output
    assert "`stages models pull org/direct`, and use the name that it prints" in done.output


def test_an_adapter_whose_base_is_gone_from_the_hub_says_how_to_use_a_copy(server, client, tiny_llama_folder, tmp_path) -> None:
    from stages.models.loading import load_language_model, load_tokenizer
    from stages.models.saving import save_model

    gone = ResolvedModel("org/gone", "hub", "org/gone", "hub:org/gone@main", ModelInput(ref="org/gone"))
    tokenizer = load_tokenizer(str(tiny_llama_folder))
    model = load_language_model(str(tiny_llama_folder), dtype=torch.float32, lora=LoraSettings(r=2))
    registry = Registry(tmp_path / "registry")
    registry.publish("a/b", lambda folder: save_model(model, tokenizer, folder), role="language_model", base=gone)
    done = client.run("models", "export", "a/b", str(tmp_path / "merged"), "--home", str(tmp_path))
    assert done.status == 2 and "the Hub has no model 'org/gone' that this account can read" in done.output
    alone, home = str(tmp_path / "alone"), ("--home", str(tmp_path))
    assert client.run("models", "export", "a/b", alone, "--adapter", *home).status == 0
    done = client.run("models", "import", alone, "--as", "a/merged", "--base", str(tiny_llama_folder), *home)
    assert done.status == 0 and "published a/merged@1 (language_model)" in done.output, done.output


def test_another_lineage_is_not_overwritten(server, client, home, tmp_path) -> None:
    assert client.run("models", "push", "recipe/base", "org/line", "--home", str(home)).status == 0
    before = server.commit("model", "org/line")
    other = client.run("models", "push", "recipe/reward", "org/line", "--home", str(home))
    assert other.status == 2 and "'org/line' contains recipe/base@1 (sha256:" in other.output and other.output.count("\n") == 1
    server.publish("model", "org/foreign", {"config.json": b"{}", "model.safetensors": b"x"})
    foreign = client.run("models", "push", "recipe/base", "org/foreign", "--home", str(home))
    assert foreign.status == 2 and "contains files that `stages models push` did not write (config.json" in foreign.output
    assert server.commit("model", "org/line") == before
    # A new version of the same name replaces the old one, whose files are removed.
    copied = tmp_path / "home"
    shutil.copytree(home, copied)
    registry = Registry(copied / "registry")

    def fill(folder: Path) -> None:
        shutil.copytree(registry.get("recipe/base@1").path, folder, dirs_exist_ok=True)
        (folder / "generation_config.json").unlink()

    registry.publish("recipe/base", fill, role="language_model")
    newer = client.run("models", "push", "recipe/base", "org/line", "--home", str(copied))
    assert newer.status == 0 and "replaces recipe/base@1 (sha256:" in newer.output and "its visibility does not change" in newer.output
    assert "generation_config.json" not in server.repositories["model", "org/line"].commits[server.commit("model", "org/line")]
    old = client.run("models", "push", "recipe/base@1", "org/line", "--home", str(home))  # a registry without the new version
    assert old.status == 2 and "pull that version first: `stages models pull org/line --as recipe/base`" in old.output
    server.moves_on = True
    late = client.run("models", "push", "recipe/base@1", "org/line", "--home", str(copied))
    assert late.status == 2 and "was changed by another user during the upload; push again" in late.output


def test_refusal_of_the_hub_is_reported(server, client, home) -> None:
    def push(identifier: str, ref: str = "recipe/base") -> str:
        done = client.run("models", "push", ref, identifier, "--home", str(home))
        assert done.status == 2, done.output
        return str(done.output).splitlines()[-1]

    assert "error: creating 'other/model': this account may not create repositories of 'other'" in push("other/model")
    server.publish("model", "other/empty", {".gitattributes": b""})
    assert "error: pushing to 'other/empty': this account may not write to 'other/empty'" in push("other/empty")
    server.publish("model", "other/hidden", {".gitattributes": b""})
    server.private.add("other/hidden")
    assert "the repository 'other/hidden' exists, but this account may not read it" in push("other/hidden")
    server.tokens.clear()
    assert "the Hub does not accept the token; log in with `hf auth login`" in push("org/model")
    assert "error: 'model' is not a repository id of the Hub; expected owner/name" in push("model")
    assert "error: no model named 'nothing'" in push("org/model", "nothing")


def test_incomplete_repository_is_not_pulled(server, client, home, tmp_path) -> None:
    assert client.run("models", "push", "recipe/base", "org/complete", "--public", "--home", str(home)).status == 0
    complete = server.repositories["model", "org/complete"].commits[server.commit("model", "org/complete")]

    def pull(identifier: str, files: dict[str, bytes] | None = None) -> str:
        if files is not None:
            server.publish("model", identifier, files)
        done = client.run("models", "pull", identifier, "--home", str(tmp_path))
        assert done.status == 2, done.output
        assert not list((tmp_path / "registry" / "models").rglob("manifest.json"))
        return str(done.output).splitlines()[-1]

    changed = {**complete, "model.safetensors": complete["model.safetensors"][:-1] + b"!"}
    assert "model.safetensors differs from the manifest; nothing was added" in pull("org/changed", changed)
    lacking = {name: content for name, content in complete.items() if name != "config.json"}
    assert "is incomplete: config.json is missing (1 missing files)" in pull("org/lacking", lacking)
    assert "was not pushed by `stages models push`" in pull("org/other", {"config.json": b"{}"})
    assert "tristage.json of org/odd@" in pull("org/odd", {**complete, "tristage.json": b"{}"})
    assert "error: the Hub has no model 'org/nothing' that this account can read" in pull("org/nothing")
    assert "error: 'nothing' is not a repository id of the Hub; expected owner/name" in pull("nothing")


# Without a server


def described(home: Path, name: str, **changes: Any) -> str:
    registry = Registry(home / "registry")
    shared = [version for _, version in versions_to_share(registry.get(f"recipe/{name}"), registry)]
    shared[0] = SharedVersion("", {**shared[0].manifest, **changes}, shared[0].lineage)
    return describe(shared, []).decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"files": [{"path": "../../x", "size": 1, "sha256": "0" * 64}]}, "lists '../../x'; refused"),
        ({"files": [{"path": "weights.pt", "size": 1, "sha256": "0" * 64}]}, "has weights.pt, a pickle file"),
        ({"files": []}, "lists 'no file'; refused"),
        ({"digest": "sha256:" + "0" * 64}, "does not match its files"),
        ({"role": "oracle"}, "does not match its files"),
        ({"base": {"kind": "folder", "ref": "/etc", "path": "/etc", "digest": "x"}}, "neither on the Hub nor in the repository"),
        ({"base": {"kind": "hub", "ref": "x", "path": "../x", "digest": "x"}}, "neither on the Hub nor in the repository"),
        ({"metrics": []}, "metrics is a list"),
    ],
)
def test_description_in_a_repository_is_validated(home: Path, changes: dict[str, Any], message: str) -> None:
    assert [version.ref for version in read_description(described(home, "stack"), "org/x")] == [
        "recipe/stack@1",
        "recipe/adapter@1",
        "recipe/base@1",
    ]
    with pytest.raises(HubError, match=message):
        read_description(described(home, "base", **changes), "org/x")


@pytest.mark.parametrize("changes", [{"rate": "high"}, {"n": "many"}, {"other": None, "judge": {}}, None])
def test_evaluations_in_a_repository_are_validated(changes: dict[str, Any] | None) -> None:
    row = {"other": "sft", "judge": "gold", "rate": "0.75", "interval": "0.6 to 0.85", "n": 40}
    entry = {"title": "verdict", "verdict": "base beats\nother", "name": "verdict", "rows": [row]}
    assert read_evaluations(json.dumps({"evaluations": [entry]}), "org/x") == [entry]
    wrong = {**entry, "rows": None if changes is None else [{**row, **changes}]}
    with pytest.raises(HubError, match="evaluations in tristage.json of org/x"):
        read_evaluations(json.dumps({"evaluations": [wrong]}), "org/x")


def test_an_adapter_on_a_folder_cannot_be_shared(home: Path, tmp_path: Path, tiny_llama_folder: Path) -> None:
    registry = Registry(tmp_path / "registry")
    source = Registry(home / "registry").get("recipe/adapter").path
    base = ResolvedModel(str(tiny_llama_folder), "folder", str(tiny_llama_folder), "sha256:x", ModelInput(ref=str(tiny_llama_folder)))
    record = registry.publish("a/b", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True), role="language_model", base=base)
    with pytest.raises(RegistryError, match=r"a/b@1 is an adapter on the folder .* which other users do not have"):
        versions_to_share(record, registry)


def test_only_local_paths_are_shortened() -> None:
    given = {"a": "/home/me/x.jsonl", "b": ["/", "/etc", "and/or", "/a b\n/c", "/home/me/run/"]}
    assert without_local_paths(given) == {"a": "x.jsonl", "b": ["/", "/etc", "and/or", "/a b\n/c", "run"]}


def test_push_without_a_token_or_offline_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None, raising=False)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False, raising=False)
    with pytest.raises(HubError, match="no Hub token is set; log in with `hf auth login`"):
        check_may_upload()
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: True, raising=False)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        check_may_upload()
    for identifier in ("name", "a/b/c", "/b", "a/", "a b/c"):
        with pytest.raises(HubError, match="expected owner/name"):
            check_identifier(identifier)


def test_broken_connection_gives_one_message() -> None:
    from httpx2 import ConnectError

    with (
        pytest.raises(HubUnreachable, match=r"pushing to 'a/b': the connection broke off \(RuntimeError: Error while .* push again"),
        _explained("pushing to 'a/b'", {}),
    ):
        try:
            raise ConnectError("refused")
        except ConnectError as error:
            raise RuntimeError("Error while uploading 'model.safetensors' to the Hub.") from error

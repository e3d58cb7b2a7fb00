"""The registry: published versions are complete and equal, for any path, time and number of publications."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from stages.config import ModelInput
from stages.errors import RegistryError
from stages.registry.card import write_card
from stages.registry.contents import digest_folder
from stages.registry.ledger import Registry
from stages.registry.record import ModelRecord, with_shared_parents, written_once
from stages.registry.references import ResolvedModel


def model_files(folder: Path, weights: bytes = b"weights", path_in_config: str = "/home/a/base") -> None:
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "_name_or_path": path_in_config}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"name_or_path": path_in_config, "eos_token": "</s>"}))


def adapter_files(folder: Path, path_in_config: str = "/home/a/base", modules: list[str] | None = None) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"adapter")
    config = {"base_model_name_or_path": path_in_config, "r": 8, "target_modules": modules or ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(f"base_model: {path_in_config}")


def publish(registry: Registry, name: str = "quickstart/sft", fill: Any = model_files, **fields: Any) -> ModelRecord:
    return registry.publish(name, fill, role="language_model", **fields)


resolved = ResolvedModel.of_record


def test_version_can_be_read_by_name_number_or_digest(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first = publish(registry)
    second = publish(registry, fill=lambda folder: model_files(folder, b"others"))
    assert (first.version, second.version) == (1, 2)
    assert registry.get("quickstart/sft") == second
    assert registry.get("quickstart/sft@1") == first
    assert registry.get(first.digest) == first
    assert registry.get(first.digest[:16]) == first
    assert [record.ref for record in registry.records()] == ["quickstart/sft@1", "quickstart/sft@2"]
    assert sorted(path.name for path in first.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer_config.json"]


def test_digest_depends_only_on_the_files(tmp_path: Path) -> None:
    here = publish(Registry(tmp_path / "here"))
    there = publish(
        Registry(tmp_path / "there"), "other/name", lambda folder: model_files(folder, path_in_config="D:/elsewhere"), metrics={"loss": 1.0}
    )
    changed = publish(Registry(tmp_path / "here"), fill=lambda folder: model_files(folder, b"weightz"))
    assert here.digest == there.digest != changed.digest
    assert json.loads((here.path / "config.json").read_text()) == {"model_type": "llama"}
    plain = tmp_path / "plain"
    plain.mkdir()
    model_files(plain, path_in_config="/third")
    assert digest_folder(plain) == here.digest


def test_an_adapters_digest_names_its_base_by_content(tmp_path: Path) -> None:
    digests = []
    for home, modules in (("one", ["q_proj", "v_proj"]), ("two", ["v_proj", "q_proj"])):
        registry = Registry(tmp_path / home)
        for _ in range(1 if home == "one" else 2):  # version numbers differ between the homes, content does not
            base = publish(registry, "quickstart/base")
        record = publish(registry, fill=lambda folder, at=home, names=modules: adapter_files(folder, f"/{at}", names), base=resolved(base))
        assert json.loads((record.path / "adapter_config.json").read_text())["base_model_name_or_path"] == base.digest
        assert record.manifest["base"]["ref"] == base.ref
        assert record.is_adapter and not base.is_adapter
        digests.append(record.digest)
    assert digests[0] == digests[1]


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="but its base model is unknown"):
        publish(Registry(tmp_path), fill=adapter_files)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "deep/state.pkl", "weights.pth"])
def test_pickled_weights_are_refused_and_leave_nothing(tmp_path: Path, name: str) -> None:
    def fill(folder: Path) -> None:
        model_files(folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")

    with pytest.raises(RegistryError, match=name):
        publish(Registry(tmp_path), fill=fill)
    assert Registry(tmp_path).records() == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "/absolute", "a/../b", "a/b/c", "", "a b", "quickstart/7", ".hidden", "a/.b", "sft@2"])
def test_names_cannot_lead_out_of_the_registry(tmp_path: Path, name: str) -> None:
    with pytest.raises(RegistryError):
        publish(Registry(tmp_path / "registry"), name)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_symbolic_link_cannot_lead_out_of_the_registry(tmp_path: Path) -> None:
    outside, registry = tmp_path / "outside", Registry(tmp_path / "registry")
    outside.mkdir()
    publish(registry)
    (registry.root / "models" / "linked").symlink_to(outside)
    with pytest.raises(RegistryError, match="leads out of the registry"):
        publish(registry, "linked/sft")
    assert not list(outside.rglob("*.safetensors"))

    def fill(folder: Path) -> None:
        (folder / "model.safetensors").symlink_to("/etc/hostname")

    with pytest.raises(RegistryError, match="symbolic links"):
        publish(registry, fill=fill)


def test_failed_publication_leaves_no_files(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        model_files(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish(Registry(tmp_path), fill=fill)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(RegistryError, match="nothing was saved"):
        publish(Registry(tmp_path), fill=lambda folder: None)


PUBLISHER = """
    import sys, time
    from pathlib import Path
    from stages.registry.ledger import Registry

    def fill(folder):
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(sys.argv[2])
        print("filled", flush=True)
        time.sleep(float(sys.argv[3]))

    print(Registry(Path(sys.argv[1])).publish("race/model", fill, role="language_model").ref, flush=True)
"""


def start_publisher(root: Path, content: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(PUBLISHER), str(root), content, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_files_of_a_killed_publisher_are_removed(tmp_path: Path) -> None:
    process = start_publisher(tmp_path, "half", 60)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    registry = Registry(tmp_path)
    assert registry.records() == []
    assert len(list((tmp_path / "tmp").iterdir())) == 2  # its folder and its lock
    publish(registry)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert [record.ref for record in registry.records()] == ["quickstart/sft@1"]


def test_two_processes_that_publish_one_name_get_two_versions(tmp_path: Path) -> None:
    processes = [start_publisher(tmp_path, content, 0.3) for content in ("one", "two", "three")]
    refs = {process.communicate()[0].split()[-1] for process in processes}
    assert refs == {"race/model@1", "race/model@2", "race/model@3"}
    contents = {(record.path / "model.safetensors").read_text() for record in Registry(tmp_path).records()}
    assert contents == {"one", "two", "three"}


def test_unfinished_version_of_a_running_process_is_kept(tmp_path: Path) -> None:
    registry = Registry(tmp_path)

    def fill(folder: Path) -> None:
        model_files(folder)
        publish(registry, "other/model")  # cleans up leftover files while this version is being written

    assert publish(registry, fill=fill).version == 1
    assert len(registry.records()) == 2


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    record = publish(registry)
    assert registry.verify(record.ref) == []
    weights = record.path / "model.safetensors"
    weights.write_bytes(b"weightt")
    assert registry.verify(record.ref) == ["model.safetensors was changed: its SHA-256 differs from the published one"]
    weights.write_bytes(b"wei")
    assert registry.verify(record.ref) == ["model.safetensors is truncated: 3 bytes of 7"]
    weights.unlink()
    (record.path / "extra.txt").write_text("x")
    assert registry.verify(record.ref) == ["model.safetensors is missing", "extra.txt was not published with this version"]
    with pytest.raises(RegistryError, match=r"damaged and was not exported: model.safetensors is missing"):
        registry.export(record.ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_verify_finds_a_changed_manifest(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    record = publish(registry)
    manifest = json.loads((record.folder / "manifest.json").read_text())
    (record.folder / "manifest.json").write_text(json.dumps({**manifest, "digest": "sha256:" + "0" * 64}))
    assert "manifest.json was changed" in registry.verify("quickstart/sft")[0]


def test_a_newer_manifest_and_a_broken_one_are_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    path = publish(registry).folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "manifest_version": 99}))
    with pytest.raises(RegistryError, match="99 by a newer tristage"):
        registry.get("quickstart/sft")
    path.write_text('{"name": "quick')
    with pytest.raises(RegistryError, match="not a readable manifest"):
        registry.get("quickstart/sft")


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("quickstart/stf", "did you mean quickstart/sft"),
        ("nothing-like-it", "known: quickstart/sft"),
        ("quickstart/sft@7", "has no version 7"),
        ("sha256:0000", "no model whose digest"),
        ("sha256:zz", "not a registry reference"),
        ("../sft", "not a registry reference"),
    ],
)
def test_unresolved_reference_lists_known_models(tmp_path: Path, ref: str, message: str) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    with pytest.raises(RegistryError, match=message):
        registry.get(ref)


def test_lineage_is_the_tree_of_parents(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    base = publish(registry, "quickstart/base")
    hub = ResolvedModel("gpt2", "hub", "gpt2", "hub:gpt2@main", ModelInput(ref="gpt2", trust_remote_code=True))
    sft = publish(registry, fill=lambda folder: model_files(folder, b"sft"), parents=[resolved(base), hub, resolved(base)])
    aligned = publish(registry, "quickstart/aligned", lambda folder: model_files(folder, b"ppo"), parents=[resolved(sft)])
    tree = registry.lineage("quickstart/aligned")
    assert tree["ref"] == aligned.ref
    (parent,) = tree["parents"]
    assert parent["ref"] == sft.ref
    assert [leaf["ref"] for leaf in parent["parents"]] == [base.ref, "gpt2"]
    assert parent["parents"][1]["trust_remote_code"] is True
    registry.remove(base.ref)
    assert registry.lineage(sft.ref)["parents"][0]["removed"] is True


def test_lineage_continues_with_a_version_of_equal_content_if_the_parent_was_removed(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    base = publish(registry, "quickstart/base")
    again = publish(registry, "quickstart/base")
    sft = publish(registry, fill=lambda folder: model_files(folder, b"sft"), parents=[resolved(again)])
    assert registry.made_from(again) == [sft.ref] and registry.made_from(base) == []
    registry.remove(again.ref)
    (parent,) = registry.lineage(sft.ref)["parents"]
    assert parent["ref"] == base.ref and "removed" not in parent


def test_ancestors_of_many_rounds_are_written_once(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    policy = publish(registry, "rounds/sft")
    for number in range(40):  # each round has the last policy as a parent twice, so a full tree would have 2^40 entries
        made = partial(model_files, weights=b"preference %d" % number)
        preference = publish(registry, "rounds/preference", made, parents=[resolved(policy)])
        policy = publish(
            registry, "rounds/aligned", partial(model_files, weights=b"%d" % number), parents=[resolved(preference), resolved(policy)]
        )
    tree = registry.lineage(policy.ref)
    assert tree["parents"][0]["parents"][0] is tree["parents"][1]
    written = written_once(tree)
    assert written["parents"][0]["parents"][0]["parents"] and written["parents"][1] == {
        **tree["parents"][1],
        "parents": [],
        "repeated": True,
    }
    assert json.dumps(written).count('"digest"') == 1 + 3 * 40  # the last policy; of each round one preference, and one policy twice
    again = with_shared_parents(json.loads(json.dumps(written)))
    assert again["parents"][0]["parents"][0] is again["parents"][1] and again["parents"][1]["parents"]
    card = write_card(policy, registry, tmp_path, merged=False).read_text()
    assert card.count("rounds/aligned@39 ") == 2 and card.count(", see above)") == 39


def test_removing_a_base_is_refused_while_adapters_depend_on_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    base = publish(registry, "quickstart/base")
    publish(registry, fill=adapter_files, base=resolved(base))
    with pytest.raises(RegistryError, match="quickstart/sft@1"):
        registry.remove(base.ref)
    assert registry.get("quickstart/base") == base
    registry.remove(base.ref, force=True)
    with pytest.raises(RegistryError):
        registry.get("quickstart/base")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_removed_version_number_is_not_reused_and_ambiguous_removal_is_refused(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry)
    publish(registry)
    with pytest.raises(RegistryError, match="several versions"):
        registry.remove("quickstart/sft")
    registry.remove("quickstart/sft@2")
    assert publish(registry).version == 3


def test_export_copies_files_and_refuses_a_folder_with_files(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    record = publish(registry)
    path = registry.export("quickstart/sft", tmp_path / "out")
    assert digest_folder(path) == record.digest
    with pytest.raises(RegistryError, match="not an empty folder"):
        registry.export("quickstart/sft", tmp_path / "out")
    (tmp_path / "file").write_text("a")
    with pytest.raises(RegistryError, match=r"the folder .*file/out cannot be made: .*(File exists|Not a directory); name another one"):
        registry.export("quickstart/sft", tmp_path / "file" / "out")


def test_export_of_an_adapter_alone(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    record = publish(registry, fill=adapter_files, base=resolved(publish(registry, "quickstart/base")))
    path = registry.export(record.ref, tmp_path / "out")
    assert sorted(file.name for file in path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_fingerprints_find_the_newest_version(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    publish(registry, fingerprint="f1")
    second = publish(registry, fingerprint="f1")
    publish(registry, "other/sft", fingerprint="f2")
    assert registry.find_fingerprint("f1", "quickstart/sft") == second
    assert registry.find_fingerprint("f2", "quickstart/sft") is None
    assert registry.find_fingerprint("f2") is not None
    assert registry.find_fingerprint("") is None


def test_model_saved_from_different_paths_has_one_digest(tmp_path: Path, tiny_llama_folder: Path) -> None:
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    digests = set()
    for path_in_config in ("here", "there/deeper"):
        shutil.copytree(tiny_llama_folder, tmp_path / path_in_config)

        def fill(folder: Path, source: Path = tmp_path / path_in_config) -> None:
            AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
            AutoTokenizer.from_pretrained(source).save_pretrained(folder)

        digests.add(publish(Registry(tmp_path / path_in_config / "registry"), fill=fill).digest)
    assert len(digests) == 1

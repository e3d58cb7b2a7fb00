"""Full and read-only disks, flipped bits, leftover files, clock jumps, many processes: there is an error or a wait, and no data is lost."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages.cli import app
from stages.errors import RegistryError, StorageError
from stages.process.storage import storage_error, write_json
from stages.registry import ledger as registry_module
from stages.registry.ledger import Registry
from tests.conftest import write_model

REPOSITORY = Path(__file__).resolve().parents[2]


# Disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    """disk(size in KiB) mounts a small file system at tmp_path/disk; called again it changes its size. disk("ro") makes it read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int | str) -> Path:
        options = ["-o", f"size={size}k"] if isinstance(size, int) else ["-o", f"remount,{size}"]
        if isinstance(size, int) and os.path.ismount(folder):
            options[1] = f"remount,rw,{options[1]}"
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")
        return folder

    try:
        yield resize
    finally:
        if os.path.ismount(folder):
            subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A step of supervised fine-tuning and one of PPO, both with frequent checkpoints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "fault_rewards.py").write_text("def score(p, c):\n    return [len(text) / 10 for text in c]\n")
    rows = [{"prompt": f"write {number}:", "completion": "a joy"} for number in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {
        "stage": "sft",
        "name": "sft",
        "precision": "fp32",
        "model": str(tiny_llama_folder),
        "data": {"train": "rows.jsonl"},
        "training": {"batch_size": 8, "microbatch_size": 8},
        "checkpoint_seconds": 0,
    }
    ppo = {
        "stage": "ppo",
        "name": "aligned",
        "precision": "fp32",
        "policy": "sft",
        "value": "policy",
        "data": "rows.jsonl",
        "reward": [{"function": "fault_rewards:score"}],
        "generation": {"max_new_tokens": 4},
        "total_episodes": 24,
        "rollout_batch_size": 8,
        "minibatch_size": 8,
        "ppo_epochs": 1,
        "checkpoint_seconds": 0,
    }
    path = tmp_path / "fault.yaml"
    path.write_text(f"name: fault\nsteps:\n  - {json.dumps(sft)}\n  - {json.dumps(ppo)}\n")
    return path


def run(home: Path) -> Any:
    return CliRunner().invoke(app, ["run", "fault.yaml", "--home", str(home)])


def digests(home: Path) -> dict[str, str]:
    return {record.name: record.digest for record in Registry(home / "registry").records()}


def used(folder: Path) -> int:
    return sum(path.stat().st_blocks // 2 for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(600)
def test_full_disk_at_any_write_loses_no_model(disk: Any, recipe: Path, tmp_path: Path) -> None:
    calm = run(tmp_path / "calm")
    assert calm.exit_code == 0, calm.output
    total = used(tmp_path / "calm")
    stopped = 0  # checkpoints need more space than the final files
    for share in (0.02, 0.2, 0.5, 0.8, 1.1, 1.4, 1.7, 2.0, 3.0):
        home = disk(max(8, int(total * share))) / f"home-{share}"
        result = run(home)
        registry = Registry(home / "registry")
        if result.exit_code == 0:
            assert digests(home) == digests(tmp_path / "calm")
            shutil.rmtree(home)
            continue
        stopped += 1
        assert result.exit_code == 2, (share, result.exception, result.output[-2000:])
        (said,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert "no space is left on the device" in said and "run the same command again" in said, said
        for record in registry.records():
            assert registry.verify(record.ref) == []
        disk(30 * total)
        again = run(home)
        assert again.exit_code == 0, (share, again.exception, again.output[-2000:])
        assert digests(home) == digests(tmp_path / "calm")
        shutil.rmtree(home)
    assert stopped >= 4


def test_read_only_home_can_be_read(disk: Any, recipe: Path) -> None:
    home = disk(20_000) / "home"
    assert run(home).exit_code == 0
    before = digests(home)
    disk("ro")
    result = run(home)
    assert result.exit_code == 2 and "the file system is read-only" in result.stderr, result.output
    assert "Traceback" not in result.output
    for command in (["plan", "fault.yaml"], ["models", "list"], ["models", "verify"], ["models", "lineage", "fault/aligned"]):
        done = CliRunner().invoke(app, [*command, "--home", str(home)])
        assert done.exit_code == 0, (command, done.output)
    for command in (["models", "remove", "fault/aligned"],):
        done = CliRunner().invoke(app, [*command, "--home", str(home)])
        assert done.exit_code == 2 and "the file system is read-only" in done.stderr
    assert digests(home) == before


def test_home_of_another_user_is_reported(recipe: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "home").mkdir(mode=0o500)
    result = run(tmp_path / "home")
    assert result.exit_code == 2 and "permission denied" in result.stderr


def test_disk_errors_are_recognised_in_every_exception_type() -> None:
    full = OSError(28, "No space left on device", "/x/y")
    assert "no space is left on the device (/x/y)" in str(storage_error(full))
    try:
        try:
            raise full
        except OSError as error:
            raise RuntimeError("while saving") from error
    except RuntimeError as wrapped:
        assert isinstance(storage_error(wrapped), StorageError)
    foreign = type("SafetensorError", (Exception,), {})
    assert storage_error(foreign("Error while serializing: I/O error: Os { code: 28, kind: StorageFull }")) is not None
    assert storage_error(RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")) is not None
    assert storage_error(FileNotFoundError(2, "No such file")) is None and storage_error(ValueError("code: 28,")) is None


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# Bits


def test_one_flipped_bit_in_any_file_is_found_before_it_is_used(recipe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(home).exit_code == 0
    record = Registry(home / "registry").get("fault/sft")
    before = digests(home)
    for file in sorted(record.path.iterdir()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0x10
        original = file.read_bytes()
        file.write_bytes(content)
        assert Registry(home / "registry").verify(record.ref) == [f"{file.name} was changed: its SHA-256 differs from the published one"]
        verified = CliRunner().invoke(app, ["models", "verify", "fault/sft", "--home", str(home)])
        assert verified.exit_code == 2 and f"{file.name} was changed" in verified.stdout
        exported = CliRunner().invoke(app, ["models", "export", "fault/sft", str(tmp_path / "out"), "--home", str(home)])
        assert exported.exit_code == 2 and not (tmp_path / "out").exists()
        file.write_bytes(original)
    weights = record.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    result = run(home)  # rebuilds it
    assert result.exit_code == 0 and "fault/sft is damaged" in result.output
    records = {each.ref: each.digest for each in Registry(home / "registry").records()}
    assert records["fault/sft@2"] == before["fault/sft"]


def test_version_of_a_newer_tristage_is_not_changed(recipe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert run(home).exit_code == 0
    path = Registry(home / "registry").get("fault/sft").folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "manifest_version": 99, "files": "in another form"}))
    before = path.read_text()
    result = run(home)
    assert result.exit_code == 2 and "written as manifest version 99 by a newer tristage" in result.stderr
    assert path.read_text() == before


# Leftovers and clocks


def test_locks_and_leftovers_of_dead_processes_do_not_block(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    registry.publish("fault/model", write_model, role="language_model")
    (registry.root / "lock").write_text("4711")
    for name in ("0123", "4567"):
        (registry.root / "tmp" / name / "model").mkdir(parents=True)
    (registry.root / "tmp" / "0123.lock").write_text("4711")  # its process has ended, which released the lock
    (registry.root / "models" / "fault" / "model" / "last_version").write_text("")  # a crash during the write
    assert registry.publish("fault/model", write_model, role="language_model").version == 2
    assert list((registry.root / "tmp").iterdir()) == []


def test_step_locked_by_a_dead_process_runs(recipe: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    planned = json.loads(CliRunner().invoke(app, ["plan", "fault.yaml", "--home", str(home), "--json"]).stdout)
    (home / "work").mkdir(parents=True)
    (home / "work" / f"{planned['steps'][0]['fingerprint']}.lock").write_text("4711")
    assert run(home).exit_code == 0


def test_a_clock_that_jumps_back_does_not_bring_an_old_version_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)

    class Clock(datetime):
        @classmethod
        def now(cls, zone: Any = None) -> datetime:
            return now

    monkeypatch.setattr(registry_module, "datetime", Clock)
    registry = Registry(tmp_path)
    first = registry.publish("fault/model", write_model, role="language_model", fingerprint="f")
    (first.path / "model.safetensors").write_bytes(b"damaged")
    now -= timedelta(days=4000)
    second = registry.publish("fault/model", write_model, role="language_model", fingerprint="f")
    assert registry.get("fault/model") == registry.find_fingerprint("f", "fault/model") == second
    assert second.manifest["created"] < first.manifest["created"]


def test_run_under_a_jumping_clock_finishes_normally(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    assert run(tmp_path / "calm").exit_code == 0
    real, jumps = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (1e8 if next(jumps) % 2 else -1e8))
    result = run(tmp_path / "jumping")
    assert result.exit_code == 0, (result.exception, result.output)
    assert digests(tmp_path / "jumping") == digests(tmp_path / "calm")


# Many processes together

WORKER = """
    import random, sys
    from pathlib import Path
    from stages.errors import RegistryError
    from stages.registry.ledger import Registry

    root, number = Path(sys.argv[1]), int(sys.argv[2])
    draw, registry, done = random.Random(number), Registry(root), {}
    for turn in range(12):
        name = draw.choice(["race/a", "race/b", "c"])
        content = f"{number} {turn} {name} ".encode() * draw.randint(1, 2000)

        def fill(folder):
            (folder / "config.json").write_text("{}")
            (folder / "model.safetensors").write_bytes(content)

        record = registry.publish(name, fill, role="language_model", fingerprint=f"{number}-{turn}")
        try:
            assert (record.path / "model.safetensors").read_bytes() == content
        except FileNotFoundError:
            assert not record.folder.exists()
        done[record.ref] = record.digest
        for action in (lambda: registry.get(name), lambda: registry.verify(name), lambda: registry.lineage(name), registry.records,
                       lambda: registry.find_fingerprint(f"{number}-{turn}", name)):
            try:
                found = action()
            except RegistryError as error:  # gone in between
                assert "no model named" in str(error) or "removed" in str(error) or "no version" in str(error), error
                continue
            if isinstance(found, list) and found and isinstance(found[0], str):
                raise SystemExit(f"does not verify: {found}")
        if draw.random() < 0.5:
            try:
                registry.remove(draw.choice(registry.records()).ref)
            except (RegistryError, IndexError) as error:
                assert "no version" in str(error) or "no model" in str(error) or "empty sequence" in str(error), error
    print("\\n".join(f"{ref} {digest}" for ref, digest in done.items()))
"""


def test_eight_processes_publish_read_and_remove_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    workers = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for number in range(8)
    ]
    outcomes = [worker.communicate(timeout=200) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, [error[-500:] for _, error in outcomes if error]
    made = [line.split() for output, _ in outcomes for line in output.splitlines()]
    assert len({ref for ref, _ in made}) == 8 * 12  # no version number occurs twice
    registry = Registry(tmp_path)
    published = dict((ref, digest) for ref, digest in made)
    left = registry.records()
    assert {record.ref for record in left} <= set(published)
    for record in left:
        assert published[record.ref] == record.digest and registry.verify(record.ref) == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_version_removed_during_listing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    for _ in range(2):
        registry.publish("base", write_model, role="language_model")
    scandir = os.scandir

    def scandir_of_what_is_gone(path: Any = ".") -> Any:
        if Path(os.fspath(path)).name == "1":
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scandir_of_what_is_gone)
    assert "base@2" in [record.ref for record in registry.records()]


def test_leftover_whose_owner_has_just_finished_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path)
    registry.publish("fault/base", write_model, role="language_model")
    lock = tmp_path / "tmp" / "leftover.lock"
    lock.touch()
    flock = fcntl.flock

    def flock_while_the_owner_ends(file: Any, how: int) -> None:
        if how & fcntl.LOCK_NB:
            lock.unlink()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", flock_while_the_owner_ends)
    assert registry.publish("fault/base", write_model, role="language_model").version == 2


def test_a_base_removed_while_its_adapter_is_trained_is_noticed(tmp_path: Path) -> None:
    from stages.registry.references import ResolvedModel

    registry = Registry(tmp_path)
    base = registry.publish("fault/base", write_model, role="language_model")
    resolved = ResolvedModel.of_record(base)

    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(b"adapter")
        registry.remove(base.ref)

    with pytest.raises(RegistryError, match="no model whose digest begins with"):
        registry.publish("fault/adapter", adapter, role="language_model", base=resolved)
    assert registry.records() == []

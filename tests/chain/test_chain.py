"""The chain: which steps run, which are reused and why, and which files a run writes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.chain import run as chain
from stages.chain.fingerprints import code_version, why
from stages.errors import DataError, RegistryError
from stages.process.runtime import AutoPrecision, Runtime
from stages.recipe.schema import load_recipe
from stages.registry.ledger import Registry
from stages.report.page import write_report

RECIPE = """\
name: quick
seed: 7
steps:
  - {stage: train, name: base, data: a.txt}
  - {stage: train, name: sft, model: base, data: b.txt}
  - {stage: train, name: side, data: b.txt, rate: 3.0}
  - {stage: judge, name: verdict, candidates: {base: base, sft: sft}}
"""


@pytest.fixture(autouse=True)
def workdir(fake_stages: Path) -> None:
    Path("quick.yaml").write_text(RECIPE)


def run(*overrides: str, home: str = "home", quiet: bool = True) -> dict[str, Any]:
    path = Path(home)
    recipe = load_recipe("quick.yaml", overrides, Registry(path / "registry"))
    return chain.run(recipe, path, Runtime(quiet=quiet))


def plan(*overrides: str, home: str = "home") -> dict[str, tuple[str, str]]:
    path = Path(home)
    recipe = load_recipe("quick.yaml", overrides, Registry(path / "registry"))
    return {step.name: (step.action, step.reason) for step in chain.plan(recipe, path)}


def actions(summary: dict[str, Any]) -> dict[str, str]:
    return {step["name"]: step["action"] for step in summary["steps"]}


def test_second_run_reuses_all_steps_of_the_first(tmp_path: Path) -> None:
    planned = plan()
    assert {name: action for name, (action, _) in planned.items()} == dict.fromkeys(("base", "sft", "side", "verdict"), "run")
    assert planned["base"][1] == "never completed before"
    assert planned["sft"][1] == "its input base is made in this run"
    assert planned["verdict"][1] == "its inputs base, sft are made in this run"
    assert not Path("home/registry/models").exists()

    first = run()
    assert set(actions(first).values()) == {"run"}
    second = run()
    assert set(actions(second).values()) == {"reuse"}
    assert [step["model"] for step in first["steps"]] == [step["model"] for step in second["steps"]]
    assert [step["metrics"] for step in first["steps"]] == [step["metrics"] for step in second["steps"]]
    assert all(step["reused"] for step in second["steps"])
    assert len(Registry("home/registry").records()) == 3


def test_summary_records_steps_models_and_results(tmp_path: Path) -> None:
    run()
    latest = Path("home/runs/quick/latest")
    summary = json.loads((latest / "summary.json").read_text())
    assert latest.is_symlink()
    assert summary["recipe"] == "quick" and summary["finished"] is True
    assert summary["wall_seconds"] > 0 and summary["peak_memory_bytes"] > 1e6
    assert summary["environment"]["python"] and summary["environment"]["packages"]["torch"]
    step = summary["steps"][1]
    assert (step["name"], step["stage"], step["reused"]) == ("sft", "train", False)
    assert step["model"]["ref"] == "quick/sft" and step["model"]["digest"].startswith("sha256:")
    assert step["metrics"]["loss"] == 0.5
    assert {name: row["scores"] for name, row in summary["candidates"].items()} == {"base": {"gold": 0.5}, "sft": {"gold": 0.5}}
    assert summary["win_rates"][0]["ci_low"] == 0.6
    assert (latest / "sft" / "metrics.jsonl").exists()
    assert list(Path("home/work").iterdir()) == []


def test_reused_evaluation_copies_its_files_and_figures() -> None:
    run()
    shutil.rmtree(next(path for path in Path("home/runs/quick").iterdir() if not path.is_symlink()))  # a user may delete run folders
    summary = run()
    assert actions(summary)["verdict"] == "reuse"
    latest = Path("home/runs/quick/latest")
    assert "a completion" in (latest / "verdict" / "completions.jsonl").read_text()
    assert summary["candidates"]["sft"]["scores"] == {"gold": 0.5}
    (latest / "verdict" / "evaluation.json").write_text("edited")  # an edit in a run folder does not change the stored files
    assert actions(run())["verdict"] == "reuse"
    kept = next(Path("home/results").glob("*/files/evaluation.json"))
    kept.write_text("damaged")
    assert actions(run())["verdict"] == "run"
    assert actions(run())["verdict"] == "reuse"


def test_reused_step_copies_its_log_and_the_run_has_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.report.page.write_report", write_report)
    run()
    first = Path("home/runs/quick/latest").resolve()
    log = (first / "sft" / "metrics.jsonl").read_text()
    page = (first / "report.html").read_text()
    assert "sft wins 70 % of 100 prompts against base, by gold" in page
    shutil.rmtree(first)
    summary = run()
    latest = Path("home/runs/quick/latest")
    assert actions(summary)["sft"] == "reuse" and (latest / "sft" / "metrics.jsonl").read_text() == log
    assert summary["steps"][1]["inputs"] == {"model": "quick/base@1"} and summary["steps"][1]["config"]["rate"] == 1.0
    # Time and memory of a reused step are those of the run that computed it.
    made = summary["steps"][1]["circumstances"]
    assert made["run"] == first.name and made["peak_memory_bytes"] > 1e6 and made["packages"]["torch"]
    assert f'<td class="left">{first.name}</td>' in (latest / "report.html").read_text()


def test_a_report_that_fails_does_not_fail_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug of the report")

    monkeypatch.setattr("stages.report.page.write_report", broken)
    recipe = load_recipe("quick.yaml", (), Registry(Path("home/registry")))
    assert chain.run(recipe, Path("home"), Runtime())["finished"] is True
    said = " ".join(capsys.readouterr().out.split())
    assert "The report could not be written (ZeroDivisionError: a bug of the report); try `stages report home/runs/quick/" in said


def test_models_of_two_homes_agree(tmp_path: Path) -> None:
    models = [{step["name"]: step["model"] for step in run(home=home)["steps"]} for home in ("home", "deeper/home")]
    run("base.rate=2.0", home="third")  # so the third home has other version numbers
    models.append({step["name"]: step["model"] for step in run(home="third")["steps"]})
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize(
    ("overrides", "step", "reason"),
    [
        (["sft.rate=2.0"], "sft", "setting changed: rate (1.0 -> 2.0)"),
        (["seed=8"], "base", "seed changed (7 -> 8)"),
        (["sft.data=[a.txt, b.txt]"], "sft", "data changed: data"),
        (["verdict.candidates.sft=side"], "verdict", "input changed: candidates.sft"),
        (["verdict.question=why?"], "verdict", "setting changed: question ('which is better?' -> 'why?')"),
        (["verdict.candidates={base: base}"], "verdict", "input changed: candidates.sft"),
    ],
)
def test_rerun_step_states_the_reason(overrides: list[str], step: str, reason: str) -> None:
    run()
    action, said = plan(*overrides)[step]
    assert action == "run"
    assert reason in said


def test_changed_data_reruns_the_step_and_its_dependents() -> None:
    run()
    Path("a.txt").write_text("another a")
    planned = plan()
    assert planned["base"] == ("run", "data changed: data")
    assert planned["sft"] == ("run", "its input base is made in this run")
    assert planned["side"][0] == "reuse"
    assert actions(run()) == {"base": "run", "sft": "run", "side": "reuse", "verdict": "run"}


def test_rerun_with_equal_content_does_not_rerun_dependents() -> None:
    run()
    summary = run("base.rate=1.5")  # another setting that does not change the weights
    assert actions(summary) == {"base": "run", "sft": "reuse", "side": "reuse", "verdict": "reuse"}


def test_changed_code_reruns_the_step(tmp_path: Path) -> None:
    run()
    (tmp_path / "fake_stages.py").write_text((tmp_path / "fake_stages.py").read_text() + "\n# changed\n")
    assert plan()["base"] == ("run", "code of the stage changed")


def test_names_and_paths_are_not_part_of_the_fingerprint(tmp_path: Path) -> None:
    run()
    Path("moved").mkdir()
    Path("a.txt").rename("moved/a.txt")
    assert plan("base.data=moved/a.txt")["base"][0] == "reuse"


def test_damaged_version_is_rebuilt() -> None:
    run()
    record = Registry("home/registry").get("quick/sft")
    (record.path / "model.safetensors").write_text("{}")
    assert plan()["sft"] == (
        "run",
        "quick/sft is damaged: model.safetensors is truncated: 2 bytes of " + f"{record.manifest['files'][1]['size']}",
    )
    summary = run()
    assert actions(summary)["sft"] == "run"
    assert summary["steps"][1]["version"] == 2
    assert actions(run())["sft"] == "reuse"


def test_a_damaged_foreign_model_is_refused() -> None:
    run()
    Path("quick.yaml").write_text("name: other\nsteps:\n  - {stage: train, name: a, model: quick/sft, data: a.txt}\n")
    assert plan()["a"][0] == "run"
    (Registry("home/registry").get("quick/sft").path / "model.safetensors").write_text("{}")
    with pytest.raises(RegistryError, match="quick/sft@1 is damaged"):
        plan()


def test_cached_hashes_do_not_hide_a_damaged_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.registry import contents

    monkeypatch.setattr(contents, "LARGE_BYTES", 0)
    monkeypatch.setattr(contents.time, "time", lambda: 1e12)  # all files are old enough for the cache to trust their times
    run()
    Path("quick.yaml").write_text("name: other\nsteps:\n  - {stage: train, name: a, model: quick/sft, data: a.txt}\n")
    assert plan()["a"][0] == "run"
    weights = Registry("home/registry").get("quick/sft").path / "model.safetensors"
    weights.write_text(weights.read_text().replace("rate", "ratf"))
    memory = json.loads(Path("home/cache/plan.json").read_text())
    status = weights.stat()  # a bit flip on the disk: same size and time
    memory["hashes"][str(weights.absolute())][:4] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    Path("home/cache/plan.json").write_text(json.dumps(memory))
    assert plan()["a"][0] == "run"  # a plan trusts the cached hashes
    with pytest.raises(RegistryError, match="quick/sft@1 is damaged: model.safetensors was changed"):
        run()


def test_data_is_checked_once() -> None:
    fake = importlib.import_module("fake_stages")
    calls = []
    original = fake.TrainConfig.check_data
    fake.TrainConfig.check_data = lambda self: (calls.append(self.name), original(self))[1]
    try:
        Path("home").mkdir()
        plan()
        plan()
        assert calls == ["base", "sft", "side"]
        Path("b.txt").write_text("another b")
        plan()
        assert calls[3:] == ["sft", "side"]
    finally:
        fake.TrainConfig.check_data = original


def test_interrupted_step_is_resumed_from_its_checkpoint() -> None:
    with pytest.raises(RuntimeError, match="the machine failed"):
        run("sft.stop_after=2")
    summary = json.loads(Path("home/runs/quick/latest/summary.json").read_text())
    assert summary["finished"] is False
    assert [step["name"] for step in summary["steps"]] == ["base"]
    planned = plan("sft.stop_after=2")
    assert planned["base"][0] == "reuse"
    assert planned["sft"] == ("resume", "an earlier run was interrupted; never completed before")
    summary = run("sft.stop_after=2")
    assert actions(summary)["sft"] == "resume"
    assert summary["steps"][1]["metrics"]["first_step"] == 2
    assert list(Path("home/work").iterdir()) == []


def test_interrupted_run_with_other_settings_is_named_with_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="the machine failed"):
        run("sft.stop_after=2", "sft.rate=2.0")
    left = next(path for path in Path("home/work").iterdir() if path.is_dir())
    expected = (
        "run",
        "never completed before. Not continued: an interrupted run (setting changed: rate (2.0 -> 3.0), stop_after (2 -> None))",
    )
    assert plan("sft.rate=3.0")["sft"] == expected
    run("sft.rate=3.0", "sft.seed=9", quiet=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert "an interrupted run (setting changed: rate (2.0 -> 3.0), stop_after (2 -> None); seed changed (7 -> 9))" in printed
    assert f"of checkpoints in {left}" in printed
    # The earlier settings continue the earlier run; then nothing is left.
    assert plan("sft.stop_after=2", "sft.rate=2.0")["sft"][0] == "resume"
    assert run("sft.stop_after=2", "sft.rate=2.0")["steps"][1]["metrics"]["first_step"] == 2
    assert list(Path("home/work").iterdir()) == []


def test_interrupted_step_keeps_its_dtype_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    begin = Runtime.begin_step

    def note(runtime: Runtime, seed: int, auto: AutoPrecision | None = None) -> None:
        begun.append(auto.precision if auto is not None else "as on a GPU")
        begin(runtime, seed, auto)

    monkeypatch.setattr(Runtime, "begin_step", note)
    monkeypatch.setattr("stages.chain.run.visible_gpus", list)
    monkeypatch.setattr("stages.models.precision.has_tiles", lambda: True)
    monkeypatch.setattr("stages.models.precision.pass_seconds", lambda width: {"fp32": 2.0, "bf16": 1.0})
    with pytest.raises(RuntimeError, match="the machine failed"):
        run("sft.stop_after=2")
    monkeypatch.setattr("stages.models.precision.has_tiles", lambda: False)
    run("sft.stop_after=2")
    # base and sft; then the resumed sft, and two steps that begin on the second machine
    assert begun == ["bf16", "bf16", "bf16", "fp32", "fp32"]
    assert list(Path("home/work").iterdir()) == []


def test_wrong_data_is_reported_before_anything_runs() -> None:
    Path("b.txt").write_text("")
    with pytest.raises(DataError, match=r"quick.yaml:5: steps\[1\] \(sft\): .*b.txt: no rows"):
        run()
    assert Registry("home/registry").records() == []
    assert not Path("home/runs").exists()


def test_fully_reused_run_imports_no_torch(tmp_path: Path) -> None:
    run()
    script = (
        "import sys, fake_stages; fake_stages.install(); sys.argv = ['stages', 'run', 'quick.yaml', '--home', 'home']\n"
        "from stages.cli import app\n"
        "app(standalone_mode=False)\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "report.html" in done.stdout
    assert done.stdout.count("reused:") == 4


def test_simultaneous_runs_execute_a_step_once(tmp_path: Path) -> None:
    script = (
        "import sys, time, fake_stages; fake_stages.install()\n"
        "from stages.cli import app\n"
        "train = fake_stages.train\n"
        "fake_stages.train = lambda *given: (time.sleep(0.5), train(*given))[1]\n"
        "sys.argv = ['stages', 'run', 'quick.yaml', '--home', 'home']; app()"
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "PATH": ""}
    command = [sys.executable, "-c", script]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert len(Registry("home/registry").records()) == 3
    assert len([path for path in Path("home/runs/quick").iterdir() if not path.is_symlink()]) == 2


def test_the_reason_of_a_rerun_names_every_part_that_changed() -> None:
    old = {"stage": "a", "settings": {"x": {"y": 1}, "z": [1, 2]}, "seed": 1, "inputs": {"m": "1"}, "data": {}, "code": "1"}
    new = {"stage": "b", "settings": {"x": {"y": 2}, "z": [1]}, "seed": 2, "inputs": {}, "data": {"d": "1"}, "code": "2"}
    assert why(old, new) == (
        "stage changed (a -> b); setting changed: x.y (1 -> 2), z[1] (2 -> absent); seed changed (1 -> 2); "
        "input changed: m; data changed: d; code of the stage changed"
    )


def test_code_versions_follow_imports_within_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "rooms").mkdir(parents=True)
    (package / "registry.py").write_text("x = 1")
    (package / "stage.py").write_text("from stages.registry.ledger import x\ndef run():\n    from stages.rooms import inner")
    (package / "rooms" / "__init__.py").write_text("")
    (package / "rooms" / "inner.py").write_text("from . import other")
    (package / "rooms" / "other.py").write_text("y = 1")
    (package / "rooms" / "page.html").write_text("<p>")
    (package / "apart.py").write_text("z = 1")
    monkeypatch.setattr("stages.chain.fingerprints.PACKAGE", package)
    seen = {code_version("stages.stage")}
    for name, changes in (
        ("stage.py", True),
        ("rooms/inner.py", True),
        ("rooms/other.py", True),
        ("rooms/page.html", True),
        ("rooms/__init__.py", True),
        ("apart.py", False),
        ("registry.py", False),
    ):
        (package / name).write_text((package / name).read_text() + "\n# changed")
        version = code_version("stages.stage")
        assert (version not in seen) == changes, name
        seen.add(version)


def test_the_code_of_a_function_named_in_a_recipe_counts(tmp_path: Path) -> None:
    (tmp_path / "judges.py").write_text("def score(): ...")
    before = code_version("stages.sft.run", ["judges"])
    assert before != code_version("stages.sft.run")
    (tmp_path / "judges.py").write_text("def score(): return 1")
    assert code_version("stages.sft.run", ["judges"]) != before

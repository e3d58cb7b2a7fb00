"""The commands: what they print, what they write, and how they fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stages import __version__
from stages.cli import app
from stages.process.environment import continue_command
from stages.registry.contents import digest_folder
from stages.registry.ledger import Registry

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPE = """\
name: quick
steps:
  - {stage: train, name: base, data: a.txt}
  - {stage: train, name: sft, model: base, data: a.txt}
  - {stage: judge, name: verdict, candidates: {base: base, sft: sft}}
"""


@pytest.fixture
def workdir(fake_stages: Path) -> Path:
    Path("quick.yaml").write_text(RECIPE)
    return fake_stages


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def calls_json(*arguments: str) -> Any:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_lists_of_commands_show_complete_sentences() -> None:
    for arguments in (["--help"], ["models", "--help"]):
        commands = call(*arguments).output.partition("Commands:")[2].strip().splitlines()
        assert len(commands) >= 9
        assert [line for line in commands if not line.endswith(".") or line.endswith("...")] == []


def test_help_is_fast_and_names_the_commands() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "stages", "--help"], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    took = time.monotonic() - start
    assert took < 3, f"{took:.1f} s"  # 0.1 s alone; the machine may be busy
    for command in ("run", "plan", "models", "generate"):
        assert command in done.stdout


def test_version_option_prints_the_version() -> None:
    assert call("--version").stdout == f"tristage {__version__}\n"


def test_second_run_reuses_every_step(workdir: Path) -> None:
    result = call("run", "quick.yaml", "base.rate=2.0", "--home", "made")
    assert result.exit_code == 0, result.output
    assert "quick finished" in result.stdout
    assert "The report: made/runs/quick/" in result.stdout
    summary = json.loads(Path("made/runs/quick/latest/summary.json").read_text())
    assert summary["overrides"] == ["base.rate=2.0"] and summary["command"] == continue_command()
    again = call("run", "quick.yaml", "base.rate=2.0", "--home", "made")
    assert again.stdout.count("reused:") == 3


def test_home_is_the_option_then_the_variable_then_outputs(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call("run", "quick.yaml")
    assert Path("outputs/registry").is_dir()
    monkeypatch.setenv("STAGES_HOME", str(workdir / "elsewhere"))
    call("run", "quick.yaml")
    assert Path("elsewhere/registry").is_dir()


def test_plan_runs_nothing(workdir: Path) -> None:
    steps = calls_json("plan", "quick.yaml")["steps"]
    assert [(step["name"], step["action"]) for step in steps] == [("base", "run"), ("sft", "run"), ("verdict", "run")]
    assert not Path("outputs").exists()
    call("run", "quick.yaml")
    steps = calls_json("plan", "quick.yaml", "sft.rate=3.0")["steps"]
    assert [step["action"] for step in steps] == ["reuse", "run", "run"]
    assert steps[1]["reason"] == "setting changed: rate (1.0 -> 3.0)"
    table = call("plan", "quick.yaml")
    assert table.stdout.count("reuse") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "quick.yaml", "sft.rte=2"], "error: override 'sft.rte=2': steps[1].rte: unknown field 'rte'; did you mean 'rate'?"),
        (["plan", "quick.yaml", "sft.rate=fast"], "error: override 'sft.rate=fast': steps[1].rate: got 'fast', expected a number."),
        (["run", "missing.yaml"], "error: missing.yaml: no such recipe; known: quick.yaml"),
        (["models", "show", "quick/sft"], "error: no model named 'quick/sft'"),
        (["models", "verify", "quick/sft"], "error: no model named 'quick/sft'"),
        (["generate", "nowhere", "--prompt", "a"], "error: got 'nowhere', which is no"),
    ],
)
def test_user_error_prints_one_message_and_exits_with_2(workdir: Path, arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1


def test_debug_keeps_the_traceback(workdir: Path) -> None:
    result = call("run", "missing.yaml", "--debug")
    assert type(result.exception).__name__ == "RecipeError"


@pytest.mark.parametrize(
    ("arguments", "broken", "begin"),
    [
        (["run", "quick.yaml"], "fake_stages.train", "error: step 'base' (train): unexpected"),
        (["plan", "quick.yaml"], "fake_stages.TrainConfig.check_data", "error: checking the data of step 'base' (train): unexpected"),
        (["plan", "quick.yaml"], "stages.memory_plan.plan.plan_memory", "error: stages plan: unexpected"),
        (["models", "list"], "stages.registry.ledger.Registry.records", "error: stages list: unexpected"),
        (["models", "show", "x"], "stages.registry.ledger.Registry.get", "error: stages show: unexpected"),
        (["generate", "x", "--prompt", "a"], "stages.terminal.Speaker.load", "error: stages generate: unexpected"),
        (["chat", "x"], "stages.terminal.Speaker.load", "error: stages chat: unexpected"),
        (["report", "x"], "stages.report.run_folder.find_run", "error: stages report: unexpected"),
        (["sweep", "quick.yaml", "base.rate=[1.0]"], "stages.sweep.run.load_sweep", "error: stages sweep: unexpected"),
    ],
)
@pytest.mark.parametrize("error", [ZeroDivisionError("odd"), SystemExit("odd")], ids=["exception", "exit"])
def test_unexpected_error_prints_one_message_and_exits_with_1(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], broken: str, begin: str, error: BaseException
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error.__class__(*error.args)

    monkeypatch.setattr(broken, fail)
    result = call(*arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1), result.output
    assert result.stderr.startswith(f"{begin} {type(error).__name__}: odd")
    file = Path(result.stderr.partition("The traceback is in ")[2].partition("; --debug shows it")[0])
    assert f"{type(error).__name__}: odd" in file.read_text() and "Traceback" not in result.output
    debugged = call(*arguments, "--debug")
    assert debugged.exit_code == 1 and type(debugged.exception) in (ZeroDivisionError, RuntimeError)


def test_sweep_continues_after_an_unexpected_error(workdir: Path) -> None:
    result = call("sweep", "quick.yaml", "base.stop_after=[0,null]", "--metric", "steps.base.metrics.loss")
    assert result.exit_code == 1, result.output
    rows = [json.loads(line) for line in next(workdir.rglob("results.jsonl")).read_text().splitlines()]
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows[0]["error"].startswith("step 'base' (train): unexpected RuntimeError: the machine failed")


def test_ctrl_c_exits_with_status_130(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("stages.terminal.Speaker.load", interrupted)
    result = call("generate", "x", "--prompt", "a")
    assert (result.exit_code, result.stderr) == (130, "")


def test_output_whose_reader_has_ended_gives_no_message(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with ``stages conformance | head``: rich ends the program at the first line that it cannot write."""

    def closed(*_: Any) -> Any:
        raise BrokenPipeError

    def end(*_: Any) -> Any:
        raise SystemExit(1)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rich.console.Console._write_buffer", closed)
    monkeypatch.setattr("rich.console.Console.on_broken_pipe", end)  # rich also replaces the program's output, which pytest needs
    result = call("conformance")
    assert (result.exit_code, result.stderr) == (1, "")


def test_models_are_listed_shown_and_traced(workdir: Path) -> None:
    assert "No models in" in call("models", "list").stdout
    call("run", "quick.yaml")
    rows = calls_json("models", "list")
    assert [row["ref"] for row in rows] == ["quick/base@1", "quick/sft@1"]
    assert rows[0]["metrics"]["loss"] == 0.5
    assert "quick/sft@1" in call("models", "list").stdout
    shown = calls_json("models", "show", "quick/sft")
    assert shown["parents"][0]["ref"] == "quick/base@1"
    assert shown["recipe_step"]["stage"] == "train"
    text = call("models", "show", "quick/sft").stdout
    for said in ("quick/base@1", "data: a.txt (1 row)", "made by a step of stage train", "heldout_error  1", "question"):
        assert (said in text) is (said != "question"), text
    assert "digest" not in text and shown["digest"] not in text
    everything = call("models", "show", "quick/sft", "--all").stdout
    assert "digest" in everything and "packages" in everything and '"rate": 1.0' in everything.replace("\n", "")
    assert calls_json("models", "lineage", "quick/sft")["parents"][0]["ref"] == "quick/base@1"
    tree = call("models", "lineage", "quick/sft").stdout
    assert tree.index("quick/sft@1") < tree.index("quick/base@1")
    assert tree.count("data: a.txt (1 row)") == 2 and "sha256:" not in tree
    Path("a.txt").write_text("b\n")
    assert "data: a.txt (changed since)" in call("models", "show", "quick/sft").stdout
    assert call("models", "lineage", "quick/sft", "--all").stdout.count("sha256:") >= 2


def test_models_are_verified_exported_and_removed(workdir: Path) -> None:
    call("run", "quick.yaml")
    assert call("models", "verify").stdout == "quick/base@1: intact\nquick/sft@1: intact\n"
    record = Registry("outputs/registry").get("quick/sft")
    assert calls_json("models", "export", "quick/sft", "out")["path"] == str(workdir / "out")
    (workdir / "out" / "README.md").unlink()  # the model card
    assert digest_folder(workdir / "out") == record.digest
    (record.path / "config.json").write_text("{ }")
    result = call("models", "verify", "quick/sft")
    assert result.exit_code == 2
    assert result.stdout == "quick/sft@1: config.json was changed: its SHA-256 differs from the published one\n"
    assert calls_json("models", "remove", "quick/sft@1")["removed"] == "quick/sft@1"
    assert [row["ref"] for row in calls_json("models", "list")] == ["quick/base@1"]


def test_removal_says_which_versions_depended_on_the_removed_one(workdir: Path) -> None:
    call("run", "quick.yaml")
    shown = call("models", "remove", "quick/base").stdout
    assert "Made from it, and unchanged: quick/sft@1." in shown and "No version of quick/base is left." in shown
    call("run", "quick.yaml")  # makes base@2
    call("run", "quick.yaml", "seed=5")  # makes base@3
    assert "quick/base now means quick/base@2. Recipes that name quick/base@3 need" in call("models", "remove", "quick/base@3").stdout


def test_generate_shows_two_models_side_by_side(workdir: Path, tiny_llama_folder: Path) -> None:
    arguments = ["generate", str(tiny_llama_folder), "--prompt", "the film", "--against", str(tiny_llama_folder)]
    options = ["--max-new-tokens", "5", "--num-samples", "2", "--seed", "3"]
    rows = calls_json(*arguments, *options)
    assert len(rows) == 2 and rows[0]["prompt"] == "the film"
    assert rows == calls_json(*arguments, *options)
    table = call(*arguments, *options)
    assert table.exit_code == 0, table.output
    assert "the film" in table.stdout


def test_import_prints_what_it_read_and_published(tmp_path: Path) -> None:
    """The command prints the library, the models and the notes; bad input is one message and status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "stages", "models", "import", str(tmp_path / "nowhere"), "--as", "old/model", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error:") and "no such folder" in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_without_a_character_shows_its_code(tmp_path: Path) -> None:
    (tmp_path / "schön.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"]}\n')
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "stages", "label", "schön.jsonl", "--report", "--home", "home"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sch\\xf6n.jsonl: labels" in done.stdout


def test_label_refuses_json_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completions": ["b", "c"]}\n')
    done = CliRunner().invoke(app, ["label", str(tmp_path / "a.jsonl"), "--json", "--home", str(tmp_path / "home")])
    assert done.exit_code == 2 and "only the report is printed as JSON; add --report" in " ".join(done.stderr.split())
    assert not (tmp_path / "home").exists()


COPIES = {
    "stages.sharing.push.push": ["push", "mini/sft", "org/mine"],
    "stages.sharing.pull.pull": ["pull", "org/mine"],
    "stages.importing.run.import_model": ["import", "folder", "--as", "mine/sft"],
    "stages.registry.ledger.Registry.export": ["export", "mini/sft", "folder"],
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("function", COPIES)
def test_a_stopped_copy_of_a_model_says_how_to_continue(
    function: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(function, stopped)
    command = ["models", *COPIES[function], "--home", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["stages", *command])
    result = call(*command)
    assert result.exit_code == 128 + number
    assert result.stderr == f"stopped by {number.name}; completed work is kept. To continue: stages {' '.join(command)}\n"

"""The GPU table at toy size on a CPU: its rows, the reasons for missing numbers, and its output."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import measures  # noqa: E402
import packages  # noqa: E402
import table  # noqa: E402
from table import DECODED  # noqa: E402
from workloads import FULL, TINY  # noqa: E402


def options(**fields: Any) -> Namespace:
    return Namespace(**{"tiny": True, "trl": None, "only": [], **fields})


def shown(row: Any) -> tuple[str, float | None, str]:
    return row.case, row.value, row.note


def test_the_table_has_all_rows_and_each_measurement_runs_once(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []
    results = {
        "step": {"planned_bytes": 2**31, "peak_bytes": None, "idle_share": None, "episodes_per_second": 3.0},
        "decoding": {"ratio": 4.5},
        "continuous": {"skipped": "does not fit: CUDA out of memory"},
        "self_kl": {"kl": 0.0},
        "files": {"workdir": "there"},
    }

    def run(task: dict[str, Any], seconds: float) -> dict[str, Any]:
        asked.append(task)
        return results[task["measure"]]

    made = table.Table(options(), tmp_path, run)
    made.fill()
    by_measure: dict[str, list[Any]] = {}
    for row in made.rows:
        by_measure.setdefault(row.measure, []).append(row)
    assert [len(rows) for rows in by_measure.values()] == [3, 3, 2, 2, 1, len(table.SETUPS), 2, len(table.NOT_COMPILED)]
    assert len(table.SETUPS) >= 8 and len([task for task in asked if task["measure"] == "step"]) == len(table.SETUPS)
    assert {shown(row) for row in by_measure["idle share of the GPU in the update"]} == {(name, None, "no GPU") for name in table.IDLE}
    assert {row.note for row in by_measure["PPO speed"]} == {"--trl does not name an environment with TRL 1.12"}
    assert by_measure["decoding"][0].value == 4.5
    assert by_measure["continuous batching"][0].note == "does not fit: CUDA out of memory"
    assert {row.details["planned_gib"] for row in by_measure["planned / measured memory"]} == {2.0}
    assert made.crashed == []


def test_the_ratio_is_to_the_best_microbatch_of_trl(tmp_path: Path) -> None:
    """TRL samples 8 episodes in 2 iterations after the first, in 2 s: 4 per second. The other microbatch does not fit into memory."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\ntask = json.loads(sys.argv[2])\nassert task['packages'] is None\n"
        "if task['microbatch'] == 4: sys.exit('torch.OutOfMemoryError: CUDA out of memory')\n"
        "print('a line of a library')\nprint(json.dumps({'seconds': [9.0, 1.0, 1.0], 'peak_bytes': 2**30}))\n"
    )
    script.chmod(0o755)
    results = {"files": {"workdir": str(tmp_path)}, "step": {"episodes_per_second": 24.0, "peak_bytes": None}}
    made = table.Table(options(trl=tmp_path, only=["shared", "times"]), tmp_path, lambda task, seconds: results[task["measure"]])
    made.fill()
    (row,) = made.rows
    assert row.value == 6.0  # 24 / 4
    best = row.details["trl"]
    assert (best["microbatch"], best["peak_gib"], best["tried"]) == (2, 1.0, {2: 4.0})
    assert best["failed"] == {4: "does not fit: the process ran out of memory"}


def test_compiled_layers_are_compared_with_the_same_set_up(tmp_path: Path) -> None:
    """``--only compiled`` measures PPO of both sizes with and without compilation in one call."""

    def run(task: dict[str, Any], seconds: float) -> dict[str, Any]:
        compiles = task.get("fields", {}).get("training", {}).get("torch_compile", False)
        asked.append((task["shape"], task["measure"], compiles))
        return {"update_tokens_per_second": 30.0 if compiles else 20.0}

    asked: list[tuple[str, str, bool]] = []
    made = table.Table(options(only=["compiled layers"]), tmp_path, run)
    made.fill()
    assert [(row.case, row.value) for row in made.rows] == [("410M, PPO, value network", 1.5), ("1B, PPO, full", 1.5)]
    assert {one for one in asked if one[1] == "step"} == {
        (shape, "step", compiles) for shape in ("410M", "1B") for compiles in (False, True)
    }


def test_a_crash_is_shown_in_its_row_and_gives_exit_status_1(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(table, "in_this_process", lambda task, seconds: {"crashed": "RuntimeError: shapes | differ"})
    assert table.main(["--tiny", "--only", "decoding", "ragged", "--out", str(tmp_path)]) == 1
    assert "error: these measurements crashed: decoding 1B Llama, ragged" in capsys.readouterr().err
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["rows"][0]["note"] == "crashed: RuntimeError: shapes | differ"
    assert content["machine"]["commit"] and content["machine"]["versions"]["torch"]
    assert "crashed: RuntimeError: shapes / differ |" in (tmp_path / "gpu.md").read_text()


def runner(asked: list[str], results: dict[str, Any]) -> Any:
    """A ``run`` that notes the name of each task: its measure, or the shape of files."""

    def run(task: dict[str, Any], seconds: float) -> dict[str, Any]:
        name = task["shape"] if task["measure"] == "files" else task["measure"]
        asked.append(name)
        return results.get(name, {})

    return run


def test_important_measurements_come_first_and_the_files_of_a_shape_are_made_once(tmp_path: Path) -> None:
    asked: list[str] = []
    table.Table(options(), tmp_path, runner(asked, {})).fill()
    assert asked[:6] == ["410M", "step", "step", "step", "decoding", "decoding"]
    assert asked.index("1B") < asked.index("7B") and sorted(asked).count("1B") == 1


def test_every_result_is_written_immediately_and_the_next_call_continues(tmp_path: Path, monkeypatch) -> None:
    """The first call ends after two measurements, of which one took too long. The second call measures that one and the others."""
    asked: list[str] = []
    now = [0.0]
    monkeypatch.setattr(table.time, "monotonic", lambda: now[0])
    results = {"decoding": {"skipped": "took longer than 40 s", "timed_out": True}, "continuous": {"ratio": 2.0}}

    def run(task: dict[str, Any], seconds: float) -> dict[str, Any]:
        now[0] += 40
        limits.append(seconds)
        return runner(asked, results)(task, seconds)

    limits: list[float] = []
    monkeypatch.setattr(table, "in_this_process", run)
    arguments = ["--tiny", "--only", DECODED, "--out", str(tmp_path), "--work", str(tmp_path)]
    assert table.main([*arguments, "--minutes", "1.4"]) == 0  # 84 s: 4 are left for the third measurement, too few
    assert asked == ["decoding", "decoding"] and limits == [84.0, 44.0]
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["note"] for row in content["rows"]] == ["took longer than 40 s", "took longer than 40 s", "not measured"]
    results["decoding"] = {"ratio": 5.0}
    assert table.main(arguments) == 0 and asked[2:] == ["decoding", "decoding", "continuous"]
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["value"] for row in content["rows"]] == [5.0, 5.0, 2.0]
    assert table.main(arguments) == 0 and len(asked) == 5  # nothing is left to measure
    assert table.main([*arguments, "--again"]) == 0 and len(asked) == 8


def test_results_of_another_commit_are_put_aside(tmp_path: Path, capsys) -> None:
    card = {"name": "NVIDIA H200", "memory_bytes": 1, "driver": "1"}
    on = {"gpus": [card], "cpu": "c", "versions": {}, "commit": "new"}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": on, "tiny": True, "results": {"a": {}}}))
    other_machine = {**on, "cpu": "d", "gpus": [{**card, "driver": "2"}]}
    assert table.kept_results(path, other_machine, tiny=True) == {"a": {}}
    path.write_text(json.dumps({"machine": {**on, "commit": "old"}, "tiny": True, "results": {"a": {}}}))
    assert table.kept_results(path, on, tiny=True) == {}
    (older,) = tmp_path.glob("gpu-before-*.json")
    assert str(older) in capsys.readouterr().err and not (tmp_path / "gpu.json").exists()


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path: Path, monkeypatch, capsys) -> None:
    """As on a machine whose image has an older transformers, and neither bitsandbytes nor a network."""
    (tmp_path / "pyproject.toml").write_text(
        "[project]\ndependencies = ['torch>=1', 'transformers>=99,<100', 'no-such-package>=1']\n"
        "[project.optional-dependencies]\nquantize = ['bitsandbytes>=99']\n"
    )
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    assert table.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"transformers>=99,<100 ({version('transformers')} installed)" in said and "no-such-package>=1 (not installed)" in said
    assert "pip install 'transformers>=99,<100' 'no-such-package>=1'" in said and "torch>=1" not in said
    assert "rows of quantized weights and 8-bit moments will have no number: bitsandbytes>=99" in said
    assert not (tmp_path / "out").exists()
    assert packages.missing(HERE.parents[2] / "pyproject.toml") == ([], [])  # of this environment


def test_a_folder_without_trl_1_12_is_refused_with_the_command_that_makes_one(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "trl" / "experimental" / "ppo").mkdir(parents=True)
    for folder in ("trl", "trl/experimental", "trl/experimental/ppo"):
        (tmp_path / folder / "__init__.py").write_text("")
    for number, problem in (("1.16.0", "it has TRL 1.16.0, not 1.12"), ("1.12.0", "")):
        information = tmp_path / f"trl-{number}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: trl\nVersion: {number}\n")
        assert packages.problem_of_trl(Path(sys.executable), str(tmp_path)) == problem
        (information / "METADATA").unlink()
        information.rmdir()
    monkeypatch.setattr(table, "problem_of_trl", lambda *_: "it has TRL 1.16.0, not 1.12")
    assert table.main(["--trl", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not 1.12 (python -m pip install --no-deps --target FOLDER trl==1.12.0" in capsys.readouterr().err


def test_the_table_starts_where_the_project_is_not_installed(tmp_path: Path) -> None:
    """Only this file's place tells it where the project is."""
    code = f"import runpy; runpy.run_path({str(HERE / 'table.py')!r}); import stages; print(stages.__file__)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(HERE.parents[2] / "stages" / "__init__.py"), done.stderr


def test_code_without_git_is_known_by_a_digest(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "stages").mkdir()
    monkeypatch.setattr(table, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    empty = table.commit()
    (tmp_path / "stages" / "a.py").write_text("x = 1")
    assert empty.startswith("code ") and table.commit() not in (empty, "")


def test_the_row_of_a_crash_has_its_error_and_the_next_measurement_runs(tmp_path: Path) -> None:
    asked: list[str] = []
    results = {"decoding": {"crashed": "RuntimeError: a kernel"}, "continuous": {"ratio": 2.0}}
    made = table.Table(options(only=[DECODED]), tmp_path, runner(asked, results))
    made.fill()
    assert [row.note.split(";")[0] for row in made.rows][:2] == ["crashed: RuntimeError: a kernel"] * 2
    assert made.rows[2].value == 2.0 and len(made.crashed) == 2


def test_a_process_finds_the_packages_of_pythonpath(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "carried.py").write_text("VALUE = {'a': 1}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import json, carried, stages; print(json.dumps(carried.VALUE))"
    assert table.in_process([sys.executable, "-c", code], {}) == {"a": 1}


def test_an_update_that_cannot_be_profiled_runs_and_the_reason_is_kept(monkeypatch) -> None:
    """A PyTorch without CUPTI cannot profile a GPU."""
    from stages.ppo.update.updater import Updater

    def fails(_: Any) -> None:
        raise AssertionError("no CUPTI")

    monkeypatch.setattr(torch.profiler.profile, "start", fails)
    monkeypatch.setattr(Updater, "update", lambda self: "updated")
    with measures._profiled(measures.Clock(), 0, False) as idle:
        assert Updater.update(None) == "updated"  # type: ignore[arg-type, call-arg, comparison-overlap]
    assert idle == {"why": "the profiler does not start (AssertionError: no CUPTI)"}


def test_a_process_that_takes_too_long_is_ended() -> None:
    made = table.in_process([sys.executable, "-c", "import time; time.sleep(60)"], {}, 0.5)
    assert made["timed_out"] and made["skipped"].startswith("took longer than")


def test_a_process_returns_its_result_or_the_reason_for_having_none(capsys) -> None:
    def code(text: str) -> dict[str, Any]:
        return table.in_process([sys.executable, "-c", text], {"a": 1})

    assert code("import sys; print('noise'); print(sys.argv[1])") == {"a": 1}
    assert code("import sys; sys.exit('CUDA out of memory')") == {"skipped": "does not fit: the process ran out of memory"}
    assert code("raise LookupError('no such row')") == {"crashed": "LookupError: no such row"}


@pytest.mark.parametrize(
    ("intervals", "length"), [([], 0), ([(0, 2), (1, 3), (5, 6)], 4), ([(5, 6), (0, 10)], 10), ([(0, 1), (1, 2), (0, 1)], 2)]
)
def test_covered_counts_overlapping_intervals_once(intervals, length) -> None:
    assert measures.covered(intervals) == length


def test_memory_errors_and_missing_packages_are_reasons_for_having_no_result(monkeypatch) -> None:
    def raises(error: BaseException) -> Any:
        def measure(_: dict[str, Any]) -> dict[str, Any]:
            raise error

        monkeypatch.setitem(measures.MEASURES, "step", measure)
        return measures.measured({"measure": "step", "device": "cpu"})

    outer = ValueError("cannot load")
    outer.__cause__ = MemoryError()
    assert raises(outer) == {"skipped": "does not fit: cannot load"}
    assert raises(ImportError("No module named 'x'")) == {"skipped": "a package is missing: No module named 'x'"}
    with pytest.raises(ValueError, match="shapes"):
        raises(ValueError("shapes"))


def test_a_step_and_decoding_give_numbers_at_toy_size(tmp_path: Path) -> None:
    made = table.Table(options(), tmp_path, table.in_this_process)
    names = "410M, PPO, shared value head", table.decoding_name("ragged")
    tried: set[str] = set()
    for name in names:
        made._measure(made._measurements[name], float("inf"), tried)
    step, decoded = (made.done[name] for name in names)
    assert table.reason(step) == table.reason(decoded) == ""
    assert step["planned_bytes"] > 0 and step["peak_bytes"] is None and step["episodes_per_second"] > 0
    assert len(step["seconds"]) == TINY.iterations and decoded["ratio"] == decoded["here"] / decoded["generate"]
    assert FULL.shapes.keys() == TINY.shapes.keys()

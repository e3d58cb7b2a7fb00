"""Measures speed and memory on a GPU and writes one table, in JSON and Markdown.

    .venv/bin/python tests/benchmarks/gpu/table.py [--trl FOLDER] [--only WORDS] [--out FOLDER]
    .venv/bin/python tests/benchmarks/gpu/table.py --tiny      # every row at toy size on a CPU, to test this program

The models have random weights and the shapes of known models, so nothing is downloaded. The folder of --trl is an environment (with
bin/python) or a folder of packages, with TRL 1.12. Without --trl, the rows that compare with TRL have no number. Each measurement runs in a
separate process. If a set-up does not fit into memory or lacks a package, its row gives the reason. The exit status is 1 only if a
measurement crashed.

Result: gpu.json and gpu.md in the folder of --out; docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path.insert(0, str(HERE))
TIME_LIMIT = 3600  # seconds of one measurement

from workloads import FULL, TINY  # noqa: E402

LORA = {"lora": {"r": 16}}
CHECKPOINTED = {"gradient_checkpointing": True}


@dataclass(frozen=True)
class Setup:
    """A recipe step to run. ``profile``: also measure the share of the update in which the GPU is idle."""

    shape: str
    fields: dict[str, Any] = field(default_factory=dict)
    stage: str = "ppo"
    quantization: str = "none"
    learned_reward: bool = False
    profile: bool = False


SETUPS: dict[str, Setup] = {
    "410M, PPO, value network": Setup("410M", learned_reward=True, profile=True),
    "410M, PPO, shared value head": Setup("410M", {"value": "shared"}, learned_reward=True),
    "410M, PPO, LoRA": Setup("410M", {**LORA, "value": "policy"}, learned_reward=True),
    "1B, PPO, full": Setup("1B", profile=True),
    "1B, PPO, LoRA": Setup("1B", LORA),
    "7B, PPO, nf4 LoRA, checkpointing": Setup("7B", {**LORA, "training": CHECKPOINTED}, quantization="nf4"),
    "1B, PPO, int8 LoRA": Setup("1B", LORA, quantization="int8"),
    "1B, PPO, 8-bit moments, checkpointing": Setup("1B", {"training": {**CHECKPOINTED, "optimizer": "adamw_8bit"}}),
    "135M, PPO, full": Setup("135M"),
    "1B, SFT, full": Setup("1B", stage="sft"),
    "1B, SFT, LoRA, checkpointing": Setup("1B", {**LORA, "training": CHECKPOINTED}, stage="sft"),
    "410M, reward model": Setup("410M", stage="reward_model"),
}
AGAINST_TRL = {  # set-up -> (must, aim): times TRL's best microbatch
    "410M, PPO, value network": (6, 8),
    "410M, PPO, shared value head": (9, 12),
    "410M, PPO, LoRA": (6, 9),
}
MATMUL_SHARES = {
    "1B, PPO, full": (0.50, 0.60),
    "1B, PPO, LoRA": (0.35, 0.45),
    "7B, PPO, nf4 LoRA, checkpointing": (0.25, 0.35),
}
IDLE = {"410M, PPO, value network": (0.25, 0.10), "1B, PPO, full": (0.25, 0.10)}
DECODED = "1B Llama"
NO_GPU = "no GPU"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """One row. ``value`` is None if there is none; then ``note`` says why. ``must`` and ``aim`` are texts such as ``>= 6``."""

    measure: str
    case: str
    value: float | None
    must: str
    aim: str
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Table:
    """Runs the measurements and collects rows. Each measurement runs once, although several rows may use it."""

    def __init__(self, options: argparse.Namespace, work: Path, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """``run`` returns the result of a task; a result with ``skipped`` or ``crashed`` has only that reason."""
        self.options, self.work, self._run = options, work, run
        self.scale = TINY if options.tiny else FULL
        self.device = "cpu" if options.tiny else "cuda"
        self.rows: list[Row] = []
        self._done: dict[str, dict[str, Any]] = {}

    @property
    def crashed(self) -> list[str]:
        """The names of the measurements that crashed."""
        return [name for name, result in self._done.items() if "crashed" in result]

    def fill(self) -> None:
        """Make every row that the option ``only`` chooses."""
        for section in (self._ppo_rows, self._share_rows, self._decoding_rows, self._continuous_row, self._memory_rows, self._kl_rows):
            section()

    # Sections

    def _ppo_rows(self) -> None:
        for name, (must, aim) in AGAINST_TRL.items():
            if not self._chosen(case := f"{name}, times TRL 1.12"):
                continue
            result, best = self._setup(name), self._best_of_trl()
            speed = {"episodes_per_second": result.get("episodes_per_second"), "peak_gib": gib(result.get("peak_bytes")), "trl": best}
            other = best.get("episodes_per_second")
            value = result["episodes_per_second"] / other if other and "episodes_per_second" in result else None
            why = reason(result) or reason(best) or (NO_GPU if self.options.tiny else "")
            self._add("PPO speed", case, value, f">= {must}", f">= {aim}", why, speed)

    def _share_rows(self) -> None:
        for title, key, cases, sign in (
            ("share of the matmul peak in the update", "update_matmul_share", MATMUL_SHARES, ">="),
            ("idle share of the GPU in the update", "idle_share", IDLE, "<="),
        ):
            for name, (must, aim) in cases.items():
                if not self._chosen(f"{title}, {name}"):
                    continue
                result = self._setup(name)
                value = result.get(key) if self.device == "cuda" else None
                note = reason(result) or ("" if value is not None else NO_GPU if self.device != "cuda" else NOT_MEASURED)
                self._add(title, name, value, f"{sign} {must}", f"{sign} {aim}", note, speeds(result))

    def _decoding_rows(self) -> None:
        for case, ragged in (("full", False), ("ragged", True)):
            name = f"decoding {DECODED}, {case}, times model.generate"
            if self._chosen(name):
                result = self._task(name, {"measure": "decoding", "shape": DECODED, "ragged": ragged})
                self._add("decoding", name, result.get("ratio"), ">= 4", ">= 6", reason(result) or self._toy(), result)

    def _continuous_row(self) -> None:
        name = f"continuous batching {DECODED}, times batch after batch"
        if self._chosen(name):
            result = self._task(name, {"measure": "continuous", "shape": DECODED})
            self._add("continuous batching", name, result.get("ratio"), ">= 1.8", ">= 2.5", reason(result) or self._toy(), result)

    def _memory_rows(self) -> None:
        for name in SETUPS:
            if not self._chosen(f"planned / measured memory, {name}"):
                continue
            result = self._setup(name)
            planned, peak = result.get("planned_bytes"), result.get("peak_bytes")
            value = planned / peak if planned and peak else None
            note = reason(result) or ("" if peak else NO_GPU)
            details = {"planned_gib": gib(planned), "measured_gib": gib(peak)}
            self._add("planned / measured memory", name, value, "0.87 to 1.15", "0.92 to 1.08", note, details)

    def _kl_rows(self) -> None:
        for precision in ("fp32", "bf16"):
            name = f"KL of a model to itself, {precision}"
            if self._chosen(name):
                result = self._task(name, {"measure": "self_kl", "shape": "410M", "precision": precision})
                self._add("KL of a model to itself", precision, result.get("kl"), "0", "0", reason(result))

    # Measurements

    def _setup(self, name: str) -> dict[str, Any]:
        return self._task(name, {"measure": "step", **asdict(SETUPS[name])})

    def _best_of_trl(self) -> dict[str, Any]:
        """Speed and peak memory of TRL with its fastest microbatch, and the speed of the other microbatches or why they failed."""
        if self.options.trl is None:
            return {"skipped": "--trl does not name an environment with TRL 1.12"}
        files = self._task("the files for TRL", {"measure": "trl", "shape": "410M"})
        if reason(files):
            return files
        python, packages = interpreter(self.options.trl)
        tried: dict[int, dict[str, Any]] = {}
        for size in self.scale.microbatches:
            settings = {**files, "device": self.device, "microbatch": size, "packages": packages}
            tried[size] = self._once(f"TRL, microbatch {size}", lambda s=settings: in_process([str(python), str(HERE / "ppo_trl.py")], s))
        done = {size: result for size, result in tried.items() if not reason(result)}
        if not done:
            return {"skipped": f"no microbatch of TRL ran: {reason(tried[self.scale.microbatches[0]])}"}
        speed = {size: self.scale.batch * (len(result["seconds"]) - 1) / sum(result["seconds"][1:]) for size, result in done.items()}
        best = max(speed, key=speed.__getitem__)
        peak = gib(done[best]["peak_bytes"])
        failed = {size: reason(result) for size, result in tried.items() if reason(result)}
        return {"microbatch": best, "episodes_per_second": speed[best], "peak_gib": peak, "tried": speed, "failed": failed}

    def _task(self, name: str, task: dict[str, Any]) -> dict[str, Any]:
        return self._once(name, lambda: self._run({**task, "tiny": self.options.tiny, "device": self.device, "work": str(self.work)}))

    def _once(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self._done:
            began = time.perf_counter()
            self._done[name] = work()
            print(f"{name}: {reason(self._done[name]) or 'done'} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
        return self._done[name]

    def _chosen(self, name: str) -> bool:
        return all(word.lower() in name.lower() for word in self.options.only)

    def _toy(self) -> str:
        return "toy size, says nothing about a GPU" if self.options.tiny else ""

    def _add(
        self, measure: str, case: str, value: float | None, must: str, aim: str, note: str, details: dict[str, Any] | None = None
    ) -> None:
        shown = {name: part for name, part in (details or {}).items() if name not in ("skipped", "crashed")}
        self.rows.append(Row(measure, case, value, must, aim, note, shown))


def reason(result: dict[str, Any]) -> str:
    """Why a measurement has no result; empty if it has one."""
    return f"crashed: {result['crashed']}" if "crashed" in result else str(result.get("skipped", ""))


def speeds(result: dict[str, Any]) -> dict[str, Any]:
    kept = ("generation_tokens_per_second", "update_tokens_per_second", "episodes_per_second", "pass_tokens", "retreats")
    return {name: result[name] for name in kept if name in result}


def gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


# Processes


def interpreter(path: Path) -> tuple[Path, str | None]:
    """(the Python that imports TRL, a folder of packages to import first or None). ``path``: an environment, or a folder of packages."""
    own = path / "bin" / "python"
    return (own, None) if own.exists() else (Path(sys.executable), str(path.absolute()))


def in_process(command: list[str], task: dict[str, Any]) -> dict[str, Any]:
    """Run ``command`` with ``task`` as its last argument. Its last line is the result; if it fails, the result says why."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [*command, json.dumps(task)], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {TIME_LIMIT} s"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if done.returncode == -9 or "out of memory" in done.stderr.lower():
        return {"skipped": "does not fit: the process ran out of memory"}
    print(done.stderr[-4000:], file=sys.stderr, flush=True)
    lines = done.stderr.strip().splitlines()
    return {"crashed": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def in_own_process(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task, measured in a separate process."""
    return in_process([sys.executable, "-W", "ignore", str(HERE / "measures.py")], task)


def in_this_process(task: dict[str, Any]) -> dict[str, Any]:
    """The result of a task, measured here: for toy sizes, where starting a process takes longer than the measurement."""
    from measures import measured

    try:
        return measured(task)
    except Exception as error:
        traceback.print_exc()
        return {"crashed": f"{type(error).__name__}: {error}"[:300]}


# Output


def machine() -> dict[str, Any]:
    """The machine and the versions that the numbers were measured with."""
    from importlib.metadata import PackageNotFoundError, version

    from stages.process.gpus import visible_gpus
    from stages.process.hardware import cpu_name

    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "flash-attn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    processor = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"gpus": visible_gpus(), **processor, "versions": versions, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def markdown(rows: Sequence[Row], on: dict[str, Any], *, tiny: bool) -> str:
    """The table with a header that names card, driver, versions and commit."""
    cards = ", ".join(f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB, driver {gpu['driver']})" for gpu in on["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
    lines = [
        f"Measured on {on['date']} at commit {on['commit']}: {cards}; {on['cores']} cores of {on['cpu']}; "
        f"Python {on['python']}, {versions}.",
        *(["", "**Toy sizes on a CPU. These numbers only show that the program runs.**"] if tiny else []),
        "",
        "| measure | case | found | must | aim | note |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        details = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in row.details.items() if value is not None)
        note = "; ".join(part for part in (row.note, details) if part).replace("|", "/").replace("\n", " ")
        lines.append(f"| {row.measure} | {row.case} | {_shown(row.value)} | {row.must} | {row.aim} | {note} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{name}: {_shown(part)}" for name, part in value.items() if part not in (None, {})) + ")"
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``gpu.json`` and ``gpu.md``, and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Toy sizes on a CPU, in this process.")
    parser.add_argument("--trl", type=Path, metavar="FOLDER", help="An environment or a folder of packages with TRL 1.12.")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="Make only rows whose name has all these words.")
    parser.add_argument("--out", type=Path, default=Path("gpu-table"), metavar="FOLDER", help="Folder for gpu.json and gpu.md.")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="Folder for the models (about 40 GB), kept; default: a temporary one.")
    options = parser.parse_args(arguments)
    if not options.tiny:
        import torch

        if not torch.cuda.is_available():
            print("error: there is no CUDA device; --tiny makes every row at toy size on a CPU", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        table = Table(options, options.work or Path(temporary), in_this_process if options.tiny else in_own_process)
        table.fill()
    on = machine()
    content = {"machine": on, "tiny": options.tiny, "rows": [asdict(row) for row in table.rows]}
    (options.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    text = markdown(table.rows, on, tiny=options.tiny)
    (options.out / "gpu.md").write_text(text)
    print(text)
    if table.crashed:
        print(f"error: these measurements crashed: {'; '.join(table.crashed)}", file=sys.stderr)
    return 1 if table.crashed else 0


if __name__ == "__main__":
    sys.exit(main())

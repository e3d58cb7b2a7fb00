"""Measures speed and memory on a GPU and writes one table, in JSON and Markdown.

    python tests/benchmarks/gpu/table.py [--trl FOLDER] [--only WORDS] [--minutes N] [--out FOLDER] [--work FOLDER]
    python tests/benchmarks/gpu/table.py --list      # the measurements in their order, and their time limits
    python tests/benchmarks/gpu/table.py --tiny      # every row at toy size, on a CPU if there is no GPU, to test this program

The models have random weights and the shapes of known models, so nothing is downloaded. The folder of --trl is an environment (with
bin/python) or a folder of packages, with TRL 1.12 (``pip install --no-deps --target FOLDER trl==1.12.0``). Without --trl, the rows that
compare with TRL have no number. Packages that are missing are named before anything is measured. Each measurement runs in a
separate process and has a time limit. If a set-up does not fit into memory, lacks a package, takes too long or crashes, its row gives the
reason, and the next measurement runs. The exit status is 1 only if a measurement crashed.

Result: gpu.json and gpu.md in the folder of --out, written after every measurement; docs/speed.md, section "Measure your GPU".

The important measurements come first: PPO at 410M beside TRL, decoding, 1B, 7B nf4, KL, memory. The same command continues: it keeps the
results in --out that this code measured on a card of this kind, and runs what is missing, was stopped by a time limit, or crashed. --again
measures everything again. --minutes ends it in time.

A session of 30 minutes on a GPU is this command, once with --minutes 28, or in each of three calls of 10 minutes with --minutes 9:

    python tests/benchmarks/gpu/table.py --trl TRL --work /tmp/models --out gpu-table --minutes 28

If time is left, ``python -m pytest -m gpu tests/gpu -x -q`` runs every stage on the card. Copy gpu-table/ to where it is safe at the end of
every call. Where the folders of --work and --out are lost between calls, bring back gpu-table/ before the next call; the models are made
again. The times are estimates; no GPU has run this program yet.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
sys.path[:0] = [str(HERE), str(REPOSITORY)]  # the project need not be installed
TIME_LIMIT = 180  # seconds of a measurement, unless its set-up has its own limit
LEAST_SECONDS = 20  # a measurement does not begin if less than this is left of --minutes

from packages import TRL, Missing, how_to_install, missing, problem_of_trl  # noqa: E402
from workloads import FULL, TINY  # noqa: E402

LORA = {"lora": {"r": 16}}
CHECKPOINTED = {"gradient_checkpointing": True}
COMPILED = {"training": {"torch_compile": True}}


@dataclass(frozen=True)
class Setup:
    """A recipe step to run. ``profile``: also measure the share of the update in which the GPU is idle. ``short``: PPO has fewer iterations
    and epochs. ``seconds``: its time limit."""

    shape: str
    fields: dict[str, Any] = field(default_factory=dict)
    stage: str = "ppo"
    quantization: str = "none"
    learned_reward: bool = False
    profile: bool = False
    short: bool = False
    seconds: int = TIME_LIMIT


SETUPS: dict[str, Setup] = {
    "410M, PPO, value network": Setup("410M", learned_reward=True, profile=True),
    "410M, PPO, shared value head": Setup("410M", {"value": "shared"}, learned_reward=True),
    "410M, PPO, LoRA": Setup("410M", {**LORA, "value": "policy"}, learned_reward=True),
    "1B, PPO, full": Setup("1B", profile=True),
    "1B, PPO, LoRA": Setup("1B", LORA),
    "7B, PPO, nf4 LoRA, checkpointing": Setup("7B", {**LORA, "training": CHECKPOINTED}, quantization="nf4", short=True, seconds=400),
    "1B, PPO, int8 LoRA": Setup("1B", LORA, quantization="int8", short=True),
    "1B, PPO, 8-bit moments, checkpointing": Setup("1B", {"training": {**CHECKPOINTED, "optimizer": "adamw_8bit"}}, short=True),
    "135M, PPO, full": Setup("135M", short=True),
    "1B, SFT, full": Setup("1B", stage="sft"),
    "1B, SFT, LoRA, checkpointing": Setup("1B", {**LORA, "training": CHECKPOINTED}, stage="sft"),
    "410M, reward model": Setup("410M", stage="reward_model"),
    "410M, PPO, value network, compiled": Setup("410M", COMPILED, learned_reward=True, seconds=400),
    "1B, PPO, full, compiled": Setup("1B", COMPILED, seconds=400),
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
NOT_COMPILED = {"410M, PPO, value network, compiled": "410M, PPO, value network", "1B, PPO, full, compiled": "1B, PPO, full"}
IDLE = {"410M, PPO, value network": (0.25, 0.10), "1B, PPO, full": (0.25, 0.10)}
DECODED = "1B Llama"
DECODINGS = {"full": False, "ragged": True}  # whether completions end at different times
PRECISIONS = ("bf16", "fp32")
NO_GPU = "no GPU"
NOT_MEASURED = "not measured"
LATER = ("timed_out", "crashed")  # marks of results that the next call measures again


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


@dataclass(frozen=True)
class Measurement:
    """One measurement. ``run(seconds)`` returns its result within this time. ``needs``: a measurement that makes its files."""

    name: str
    run: Callable[[float], dict[str, Any]]
    seconds: int = TIME_LIMIT
    needs: str | None = None


class Table:
    """Runs the measurements and makes rows of their results. Each measurement runs once, although several rows may use it."""

    def __init__(
        self, options: argparse.Namespace, work: Path, run: Callable[[dict[str, Any], float], dict[str, Any]], *, device: str = "cpu"
    ) -> None:
        """``run(task, seconds)`` returns the result of a task; a result with ``skipped`` or ``crashed`` has only that reason."""
        self.options, self.work, self._run, self.device = options, work, run, device
        self.scale = TINY if options.tiny else FULL
        self.done: dict[str, dict[str, Any]] = {}  # results by the measurement's name
        self._measurements = {one.name: one for one in self._all_measurements()}

    @property
    def crashed(self) -> list[str]:
        """The names of the measurements that crashed."""
        return [name for name, result in self.done.items() if "crashed" in result]

    def fill(self, *, deadline: float = float("inf"), save: Callable[[], object] = lambda: None) -> None:
        """Run the measurements of the chosen rows, the important ones first. ``deadline``: on the clock of ``time.monotonic``.

        ``save`` is called after each measurement. Measurements that have a result are not repeated, unless they crashed or took too long.
        """
        tried: set[str] = set()
        for name in self.wanted():
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"no time left for {name} and what follows", file=sys.stderr, flush=True)
                return
            self._measure(self._measurements[name], deadline, tried)
            save()

    def _measure(self, one: Measurement, deadline: float, tried: set[str]) -> None:
        kept = self.done.get(one.name)
        if one.name in tried or (kept is not None and not any(mark in kept for mark in LATER)):
            return
        tried.add(one.name)
        if one.needs is not None:
            self._measure(self._measurements[one.needs], deadline, tried)
            if reason(files := self.done[one.needs]):
                self.done[one.name] = files
                return
        began = time.perf_counter()
        self.done[one.name] = one.run(max(1.0, min(one.seconds, deadline - time.monotonic())))
        print(f"{one.name}: {reason(self.done[one.name]) or 'done'} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)

    def wanted(self) -> list[str]:
        """The measurements that the chosen rows use, in order."""
        used = {name for row in self._row_makers() for name in row.uses}
        return [name for name in self._order() if name in used]

    def seconds_of(self, name: str) -> int:
        """The time limit of a measurement, without the one that makes its files."""
        return self._measurements[name].seconds

    @property
    def rows(self) -> list[Row]:
        """The chosen rows, with the results so far."""
        return [row.make() for row in self._row_makers()]

    # Measurements

    def _order(self) -> list[str]:
        """The names of all measurements, the important ones first."""
        trl = [f"TRL, microbatch {size}" for size in sorted(self.scale.microbatches, reverse=True)]  # the largest is the fastest known
        first = ["410M, PPO, value network", trl[0], "410M, PPO, shared value head", "410M, PPO, LoRA"]
        second = [*map(decoding_name, DECODINGS), CONTINUOUS, "1B, PPO, full", "1B, PPO, LoRA", *trl[1:]]
        third = ["7B, PPO, nf4 LoRA, checkpointing", *map(kl_name, PRECISIONS)]
        known = {*first, *second, *third}
        return [*first, *second, *third, *(name for name in SETUPS if name not in known)]

    def _all_measurements(self) -> Iterator[Measurement]:
        for shape in dict.fromkeys(setup.shape for setup in SETUPS.values()):
            yield self._task(files_of(shape), {"measure": "files", "shape": shape}, seconds=240)
        for name, setup in SETUPS.items():
            yield self._task(name, {"measure": "step", **asdict(setup)}, seconds=setup.seconds, needs=files_of(setup.shape))
        for case, ragged in DECODINGS.items():
            yield self._task(decoding_name(case), {"measure": "decoding", "shape": DECODED, "ragged": ragged})
        yield self._task(CONTINUOUS, {"measure": "continuous", "shape": DECODED})
        for precision in PRECISIONS:
            yield self._task(kl_name(precision), {"measure": "self_kl", "shape": "410M", "precision": precision}, needs=files_of("410M"))
        for size in self.scale.microbatches:
            yield Measurement(f"TRL, microbatch {size}", lambda seconds, size=size: self._trl(size, seconds), needs=files_of("410M"))  # type: ignore[misc]

    def _task(self, name: str, task: dict[str, Any], *, seconds: int = TIME_LIMIT, needs: str | None = None) -> Measurement:
        complete = {**task, "tiny": self.options.tiny, "device": self.device, "work": str(self.work)}
        return Measurement(name, lambda limit: self._run(complete, limit), seconds, needs)

    def _trl(self, size: int, seconds: float) -> dict[str, Any]:
        if self.options.trl is None:
            return {"skipped": NO_TRL}
        python, packages = interpreter(self.options.trl)
        settings = {**self.done[files_of("410M")], "device": self.device, "microbatch": size, "packages": packages}
        result = in_process([str(python), str(HERE / "ppo_trl.py")], settings, seconds)
        if not reason(result):
            result["episodes_per_second"] = self.scale.batch * (len(result["seconds"]) - 1) / sum(result["seconds"][1:])
        return result

    # Rows

    def _row_makers(self) -> list[RowMaker]:
        """The rows that the option ``only`` chooses."""
        everything = [
            *self._ppo_rows(),
            *self._share_rows(),
            *self._decoding_rows(),
            *self._memory_rows(),
            *self._kl_rows(),
            *self._compiled_rows(),
        ]
        return [row for row in everything if all(word.lower() in row.title.lower() for word in self.options.only)]

    def _ppo_rows(self) -> Iterator[RowMaker]:
        tries = tuple(f"TRL, microbatch {size}" for size in self.scale.microbatches)
        for name, (must, aim) in AGAINST_TRL.items():
            title = f"{name}, times TRL 1.12"

            def make(name: str = name, title: str = title, must: float = must, aim: float = aim) -> Row:
                result, best = self._result(name), self._best_of_trl()
                details = {"episodes_per_second": result.get("episodes_per_second"), "peak_gib": gib(result.get("peak_bytes")), "trl": best}
                other = best.get("episodes_per_second")
                value = result["episodes_per_second"] / other if other and "episodes_per_second" in result else None
                why = reason(result) or reason(best) or self._toy()
                return _row("PPO speed", title, value, f">= {must}", f">= {aim}", why, details)

            yield RowMaker(title, (name, *tries), make)

    def _share_rows(self) -> Iterator[RowMaker]:
        for title, key, cases, sign in (
            ("share of the matmul peak in the update", "update_matmul_share", MATMUL_SHARES, ">="),
            ("idle share of the GPU in the update", "idle_share", IDLE, "<="),
        ):
            for name, (must, aim) in cases.items():

                def make(
                    title: str = title, key: str = key, name: str = name, must: float = must, aim: float = aim, sign: str = sign
                ) -> Row:
                    result = self._result(name)
                    value = result.get(key) if self.device == "cuda" else None
                    none = NO_GPU if self.device != "cuda" else result.get("idle_why") or NOT_MEASURED
                    note = reason(result) or (self._toy() if value is not None else none)
                    return _row(title, name, value, f"{sign} {must}", f"{sign} {aim}", note, speeds(result))

                yield RowMaker(f"{title}, {name}", (name,), make)

    def _decoding_rows(self) -> Iterator[RowMaker]:
        for measure, name, must, aim in (
            *(("decoding", decoding_name(case), ">= 4", ">= 6") for case in DECODINGS),
            ("continuous batching", CONTINUOUS, ">= 1.8", ">= 2.5"),
        ):

            def make(measure: str = measure, name: str = name, must: str = must, aim: str = aim) -> Row:
                result = self._result(name)
                return _row(measure, name, result.get("ratio"), must, aim, reason(result) or self._toy(), result)

            yield RowMaker(name, (name,), make)

    def _memory_rows(self) -> Iterator[RowMaker]:
        for name in SETUPS:

            def make(name: str = name) -> Row:
                result = self._result(name)
                planned, peak = result.get("planned_bytes"), result.get("peak_bytes")
                value = planned / peak if planned and peak else None
                note = reason(result) or (self._toy() if peak else NO_GPU)
                details = {"planned_gib": gib(planned), "measured_gib": gib(peak), "allocator_retries": result.get("allocator_retries")}
                return _row("planned / measured memory", name, value, "0.87 to 1.15", "0.92 to 1.08", note, details)

            yield RowMaker(f"planned / measured memory, {name}", (name,), make)

    def _kl_rows(self) -> Iterator[RowMaker]:
        for precision in PRECISIONS:

            def make(precision: str = precision) -> Row:
                result = self._result(kl_name(precision))
                return _row("KL of a model to itself", precision, result.get("kl"), "0", "0", reason(result))

            yield RowMaker(kl_name(precision), (kl_name(precision),), make)

    def _compiled_rows(self) -> Iterator[RowMaker]:
        for name, usual in NOT_COMPILED.items():

            def make(name: str = name, usual: str = usual) -> Row:
                result, other = self._result(name), self._result(usual)
                speed, slow = (one.get("update_tokens_per_second") for one in (result, other))
                value = speed / slow if speed and slow else None
                details = {
                    "peak_gib": gib(result.get("peak_bytes")),
                    "peak_gib_not_compiled": gib(other.get("peak_bytes")),
                    **speeds(result),
                }
                why = reason(result) or reason(other) or self._toy()
                return _row("compiled layers: speed of the update, times not compiled", usual, value, "", "> 1", why, details)

            yield RowMaker(f"compiled layers, {usual}", (name, usual), make)

    def _result(self, name: str) -> dict[str, Any]:
        return self.done.get(name, {"skipped": NOT_MEASURED})

    def _best_of_trl(self) -> dict[str, Any]:
        """Speed and peak memory of TRL with its fastest microbatch, and the speed of the other microbatches or why they have none."""
        if self.options.trl is None and not any(name.startswith("TRL") and not reason(result) for name, result in self.done.items()):
            return {"skipped": NO_TRL}
        tried = {size: self._result(f"TRL, microbatch {size}") for size in self.scale.microbatches}
        speed = {size: result["episodes_per_second"] for size, result in tried.items() if not reason(result)}
        failed = {size: reason(result) for size, result in tried.items() if reason(result)}
        if not speed:
            return {"skipped": f"no microbatch of TRL ran: {'; '.join(dict.fromkeys(failed.values()))}"}
        best = max(speed, key=speed.__getitem__)
        peak = gib(tried[best]["peak_bytes"])
        return {"microbatch": best, "episodes_per_second": speed[best], "peak_gib": peak, "tried": speed, "failed": failed}

    def _toy(self) -> str:
        return "toy size, says nothing about a GPU" if self.options.tiny else ""


@dataclass(frozen=True)
class RowMaker:
    """How a row is made from the results of the measurements that it ``uses``. ``title``: what --only searches."""

    title: str
    uses: tuple[str, ...]
    make: Callable[[], Row]


CONTINUOUS = f"continuous batching {DECODED}, times batch after batch"
NO_TRL = "--trl does not name an environment with TRL 1.12"


def decoding_name(case: str) -> str:
    return f"decoding {DECODED}, {case}, times model.generate"


def kl_name(precision: str) -> str:
    return f"KL of a model to itself, {precision}"


def files_of(shape: str) -> str:
    return f"the files of {shape}"


def _row(measure: str, case: str, value: float | None, must: str, aim: str, note: str, details: dict[str, Any] | None = None) -> Row:
    shown = {name: part for name, part in (details or {}).items() if name not in ("skipped", "measured_on", *LATER)}
    return Row(measure, case, value, must, aim, note, shown)


def reason(result: dict[str, Any]) -> str:
    """Why a measurement has no result; empty if it has one."""
    return f"crashed: {result['crashed']}" if "crashed" in result else str(result.get("skipped", ""))


def speeds(result: dict[str, Any]) -> dict[str, Any]:
    kept = (
        "generation_tokens_per_second",
        "update_tokens_per_second",
        "episodes_per_second",
        "pass_tokens",
        "retreats",
        "recomputed_share",
        "allocator_retries",
    )
    return {name: result[name] for name in kept if name in result}


def gib(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 3)


# Processes


def interpreter(path: Path) -> tuple[Path, str | None]:
    """(the Python that imports TRL, a folder of packages to import first or None). ``path``: an environment, or a folder of packages."""
    own = path / "bin" / "python"
    return (own, None) if own.exists() else (Path(sys.executable), str(path.absolute()))


def in_process(command: list[str], task: dict[str, Any], seconds: float = TIME_LIMIT) -> dict[str, Any]:
    """Run ``command`` with ``task`` as its last argument for at most ``seconds``. Its last line is the result, or the result says why
    there is none."""
    paths = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run([*command, json.dumps(task)], env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {seconds:.0f} s", "timed_out": True}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.strip().splitlines()[-1]))
    if done.returncode == -9 or "out of memory" in done.stderr.lower():
        return {"skipped": "does not fit: the process ran out of memory"}
    print(done.stderr[-4000:], file=sys.stderr, flush=True)
    lines = done.stderr.strip().splitlines()
    return {"crashed": lines[-1][:300] if lines else f"exit status {done.returncode}"}


def in_own_process(task: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The result of a task, measured in a separate process within ``seconds``."""
    return in_process([sys.executable, "-W", "ignore", str(HERE / "measures.py")], task, seconds)


def in_this_process(task: dict[str, Any], seconds: float) -> dict[str, Any]:
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
    processor = {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}
    return {"gpus": visible_gpus(), **processor, "versions": versions, "commit": commit(), "date": time.strftime("%Y-%m-%d")}


def commit() -> str:
    """The commit of this code; where git does not know it (a copy of the files), a digest of the code."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        described = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        described = ""
    if described:
        return described
    digest = hashlib.sha256()
    for path in sorted([*(REPOSITORY / "stages").rglob("*.py"), *HERE.glob("*.py")]):
        digest.update(path.read_bytes())
    return f"code {digest.hexdigest()[:12]}"


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


def kept_results(path: Path, on: dict[str, Any], *, tiny: bool) -> dict[str, dict[str, Any]]:
    """The results in ``path``, if the same code measured them on the same kind of card with the same versions. Another file is renamed.

    Processor and driver may differ, because calls may get different machines; each result has its own as ``measured_on``.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        same = content["tiny"] == tiny and all(content["machine"][name] == on[name] for name in ("versions", "commit"))
        if same and cards(content["machine"]) == cards(on):
            return dict(content["results"])
    except (ValueError, KeyError, TypeError) as error:
        print(f"{path} cannot be read ({type(error).__name__}: {error})", file=sys.stderr)
    older = path.with_name(f"gpu-before-{time.strftime('%Y%m%d-%H%M%S')}.json")
    path.rename(older)
    print(f"{path} is of another commit, card or version; it is now {older}", file=sys.stderr, flush=True)
    return {}


def cards(on: dict[str, Any]) -> list[tuple[str, int]]:
    """Name and memory of each GPU of a machine."""
    return [(gpu["name"], gpu["memory_bytes"]) for gpu in on["gpus"]]


def write(table: Table, folder: Path, on: dict[str, Any]) -> str:
    """Write ``gpu.json`` and ``gpu.md``; returns the table in Markdown. A reader never sees half a file."""
    rows = table.rows
    driver = ", ".join(str(gpu["driver"]) for gpu in on["gpus"]) or "none"
    for result in table.done.values():
        result.setdefault("measured_on", f"{on['cpu']}, driver {driver}")
    content = {"machine": on, "tiny": table.options.tiny, "rows": [asdict(row) for row in rows], "results": table.done}
    text = markdown(rows, on, tiny=table.options.tiny)
    for name, written in (("gpu.json", json.dumps(content, indent=1) + "\n"), ("gpu.md", text)):
        part = folder / f".{name}"
        part.write_text(written)
        part.replace(folder / name)
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write ``gpu.json`` and ``gpu.md``, and print the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="Toy sizes in this process, on a CPU if there is no GPU.")
    parser.add_argument("--trl", type=Path, metavar="FOLDER", help="An environment or a folder of packages with TRL 1.12.")
    parser.add_argument("--anyway", action="store_true", help="Measure also if packages are missing or have other versions.")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="Make only rows whose name has all these words.")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="End after this time; the table has what is done.")
    parser.add_argument("--again", action="store_true", help="Ignore the results that are already in the folder of --out.")
    parser.add_argument("--list", action="store_true", help="Only list the measurements in their order, with their time limits.")
    parser.add_argument("--out", type=Path, default=Path("gpu-table"), metavar="FOLDER", help="Folder for gpu.json and gpu.md.")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="Folder for the models (about 40 GB), kept; default: a temporary one.")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    if not (options.tiny or options.list or _is_ready(options)):
        return 2
    import torch

    on_gpu = torch.cuda.is_available()
    if not (options.tiny or options.list or on_gpu):
        print("error: there is no CUDA device; --tiny makes every row at toy size on a CPU", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        run = in_this_process if options.tiny else in_own_process
        table = Table(options, options.work or Path(temporary), run, device="cuda" if on_gpu else "cpu")
        if options.list:
            for name in table.wanted():
                print(f"{table.seconds_of(name):5d} s  {name}")
            return 0
        options.out.mkdir(parents=True, exist_ok=True)
        on = machine()
        if not options.again:
            table.done |= kept_results(options.out / "gpu.json", on, tiny=options.tiny)
        table.fill(deadline=deadline, save=lambda: write(table, options.out, on))
        print(write(table, options.out, on))
    if table.crashed:
        print(f"error: these measurements crashed: {'; '.join(table.crashed)}", file=sys.stderr)
    return 1 if table.crashed else 0


def _is_ready(options: argparse.Namespace) -> bool:
    """Whether packages and --trl fit. Prints what does not, and the next move."""
    needed, extra = missing(REPOSITORY / "pyproject.toml")
    if needed:
        listed = "".join(f"  {one}\n" for one in needed)
        print(f"error: this Python lacks packages of pyproject.toml:\n{listed}{how_to_install(needed)}", file=sys.stderr)
        print("--anyway measures what is possible without them", file=sys.stderr)
    if extra:
        print(_without_extra(extra), file=sys.stderr)
    problem = "" if options.trl is None else problem_of_trl(*interpreter(options.trl))
    if options.trl is None:
        print(f"note: {NO_TRL}, so PPO is not compared with it ({TRL_ADVICE})", file=sys.stderr)
    elif problem:
        print(f"error: --trl {options.trl}: {problem} ({TRL_ADVICE})", file=sys.stderr)
    return options.anyway or not (needed or problem)


TRL_ADVICE = f"python -m pip install --no-deps --target FOLDER {TRL}; then --trl FOLDER"


def _without_extra(extra: list[Missing]) -> str:
    listed = ", ".join(map(str, extra))
    return f"note: rows of quantized weights and 8-bit moments will have no number: {listed}. To have them:\n{how_to_install(extra)}"


if __name__ == "__main__":
    sys.exit(main())

"""Runs every shipped recipe from its first step to its report, with tiny models.

    python tests/benchmarks/recipes.py [RECIPE ...]

A server on this machine (tests/hub) replaces the Hub. It has the models and data sets that the recipes read, with the names, files and
columns of the Hub. The client libraries are the real ones. The models are tiny, and overrides (tests/recipes/shrunk.py) shorten the steps.
The exit status is 1 if a recipe did not reach its report.

Time: 6 minutes. Result: results/recipes.json, if no recipe is named.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "hub"), str(TESTS / "recipes"), str(TESTS.parent)]

from client import Client  # noqa: E402
from published import publish_all  # noqa: E402
from shrunk import RECIPES, SHRUNK  # noqa: E402
from stand_in import Hub  # noqa: E402


def run_recipe(client: Client, name: str, folder: Path) -> dict[str, Any]:
    """Run one recipe. Returns status, seconds, numbers of steps and candidates, and Hub commits; or the end of the output if it failed."""
    began = time.monotonic()
    answer = client.run("run", str(RECIPES / f"{name}.yaml"), *SHRUNK[name], "--home", str(folder / "home"), folder=folder)
    result: dict[str, Any] = {"recipe": name, "status": answer.status, "seconds": round(time.monotonic() - began, 1)}
    run = folder / "home" / "runs" / name / "latest"
    result["report"] = (run / "report.html").exists()
    if answer.status != 0:
        return {**result, "output": answer.output[-900:]}
    summary = json.loads((run / "summary.json").read_text())
    commits = {ref for step in summary["steps"] for ref in step["hub"].values()}
    return {**result, "steps": len(summary["steps"]), "candidates": len(summary["candidates"]), "hub": sorted(commits)}


def main() -> None:
    names = sys.argv[1:] or sorted(SHRUNK)
    hub = Hub()
    hub.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        publish_all(hub, folder / "models")
        client = Client(hub.environment(folder / "cache"))
        results = []
        for name in names:
            results.append(run_recipe(client, name, folder))
            print({key: value for key, value in results[-1].items() if key not in ("hub", "output")}, flush=True)
            print(results[-1].get("output", ""), end="", flush=True)
        client.close()
    hub.stop()
    if not sys.argv[1:]:
        made = {"made": datetime.now(UTC).isoformat(timespec="seconds"), "python": platform.python_version(), "recipes": results}
        (TESTS / "benchmarks" / "results" / "recipes.json").write_text(json.dumps(made, indent=1) + "\n")
    # Without an evaluation there is no report: imdb-sentiment ends with its classifier.
    sys.exit(any(result["status"] != 0 or not (result["report"] or not result["candidates"]) for result in results))


if __name__ == "__main__":
    main()

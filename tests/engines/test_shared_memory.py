"""The folder of a killed run in shared memory is removed by the next run; that of a running one is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from stages.engines.shared_memory import claimed

RUN = """
import pathlib, sys, time
from stages.engines.shared_memory import claimed
folder = pathlib.Path(sys.argv[1])
with claimed(folder):
    folder.mkdir()
    (folder / "weights").write_text("many bytes")
    print("claimed", flush=True)
    time.sleep(60)
"""


def test_folder_of_a_killed_run_is_removed_by_the_next_run(tmp_path: Path) -> None:
    other, own = tmp_path / "tristage-other", tmp_path / "tristage-own"
    (tmp_path / "tristage-unknown").mkdir()  # without a mark: not removed
    with subprocess.Popen([sys.executable, "-c", RUN, str(other)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stdout.readline() == b"claimed\n"
        with claimed(own):
            own.mkdir()
        assert (other / "weights").exists() and not own.exists()
        run.kill()
    assert (other / "weights").exists()
    with claimed(own):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["tristage-own.lock", "tristage-unknown"]
    assert [path.name for path in tmp_path.iterdir()] == ["tristage-unknown"]

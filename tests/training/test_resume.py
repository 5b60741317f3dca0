"""The kill drill: a run that dies three times, once while saving, ends bit for bit as one that never did.

The moments are the same in every run of the tests; ``KILL_DRILL_SEED`` draws others, as the weekly job does.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "drill_training.py"


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_run_killed_three_times_equals_the_uninterrupted_one(tmp_path, tiny_model_dir):
    seed = os.environ.get("KILL_DRILL_SEED", "15")
    command = [sys.executable, SCRIPT, "resume", tmp_path, seed, "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"KILL_DRILL_SEED={seed}: {done.stderr[-2000:]}"
    drill = json.loads(done.stdout.splitlines()[-1])
    where = f"KILL_DRILL_SEED={seed}, kills (step, while saving) {drill['kills']}"
    assert drill["ends"] == [-signal.SIGKILL] * 3, where
    assert sum(saving for _, saving in drill["kills"]) == 1, where
    losses = [row for row in drill["whole"]["history"] if "loss" in row]
    assert [row["step"] for row in losses] == list(range(1, 13)), where
    assert len({row["loss"] for row in losses}) == 12, where
    assert drill["killed"] == drill["whole"], where

"""Drills on the training of ``tiny_training``: kills at random moments, damaged checkpoints, a full disk.

python tests/support/drill_training.py kill|corrupt|full FOLDER SEED COUNT prints what happened as JSON. One
process imports everything and forks the runs, so that a run costs a second or two.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import tiny_training
from tiny_training import in_child, result
from transformers import TrainerCallback

from llama_sft_helpers.doctor import explain
from llama_sft_helpers.training import CheckpointError, checkpoint_errors, latest_checkpoint


def newest(folder):
    """The step of the newest complete checkpoint, 0 for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = latest_checkpoint(folder)
    return int(path.rpartition("-")[2]) if path else 0


def in_child_for(folder, seconds, **changes):
    """Run in a forked process that gets SIGKILL after some seconds; whether it was killed."""
    pid = os.fork()
    if not pid:
        try:
            tiny_training.run(folder, **changes)
        finally:
            os._exit(0)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def kill_drill(folder, draw, count, max_steps=24):
    """SIGKILL at random moments, resuming each time, until ``count`` kills; each run's end is compared."""
    start = time.monotonic()
    assert in_child(folder / "whole", max_steps=max_steps) == 0
    seconds = time.monotonic() - start
    whole = result(folder / "whole")
    report = {"kills": 0, "lost_checkpoints": 0, "runs": 0, "equal_ends": 0, "resumed_from": [], "half": 0}
    while report["kills"] < count:
        place = folder / f"killed-{report['runs']}"
        report["runs"] += 1
        while True:
            before = newest(place)
            killed = report["kills"] < count and in_child_for(
                place, draw.uniform(0.2 * seconds, 0.7 * seconds), max_steps=max_steps
            )
            if not killed:
                break
            report["kills"] += 1
            after = newest(place)
            report["lost_checkpoints"] += after < before
            report["resumed_from"].append(after)
            present = [int(path.name.rpartition("-")[2]) for path in place.glob("checkpoint-*")]
            report["half"] += bool(present and max(present) > after)
        if not (place / "history.json").is_file():
            assert in_child(place, max_steps=max_steps) == 0
        report["equal_ends"] += result(place) == whole
    return report


def damage(path, draw):
    """Damage a file in one of seven ways; returns which."""
    content = path.read_bytes()
    way = draw.choice(("flip", "zero", "cut", "grow", "empty", "swap", "delete"))
    if way == "delete":
        path.unlink()
        return way
    at, length = draw.randrange(len(content)), draw.randint(1, 64)
    changed = bytearray(content)
    if way == "flip":
        changed[at] ^= 1 << draw.randrange(8)
    elif way == "zero":
        changed[at : at + length] = bytes(len(changed[at : at + length]))
    elif way == "cut":
        del changed[at:]
    elif way == "grow":
        changed += draw.randbytes(length)
    elif way == "empty":
        changed.clear()
    else:  # two blocks change places, as after a bad write
        other = draw.randrange(len(content))
        changed[at : at + 16], changed[other : other + 16] = (
            changed[other : other + 16],
            changed[at : at + 16],
        )
    path.write_bytes(changed)
    return way if bytes(changed) != content else "nothing"


def corrupt_drill(folder, draw, count, max_steps=6):
    """Damage one file of the newest checkpoint, then go on as notebook 06 does: what comes of it?"""
    original = folder / "original"
    assert in_child(original, max_steps=max_steps) == 0
    whole = result(original)
    for name in ("adapter", "history.json", f"checkpoint-{max_steps}"):
        path = original / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest_folder = f"checkpoint-{newest(original)}"
    report = {"detected": 0, "harmless": 0, "refused": 0, "wrong": [], "ways": {}, "unclear": []}
    for number in range(count):
        place = folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        files = sorted(path for path in (place / newest_folder).iterdir() if path.is_file())
        target = draw.choice(files)
        name = target.name
        way = damage(target, draw)
        report["ways"][way] = report["ways"].get(way, 0) + 1
        detected = newest(place) != newest(original)
        code = in_child_quietly(place, max_steps=max_steps)
        if code != 0:
            message = (folder / "error.txt").read_text() if (folder / "error.txt").is_file() else ""
            report["refused"] += 1
            if "CheckpointError" not in message:
                report["unclear"].append(f"{number}: {way} in {name}: {message[:200]}")
        elif result(place) != whole:
            report["wrong"].append(f"{number}: {way} in {name}")
        else:
            report["detected" if detected else "harmless"] += 1
    return report


def in_child_quietly(place, **changes):
    """As ``in_child``; what it raised is left in ``error.txt`` beside the folder."""
    note = place.parent / "error.txt"
    note.unlink(missing_ok=True)
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        tiny_training.run(place, **changes)
        os._exit(0)
    except BaseException as error:
        note.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(1)


class FillDisk(TrainerCallback):
    """Someone else fills the disk at a step, up to some bytes."""

    def __init__(self, step, leave_bytes):
        self._step, self._leave = step, leave_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            free = shutil.disk_usage(args.output_dir).free
            with (Path(args.output_dir) / "someone_elses_film").open("wb") as film:
                film.write(bytes(max(0, free - self._leave)))


def full_drill(folder, draw, count):
    """The disk fills up while a checkpoint is written; then room is made, and the run goes on."""
    in_child(folder / "whole")
    whole = result(folder / "whole")
    report = {"full": 0, "clear": 0, "explained": 0, "lost_checkpoints": 0, "equal_ends": 0, "messages": []}
    disk = folder / "disk"
    disk.mkdir()
    for _ in range(count):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
        try:
            place = disk / "run"
            ask, tell = os.pipe()
            if not (pid := os.fork()):
                _fill_and_report(place, draw.randint(0, 350_000), tell)
            os.close(tell)
            os.waitpid(pid, 0)
            with os.fdopen(ask) as pipe:
                found = json.loads(pipe.read())
            report["full"] += found["raised"] != "nothing"
            report["clear"] += (
                found["raised"] == "CheckpointWriteError" and "checkpoint-2" in found["message"]
            )
            report["explained"] += found["key"] == "disk-full"
            report["lost_checkpoints"] += newest(place) < 2
            report["messages"] = [found["message"].replace(str(disk), "DISK")[:300]]
            (place / "someone_elses_film").unlink()
            assert in_child(place) == 0
            report["equal_ends"] += result(place) == whole
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
        draw.random()
    return report


def _fill_and_report(place, leave_bytes, tell):
    found = {"raised": "nothing", "message": "", "key": None}
    try:
        tiny_training.quiet()
        # the guard of notebook 06 comes first and sees room; then the disk fills while the files are written
        trainer = tiny_training.build_trainer(place)
        described = tiny_training.describe_run(trainer)
        trainer.add_callback(tiny_training.RunGuardCallback(described))
        trainer.add_callback(FillDisk(4, leave_bytes))
        with checkpoint_errors(place):
            trainer.train()
    except BaseException as error:
        known = explain(error)
        found = {"raised": type(error).__name__, "message": str(error), "key": known.key if known else None}
    finally:
        os.write(tell, json.dumps(found).encode())
        os._exit(0)


DRILLS = {"kill": kill_drill, "corrupt": corrupt_drill, "full": full_drill}

if __name__ == "__main__":
    which, where, seed, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    where.mkdir(parents=True, exist_ok=True)
    assert issubclass(CheckpointError, ValueError)
    print(json.dumps(DRILLS[which](where, random.Random(seed), times)))

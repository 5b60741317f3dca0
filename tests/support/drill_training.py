"""Drills on the training of ``tiny_training``: kills, damaged checkpoints, a full disk.

python tests/support/drill_training.py kill|resume|corrupt|full FOLDER SEED COUNT prints what happened as
JSON. One process imports everything and forks the runs, so that a run costs a second or two.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

from tiny_training import build_trainer, quiet
from transformers import TrainerCallback

from llama_sft_helpers.doctor import explain
from llama_sft_helpers.training import RunGuardCallback, checkpoint_errors, describe_run, latest_checkpoint

FORK = multiprocessing.get_context("fork")


# --- A run ---


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class DieAfterStep(TrainerCallback):
    """SIGKILL at the end of a step, before its log, evaluation and checkpoint."""

    def __init__(self, step):
        self._step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self._step:
            die()


def die_while_saving(trainer, step):
    """SIGKILL in the middle of a checkpoint: the adapter is written, the optimizer's file half."""
    save = trainer._save_optimizer_and_scheduler

    def save_half(output_dir):
        save(output_dir)
        if trainer.state.global_step == step:
            path = Path(output_dir) / "optimizer.pt"
            os.truncate(path, path.stat().st_size // 2)
            die()

    trainer._save_optimizer_and_scheduler = save_half


class FillDisk(TrainerCallback):
    """Someone else fills the disk at step 4, up to some bytes, after the guard has seen room."""

    def __init__(self, leave_bytes):
        self._leave = leave_bytes

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            free = shutil.disk_usage(args.output_dir).free
            with (Path(args.output_dir) / "someone_elses_film").open("wb") as film:
                film.write(bytes(max(0, free - self._leave)))


def train(raised, folder, callbacks=(), dies_saving=None, **changes):
    """Train as notebook 06 does, from the newest whole checkpoint; an error is put into ``raised``."""
    try:
        quiet()
        warnings.filterwarnings("ignore", message="Skipped: ")
        trainer = build_trainer(folder, **changes)
        described = describe_run(trainer)
        for callback in (RunGuardCallback(described), *callbacks):
            trainer.add_callback(callback)
        if dies_saving:
            die_while_saving(trainer, dies_saving)
        with checkpoint_errors(folder):
            last = latest_checkpoint(folder, described, before_step=trainer.args.max_steps)
            trainer.train(resume_from_checkpoint=last)
        trainer.save_model(str(folder / "adapter"))
        keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
        history = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history]
        (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")
    except Exception as error:
        known = explain(error)
        raised.put([type(error).__name__, str(error), known.key if known else None])
        raise


def in_child(folder, seconds=None, **settings):
    """Train in a forked process, killed after some seconds: how it ended, and the error, its text and key."""
    raised = FORK.SimpleQueue()
    child = FORK.Process(target=train, args=(raised, folder), kwargs=settings)
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode, ["nothing", "", None] if raised.empty() else raised.get()


def result(folder):
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    history = json.loads((folder / "history.json").read_text(encoding="utf-8"))
    return {"history": history, "adapter": hashlib.sha256(weights).hexdigest()}


def train_whole(folder, **settings):
    ended, error = in_child(folder, **settings)
    assert ended == 0, error
    return result(folder)


def newest(folder):
    """The step of the newest whole checkpoint, 0 for none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = latest_checkpoint(folder)
    return int(path.rpartition("-")[2]) if path else 0


# --- Drills ---


def resume_drill(folder, draw, count, max_steps=12):
    """One kill in each third of a run, one of the three while a checkpoint is saved (each second step)."""
    kills = [[draw.randint(3, 4), False], [draw.randint(5, 8), False], [draw.randint(9, 12), False]]
    which = draw.randrange(count)
    kills[which] = [kills[which][0] + kills[which][0] % 2, True]
    whole, place, ends = train_whole(folder / "whole", max_steps=max_steps), folder / "killed", []
    for step, saving in kills:
        how = {"dies_saving": step} if saving else {"callbacks": [DieAfterStep(step)]}
        ends.append(in_child(place, **how, max_steps=max_steps)[0])
    killed = train_whole(place, max_steps=max_steps)
    return {"kills": kills, "ends": ends, "whole": whole, "killed": killed}


def kill_drill(folder, draw, count, max_steps=24):
    """SIGKILL at random moments, resuming each time, until ``count`` kills; each run's end is compared."""
    start = time.monotonic()
    whole = train_whole(folder / "whole", max_steps=max_steps)
    seconds = time.monotonic() - start
    report = {"kills": 0, "lost_checkpoints": 0, "runs": 0, "equal_ends": 0, "resumed_from": []}
    while report["kills"] < count:
        place, report["runs"] = folder / f"killed-{report['runs']}", report["runs"] + 1
        before = ended = 0
        while report["kills"] < count:
            ended, _ = in_child(place, draw.uniform(0.2, 0.7) * seconds, max_steps=max_steps)
            if ended == 0:
                break
            report["kills"] += 1
            report["lost_checkpoints"] += newest(place) < before
            before = newest(place)
            report["resumed_from"].append(before)
        end = train_whole(place, max_steps=max_steps) if ended else result(place)
        report["equal_ends"] += end == whole
    return report


def damage(path, draw):
    """Damage a file in one of seven ways; returns which."""
    content = path.read_bytes()
    changed = bytearray(content)
    way = draw.choice(("flip", "zero", "cut", "grow", "empty", "swap", "delete"))
    at, other, length = draw.randrange(len(content)), draw.randrange(len(content)), draw.randint(1, 64)
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
    elif way == "swap":  # two blocks change places, as after a bad write
        here, there = slice(at, at + 16), slice(other, other + 16)
        changed[here], changed[there] = changed[there], changed[here]
    path.unlink() if way == "delete" else path.write_bytes(changed)
    return way


def corrupt_drill(folder, draw, count, max_steps=6):
    """Damage one file of the newest checkpoint, then go on as notebook 06 does: what comes of it?"""
    original, place = folder / "original", folder / "damaged"
    whole = train_whole(original, max_steps=max_steps)
    for path in (original / "adapter", original / f"checkpoint-{max_steps}"):
        shutil.rmtree(path)
    (original / "history.json").unlink()
    last = newest(original)
    report = {"detected": 0, "harmless": 0, "refused": 0, "wrong": [], "ways": Counter(), "unclear": []}
    for number in range(count):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place)
        target = draw.choice(sorted(p for p in (place / f"checkpoint-{last}").iterdir() if p.is_file()))
        way = damage(target, draw)
        what = f"{number}: {way} in {target.name}"
        report["ways"][way] += 1
        outcome = "harmless" if newest(place) == last else "detected"
        ended, error = in_child(place, max_steps=max_steps)
        if ended != 0:
            outcome = "refused"
            report["unclear"] += [] if error[0] == "CheckpointError" else [f"{what}: {error}"]
        elif result(place) != whole:
            report["wrong"].append(what)
            continue
        report[outcome] += 1
    return report


def full_drill(folder, draw, count):
    """The disk fills up while a checkpoint is written; then room is made, and the run goes on."""
    whole = train_whole(folder / "whole")
    report = Counter(full=0, clear=0, explained=0, lost_checkpoints=0, equal_ends=0)
    disk = folder / "disk"
    disk.mkdir()
    for _ in range(count):
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
        try:
            place = disk / "run"
            _, (raised, message, key) = in_child(place, callbacks=[FillDisk(draw.randint(0, 350_000))])
            report["full"] += raised != "nothing"
            report["clear"] += raised == "CheckpointWriteError" and "checkpoint-2" in message
            report["explained"] += key == "disk-full"
            report["lost_checkpoints"] += newest(place) < 2
            (place / "someone_elses_film").unlink()
            report["equal_ends"] += train_whole(place) == whole
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return report


DRILLS = {"resume": resume_drill, "kill": kill_drill, "corrupt": corrupt_drill, "full": full_drill}

if __name__ == "__main__":
    which, where, seed, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    where.mkdir(parents=True, exist_ok=True)
    print(json.dumps(DRILLS[which](where, random.Random(seed), times)))

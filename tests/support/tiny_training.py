"""The training run of notebook 06 on the tiny Llama, for tests; as a script, a drill that kills it.

python tests/support/tiny_training.py FOLDER SEED trains once undisturbed and once with three SIGKILLs,
resuming each time, and prints both results as JSON. One process imports everything and forks the runs.
"""

import hashlib
import json
import logging
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import datasets
import tiny_models
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from tiny_models import SEVEN
from transformers import AutoTokenizer, TrainerCallback

from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.demo_model import ensure_model
from llama_sft_helpers.profiles import load_profile
from llama_sft_helpers.training import RunGuardCallback, describe_run, latest_checkpoint


def quiet():
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def build_model(r=16):
    model = tiny_models.load_int8(ensure_model("tiny-llama"))
    transformers.set_seed(42)
    lora = LoraConfig(r=r, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=SEVEN)
    return get_peft_model(model, lora)


def build_trainer(folder, callbacks=(), model=None, **changes):
    rows = load_dataset(load_profile("ci-tiny").dataset_id, split="train").select(range(48))
    rows = rows.map(to_prompt_completion, remove_columns=rows.column_names)
    settings = {
        "max_length": 128,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    }
    trainer = tiny_models.build_trainer(
        model or build_model(),
        folder,
        AutoTokenizer.from_pretrained(ensure_model("tiny-llama")),
        rows.select(range(40)),
        eval_rows=rows.select(range(40, 48)),
        callbacks=callbacks,
        **(settings | changes),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


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


def run(folder, kill=None, **changes):
    """Train, from the newest complete checkpoint; ``kill`` is (step, whether while saving)."""
    quiet()
    step, saving = kill or (0, False)
    trainer = build_trainer(folder, [] if saving else [DieAfterStep(step)], **changes)
    if saving:
        die_while_saving(trainer, step)
    described = describe_run(trainer)
    trainer.add_callback(RunGuardCallback(described))
    warnings.filterwarnings("ignore", message="Skipped: ")
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder, described))
    trainer.save_model(str(Path(folder) / "adapter"))
    keys = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    history = [{key: row[key] for key in keys if key in row} for row in trainer.state.log_history]
    (Path(folder) / "history.json").write_text(json.dumps(history))


def in_child(folder, kill=None, **changes):
    """Run in a forked process and return how it ended: 0, or minus the signal's number."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        run(folder, kill, **changes)
        code = 0
    finally:
        os._exit(code)


def result(folder):
    weights = (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()
    history = json.loads((Path(folder) / "history.json").read_text())
    return {"history": history, "adapter": hashlib.sha256(weights).hexdigest()}


def drill(folder, seed, max_steps=12):
    draw = random.Random(seed)
    # one kill in each third of the run, and one of the three while saving (every second step)
    kills = [(draw.randint(3, 4), False), (draw.randint(5, 8), False), (draw.randint(9, 12), False)]
    which = draw.randrange(3)
    kills[which] = (kills[which][0] + kills[which][0] % 2, True)
    ends = [in_child(folder / "whole", max_steps=max_steps)]
    ends += [in_child(folder / "killed", kill, max_steps=max_steps) for kill in kills]
    ends.append(in_child(folder / "killed", max_steps=max_steps))
    return {
        "kills": kills,
        "ends": ends,
        "whole": result(folder / "whole"),
        "killed": result(folder / "killed"),
    }


if __name__ == "__main__":
    print(json.dumps(drill(Path(sys.argv[1]), int(sys.argv[2]))))

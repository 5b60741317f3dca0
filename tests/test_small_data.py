"""Few rows: what is held out, the steps by hand over several epochs, and the notebooks to their end."""

import itertools
import json
import re
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import small_data
import torch
import transformers
from tiny_models import build_trainer
from trl import SFTTrainer

from llama_sft_helpers import training
from llama_sft_helpers.data import DataError, plan_split, plan_steps
from llama_sft_helpers.profiles import available_profiles, read_profile

PROFILES = available_profiles()


@pytest.mark.parametrize("profile_name", PROFILES)
@pytest.mark.parametrize(
    ("usable", "held_out"), [(2, 1), (3, 1), (20, 2), (40, 4), (343, 34), (50_000, None)]
)
def test_at_most_a_tenth_is_held_out_and_at_least_one(profile_name, usable, held_out):
    profile = read_profile(profile_name)
    sizes = plan_split(profile, usable, usable + 5)
    assert sizes.eval_rows == min(profile.eval_rows, held_out or profile.eval_rows)
    expected = usable - sizes.eval_rows
    assert sizes.train_rows == (min(profile.train_rows, expected) if profile.train_rows else expected)
    beyond = f", {expected - sizes.train_rows:,} beyond" if sizes.train_rows < expected else ""
    assert f"left out: 5 that cannot be used{beyond}" in str(sizes)


def test_a_split_says_what_it_did():
    assert str(plan_split(read_profile("ci-tiny"), 300, 300)) == (
        "300 rows: 64 to train on, 16 held out; left out: 0 that cannot be used, 220 beyond the profile's "
        "train_rows"
    )
    told = str(plan_split(read_profile("colab-a100"), 20, 23))
    assert told.startswith(
        "23 rows: 18 to train on, 2 held out (a tenth of the rows, at least one, instead of"
    )
    assert "3 that cannot be used" in told


@pytest.mark.parametrize(("usable", "reason"), [(0, "no-rows"), (1, "too-few-rows")])
def test_what_cannot_be_split_is_refused_by_name(usable, reason):
    told = rf"\[{reason}\] {usable} of 7 rows can be used, expected at least 2.*summarize_rows"
    with pytest.raises(DataError, match=told) as caught:
        plan_split(read_profile("ci-tiny"), usable, 7)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs"),
    [(10, 4, 1, 3), (10, 2, 2, 0.5), (3, 4, 4, 2), (9, 2, 2, 1.3)],
)
def test_epochs_give_the_steps_that_the_trainer_takes(  # noqa: PLR0917
    tmp_path, tiny_model, rows, batch, accumulation, epochs
):
    """transformers' own count, by its ``num_train_epochs``, is the independent truth."""
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    quiet = {"learning_rate": 0.0, "report_to": "none", "disable_tqdm": True}
    args = transformers.TrainingArguments(str(tmp_path), num_train_epochs=epochs, **quiet, **settings)
    row = {"input_ids": [1, 2], "labels": [1, 2]}
    trained = transformers.Trainer(tiny_model, args, train_dataset=[row] * rows).train()
    plan = plan_steps(read_profile("ci-tiny", epochs=epochs, **settings), rows, 2 * rows)
    assert plan.max_steps == trained.global_step


def test_packed_epochs_count_blocks_and_a_small_set_seen_often_is_warned_of():
    packed = read_profile("colab-a100", epochs=2)  # 8 blocks of 2,048 tokens an update
    assert plan_steps(packed, 1000, 8 * 2048 + 1).max_steps == 4
    with pytest.raises(ValueError, match="rows=1000, tokens=0: expected at least one row and one token"):
        plan_steps(packed, 1000, 0)
    often = plan_steps(read_profile("cpu-demo"), 9, 900)  # 30 updates of 4
    assert (often.max_steps, often.epochs) == (30, 10)
    assert str(often).startswith("30 updates of 4 rows: each row is seen 10 times. That is often")
    assert "max_steps=15 or fewer" in str(often)
    twice = plan_steps(read_profile("cpu-demo", epochs=2), 9, 900)
    assert str(twice) == "6 updates of 4 rows: each row is seen 2 times"
    half = plan_steps(read_profile("cpu-demo", epochs=0.5), 16, 900)
    assert str(half) == "2 updates of 4 rows: 50% of the rows are seen once, the others not at all"
    once = plan_steps(read_profile("cpu-demo", epochs=1), 16, 900)
    assert str(once) == "4 updates of 4 rows: each row is seen once"


# --- Notebook 06: the steps by hand ---


def code_of_06():
    path = small_data.ROOT / "notebooks" / "06_training.ipynb"
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


class Recorder(SFTTrainer):
    """Writes down each micro-batch that it takes: the update, the tokens, how many the update scores."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.taken.append((self.state.global_step, inputs["input_ids"].clone(), int(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize(
    ("count", "batch", "accumulation", "packing"),
    [(1, 2, 4, False), (3, 2, 4, True), (5, 2, 2, False), (7, 1, 4, False), (12, 2, 2, True)],
)
def test_the_loop_by_hand_takes_the_micro_batches_that_the_trainer_takes(  # noqa: PLR0917
    tmp_path, tiny_model, tiny_tokenizer, count, batch, accumulation, packing
):
    rows = [{"prompt": f"Row {n}:\n", "completion": f"{n * 7} apples"} for n in range(count)]
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    settings |= {"packing": packing, "max_steps": 5, "kind": Recorder}
    trainer = build_trainer(tiny_model, tmp_path, tiny_tokenizer, rows, **settings)
    namespace = {"itertools": itertools}
    exec(next(source for source in code_of_06() if "def micro_batches_by_update" in source), namespace)
    transformers.set_seed(42)
    updates = namespace["micro_batches_by_update"](trainer.get_train_dataloader(), accumulation)
    by_hand = [
        (step, micro["input_ids"], sum(int((b["labels"][:, 1:] != -100).sum()) for b in group))
        for step, group in zip(range(5), updates, strict=False)
        for micro in group
    ]
    trainer.taken = []
    trainer.train()
    for ours, theirs in zip(by_hand, trainer.taken, strict=True):
        assert (ours[0], ours[2]) == (theirs[0], theirs[2])
        assert torch.equal(ours[1], theirs[1])


def test_06_saves_before_it_judges():
    after = itertools.dropwhile(lambda source: "trainer.train(" not in source, code_of_06())
    _, *unsaved = itertools.takewhile(lambda source: "write_training_summary(" not in source, after)
    for source in unsaved:
        assert "assert " not in source, source
        assert "check_" not in source, source


ROSE, KEPT = (1.4, 1.2, 1.9), {"best_checkpoint": "run/checkpoint-8"}
LOWEST = "The loss was lowest after step 8 (1.2000). By step 12 it was"
FINDINGS = [
    (ROSE, 2, {}, "not as hoped", f"Overfitted. {LOWEST} 1.9000; max_steps=8"),
    (ROSE, 2, {}, "not as hoped", "Rows held out: 2."),
    (ROSE, 200, {"epochs": 0.9}, "not as hoped", f"{LOWEST} 1.9000; max_steps=8"),
    (ROSE, 200, KEPT, "not as hoped", "Its checkpoint is kept: run/checkpoint-8."),
    (ROSE, 200, {"best_is_saved": True}, "as hoped", "The adapter of step 8 is saved."),
    ((1.4, 1.2, 1.21), 200, KEPT, "as hoped", f"{LOWEST} 1.2100, which is within 1% of that."),
    ((1.4, 1.2), 200, {}, "as hoped", "nothing to do"),
    ((float("nan"),), 200, {}, "not as hoped", ""),
]


@pytest.mark.parametrize(("losses", "rows", "kept", "verdict", "advice"), FINDINGS)
def test_a_held_out_loss_is_a_finding_with_advice(losses, rows, kept, verdict, advice):
    epochs, kept = kept.get("epochs", 3.0), {name: value for name, value in kept.items() if name != "epochs"}
    history = [{"step": 4 * n, "epoch": epochs, "eval_loss": loss} for n, loss in enumerate(losses, start=1)]
    row = training.summarize_training_result(history, 1.5, rows, **kept).iloc[0]
    assert (row["verdict"], row["hoped for"]) == (verdict, "below 1.5000")
    assert advice in row["advice"]
    assert ("max_steps" in row["advice"]) == (losses == ROSE)
    assert ("Overfitted" in row["advice"]) == (losses == ROSE and epochs > 1)


# --- The notebooks ---


def start(folder, *runs):
    """Run notebooks on rows as few as asked for, with a profile's data settings, all in one process.

    Returns for each (profile, rows, notebooks, changes): how it ended, what it printed, where it wrote.
    """
    places, arguments = [folder / str(place) for place in range(len(runs))], []
    for place, (profile_name, count, numbers, changes) in zip(places, runs, strict=True):
        rows = small_data.write_rows(place / "data" / "rows.jsonl", count)
        arguments += [profile_name, rows, place / "out", numbers, json.dumps(changes)]
    command = [sys.executable, small_data.__file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=small_data.ROOT)
    printed = re.split(r"^(ran|failed) [0-9,]+\n", done.stdout, flags=re.MULTILINE)
    assert len(printed) == 2 * len(runs) + 1, done.stdout[-3000:] + done.stderr[-1000:]
    return list(zip(printed[1::2], printed[::2], [place / "out" for place in places], strict=False))


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory):
    """Runs on 1, 3 and 20 rows, by their number."""
    runs = [("colab-a100", count, "06" if count == 1 else "06,07", {}) for count in (1, 3, 20)]
    return dict(zip((1, 3, 20), start(tmp_path_factory.mktemp("few"), *runs), strict=True))


@pytest.fixture
def run(tmp_path):
    """One run that must reach its end; what it printed, and where it wrote."""

    def start_one(profile_name, count, numbers, **changes):
        [(ended, printed, out)] = start(tmp_path, (profile_name, count, numbers, changes))
        assert ended == "ran", printed[-3000:]
        return printed, out

    return start_one


@pytest.mark.parametrize("count", [3, 20])
def test_training_and_evaluation_run_on_few_rows(few_rows, count):
    ended, printed, out = few_rows[count]
    assert ended == "ran", printed[-3000:]
    assert f"{count} rows: {count - max(1, count // 10)} to train on" in printed
    assert (out / "training_summary.json").is_file()


def test_one_row_is_refused_in_06_by_name(few_rows):
    ended, printed, _ = few_rows[1]
    assert ended == "failed"
    assert "[too-few-rows] 1 of 1 rows can be used, expected at least 2" in printed


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 20, 40])
@pytest.mark.parametrize("profile_name", PROFILES)
def test_every_profile_runs_on_few_rows(run, profile_name, count):
    run(profile_name, count, "05" if count == 1 else "05,06,07")


@pytest.mark.slow
def test_an_overfitted_adapter_is_saved_and_judged(run):
    _, out = run("cpu-demo", 3, "06,07", max_steps=120, save_steps=40, eval_steps=20)
    summary = json.loads((out / "training_summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss_after"] > summary["eval_loss_before"]
    log = pd.read_csv(out / "training_log.csv").dropna(subset="eval_loss")
    best = log.loc[log["eval_loss"].idxmin(), "step"]
    assert best < log["step"].max()
    assert (out / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_04_runs_on_three_rows_within_a_second_of_sweep(run):
    printed, _ = run("ci-tiny", 3, "04", sweep_seconds=1)
    assert "left out: attention, learning rate" in printed

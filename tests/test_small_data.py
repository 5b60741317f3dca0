"""Few rows: what is held out, the steps by hand over several epochs, and the notebooks to their end."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from small_data import ROOT, write_rows

from llama_sft_helpers import evaluation, training
from llama_sft_helpers.data import DataError, plan_split, plan_steps
from llama_sft_helpers.profiles import available_profiles, read_profile

PROFILES = available_profiles()


# --- The split ---


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
    assert f"left out: 5 that cannot be used, {expected - sizes.train_rows:,} beyond" in str(sizes)


def test_many_rows_are_split_as_the_profile_says():
    sizes = plan_split(read_profile("ci-tiny"), 300, 300)
    assert (sizes.train_rows, sizes.eval_rows) == (64, 16)
    assert str(sizes) == (
        "300 rows: 64 to train on, 16 held out; left out: 0 that cannot be used, 220 beyond the profile's "
        "train_rows"
    )


def test_a_small_split_says_what_it_did_instead():
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
    import transformers

    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    args = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=epochs,
        learning_rate=0.0,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
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
    assert str(often).startswith("30 updates: each row is seen 10 times. That is often")
    assert "max_steps=15 or fewer" in str(often)
    assert (
        str(plan_steps(read_profile("cpu-demo", epochs=2), 9, 900)) == "6 updates: each row is seen 2 times"
    )


# --- The steps by hand ---


def cell_source(number, text):
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code" and text in cell.source)


@pytest.mark.parametrize(
    "case",
    [(1, 2, 4, False), (3, 2, 4, True), (5, 2, 2, False), (7, 1, 4, False), (12, 2, 2, True)],
)
def test_the_loop_by_hand_takes_the_micro_batches_that_the_trainer_takes(
    tmp_path, tiny_model, tiny_tokenizer, case
):
    """The trainer's own micro-batches, written down as it takes them, are the independent truth.

    A case is: rows, rows in a micro-batch, micro-batches in an update, whether rows are packed.
    """
    import itertools

    import transformers
    from tiny_models import build_trainer
    from trl import SFTTrainer

    count, batch, accumulation, packing = case
    taken = []

    class Recorder(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            update = (self.state.global_step, inputs["input_ids"].clone(), int(num_items_in_batch))
            taken.append(update)
            return super().training_step(model, inputs, num_items_in_batch)

    rows = [{"prompt": f"Row {n}:\n", "completion": f"{n * 7} apples"} for n in range(count)]
    trainer = build_trainer(
        tiny_model,
        tmp_path,
        tiny_tokenizer,
        rows,
        kind=Recorder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        max_steps=5,
    )
    namespace = {"itertools": itertools}
    exec(cell_source("06", "def micro_batches_by_update"), namespace)
    transformers.set_seed(42)
    updates = namespace["micro_batches_by_update"](trainer.get_train_dataloader(), accumulation)
    by_hand = [
        (step, micro["input_ids"], sum(int((b["labels"][:, 1:] != -100).sum()) for b in group))
        for step, group in zip(range(5), updates, strict=False)
        for micro in group
    ]
    trainer.train()
    assert len(by_hand) == len(taken)
    for (step, ids, tokens), (step_taken, ids_taken, tokens_taken) in zip(by_hand, taken, strict=True):
        assert (step, tokens) == (step_taken, tokens_taken)
        assert torch.equal(ids, ids_taken)


def test_06_saves_before_it_judges():
    path = ROOT / "notebooks" / "06_training.ipynb"
    code = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    trained = next(n for n, source in enumerate(code) if "trainer.train(" in source)
    saved = next(
        n for n, source in enumerate(code) if "write_training_summary(" in source and "open" not in source
    )
    assert trained < saved
    for source in code[trained + 1 : saved]:
        assert "assert " not in source, source
        assert "check_" not in source, source


# --- Findings ---


def history(*losses):
    return [{"step": 4 * n, "eval_loss": loss} for n, loss in enumerate(losses, start=1)]


def test_a_risen_loss_is_a_finding_with_advice():
    row = training.summarize_training_result(history(1.4, 1.2, 1.9), before=1.5, eval_rows=2).iloc[0]
    assert row["verdict"] == "not as hoped"
    assert row["hoped for"] == "below 1.5000"
    assert (
        "Overfitted: the loss was lowest after step 8 (1.2000) and 1.9000 by step 12; max_steps=8"
        in row["advice"]
    )
    assert "Rows held out: 2." in row["advice"]


def test_a_rise_within_a_hundredth_is_level_and_no_overfitting():
    losses = history(1.4, 1.2, 1.21)
    row = training.summarize_training_result(losses, 1.5, 200, "run/checkpoint-8").iloc[0]
    assert row["advice"].startswith("Level in the end, within 1%: the loss was lowest after step 8 (1.2000)")
    assert "max_steps" not in row["advice"]


def test_what_is_kept_of_an_overfitted_run_is_said():
    losses = history(1.4, 1.2, 1.9)
    row = training.summarize_training_result(losses, 1.5, 200, "run/checkpoint-8").iloc[0]
    assert "Its checkpoint is kept: run/checkpoint-8." in row["advice"]
    row = training.summarize_training_result(losses, 1.5, 200, best_is_saved=True).iloc[0]
    assert (row["verdict"], row["measured"]) == ("as hoped", "1.2000")
    assert row["advice"].endswith("The adapter of that step is saved.")


def test_a_fallen_loss_leaves_nothing_to_do():
    row = training.summarize_training_result(history(1.4, 1.2), before=1.5, eval_rows=200).iloc[0]
    assert (row["verdict"], row["advice"]) == ("as hoped", "nothing to do")
    assert (
        training.summarize_training_result(history(float("nan")), 1.5, 200)["verdict"].item()
        == "not as hoped"
    )


@pytest.mark.parametrize(
    ("change", "high", "rows", "verdict", "advice"),
    [
        (-0.2, -0.1, 200, "Yes: ", ""),
        (-0.2, 0.1, 200, "It cannot be told: ", "cannot be told from luck"),
        (-0.2, -0.1, 1, "Yes: ", "interval itself uncertain"),
        (0.2, 0.3, 200, "No: ", "Lower the learning rate"),
    ],
)
def test_the_gain_is_judged_with_its_interval(change, high, rows, verdict, advice):
    line = {"loss_nats": change, "low": change - 0.1, "high": high, "rows": rows}
    row = evaluation.summarize_verdict(pd.DataFrame({"tuned - base": line}).T).iloc[0]
    assert row["verdict"].startswith(verdict)
    assert advice in row["advice"]
    assert bool(advice) == bool(row["advice"])


# --- The notebooks ---


def run(tmp_path, profile_name, count, numbers, **changes):
    folder = write_rows(tmp_path / "data" / "rows.jsonl", count)
    out = tmp_path / "out"
    script = Path(__file__).parent / "support" / "small_data.py"
    command = [sys.executable, str(script), profile_name, str(folder), str(out), numbers, json.dumps(changes)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT), out


@pytest.mark.parametrize("count", [3, 20])
def test_training_and_evaluation_run_on_few_rows(tmp_path, count):
    result, out = run(tmp_path, "colab-a100", count, "06,07")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert f"{count} rows: {count - max(1, count // 10)} to train on" in result.stdout
    assert (out / "training_summary.json").is_file()


def test_one_row_is_refused_in_06_by_name(tmp_path):
    result, _ = run(tmp_path, "colab-a100", 1, "06")
    assert result.returncode != 0
    assert "[too-few-rows] 1 of 1 rows can be used, expected at least 2" in result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 20, 40])
@pytest.mark.parametrize("profile_name", PROFILES)
def test_every_profile_runs_on_few_rows(tmp_path, profile_name, count):
    numbers = "05" if count == 1 else "05,06,07"
    result, _ = run(tmp_path, profile_name, count, numbers)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.slow
def test_an_overfitted_adapter_is_saved_and_judged(tmp_path):
    changes = {"max_steps": 120, "save_steps": 40, "eval_steps": 20}
    result, out = run(tmp_path, "cpu-demo", 3, "06,07", **changes)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    summary = json.loads((out / "training_summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss_after"] > summary["eval_loss_before"]
    log = pd.read_csv(out / "training_log.csv").dropna(subset="eval_loss")
    best = log.loc[log["eval_loss"].idxmin(), "step"]
    assert best < log["step"].max()
    assert (out / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_04_runs_on_three_rows_within_a_second_of_sweep(tmp_path):
    result, _ = run(tmp_path, "ci-tiny", 3, "04", sweep_seconds=1)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert "left out: attention, learning rate" in result.stdout

"""What notebook 06's helpers say of a run, held against counts of our own."""

import errno
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import tiny_training
import torch

from llama_sft_helpers import run, training
from llama_sft_helpers.core.progress import PROGRESS_FILE
from llama_sft_helpers.training import (
    CheckpointError,
    CheckpointWriteError,
    LiveLossCallback,
    LossError,
    RunGuardCallback,
    ThroughputCallback,
    check_base_unchanged,
    check_checkpoint,
    check_gradients_reach_adapters,
    check_loss_history,
    checkpoint_errors,
    checkpoints,
    checksum_base,
    describe_run,
    latest_checkpoint,
    plot_loss,
    plot_overfitting,
    summary,
    watching,
    write_training_summary,
)

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _quiet():
    tiny_training.quiet()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps, its trainer, callbacks and the base's checksum from before."""
    tiny_training.quiet()
    folder = tmp_path_factory.mktemp("run")
    throughput = ThroughputCallback()
    trainer = tiny_training.build_trainer(folder, [throughput])
    before = checksum_base(trainer.model)
    trainer.add_callback(RunGuardCallback(describe_run(trainer)))
    trainer.train()
    return trainer, throughput.to_frame(), before, folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run's folder, to be damaged."""
    return Path(shutil.copytree(finished[3], tmp_path / "run"))


def losses_of(trainer):
    return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]


# --- Throughput ---


def test_throughput_counts_real_tokens_and_the_time_left(finished):
    trainer, table, _, _ = finished
    torch.manual_seed(42)
    counted = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()][:4]
    assert list(table.index) == [1, 2, 3, 4]
    assert table["tokens"].tolist() == counted
    rates = table["tokens"] / table["seconds"]
    assert table["tokens_per_second"].tolist() == pytest.approx(rates.tolist())
    assert table["seconds_left"].iloc[-1] == 0
    assert table["seconds_left"].iloc[0] == pytest.approx(3 * table["seconds"].iloc[0])
    assert table["peak_gib"].between(0.05, 64).all()
    assert ThroughputCallback().to_frame().columns.tolist() == table.columns.tolist()


def test_throughput_counts_all_the_time_since_the_last_log(finished, tmp_path, monkeypatch):
    second = ThroughputCallback()
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "step"))
    trainer = tiny_training.build_trainer(tmp_path, [second], eval_strategy="no", logging_steps=2)
    trainer.train()
    table = second.to_frame()
    loss = trainer.state.log_history[1]["loss"]
    told = f"training step 4 of 4, loss {loss:.4f}"
    assert (tmp_path / "step").read_text(encoding="utf-8") == told + "\n"
    assert table.index.tolist() == [2, 4]
    assert table["tokens"].sum() == finished[1]["tokens"].sum()
    assert table["tokens_per_second"].tolist() == pytest.approx((table["tokens"] / table["seconds"]).tolist())


def test_throughput_goes_on_after_a_resume_with_the_steps_before(finished, tmp_path):
    """As after a lost session: a new trainer and a new callback, on an earlier run's checkpoint."""
    resumed, whole = ThroughputCallback(), finished[1]
    trainer = tiny_training.build_trainer(tmp_path, [resumed])
    trainer.train(resume_from_checkpoint=str(finished[3] / "checkpoint-2"))
    assert resumed.to_frame()["tokens"].to_dict() == whole["tokens"].to_dict()
    assert resumed.to_frame()["seconds"][:2].tolist() == whole["seconds"][:2].tolist()
    logged = [row["tokens"] for row in trainer.state.log_history if "tokens" in row]
    assert logged == whole["tokens"].tolist()


def test_peak_memory_is_this_process_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("PyTorch's own peak is read on a GPU")
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert 0.06 < training.peak_memory_gib() < 64


def test_peak_memory_on_windows_comes_from_psutil(monkeypatch):
    memory = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3 * 2**30))
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.Process", lambda: memory)
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails, as there
    assert training.peak_memory_gib() == 3


# --- The proofs ---


def test_gradients_reach_every_adapter_after_an_update(tiny_model):
    with pytest.raises(AssertionError, match="0 trainable LoRA matrices"):
        check_gradients_reach_adapters(tiny_model)
    model = tiny_training.build_model().float().train()
    ids = torch.arange(2, 34)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(AssertionError, match="14 of 28 LoRA matrices"):
        check_gradients_reach_adapters(model)  # B is zero, so A's gradients are
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in adapters.items():
        p.data.fill_(0.01) if "lora_B" in name else None
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    check_gradients_reach_adapters(model)
    next(iter(adapters.values())).grad[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="1 of 28"):
        check_gradients_reach_adapters(model)


def test_training_leaves_the_base_alone_and_moves_every_b(finished):
    trainer, _, before, _ = finished
    check_base_unchanged(trainer.model, before)
    b = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(b) == 14
    assert all(p.any() for p in b)
    # 2 layers of 7 linears, their scales and 2 norms; the last norm, embeddings and lm_head
    assert sum(name.endswith(".SCB") for name in before) == 14
    assert len(before) == 14 + 14 + 4 + 3


def test_checksums_of_one_word_are_all_different():
    """Eight int8 codes of -1 are the word -1; with a -2 they are -2, which Python hashes to the same."""
    words = [*range(-40, 40), 2**62, -(2**62), 2**63 - 1, -(2**63)]
    tensors = [torch.tensor([word]) for word in words] + [torch.zeros(size) for size in (1, 2, 8, 16)]
    model = torch.nn.Module()
    for number, tensor in enumerate(tensors):
        model.register_parameter(f"p{number}", torch.nn.Parameter(tensor, requires_grad=False))
    sums = checksum_base(model)
    assert len(set(sums.values())) == len(tensors) - 1  # the word 0 and two float32 zeros are the same bytes


@pytest.mark.parametrize("what", ["a code", "a scale", "an embedding", "two codes swapped"])
def test_one_changed_number_in_the_base_is_seen(what):
    model = tiny_training.build_model()
    before = checksum_base(model)
    linear = model.get_base_model().model.layers[1].mlp.up_proj.base_layer
    row = linear.weight.data[0]
    if what == "a code":
        row[5] ^= 1
    elif what == "a scale":
        linear.weight.SCB[7] = torch.nextafter(linear.weight.SCB[7], torch.tensor(1e9))
    elif what == "an embedding":
        model.get_input_embeddings().weight.data[17, 2] += 1e-6
    else:
        other = int((row != row[0]).nonzero()[0])
        row[[0, other]] = row[[other, 0]]
    with pytest.raises(AssertionError, match=f"1 of {len(before)} base weights changed"):
        check_base_unchanged(model, before)


def test_a_sound_loss_history_passes_and_others_are_named():
    check_loss_history([{"loss": 1.2, "grad_norm": 0.0, "step": 1}, {"eval_loss": 0.4, "step": 1}, {"x": 1}])
    for name, value in (("loss", 0.0), ("loss", math.nan), ("eval_loss", math.inf), ("grad_norm", math.nan)):
        with pytest.raises(LossError, match=rf"{name} is {value} at step 7, expected a finite number"):
            check_loss_history([{"loss": 1.0, "step": 6}, {name: value, "step": 7}])


# --- Checkpoints ---


def test_the_newest_whole_checkpoint_is_found(finished, run_folder, tmp_path):
    assert latest_checkpoint(run_folder, describe_run(finished[0])) == str(run_folder / "checkpoint-4")
    assert latest_checkpoint(run_folder, before_step=2) is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file", encoding="utf-8")
    assert latest_checkpoint(tmp_path) is latest_checkpoint(tmp_path / "not there") is None


def test_a_checkpoint_is_sealed_without_pefts_empty_model_card(run_folder):
    for folder in run_folder.glob("checkpoint-*"):
        files = {path.name for path in folder.iterdir()}
        assert files == {*json.loads((folder / "checksums.json").read_bytes()), "checksums.json"}
        assert "adapter_model.safetensors" in files
        assert "README.md" not in files


def test_a_finished_run_started_again_repeats_its_last_steps_and_adds_none(finished, run_folder):
    again = tiny_training.build_trainer(run_folder)
    newest = latest_checkpoint(run_folder, describe_run(again), before_step=4)
    assert newest == str(run_folder / "checkpoint-2")
    again.train(resume_from_checkpoint=newest)
    assert again.state.global_step == 4
    assert losses_of(again) == losses_of(finished[0])


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "told"),
    [
        ("optimizer.pt", flip_a_byte, "is cut short or damaged"),
        ("adapter_model.safetensors", lambda path: os.truncate(path, 100), "is cut short or damaged"),
        ("trainer_state.json", Path.unlink, "is missing"),
        ("checksums.json", lambda path: os.truncate(path, 100), "is cut short or damaged"),
        ("checksums.json", Path.unlink, "is missing: the run ended before it was written"),
    ],
)
def test_what_is_wrong_is_named_and_the_checkpoint_skipped(run_folder, name, harm, told):
    harm(run_folder / "checkpoint-4" / name)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4/{name} {told}.*checkpoint is incomplete"):
        check_checkpoint(run_folder / "checkpoint-4")
    with pytest.warns(UserWarning, match=rf"Skipped: .*checkpoint-4/{name}"):
        assert latest_checkpoint(run_folder) == str(run_folder / "checkpoint-2")


def test_a_renamed_checkpoint_is_refused_and_no_good_one_means_a_fresh_start(run_folder):
    (run_folder / "checkpoint-4").rename(run_folder / "checkpoint-40")
    flip_a_byte(run_folder / "checkpoint-2" / "scheduler.pt")
    with pytest.warns(UserWarning, match="checkpoint-40 holds step 4: it was renamed") as seen:
        assert latest_checkpoint(run_folder) is None
    assert len(seen) == 2


@pytest.mark.parametrize(("setting", "other"), [("model", "Other-7B"), ("learning_rate", 1e-4)])
def test_a_checkpoint_of_another_run_is_refused(finished, run_folder, setting, other):
    told = f"belong to another run .*{setting}: .* there, '?{other}'? here"
    with pytest.raises(CheckpointError, match=told):
        latest_checkpoint(run_folder, {**describe_run(finished[0]), setting: other})


@pytest.mark.parametrize(
    ("rank", "changes", "expected"),
    [
        (8, {"max_length": 64}, {"lora", "max_length", "data", "rows"}),  # too long a prompt: no row
        (16, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, set()),
    ],
)
def test_what_makes_another_run(finished, tmp_path, rank, changes, expected):
    described = describe_run(finished[0])
    other = tiny_training.build_trainer(tmp_path, model=tiny_training.build_model(r=rank), **changes)
    assert {key for key, value in describe_run(other).items() if described[key] != value} == expected


def test_a_pattern_as_target_modules_is_kept_whole():
    """Sorted into letters, patterns of the same letters looked alike."""
    assert checkpoints._describe("abc_q") != checkpoints._describe("q_cab")
    assert checkpoints._describe({"v_proj", "q_proj"}) == "q_proj, v_proj"


def test_training_into_the_folder_of_another_run_stops_before_it_writes(run_folder):
    trainer = tiny_training.build_trainer(run_folder, learning_rate=1e-3)
    trainer.add_callback(RunGuardCallback(describe_run(trainer)))
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"learning_rate: 0\.005 there, 0\.001 here"):
        trainer.train()
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*") if path.is_file()} == before


def test_a_disk_that_fills_up_during_a_checkpoint(run_folder):
    half = run_folder / "checkpoint-6"
    half.mkdir()
    (half / "optimizer.pt").symlink_to("/dev/full")  # every write to it fails with ENOSPC
    trainer = tiny_training.build_trainer(run_folder, max_steps=8)
    told = r"is full: .*checkpoint-4, intact.*run this cell again"
    with pytest.raises(CheckpointWriteError, match=told), checkpoint_errors(run_folder):
        trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    with pytest.warns(UserWarning, match="checkpoint-6"):
        assert latest_checkpoint(run_folder) == str(run_folder / "checkpoint-4")


def test_no_checkpoint_is_begun_without_room_for_it(tmp_path, monkeypatch):
    trainer = tiny_training.build_trainer(tmp_path)
    trainer.add_callback(RunGuardCallback(describe_run(trainer)))
    monkeypatch.setattr(checkpoints, "free_bytes", lambda folder: 2**20)
    with pytest.raises(CheckpointWriteError, match=r"are needed, 1 MiB are free; there is no checkpoint yet"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_is_told_in_a_folder_that_is_not_there_yet_and_other_errors_pass(tmp_path):
    told = r"missing is full: .* MiB are free; there is no checkpoint"
    with pytest.raises(CheckpointWriteError, match=told), checkpoint_errors(tmp_path / "deep" / "missing"):
        raise OSError(errno.ENOSPC, "No space left on device")
    for error in (KeyError("x"), CheckpointError("another run"), CheckpointWriteError("no room")):
        with pytest.raises(type(error)) as seen, checkpoint_errors(tmp_path):
            raise error
        assert seen.value is error


# --- Figures and files ---


@pytest.mark.parametrize(
    ("eval_losses", "step", "ending"),
    [
        ([2.0, 1.0, 1.5], 4, "then rose: overfitting"),
        ([2.0, 1.0, 1.005], 4, "at the end within 1% of that"),
        ([2.0, 1.0, 0.5], 6, "the last one measured"),
    ],
)
def test_the_overfitting_picture_marks_the_best_step(eval_losses, step, ending):
    trained = [{"step": n, "epoch": n / 4, "loss": float(n)} for n in range(1, 7)]
    held_out = [
        {"step": 2 * n, "epoch": n / 2, "eval_loss": loss} for n, loss in enumerate(eval_losses, start=1)
    ]
    ax = plot_overfitting(trained + held_out)
    train, points, best = ax.get_lines()
    assert list(train.get_xdata()) == list(points.get_xdata()) == [2, 4, 6]
    assert list(train.get_ydata()) == [1.5, 3.5, 5.5]
    assert list(best.get_xdata()) == [step] * 2
    assert ax.get_xlabel() == "optimizer step (6 steps: 1.5 epochs)"
    assert f"step {step} (line), " in ax.get_title()
    assert ending in ax.get_title()
    first_epoch = [row | {"epoch": row["epoch"] / 2} for row in trained + held_out]
    assert "overfitting" not in plot_overfitting(first_epoch).get_title()
    _, gain, _ = plot_overfitting(trained + held_out, before=2.5).get_lines()
    assert (gain.get_xdata()[0], gain.get_ydata()[0]) == (0, 2.5)
    with pytest.raises(ValueError, match="no eval_loss"):
        plot_overfitting(trained)


def test_plot_loss_draws_both_curves(finished):
    ax = plot_loss(finished[0].state.log_history, label="first")
    train, held_out = ax.get_lines()
    assert list(train.get_xdata()) == [1, 2, 3, 4]
    assert list(held_out.get_xdata()) == [3, 4]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["first training", "first held out"]
    assert plot_loss([], before=2.0).get_lines()[0].get_xydata().tolist() == [[0, 2.0]]
    assert ax.get_xlabel()
    assert "nats" in ax.get_ylabel()
    assert not plot_loss([]).get_lines()


@pytest.fixture
def drawings(monkeypatch):
    """The figures that are shown, and those that take the place of one."""
    shown, updated = [], []

    class Handle:
        def update(self, figure):
            updated.append(figure)

    def display(figure, display_id):
        shown.append(figure)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(watching, "_SECONDS_BETWEEN_DRAWINGS", 0)
    return shown, updated


def test_the_live_figure_updates_in_place(tmp_path, drawings):
    shown, updated = drawings
    throughput = ThroughputCallback()
    callbacks = [throughput, LiveLossCallback(throughput, before=9.0)]
    tiny_training.build_trainer(tmp_path, callbacks, save_strategy="no").train()
    assert len(shown) == 1
    assert len(updated) >= 4
    title = updated[-1].axes[0].get_title()
    assert title.startswith("4 of 4 steps done, held-out loss 9.00 → ")
    assert "tokens/s" in title
    axes = [figure.axes[0] for figure in (shown[0], *updated)]
    assert len({ax.get_xlim() + ax.get_ylim() for ax in axes}) == 1
    assert axes[0].get_ylim() == (0, 18)
    assert not any("left" in ax.get_title() for ax in axes)  # the bar's estimate would differ


def test_where_a_program_runs_the_notebook_only_the_finished_curve_is_drawn(tmp_path, monkeypatch, drawings):
    shown, updated = drawings
    monkeypatch.setenv("SFT_PROGRESS_FILE", str(tmp_path / "step"))
    throughput = ThroughputCallback()
    callbacks = [throughput, LiveLossCallback(throughput, before=9.0)]
    tiny_training.build_trainer(tmp_path / "out", callbacks, save_strategy="no").train()
    assert (len(shown), updated) == (1, [])
    assert shown[0].axes[0].get_title().startswith("4 of 4 steps done, held-out loss 9.00 → ")


def test_the_summary_is_written_whole_or_not_at_all_and_reported(tmp_path, capsys):
    path = tmp_path / "training_summary.json"
    write_training_summary(path, dict.fromkeys(summary.SUMMARY_KEYS, 0.5))
    with pytest.raises(TypeError):
        write_training_summary(path, {"eval_loss_before": object()})
    run._report(tmp_path)
    assert "held-out loss: 0.5000 before, 0.5000 after training" in capsys.readouterr().out
    path.write_text(json.dumps({"eval_loss_before": 1.0}), encoding="utf-8")
    with pytest.raises(run.RunError, match=r"lacks eval_loss_after, .*Run notebook 06 again"):
        run._report(tmp_path)

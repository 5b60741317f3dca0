"""What notebook 06's helpers say of a run, held against counts and loops of our own."""

import errno
import json
import math
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import tiny_training
import torch

from llama_sft_helpers import training
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
    return trainer, throughput, before, folder


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy of the finished run's folder, to be damaged."""
    return Path(shutil.copytree(finished[3], tmp_path / "run"))


def test_throughput_goes_on_after_a_resume_with_the_steps_before(tmp_path):
    """As after a lost session: a new trainer and a new callback, on an earlier run's checkpoint."""
    settings = {"max_steps": 6, "save_steps": 3, "eval_strategy": "no"}
    whole = ThroughputCallback()
    tiny_training.build_trainer(tmp_path, [whole], **settings).train()
    resumed = ThroughputCallback()
    trainer = tiny_training.build_trainer(tmp_path / "again", [resumed], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.to_frame().index.tolist() == [1, 2, 3, 4, 5, 6]
    assert resumed.to_frame()["tokens"].tolist() == whole.to_frame()["tokens"].tolist()
    assert resumed.to_frame()["seconds"][:3].tolist() == whole.to_frame()["seconds"][:3].tolist()
    logged = [row["tokens"] for row in trainer.state.log_history if "tokens" in row]
    assert logged == whole.to_frame()["tokens"].tolist()


def test_throughput_counts_all_the_time_since_the_last_log(tmp_path):
    every = ThroughputCallback()
    tiny_training.build_trainer(tmp_path / "a", [every], max_steps=4, eval_strategy="no").train()
    second = ThroughputCallback()
    tiny_training.build_trainer(
        tmp_path / "b", [second], max_steps=4, eval_strategy="no", logging_steps=2
    ).train()
    assert second.to_frame().index.tolist() == [2, 4]
    assert second.to_frame()["tokens"].sum() == every.to_frame()["tokens"].sum()
    for row in second.rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])


# --- The numbers ---


def test_five_losses_equal_a_hand_written_loop(tmp_path):
    trainer = tiny_training.build_trainer(
        tmp_path, max_steps=5, gradient_accumulation_steps=2, save_strategy="no", eval_strategy="no"
    )
    model = trainer.model
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    adapters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(42)
    batches = iter(trainer.get_train_dataloader())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in adapters]
    by_hand = []
    model.train()
    for step in range(5):
        pair = [next(batches), next(batches)]
        count = sum(int((batch["labels"] != -100).sum()) for batch in pair)
        total = 0.0
        for batch in pair:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            logprobs = logits[:, :-1].log_softmax(-1)
            labels = batch["labels"][:, 1:]
            scored = labels != -100
            picked = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            loss = -(picked * scored).sum() / count
            loss.backward()
            total += loss.item()
        by_hand.append(total)
        norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in adapters))
        rate = 5e-3 * (1 - step / 5)
        with torch.no_grad():  # Adam as in the paper, https://arxiv.org/abs/1412.6980
            for p, (mean, square) in zip(adapters, moments, strict=True):
                grad = p.grad * min(1.0, 1.0 / (norm + 1e-6))
                mean.mul_(0.9).add_(grad, alpha=0.1)
                square.mul_(0.999).addcmul_(grad, grad, value=0.001)
                corrected = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                p.sub_(rate * (mean / (1 - 0.9 ** (step + 1))) / corrected)
                p.grad = None
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in start:
                p.copy_(start[name])
    trainer.train()
    by_trainer = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert by_trainer == pytest.approx(by_hand, abs=1e-4)
    assert max(by_hand) - min(by_hand) > 1e-2


def test_throughput_counts_real_tokens_and_the_time_left(finished):
    trainer, throughput, _, _ = finished
    torch.manual_seed(42)
    counted = [int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader()][:4]
    table = throughput.to_frame()
    assert list(table.index) == [1, 2, 3, 4]
    assert table["tokens"].tolist() == counted
    assert (table["seconds"] > 0).all()
    rates = table["tokens"] / table["seconds"]
    assert table["tokens_per_second"].tolist() == pytest.approx(rates.tolist())
    assert table["seconds_left"].iloc[-1] == 0
    assert table["seconds_left"].iloc[0] == pytest.approx(3 * table["seconds"].iloc[0])
    assert table["peak_gib"].between(0.05, 64).all()


def test_an_unused_throughput_callback_gives_an_empty_table():
    assert list(ThroughputCallback().to_frame().columns)[-1] == "seconds_left"


# --- The proofs ---


def test_gradients_reach_every_adapter_after_an_update():
    model = tiny_training.build_model()
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    ids = torch.arange(2, 34)[None]
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(AssertionError, match="14 of 28 LoRA matrices"):
        check_gradients_reach_adapters(model)  # B is zero, so A's gradients are
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    check_gradients_reach_adapters(model)
    next(p for name, p in model.named_parameters() if "lora_A" in name).grad[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="1 of 28"):
        check_gradients_reach_adapters(model)


def test_gradients_of_a_model_without_adapters(tiny_model):
    with pytest.raises(AssertionError, match="0 trainable LoRA matrices"):
        check_gradients_reach_adapters(tiny_model)


def test_training_leaves_the_base_alone_and_moves_every_b(finished):
    trainer, _, before, _ = finished
    check_base_unchanged(trainer.model, before)
    b = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert len(b) == 14
    assert all(p.any() for p in b)


def test_the_checksum_covers_codes_scales_and_plain_weights(finished):
    names = set(finished[2])  # 2 layers of 7 linears and 2 norms, the last norm, embeddings and lm_head
    assert sum(name.endswith(".SCB") for name in names) == 14
    assert sum("base_layer.weight" in name and "SCB" not in name for name in names) == 14
    assert sum("norm" in name or "embed" in name or "lm_head" in name for name in names) == 7


def test_eight_codes_of_minus_one_are_not_one_of_minus_two():
    """Python's ``hash(-1) == hash(-2)``: the word of eight -1 is -1, with a last byte of -2 it is -2."""
    layer = torch.nn.Linear(8, 1, bias=False).requires_grad_(False)
    layer.weight = torch.nn.Parameter(torch.full((1, 8), -1, dtype=torch.int8), requires_grad=False)
    before = checksum_base(layer)
    layer.weight.data[0, 0] = -2
    assert checksum_base(layer) != before
    with pytest.raises(AssertionError, match="1 of 1 base weights changed"):
        check_base_unchanged(layer, before)


def test_checksums_of_one_word_are_all_different():
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
    if what == "a code":
        linear.weight.data[3, 5] ^= 1
    elif what == "a scale":
        scales = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
        scales[7] = torch.nextafter(scales[7], torch.tensor(1e9))
    elif what == "an embedding":
        model.get_input_embeddings().weight.data[17, 2] += 1e-6
    else:
        row = linear.weight.data[0]
        other = int((row != row[0]).nonzero()[0])
        row[[0, other]] = row[[other, 0]]
    with pytest.raises(AssertionError, match=f"1 of {len(before)} base weights changed"):
        check_base_unchanged(model, before)


# --- Checkpoints ---


def test_the_newest_complete_checkpoint_is_found(finished, tmp_path):
    trainer, _, _, folder = finished
    assert latest_checkpoint(folder, describe_run(trainer)) == str(folder / "checkpoint-4")
    assert latest_checkpoint(tmp_path / "not there") is None
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert latest_checkpoint(tmp_path) is None


def test_a_finished_run_started_again_repeats_its_last_steps_and_adds_none(finished, run_folder):
    again = tiny_training.build_trainer(run_folder)
    newest = latest_checkpoint(run_folder, describe_run(again), before_step=4)
    assert newest == str(run_folder / "checkpoint-2")
    assert latest_checkpoint(run_folder, before_step=2) is None
    again.train(resume_from_checkpoint=newest)

    def losses(trainer):
        return [(row["step"], row["loss"]) for row in trainer.state.log_history if "loss" in row]

    assert again.state.global_step == 4
    assert losses(again) == losses(finished[0])


@pytest.mark.parametrize("name", checkpoints._NEEDED)
def test_a_truncated_file_is_named_and_its_checkpoint_skipped(run_folder, name):
    path = run_folder / "checkpoint-4" / name
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(CheckpointError, match=rf"checkpoint-4/{name} is cut short or damaged"):
        check_checkpoint(run_folder / "checkpoint-4")
    with pytest.warns(UserWarning, match=rf"Skipped: .*checkpoint-4/{name}"):
        assert latest_checkpoint(run_folder) == str(run_folder / "checkpoint-2")


@pytest.mark.parametrize("name", checkpoints._NEEDED)
def test_a_missing_file_is_named(run_folder, name):
    (run_folder / "checkpoint-4" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        check_checkpoint(run_folder / "checkpoint-4")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("optimizer.pt", r"is (damaged|cut short)"),
        ("adapter_model.safetensors", "is not as it was written: its checksum differs"),
        ("checksums.json", r"is (cut short or damaged|not as it was written)"),
    ],
)
def test_a_flipped_byte_is_seen(run_folder, name, problem):
    path = run_folder / "checkpoint-4" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=problem):
        check_checkpoint(run_folder / "checkpoint-4")


def test_a_renamed_checkpoint_is_refused(run_folder):
    (run_folder / "checkpoint-4").rename(run_folder / "checkpoint-40")
    with pytest.raises(CheckpointError, match="holds step 4"):
        check_checkpoint(run_folder / "checkpoint-40")


def test_no_good_checkpoint_means_a_fresh_start(run_folder):
    for step in (2, 4):
        (run_folder / f"checkpoint-{step}" / "trainer_state.json").unlink()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert latest_checkpoint(run_folder) is None
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("setting", "other"),
    [("model", "Other-7B"), ("lora", "r=8"), ("learning_rate", 1e-4), ("data", "0" * 16), ("max_steps", 99)],
)
def test_a_checkpoint_of_another_run_is_refused(finished, run_folder, setting, other):
    run = {**describe_run(finished[0]), setting: other}
    with pytest.raises(
        CheckpointError, match=f"belong to another run .*{setting}: .* there, '?{other}'? here"
    ):
        latest_checkpoint(run_folder, run)


def test_another_rank_data_or_length_makes_another_run(finished, tmp_path):
    run = describe_run(finished[0])
    other = tiny_training.build_trainer(tmp_path, model=tiny_training.build_model(r=8), max_length=64)
    differing = {key for key, value in describe_run(other).items() if run[key] != value}
    assert differing == {"lora", "max_length", "data", "rows"}  # rows cut to their prompt are dropped


def test_half_the_micro_batch_stays_the_same_run(finished, tmp_path):
    halved = tiny_training.build_trainer(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )
    assert describe_run(halved) == describe_run(finished[0])


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
    with (
        pytest.raises(CheckpointWriteError, match=r"is full: .*checkpoint-4, intact.*run this cell again"),
        checkpoint_errors(run_folder),
    ):
        trainer.train(resume_from_checkpoint=str(run_folder / "checkpoint-4"))
    check_checkpoint(run_folder / "checkpoint-4")
    with pytest.warns(UserWarning, match="checkpoint-6"):
        assert latest_checkpoint(run_folder) == str(run_folder / "checkpoint-4")


def test_no_checkpoint_is_begun_without_room_for_it(tmp_path, monkeypatch):
    trainer = tiny_training.build_trainer(tmp_path)
    trainer.add_callback(RunGuardCallback(describe_run(trainer)))
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 2**20))
    with pytest.raises(CheckpointWriteError, match=r"are needed, 1 MiB are free; there is no checkpoint yet"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_in_a_folder_that_is_not_there_yet(tmp_path):
    with (
        pytest.raises(
            CheckpointWriteError, match=r"missing is full: .* MiB are free; there is no checkpoint"
        ),
        checkpoint_errors(tmp_path / "deep" / "missing"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_pattern_as_target_modules_is_kept_whole():
    """Sorted into letters, patterns of the same letters looked alike."""

    def described(targets):
        return describe_run(tiny_run(SimpleNamespace(r=8, lora_alpha=16, target_modules=targets)))["lora"]

    assert described("abc_q") != described("q_cab")
    assert described("q_proj") != described(["q_proj"])
    assert described(r".*\.q_proj") == r"r=8, lora_alpha=16, modules matching '.*\\.q_proj'"
    assert described({"v_proj", "q_proj"}) == "r=8, lora_alpha=16, q_proj, v_proj"


def tiny_run(lora):
    """What ``describe_run`` reads of a trainer."""
    base = SimpleNamespace(
        config=SimpleNamespace(hidden_size=8, num_hidden_layers=1, vocab_size=8, _name_or_path="x/y")
    )
    model = SimpleNamespace(
        get_base_model=lambda: base, peft_config={"default": lora}, active_adapter="default"
    )
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed")
    args = SimpleNamespace(max_length=8, packing=False, learning_rate=1.0, **dict.fromkeys(names, 1))
    return SimpleNamespace(args=args, train_dataset=[{"input_ids": [1]}], model=model)


def test_other_errors_pass_through():
    for error in (KeyError("x"), RuntimeError("shapes differ"), CheckpointError("another run")):
        with pytest.raises(type(error)) as seen, checkpoint_errors("."):
            raise error
        assert seen.value is error


# --- Figures and files ---


@pytest.mark.parametrize(
    ("eval_losses", "step", "ending"),
    [
        ([2.0, 1.0, 1.5], 4, "overfitting"),
        ([2.0, 1.0, 1.005], 4, "level since"),
        ([2.0, 1.0, 0.5], 6, "the last one measured"),
    ],
)
def test_the_overfitting_picture_marks_the_best_step(eval_losses, step, ending):
    history = [{"step": n, "epoch": n / 4, "loss": float(n)} for n in range(1, 7)]
    history += [
        {"step": 2 * n, "epoch": n / 2, "eval_loss": loss} for n, loss in enumerate(eval_losses, start=1)
    ]
    ax = plot_overfitting(history)
    train, held_out, best = ax.get_lines()
    assert list(train.get_xdata()) == list(held_out.get_xdata()) == [0.5, 1.0, 1.5]
    assert list(train.get_ydata()) == [1.5, 3.5, 5.5]
    assert list(best.get_xdata()) == [step / 4] * 2
    assert f"step {step} (line), " in ax.get_title()
    assert ending in ax.get_title()
    _, gain, _ = plot_overfitting(history, before=2.5).get_lines()
    assert (gain.get_xdata()[0], gain.get_ydata()[0]) == (0, 2.5)
    with pytest.raises(ValueError, match="no eval_loss"):
        plot_overfitting(history[:6])


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


def test_the_live_figure_updates_in_place(tmp_path, monkeypatch):
    shown, updated = [], []

    class Handle:
        def update(self, figure):
            updated.append(figure)

    def display(figure, display_id):
        shown.append(figure)
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    throughput = ThroughputCallback()
    live = LiveLossCallback(throughput, every_seconds=0, before=9.0)
    trainer = tiny_training.build_trainer(tmp_path, [throughput, live], save_strategy="no")
    trainer.train()
    assert len(shown) == 1
    assert len(updated) >= 4
    title = updated[-1].axes[0].get_title()
    assert title.startswith("step 4 of 4, held-out loss 9.00 → ")
    assert "tokens/s" in title
    axes = [figure.axes[0] for figure in (shown[0], *updated)]
    assert len({ax.get_xlim() + ax.get_ylim() for ax in axes}) == 1
    assert axes[0].get_ylim() == (0, 18)
    assert "left" in axes[0].get_title()


def test_the_summary_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "training_summary.json"
    write_training_summary(path, {"eval_loss_before": 1.5})
    with pytest.raises(TypeError):
        write_training_summary(path, {"eval_loss_before": object()})
    assert json.loads(path.read_text()) == {"eval_loss_before": 1.5}


def test_peak_memory_is_this_process_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("PyTorch's own peak is read on a GPU")
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert 0.06 < training.peak_memory_gib() < 64


def test_a_sound_loss_history_passes_and_others_are_named():
    check_loss_history([{"loss": 1.2, "grad_norm": 0.0, "step": 1}, {"eval_loss": 0.4, "step": 1}, {"x": 1}])
    for entry in ({"loss": float("nan")}, {"eval_loss": float("inf")}, {"grad_norm": float("nan")}):
        with pytest.raises(LossError, match=r"(nan|inf) at step 7, expected a finite number above 0"):
            check_loss_history([{"loss": 1.0, "step": 6}, entry | {"step": 7}])

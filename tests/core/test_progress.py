"""Plain lines about a run: what they say, and how seldom."""

import pytest

from llama_sft_helpers.core import progress
from llama_sft_helpers.core.progress import PROGRESS_FILE, ProgressLines, clock, report_step


@pytest.fixture
def step_file(tmp_path, monkeypatch):
    path = tmp_path / "step"
    path.touch()
    monkeypatch.setenv(PROGRESS_FILE, str(path))
    return path


def test_a_line_names_cells_and_step_and_comes_every_ten_seconds(step_file, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    lines = ProgressLines("09_your_run", 25, step_file)
    lines.cell_done()
    report_step(3, 30, 2.0, 83.4)
    assert lines.news() == "09_your_run: 1 of 25 cells, training step 3 of 30, loss 2.0000, 1:23 left"
    report_step(4, 30, 1.5, 80.0)
    now[0] += 9.9
    assert not lines.news()
    now[0] += 0.1
    assert lines.news().endswith("training step 4 of 30, loss 1.5000, 1:20 left")
    now[0] += 60
    assert not lines.news()  # nothing new
    lines.cell_done()
    assert lines.news() == "09_your_run: 2 of 25 cells"


def test_a_step_that_is_half_written_is_not_told(step_file):
    lines = ProgressLines("09_your_run", 25, step_file)
    report_step(3, 30, 2.0, 83.4)
    whole = step_file.read_text(encoding="utf-8")
    step_file.write_text(whole[:20], encoding="utf-8")
    assert not lines.news()
    step_file.write_text(whole, encoding="utf-8")
    assert lines.news().endswith("loss 2.0000, 1:23 left")


def test_a_step_is_reported_nowhere_or_on_a_full_disk_without_an_error(tmp_path, monkeypatch):
    report_step(1, 2, 0.5, 1.0)
    monkeypatch.setenv(PROGRESS_FILE, str(tmp_path / "none" / "step"))
    report_step(1, 2, 0.5, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (83.4, "1:23"), (4000, "66:40")])
def test_a_clock_shows_minutes_and_seconds(seconds, shown):
    assert clock(seconds) == shown

"""Watch a run: tokens per second, memory and losses as they come.

Nothing here trains. The callbacks plug into ``SFTTrainer``
(https://huggingface.co/docs/transformers/main_classes/callback).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from llama_sft_helpers.core.progress import PROGRESS_FILE, report_step
from llama_sft_helpers.training.plots import held_out_losses, plot_loss

if TYPE_CHECKING:
    import pandas as pd
    from transformers import TrainerControl, TrainerState, TrainingArguments

_THROUGHPUT = ["step", "seconds", "tokens", "tokens_per_second", "peak_gib", "seconds_left"]
_SECONDS_BETWEEN_DRAWINGS = 2.0


def peak_memory_gib() -> float:
    """The peak so far, in GiB: PyTorch's allocations on the GPU, or this process's memory without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":  # where the standard library has no module resource
        import psutil

        return int(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class ThroughputCallback(TrainerCallback):
    """Measures each optimizer step: tokens per second, peak memory, time left.

    Real tokens are counted (trl's ``num_tokens``; padding is left out), and the time that evaluation and
    saving take does not count as training time. The figures also go into the trainer's log, so they are in
    its checkpoints, and a resumed run goes on with those of the steps before.

    Attributes:
        rows: One dict a step: ``step``, ``seconds``, ``tokens``, ``tokens_per_second``, ``peak_gib``,
            ``seconds_left``.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._started = 0.0
        self._seconds = 0.0  # since the last log
        self._tokens_before = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over the steps that a resumed run's log already holds; trl counts its tokens from 0 again."""
        self.rows = [{key: row[key] for key in _THROUGHPUT} for row in state.log_history if "seconds" in row]
        self._tokens_before = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the step's clock."""
        self._started = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the step's clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._seconds += time.perf_counter() - self._started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the row of the step that was just logged."""
        if not logs or "loss" not in logs:
            return
        total = float(logs.get("num_tokens", 0.0))
        tokens, self._tokens_before = total - self._tokens_before, total
        seconds, self._seconds = self._seconds, 0.0
        pace = (sum(row["seconds"] for row in self.rows) + seconds) / state.global_step
        row = {
            "step": state.global_step,
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "peak_gib": peak_memory_gib(),
            "seconds_left": pace * (state.max_steps - state.global_step),
        }
        self.rows.append(row)
        report_step(state.global_step, state.max_steps, logs["loss"], row["seconds_left"])
        if state.log_history:
            state.log_history[-1].update(row)

    def to_frame(self) -> pd.DataFrame:
        """``rows`` as a table, indexed by step."""
        import pandas as pd

        return pd.DataFrame(self.rows, columns=_THROUGHPUT).set_index("step")


class LiveLossCallback(TrainerCallback):
    """Draws the training and held-out loss while the run goes on, in one figure that updates in place.

    The axes stay as they are from the first drawing on, unless a loss rises above twice ``before``. The time
    left is told by the trainer's bar above it, which counts evaluation and saving too. Nobody sees the figure
    change where ``llama-sft run`` executes the notebook, so there only the finished curve is drawn.

    Args:
        throughput: Its figures go into the title; put it before this callback in the trainer's list.
        before: The held-out loss before training, in nats per token, drawn at step 0.
    """

    def __init__(self, throughput: ThroughputCallback, before: float) -> None:
        self._throughput = throughput
        self._before = before
        self._seen = PROGRESS_FILE not in os.environ
        self._drawn = 0.0
        self._handle: Any = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw again, unless the last drawing is too recent, or nobody would see it."""
        if self._seen and time.perf_counter() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._draw(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the finished curve."""
        self._draw(state)

    def _draw(self, state: TrainerState) -> None:
        import matplotlib.pyplot as plt
        from IPython.display import display

        losses = [row["loss"] for row in state.log_history if "loss" in row]
        if not losses:
            return
        ax = plot_loss(state.log_history, before=self._before)
        top = max(2 * self._before, 1.05 * max(losses))
        ax.set(
            title=self._title(state), xlim=(-0.02 * state.max_steps, 1.02 * state.max_steps), ylim=(0, top)
        )
        if self._handle is None:
            self._handle = display(ax.figure, display_id=True)
        else:
            self._handle.update(ax.figure)
        plt.close(ax.figure)
        self._drawn = time.perf_counter()

    def _title(self, state: TrainerState) -> str:
        held_out = held_out_losses(state.log_history, self._before)
        title = (
            f"{state.global_step} of {state.max_steps} steps done"  # the bar counts the one that runs, too
        )
        if len(held_out) > 1:
            title += f", held-out loss {held_out[min(held_out)]:.2f} → {held_out[max(held_out)]:.2f}"
        if self._throughput.rows:
            row = self._throughput.rows[-1]
            tokens, spent = (
                sum(each[name] for each in self._throughput.rows) for name in ("tokens", "seconds")
            )
            title += f"\n{tokens / max(spent, 1e-9):,.0f} tokens/s on average, peak {row['peak_gib']:.1f} GiB"
        return title

"""``index.html`` of ``llama-sft run``: what a run has found so far, on one page that needs no network."""

from __future__ import annotations

import base64
import io
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.files import FilesError
from llama_sft_helpers.core.language import page_template, reader_language, translate
from llama_sft_helpers.core.progress import clock

# notebooks that train -> where in the run's folder they leave their summary, log and adapter
RESULTS = {"06_training": ".", "09_your_run": "your_run"}


def result_page(
    folder: Path,
    profile: str,
    model: str,
    seconds: Mapping[str, float | None],
    at_work: Collection[str] | None,
) -> str:
    """The page, from what the run's notebooks have left in its folder; a browser reads it anew by itself.

    Args:
        folder: The run's output folder. What is missing or damaged there is left out, and so is what an
            earlier run left: a training's result is shown once its notebook is done in this run.
        profile: Its name.
        model: The model's id or folder.
        seconds: Name of each notebook, as ``06_training`` -> how long it took, None where it is not done.
        at_work: Those that are being executed; None once the run is over.

    Returns:
        HTML that fetches nothing, in the reader's language.
    """
    page = page_template("result_page.html.jinja", reader_language())
    trained = next((folder / RESULTS[stem] for stem in RESULTS if seconds.get(stem) is not None), None)
    summary = _read_summary(trained) if trained else None
    return page.render(
        title=_title(summary, running=at_work is not None),
        profile=profile,
        model=model,
        state=_state(seconds, running=at_work is not None),
        running=at_work is not None,
        tiles=_tiles(summary),
        curve=_curve(trained, summary) if trained else "",
        answers=_answers(folder) if seconds.get("07_evaluation") is not None else [],
        notebooks=[_card(stem, took, at_work) for stem, took in seconds.items()],
        commands=_commands(trained),
        folder=str(folder),
    )


def _state(seconds: Mapping[str, float | None], running: bool) -> str:
    done, every = sum(took is not None for took in seconds.values()), len(seconds)
    if done == every:
        return translate("All notebooks are done.")
    if running:
        return translate(
            "{done} of {every} notebooks are done; this page fills by itself.", done=done, every=every
        )
    return translate("{done} of {every} notebooks are done; the run stopped there.", done=done, every=every)


def _title(summary: Mapping[str, Any] | None, running: bool) -> str:
    if not summary:
        state = translate("running" if running else "executed")
        return translate("Llama 3 8B, fine-tuned before your eyes: {state}", state=state)
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    return translate(
        "Held-out loss: {before:.2f} before training, {after:.2f} after", before=before, after=after
    )


def _read_summary(folder: Path) -> dict[str, Any] | None:
    from llama_sft_helpers.training import read_training_summary

    try:
        return read_training_summary(folder / "training_summary.json")
    except FilesError:
        return None  # 06 has not come so far


def _tiles(summary: Mapping[str, Any] | None) -> list[tuple[str, str, str]]:
    """Name, value and remark of each number."""
    if not summary:
        return []
    before, after = summary["eval_loss_before"], summary["eval_loss_after"]
    each_second = summary["train_tokens"] / max(summary["train_seconds"], 1e-9)  # 09 writes no such figure
    change = translate("{change:+.1%}, nats per token", change=after / before - 1)
    tokens = translate(
        "{tokens:,.0f} tokens, {speed:,.0f} a second", tokens=summary["train_tokens"], speed=each_second
    )
    at_most = translate("at most, while training on {device}", device=summary["device"])
    return [
        (translate("Held-out loss"), f"{before:.3f} → {after:.3f}", change),
        (translate("Training"), clock(summary["train_seconds"]), tokens),
        (translate("Memory"), f"{summary['peak_gib']:.1f} GiB", at_most),
    ]


def _curve(folder: Path, summary: Mapping[str, Any] | None) -> str:
    """06's losses as an SVG picture in base64, or nothing."""
    log = folder / "training_log.csv"
    if not summary or not log.is_file():
        return ""
    import matplotlib.pyplot as plt
    import pandas as pd

    from llama_sft_helpers.training import plot_loss

    rows = [row.dropna().to_dict() for _, row in pd.read_csv(log).iterrows()]
    figure = plot_loss(rows, before=summary["eval_loss_before"]).figure
    with io.BytesIO() as picture:
        figure.savefig(picture, format="svg")  # type: ignore[union-attr]
        plt.close("all")
        return base64.b64encode(picture.getvalue()).decode()


def _answers(folder: Path) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Each question with its answers, as 07 saved them: model, how the answer ended, text."""
    if not (path := folder / "answers.csv").is_file():
        return []
    import pandas as pd

    from llama_sft_helpers.evaluation.answers import list_answers

    listed = list_answers(pd.read_csv(path, keep_default_na=False), reader_language())
    return [(ask, [(translate(name), end, text) for name, end, text in pair]) for ask, pair in listed]


def _card(stem: str, took: float | None, at_work: Collection[str] | None) -> tuple[str, str, str]:
    """The page to link to, where there is one, the notebook's name, and its state."""
    number, _, word = stem.partition("_")
    words = word.replace("_", " ").capitalize().replace("Lora", "LoRA")
    name = f"{number} · {translate(words)}"
    if took is None:
        if at_work is None:
            return "", name, translate("not done")
        return "", name, translate("running now" if stem in at_work else "waiting")
    return stem, name, translate("done in {time}", time=clock(took))


def _commands(trained: Path | None) -> list[tuple[str, str]]:
    """Sentences, each with the command it speaks of."""
    own = "llama-sft train --data my.csv --columns question=instruction,answer=output"
    commands = [(translate("Train on rows of your own:"), own)]
    if trained and (adapter := trained / "adapter").is_dir():
        chat = f"llama-sft chat {shlex.quote(str(adapter))}"
        commands.insert(0, (translate("Talk to the trained model:"), chat))
    return commands

"""``play.html``: the series' own numbers to play with, on one page that needs no network and no server.

The page's arithmetic is ``templates/play_model.js``, its numbers are those of ``play_data``. A test holds
both equal to the functions that the notebooks call.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.language import korean, page_template, reader_language
from llama_sft_helpers.core.llama import Shape, load_llama3_config
from llama_sft_helpers.data.rows import PROMPT_WITH_INPUT, PROMPT_WITHOUT_INPUT
from llama_sft_helpers.profiles import read_profile

if TYPE_CHECKING:
    from llama_sft_helpers.core.llama import ModelConfig
    from llama_sft_helpers.profiles import Profile

_PACKAGE = Path(__file__).parent
_RESULTS = "speed_h200_40gib"
# Card as memory.CARDS_GIB names it -> the profile that the series takes there.
_PROFILES = {"16 GB": "colab-t4", "24 GB": "colab-l4", "40 GB": "colab-a100", "80 GB": "colab-a100"}
_BATCHES = (1, 2, 3, 4, 6, 8)
_LENGTHS = (256, 512, 768, 1024, 1536, 2048, 3072, 4096)


def play_page(home: str = "", language: str | None = None) -> str:
    """The page: HTML that fetches nothing and works from a file.

    Args:
        home: Where its link to the page beside it leads, as ``index.html``; without it there is no link.
        language: ``"en"`` or ``"ko"``; None for the reader's.
    """
    language = language or reader_language()
    page = page_template("play.html.jinja", language)
    return page.render(data=play_data(), home=home, texts=korean("play_js") if language == "ko" else {})


def play_data() -> dict[str, Any]:
    """What the page's arithmetic starts from, by section; all of it becomes JSON."""
    return {
        "grid": _grid(),
        "lora": _lora(),
        "tokens": _tokens(),
        "memory": _memory(),
        "speed": _speed(),
    }


def _grid() -> dict[str, Any]:
    """A row of 24 weights drawn from a bell curve, the largest magnitude 1; which of them is the outlier."""
    source = random.Random(3)  # noqa: S311  (no secret, and the same row in each page)
    row = [source.gauss(0, 1) for _ in range(24)]
    largest = max(map(abs, row))
    row = [round(weight / largest, 3) for weight in row]
    return {"row": row, "outlier": min(range(len(row)), key=lambda place: abs(row[place]))}


def _lora() -> dict[str, Any]:
    """Llama 3 8B's weights, and what one more rank adds to each projection of all its layers."""
    shape = Shape.of(load_llama3_config())
    per_rank = {name: shape.layers * (d_in + d_out) for name, (d_in, d_out) in shape.linears.items()}
    return {"weights": shape.linear_weights + shape.unquantized, "per_rank": per_rank}


def _tokens() -> dict[str, Any]:
    """Alpaca's templates, some shipped rows, and the tokenizer of the shipped tiny Llama."""
    tokenizer = json.loads((_PACKAGE / "models/tiny-llama/tokenizer.json").read_text(encoding="utf-8"))
    with (_PACKAGE / "datasets" / "alpaca_mini.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 3)]
    return {
        "merges": [" ".join(pair) for pair in tokenizer["model"]["merges"]],
        "special": [token["content"] for token in tokenizer["added_tokens"]],
        "size": len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]),
        "bos": "<|begin_of_text|>",
        "eos": "<|end_of_text|>",
        "with_input": PROMPT_WITH_INPUT,
        "without_input": PROMPT_WITHOUT_INPUT,
        "rows": rows,
    }


@functools.cache  # over a thousand plans, the same for each page
def _memory() -> dict[str, Any]:
    """For each card the plans of its profile, over lengths and batches, without and with checkpointing."""
    from llama_sft_helpers.memory import plan_memory
    from llama_sft_helpers.memory.plan import CARDS_GIB

    config = load_llama3_config()
    components = list(plan_memory(config, read_profile("colab-t4"))["component"])
    cards = {name: _card(config, read_profile(_PROFILES[name]), gib) for name, gib in CARDS_GIB.items()}
    return {"components": components, "cards": cards}


def _card(config: ModelConfig, profile: Profile, gib: float) -> dict[str, Any]:
    batches = sorted({*_BATCHES, profile.per_device_train_batch_size})
    lengths = sorted({*_LENGTHS, profile.max_length})
    settings: list[dict[str, Any]] = [
        {"gradient_checkpointing": again, "per_device_train_batch_size": batch, "max_length": length}
        for again, batch, length in itertools.product((False, True), batches, lengths)
    ]
    return {
        "gib": gib,
        "profile": profile.name,
        "checkpointing": profile.gradient_checkpointing,
        "batch": batches.index(profile.per_device_train_batch_size),
        "length": lengths.index(profile.max_length),
        "batches": batches,
        "lengths": lengths,
        "plans": [_plan(config, dataclasses.replace(profile, **setting), gib) for setting in settings],
    }


def _plan(config: ModelConfig, profile: Profile, card_gib: float) -> dict[str, Any]:
    """The components in GiB, whether they fit, and what would make them fit."""
    from llama_sft_helpers.memory import plan_fit, plan_memory

    fit = plan_fit(config, profile, cards_gib={"this": card_gib}).iloc[0]
    sizes = [round(size, 4) for size in plan_memory(config, profile)["gib"]]
    return {"gib": sizes, "verdict": fit["verdict"], "change": fit["change"]}


def _speed() -> dict[str, Any]:
    """The finished rungs of the ladder, and Alpaca's size as notebook 08 takes it."""
    from llama_sft_helpers.speed import read_results, summarize_ladder

    results = read_results(_RESULTS)
    speeds = summarize_ladder(results, epoch_tokens=1, price_per_hour=1)["tokens_per_second"]
    changes = {rung["rung"]: rung["change"] for rung in results["rungs"]}
    rungs = [{"rung": rung, "change": changes[rung], "speed": speed} for rung, speed in speeds.items()]
    return {"card": results["card"], "cap_gib": results["cap_gib"], "file": _RESULTS, "rungs": rungs}

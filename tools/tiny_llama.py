"""Ship the tiny Llama anew after a change to its recipe: ``make tiny-llama``.

It is trained into a temporary folder. If what comes out is the shipped model, but for what another CPU or
thread count rounds differently, the shipped files stay as they are and only their stamp is renewed, so that
an edited comment does not move the numbers of every test. Otherwise the new files take their place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from llama_sft_helpers import demo_model, tiny_llama

# Measured between instruction sets: 0.0018 at most; a model trained from another seed is off by 0.5.
TOLERANCE = 0.01


def same_model(built: Path, shipped: Path) -> bool:
    """Whether two folders hold the same tokenizer files, byte for byte, and weights within ``TOLERANCE``."""
    if not (shipped / "model.safetensors").is_file():
        return False
    tokenizers = ("tokenizer.json", "tokenizer_config.json")
    if any((built / name).read_bytes() != (shipped / name).read_bytes() for name in tokenizers):
        return False
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (built, shipped))
    return {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    } and all((tensor - theirs[name]).abs().max() <= TOLERANCE for name, tensor in ours.items())


def ship(shipped: Path = demo_model._SHIPPED) -> bool:
    """Train by the recipe, keep or replace the shipped files, renew their stamp; whether they were kept."""
    with tempfile.TemporaryDirectory() as scratch:
        tiny_llama.build(Path(scratch))
        kept = same_model(Path(scratch), shipped)
        if not kept:
            shipped.mkdir(parents=True, exist_ok=True)
            for path in Path(scratch).iterdir():
                shutil.copyfile(path, shipped / path.name)
    weights = hashlib.sha256((shipped / "model.safetensors").read_bytes()).hexdigest()[:16]
    stamp = {"model": "tiny-llama", "recipe": tiny_llama.recipe(), "weights": weights}
    part = shipped / f"{demo_model._STAMP}.part"
    part.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(part, shipped / demo_model._STAMP)
    return kept


if __name__ == "__main__":
    print("The weights are as before; their stamp is new." if ship() else "The tiny Llama was replaced.")

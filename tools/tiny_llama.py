"""The recipe of the tests' tiny Llama, and how its model is shipped: ``make tiny-llama`` after a change.

A tokenizer and two layers are trained on the shipped rows. The model that they made lies in the package, in
``models/tiny-llama``, and is the same on every machine. Trained again on another CPU it would not be: sums
are taken in another order there, which 500 steps turn into weights that differ by up to 0.002.

So it is trained into a temporary folder. If what comes out is the shipped model, but for what another CPU or
thread count rounds differently, the shipped files stay as they are and only their stamp is renewed, so that
an edited comment does not move the numbers of every test. Otherwise the new files take their place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from llama_sft_helpers import demo_model

_ROWS = Path(demo_model.__file__).parent / "datasets" / "alpaca_mini.jsonl"

# Llama 3's special tokens in their order; the tiny tokenizer puts them behind its 1024 - 256 learned pieces.
_LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
_VOCAB = 1024
_STEPS = 500
# Measured between instruction sets: 0.0018 at most; a model trained from another seed is off by 0.5.
TOLERANCE = 0.01


def recipe() -> str:
    """Sixteen digits of a hash of all that makes the model: this file and the rows."""
    texts = (path.read_text(encoding="utf-8") for path in (Path(__file__), _ROWS))
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def build(folder: Path) -> None:
    """Train the tiny Llama and write it: 500 steps on the shipped rows, half a minute on one core."""
    texts = list(texts_of_rows())
    tokenizer = _tokenizer(texts)
    config = LlamaConfig(
        vocab_size=_VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    set_seed(0)
    model = LlamaForCausalLM(config)
    _pretrain(model, tokenizer, texts)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def texts_of_rows() -> Iterator[str]:
    """Each row as one text: instruction, input and output, a line each."""
    with _ROWS.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1024 entries that behaves as Llama 3's: BOS in front, special tokens at the end."""
    tokenizer: Tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB - len(_LLAMA3_SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _LLAMA3_SPECIAL_TOKENS]
    )
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        additional_special_tokens=list(_LLAMA3_SPECIAL_TOKENS[2:]),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def _pretrain(model: Any, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> None:
    """Plain language modelling on the texts, joined by EOS and cut into blocks of 128 tokens."""
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    blocks = torch.tensor(stream[: len(stream) // 128 * 128]).view(-1, 128)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=_STEPS)
    model.train()
    for _ in range(_STEPS):
        batch = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


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
        build(Path(scratch))
        kept = same_model(Path(scratch), shipped)
        if not kept:
            shipped.mkdir(parents=True, exist_ok=True)
            for path in Path(scratch).iterdir():
                shutil.copyfile(path, shipped / path.name)
    weights = hashlib.sha256((shipped / "model.safetensors").read_bytes()).hexdigest()[:16]
    stamp = {"model": "tiny-llama", "recipe": recipe(), "weights": weights}
    part = shipped / f"{demo_model._STAMP}.part"
    part.write_text(json.dumps(stamp), encoding="utf-8")
    os.replace(part, shipped / demo_model._STAMP)
    return kept


if __name__ == "__main__":
    print("The weights are as before; their stamp is new." if ship() else "The tiny Llama was replaced.")

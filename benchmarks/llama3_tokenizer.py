"""Llama 3's own tokenizer without the hub, for benchmarks and tests.

The vocabulary is the file that Meta ships inside the PyPI package ``llama-models`` (Llama 3 Community
License); transformers turns it into the same fast tokenizer that the hub's repository holds. Needs
``tiktoken``, which reads that file.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VOCABULARY = "llama_models/llama3/tokenizer.model"
_SPECIAL_TOKENS = 256

# Ids 128,000 to 128,010 in order. The rest up to 128,255 are reserved tokens, numbered on.
_NAMED = {
    "3.0": "begin_of_text end_of_text reserved reserved reserved reserved start_header_id end_header_id "
    "reserved eot_id",
    "3.1": "begin_of_text end_of_text reserved reserved finetune_right_pad_id reserved start_header_id "
    "end_header_id eom_id eot_id python_tag",
}


def vocabulary_file() -> Path:
    """Path of Meta's tokenizer.model; the package itself is not imported.

    Raises:
        FileNotFoundError: llama-models is not installed.
    """
    fix = "pip install --no-deps llama-models && pip install tiktoken"
    try:
        path = Path(str(importlib.metadata.distribution("llama-models").locate_file(_VOCABULARY)))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"Llama 3's tokenizer comes from the package llama-models, which is not here: {fix}"
        ) from error
    if not path.is_file():
        raise FileNotFoundError(f"llama-models has no {_VOCABULARY}; its tested version: {fix}==0.3.0")
    return path


def special_tokens(version: Literal["3.0", "3.1"] = "3.0") -> list[str]:
    """The 256 special tokens in the order of their ids, 128,000 to 128,255."""
    names = _NAMED[version].split()
    tokens = []
    reserved = 0
    for position in range(_SPECIAL_TOKENS):
        name = names[position] if position < len(names) else "reserved"
        if name == "reserved":
            name = f"reserved_special_token_{reserved}"
            reserved += 1
        tokens.append(f"<|{name}|>")
    return tokens


def build_llama3_tokenizer(version: Literal["3.0", "3.1"] = "3.0") -> PreTrainedTokenizerFast:
    """The tokenizer of Meta-Llama-3-8B (3.0) or Llama-3.1-8B: 128,256 tokens, BOS in front, no pad token."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = special_tokens(version)
    tokenizer = TikTokenConverter(str(vocabulary_file()), extra_special_tokens=special).converted()
    bos = special[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|end_of_text|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )

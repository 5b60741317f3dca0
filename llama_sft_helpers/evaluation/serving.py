"""Notebook 07: the ``Modelfile`` that makes Ollama ask as training did, and llama.cpp asked by it.

As a program (``python -m llama_sft_helpers.evaluation.serving MODELFILE``, which needs the package
``xllamacpp``) it reads a JSON list of instructions and writes the answers that llama.cpp gives by that file.
llama.cpp gets a process of its own because its threads and PyTorch's do not share one well.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from llama_sft_helpers.core.files import write_text

# Ollama puts the user's message in this place (https://docs.ollama.com/modelfile).
MESSAGE = "{{ .Prompt }}"
_MODELFILE = re.compile(
    r'FROM (?P<model>.+)\n(?:ADAPTER (?P<adapter>.+)\n)?TEMPLATE """(?P<template>(?s:.*?))"""\n'
    r'PARAMETER stop "(?P<stop>.+)"\nPARAMETER num_predict (?P<num_predict>\d+)\n'
)


def write_modelfile(
    path: str | Path,
    *,
    model_file: str,
    prompt: str,
    stop: str,
    max_new_tokens: int,
    adapter_file: str | None = None,
) -> Path:
    """Write a ``Modelfile``: the model, its prompt, where an answer ends, and greedy decoding as in 07.

    The GGUF files of the model and, if it is not merged into that, of the adapter lie beside it. The prompt
    is that of training for the message ``MESSAGE``; ``stop`` is the text of the token that ends an answer.

    Raises:
        ValueError: The prompt has no place for the message, or holds what ends a template.
    """
    if MESSAGE not in prompt or '"""' in prompt:
        raise ValueError(
            f'prompt is {prompt!r}; expected {MESSAGE} once and no """. Make it by the function that makes '
            f"your prompts, of the instruction {MESSAGE!r}."
        )
    adapter = f"ADAPTER ./{adapter_file}\n" if adapter_file else ""
    text = (
        f'FROM ./{model_file}\n{adapter}TEMPLATE """{prompt}"""\nPARAMETER stop "{stop}"\n'
        f"PARAMETER num_predict {max_new_tokens}\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n"
    )
    write_text(path, text)
    return Path(path)


def _read_modelfile(path: Path) -> dict[str, Any]:
    found = _MODELFILE.match(path.read_text(encoding="utf-8"))
    if not found:
        raise ValueError(f"{path} is not as write_modelfile writes it; write it anew.")
    return found.groupdict()


def ask(modelfile: str | Path, instructions: list[str]) -> list[dict[str, Any]]:
    """llama.cpp's greedy answers, by the model, template, stop and length of a ``Modelfile``.

    Returns:
        For each ``text``, ``tokens`` (ids) and ``stopped`` (whether it ended by itself).

    Raises:
        ValueError: The file is not one of ``write_modelfile``.
    """
    import xllamacpp

    said, folder = _read_modelfile(Path(modelfile)), Path(modelfile).parent
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.verbosity = str(folder / said["model"]), 2048, 0
    if threads := os.environ.get("OMP_NUM_THREADS"):  # llama.cpp's threads do not look at it themselves
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if said["adapter"]:
        lora = xllamacpp.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(folder / said["adapter"]), 1.0
        params.lora_adapters = [lora]
    server = xllamacpp.Server(params)
    answers = []
    for instruction in instructions:
        request = {
            "prompt": said["template"].replace(MESSAGE, instruction),
            "stop": [said["stop"]],
            "max_tokens": int(said["num_predict"]),
            "temperature": 0,
            "repeat_penalty": 1,
            "logprobs": 1,
        }
        choice = server.handle_completions(request)["choices"][0]
        tokens = [token["id"] for token in (choice.get("logprobs") or {}).get("content", [])]
        stopped = choice["finish_reason"] == "stop"
        answers.append({"text": choice["text"], "tokens": tokens, "stopped": stopped})
    return answers


if __name__ == "__main__":
    print(json.dumps(ask(sys.argv[1], json.load(sys.stdin))))  # noqa: T201  (a program's answer)

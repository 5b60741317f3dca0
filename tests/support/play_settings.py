"""200 random settings of ``play.html``, each a call of its JavaScript beside what the Python code says."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import llama_sft_helpers
from llama_sft_helpers.core.llama import LINEARS, load_llama3_config
from llama_sft_helpers.data import count_tokens, summarize_loss_mask, to_prompt_completion
from llama_sft_helpers.lora import plan_adapters
from llama_sft_helpers.memory import CARDS_GIB, plan_fit, plan_memory
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.quantization import quantize_absmax
from llama_sft_helpers.speed import read_results, summarize_ladder

PACKAGE = Path(llama_sft_helpers.__file__).parent
MODEL = PACKAGE / "templates" / "play_model.js"
TOKENIZER = AutoTokenizer.from_pretrained(PACKAGE / "models" / "tiny-llama")
LLAMA3 = load_llama3_config()
# Words, and what tokenizers of two languages may see differently: spaces, line ends, digits, other scripts.
PARTS = [
    *"aZß한🙂é'.,#\n\t\r\v\x1c\x85\xa0\xad\u2028\ufeff",
    "  ",
    "we'll",
    " DON'T",
    " 2024",
    "x1",
    " the",
    "{input}",
]
PARTS += ["\n\n", "### Response:\n", " instruction", "...", "<|end_of_text|>", "<|begin_of_text|>", "<|end"]


def settings(data, count=200):
    """Function, its arguments and the expected result: as many of each section."""
    chance = random.Random(0)
    sections = (_grid, _adapter, _tokens, _memory, _epoch)
    return [sections[n % len(sections)](data, chance) for n in range(count)]


def assert_equal(expected, results):
    """Hold what JavaScript returned against ``settings``; sums may differ in the last digits."""
    assert len(results) == len(expected) == 200
    for (name, args, wanted), result in zip(expected, results, strict=True):
        for key, value in wanted.items():
            exact = name in ("maskRow", "planMemory")
            assert result[key] == (value if exact else pytest.approx(value, rel=1e-12)), (name, args, key)


def _grid(data, chance):
    bits, absmax = chance.randint(2, 8), round(chance.uniform(0.01, 2), 2)
    outlier = chance.choice([1, 2, chance.randint(3, 20)])  # 2 makes ties
    row, place = torch.tensor(data["grid"]["row"], dtype=torch.float64), data["grid"]["outlier"]
    if outlier > 1:
        row[place] = outlier
    half = (row * absmax).half().float()
    largest, top = half.abs().max(), 2 ** (bits - 1) - 1
    codes = quantize_absmax((row * absmax)[None], bits)[0][0]
    step, half = largest.item() / top, half.double()
    others = torch.arange(len(row)) != (place if outlier > 1 else -1)
    error = ((codes.double() * step - half)[others].norm() / half[others].norm()).item()
    expected = {"codes": codes.tolist(), "weights": half.tolist(), "step": step, "error": error}
    return "quantizeRow", (bits, absmax, outlier), expected


def _adapter(data, chance):
    r, targets = chance.randint(1, 256), chance.sample(LINEARS, chance.randint(1, 7))
    parameters = int(plan_adapters(LLAMA3, r, targets)["parameters"].sum())
    # 04 asserts this count of Llama 3 8B's weights on the model itself.
    share = parameters / (8_030_261_248 + parameters)
    expected = {"parameters": parameters, "mib": parameters * 4 / 2**20, "share": share}
    return "planAdapter", (r, targets), expected


def _text(chance):
    return "".join(chance.choices(PARTS, k=chance.randint(0, 30)))


def _tokens(data, chance):
    own = {"instruction": _text(chance), "input": _text(chance), "output": _text(chance) + "x"}
    row, limit = chance.choice([own, own, *data["tokens"]["rows"]]), chance.randint(16, 400)
    texts = to_prompt_completion(row)
    counts = {name: n[0] for name, n in count_tokens({k: [v] for k, v in texts.items()}, TOKENIZER).items()}
    ids = TOKENIZER(texts["prompt"])["input_ids"]
    answer = TOKENIZER(texts["completion"], add_special_tokens=False)["input_ids"]
    labels = [-100] * len(ids) + answer + [TOKENIZER.eos_token_id]
    ids = (ids + answer + [TOKENIZER.eos_token_id])[:limit]
    batch = {"input_ids": ids, "labels": labels[:limit], "attention_mask": [1] * len(ids)}
    batch = {name: torch.tensor([values]) for name, values in batch.items()}
    mask = summarize_loss_mask(batch, TOKENIZER).iloc[0]
    expected = {"pieces": TOKENIZER.convert_ids_to_tokens(ids), "tokens": counts["tokens"]}
    expected |= {"prompt": counts["prompt_tokens"], "scored": int(mask["scored"])}
    return "maskRow", (row, limit), expected | {"eos": bool(mask["eos_scored"])}


def _memory(data, chance):
    card = chance.choice(list(CARDS_GIB))
    found = data["memory"]["cards"][card]
    batch, length = (chance.randrange(len(found[name])) for name in ("batches", "lengths"))
    checkpointing = chance.random() < 0.5
    profile = read_profile(
        found["profile"],
        per_device_train_batch_size=found["batches"][batch],
        max_length=found["lengths"][length],
        gradient_checkpointing=checkpointing,
    )
    plan = plan_memory(LLAMA3, profile)
    fit = plan_fit(LLAMA3, profile, cards_gib={card: CARDS_GIB[card]}).iloc[0]
    expected = {"gib": plan["gib"].round(4).tolist(), "verdict": fit["verdict"], "change": fit["change"]}
    return "planMemory", (card, checkpointing, batch, length), expected


def _epoch(data, chance):
    tokens, price = chance.randint(1, 10**9), round(chance.uniform(0, 10), 2)
    ladder = summarize_ladder(read_results("speed_h200_40gib"), tokens, price).dropna(subset=["epoch_hours"])
    rung = chance.choice(list(ladder.index))
    hours, cost = ladder.loc[rung, ["epoch_hours", "epoch_price"]]
    return "planEpoch", (rung, tokens, price), {"hours": hours, "price": cost}

"""The training run of notebook 06 on the tiny Llama, for tests."""

import logging
import warnings

import datasets
import tiny_models
import transformers
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from tiny_models import SEVEN
from transformers import AutoTokenizer

from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.demo_model import ensure_model
from llama_sft_helpers.profiles import load_profile


def quiet():
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def build_model(r=16):
    model = tiny_models.load_int8(ensure_model("tiny-llama"))
    transformers.set_seed(42)
    lora = LoraConfig(r=r, lora_alpha=16, lora_dropout=0, task_type="CAUSAL_LM", target_modules=SEVEN)
    return get_peft_model(model, lora)


def build_trainer(folder, callbacks=(), model=None, **changes):
    rows = load_dataset(load_profile("ci-tiny").dataset_id, split="train").select(range(48))
    rows = rows.map(to_prompt_completion, remove_columns=rows.column_names)
    settings = {
        "max_length": 128,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
    }
    trainer = tiny_models.build_trainer(
        model or build_model(),
        folder,
        AutoTokenizer.from_pretrained(ensure_model("tiny-llama")),
        rows.select(range(40)),
        eval_rows=rows.select(range(40, 48)),
        callbacks=callbacks,
        **(settings | changes),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer

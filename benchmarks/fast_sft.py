"""trl's ``sft`` command with notebook 08's switches: int8 product, varlen attention, compiled layers.

    accelerate launch --config_file accelerate_ddp-int8.yaml fast_sft.py --config sft_ddp-int8.yaml

It reads the files that notebook 07 writes, and does what ``python -m trl.scripts.sft`` does with them but for
the switches, for LoRA in float32 as in notebook 06, and for checkpointing, which compiled layers do without.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from datasets import load_dataset
from trl import SFTTrainer, get_peft_config, get_quantization_config
from trl.scripts.sft import make_parser

from llama_sft_helpers import speed

BUDGET = 0.9  # as the profile colab-a100 has it


class QuickTrainer(speed.QuickSteps, SFTTrainer):
    """trl's trainer, which counts the parameters once a run."""


def main() -> None:
    script, training, model, _ = make_parser().parse_args_and_config(fail_with_unknown_args=False)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # DDP sends gradients when a layer's backward pass is done; the compiler need not cut layers for that
    torch._dynamo.config.optimize_ddp = False
    attention = speed.register_varlen_attention()
    training.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": attention}
    training.gradient_checkpointing = training.logging_nan_inf_filter = False
    data = load_dataset(script.dataset_name)
    trainer = QuickTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    layers = speed.use_fast_int8(trainer.model)
    compiled = speed.compile_decoder_layers(trainer.model, BUDGET)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    found = {"fast_int8_layers": layers, "attention": attention, "graphs": compiled.graphs}
    found |= {"compile_seconds": round(compiled.seconds, 1), "fallback": compiled.fallback}
    trainer.accelerator.print("switches " + json.dumps(found))


if __name__ == "__main__":
    main()

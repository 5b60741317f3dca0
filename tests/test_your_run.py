"""``llama-sft train`` and notebook 09: from every form of data to an adapter with its template."""

import functools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from data_forms import FORMS, write_form
from safetensors.torch import load_file
from small_data import write_rows
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llama_sft_helpers import data
from llama_sft_helpers.cli import app
from llama_sft_helpers.data import DataError, to_prompt_completion
from llama_sft_helpers.profiles import _CHOICES, load_profile, read_profile

FORM = Path(__file__).parent.parent / "notebooks" / "09_your_run.ipynb"
# Runs when the kernel's Python starts: a hub that holds one data set.
HUB = """
import datasets
rows = datasets.Dataset.from_parquet({path!r})
datasets.load_dataset = lambda name, split: {{("me/own", "train"): rows}}[name, split]
"""
SHORT = ["--set", "max_steps=2", "--set", "eval_rows=4", "--set", "max_new_tokens=2"]


def train(source, out, *options):
    command = ["train", "--profile", "ci-tiny", "--data", str(source), "--out", str(out), *options]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "your_run" / "training_summary.json").read_text(encoding="utf-8"))
    notebook = nbformat.read(out / "09_your_run.ipynb", as_version=4)
    return summary, json.dumps([cell.get("outputs") for cell in notebook.cells])


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_model_dir):
    """A run on the first form's rows that exports all it can: its options and folder, and what it gave."""
    folder = tmp_path_factory.mktemp("exported")
    source, columns, _ = write_form(FORMS[0], folder / "data")
    options = ["--model", str(tiny_model_dir), "--columns", columns, "--export", "adapter and GGUF", *SHORT]
    return source, options, folder / "out", train(source, folder / "out", *options)


@pytest.mark.parametrize(
    "form", [FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])]
)
def test_a_file_becomes_an_adapter_that_keeps_its_template(
    form, tmp_path, tiny_model_dir, monkeypatch, request
):
    source, columns, layout = write_form(form, tmp_path / "data")
    if form == "hub":
        (tmp_path / "sitecustomize.py").write_text(HUB.format(path=str(source)), encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        source = "me/own"
    out, options = tmp_path / "out", ["--columns", columns] if columns else []
    if form == FORMS[0]:
        source, _, out, (summary, shown) = request.getfixturevalue("exported")
    else:
        summary, shown = train(source, out, "--model", str(tiny_model_dir), *options, *SHORT)
    plain = layout == "prompt-completion"
    assert (summary["data"], summary["prompt_format"]) == (str(source), "plain" if plain else "alpaca")
    assert f"layout: {layout}" in shown
    adapter = out / "your_run" / "adapter"
    said = "datasets:\n- me/own" if form == "hub" else "The data are the trainer's own"
    assert said in (adapter / "README.md").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    if plain:
        assert tokenizer.chat_template is None
        return
    asked = [{"role": "user", "content": "Add 2 and 2."}]
    prompt = to_prompt_completion({"instruction": "Add 2 and 2.", "output": "4"})["prompt"]
    assert tokenizer.apply_chat_template(asked, tokenize=False) == tokenizer.bos_token + prompt


@pytest.mark.parametrize("setting", ["prompt_format", "export"])
def test_the_form_offers_what_a_profile_takes(setting):
    cell = next(cell.source for cell in nbformat.read(FORM, as_version=4).cells if "# @param" in cell.source)
    (offered,) = re.findall(rf"^{setting} = .* # @param (\[.*\])$", cell, flags=re.MULTILINE)
    assert tuple(json.loads(offered)) == _CHOICES[setting]


def test_an_empty_field_is_left_out_and_a_setting_that_a_reader_adds_may_be_false_or_0():
    code = [cell.source for cell in nbformat.read(FORM, as_version=4).cells if cell.cell_type == "code"]
    fields, load = (next(source for source in code if part in source) for part in ("# @param", "form = "))
    above, line, below = load.partition("profile = load_profile(form=form)")
    added = 'form |= {"packing": False, "train_rows": 0}\n'
    read = functools.partial(read_profile, "colab-a100")
    names = {"load_profile": read, "read_profile": read}
    exec("\n".join([fields, above + added + line + below]), names)
    profile, shipped = names["profile"], read_profile("colab-a100")
    assert (shipped.packing, profile.packing, profile.train_rows) == (True, False, 0)
    assert (profile.model_id, profile.learning_rate) == (shipped.model_id, shipped.learning_rate)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "epochs=-1"], "not above 0"),
        (["--export", "gguf"], "'export': 'gguf' is not one of 'adapter', 'adapter and GGUF'"),
    ],
)
def test_settings_that_cannot_be_are_one_clear_error(options, told, tmp_path):
    result = CliRunner().invoke(app, ["train", "--profile", "ci-tiny", "--out", str(tmp_path), *options])
    assert result.exit_code == 1
    assert told in result.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dataset_id": "none.csv"}, "There is no file or folder"),
        ({"columns": "question=instruction"}, "has no column 'question'"),
    ],
)
def test_data_that_cannot_be_trained_on_stops_09_before_a_model_is_loaded(options, told):
    """``llama-sft train`` ends with the failing cell's own message, as any run does (``test_run.py``)."""
    cells = [cell.source for cell in nbformat.read(FORM, as_version=4).cells if cell.cell_type == "code"]
    (place,) = (n for n, source in enumerate(cells) if "data.load_rows(" in source)
    assert all("AutoModelForCausalLM.from_pretrained(" not in source for source in cells[:place])
    names = {"AutoTokenizer": AutoTokenizer, "data": data, "profile": load_profile("ci-tiny", **options)}
    with pytest.raises((DataError, FileNotFoundError), match=told):
        exec(cells[place], names)


@pytest.mark.parametrize(
    ("dataset", "elsewhere", "length"),
    [
        ("", {}, (6, None)),  # ci-tiny has 12 updates: a demonstration on rows that 06 trains on
        ("rows.csv", {}, (12, 3)),  # updates, and epochs, which count if there are any
        ("", {"epochs": 2}, (6, 2)),
        ("", {"max_steps": 9}, (9, None)),
        ("", {"max_steps": 1}, (1, None)),
        ("", "max_steps = 7", (7, None)),  # in a file of one's own
    ],
)
def test_the_form_of_09_halves_the_updates_where_it_names_no_data(
    monkeypatch, tmp_path, dataset, elsewhere, length
):
    cells = {cell.id: cell.source for cell in nbformat.read(FORM, as_version=4).cells}
    in_file, in_settings = (elsewhere, {}) if isinstance(elsewhere, str) else ("", elsewhere)
    (tmp_path / "own.toml").write_text(f'profile = "ci-tiny"\n[settings]\n{in_file}\n', encoding="utf-8")
    monkeypatch.setenv("SFT_PROFILE", str(tmp_path / "own.toml"))
    monkeypatch.setenv("SFT_SETTINGS", json.dumps(in_settings))
    names = {"load_profile": load_profile, "read_profile": read_profile}
    exec(cells["09-005"], names)
    exec(cells["09-007"], names | {"dataset": dataset}, found := {})
    assert (found["profile"].max_steps, found["profile"].epochs) == length


@pytest.mark.parametrize(
    ("command", "own_file", "length"),
    [
        (["train", "--data", "rows.csv"], None, {"epochs": 3}),
        (["train", "--data", "rows.csv", "--set", "max_steps=9"], None, {"max_steps": 9}),
        (["train", "--data", "rows.csv", "--set", "epochs=none"], None, {"epochs": None, "max_steps": 12}),
        (["train", "--data", "rows.csv"], "", {"max_steps": 12}),
        (["train", "--data", "rows.csv"], "max_steps = 7", {"max_steps": 7}),
        (["train", "--data", "rows.csv"], "epochs = 2", {}),
        (["run", "--data", "rows.csv"], None, {"max_steps": 12}),  # else the form of 09 would halve it
        (["run"], 'dataset_id = "rows.csv"', {"max_steps": 12}),
        (["run"], None, {}),
    ],
)
def test_rows_of_ones_own_are_seen_three_times_or_as_profile_and_settings_say(
    command, own_file, length, tmp_path, monkeypatch
):
    profile = "ci-tiny"
    if own_file is not None:
        profile = str(tmp_path / "own.toml")
        Path(profile).write_text(f'profile = "ci-tiny"\n[settings]\n{own_file}\n', encoding="utf-8")
    kernels = []
    monkeypatch.setattr(
        "llama_sft_helpers.run._execute_all",
        lambda paths, out, timeout, environment, **more: kernels.append(environment) or {},
    )
    options = ["--profile", profile, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*command, *options])
    assert result.exit_code == 0, result.output
    told = json.loads(kernels[0]["SFT_SETTINGS"])
    assert {name: told[name] for name in ("epochs", "max_steps") if name in told} == length


@pytest.mark.slow
@pytest.mark.parametrize("switches", ["", "packing", "packing fast_int8 compile_layers"])
def test_an_overfitted_run_keeps_everything_and_its_best_adapter(switches, tmp_path):
    source = write_rows(tmp_path / "data" / "rows.jsonl", 12)
    options = ["epochs=12", "learning_rate=0.02", "max_new_tokens=2"]
    options += [f"{switch}=true" for switch in switches.split()]
    settings = [word for option in options for word in ("--set", option)]
    summary, shown = train(source, tmp_path / "out", *settings)
    folder = tmp_path / "out" / "your_run"
    assert "Overfitted. The loss was lowest after step" in shown
    assert "each row is seen 12 times. That is often" in shown
    losses = pd.read_csv(folder / "training_log.csv").set_index("step")["eval_loss"].dropna()
    assert summary["eval_loss_after"] == pytest.approx(losses.min())
    checkpoints = [f"checkpoints/checkpoint-{step}" for step in (losses.idxmin(), losses.index[-1])]
    saved, best, last = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", *checkpoints)
    )
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert saved[name].equal(best[name])
    assert not saved[name].equal(last[name])
    assert (folder / "adapter.zip").is_file()


def test_a_second_run_writes_the_export_anew_and_keeps_an_edited_card(tmp_path, exported):
    """The tiny model's tokenizer is unknown to llama.cpp: the profile stops before the GGUF file."""
    source, options, out, _ = exported
    folder = shutil.copytree(out, tmp_path / "out") / "your_run"
    card = folder / "adapter" / "README.md"
    edited = card.read_text(encoding="utf-8") + "The rows are under CC0.\n"
    card.write_text(edited, encoding="utf-8")
    (folder / "Modelfile").unlink()
    _, shown = train(source, tmp_path / "out", *options)
    assert "README.md was edited" in shown
    assert "convert_hf_to_gguf" in shown
    assert (folder / "merged" / "model.safetensors").is_file()
    assert "FROM ./model-q8_0.gguf" in (folder / "Modelfile").read_text(encoding="utf-8")
    with zipfile.ZipFile(folder / "adapter.zip") as archive:
        assert archive.read("README.md").decode() == edited == card.read_text(encoding="utf-8")
        assert "r=16, alpha=16" in archive.read("README.new.md").decode()

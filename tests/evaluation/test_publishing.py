"""The model card and the upload, against the real client and a hub on loopback."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from fake_hub import Account
from fake_hub_upload import UploadHub
from peft import LoraConfig

from llama_sft_helpers.core.files import FilesError
from llama_sft_helpers.core.llama import is_llama3
from llama_sft_helpers.evaluation import (
    PublishError,
    check_repo_id,
    hash_rows,
    hub_errors,
    keep_model_card,
    write_model_card,
)
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.training import read_training_summary

ROWS = Path(__file__).parents[2] / "llama_sft_helpers" / "datasets"
SUMMARY = {
    "eval_loss_before": 1.5,
    "eval_loss_after": 1.25,
    "train_seconds": 61.4,
    "train_tokens": 12345,
    "peak_gib": 8.46,
    "profile": "colab-a100",
    "versions": {"torch": "2.11.0", "peft": "0.20.0"},
}
PROMPT = "### Instruction:\n{{ .Prompt }}\n\n### Response:\n"
LOSSES = pd.DataFrame(
    {"loss_nats": [1.5, 1.25], "low": [1.4, 1.2], "high": [1.6, 1.3], "perplexity": [4.48, 3.49]},
    index=["base", "tuned"],
).assign(rows=2, tokens=2000)
ANSWERS = pd.DataFrame(
    {
        "prompt": ["Say | hi", "Code"],
        "base": ["hello <script>", "```python\nprint()\n```"],
        "base_tokens": [3, 12],
        "base_stopped": [True, False],
        "tuned": ["hi", "````x````"],
        "tuned_tokens": [2, 5],
        "tuned_stopped": [True, True],
    }
)


def write(folder, **changes):
    facts = {
        "profile": read_profile("colab-a100"),
        "peft_config": LoraConfig(r=8, lora_alpha=12, target_modules=["v_proj", "q_proj"]),
        "prompt": PROMPT,
        "training_summary": SUMMARY,
        "data_sha256": "ab" * 32,
        "losses": LOSSES,
        "generations": ANSWERS,
        "device": "NVIDIA A100",
    }
    return write_model_card(folder, **{**facts, **changes})


def test_a_card_names_what_was_run_and_measured(tmp_path):
    text = write(tmp_path).read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "meta-llama/Meta-Llama-3-8B"
    assert metadata["datasets"] == ["yahma/alpaca-cleaned"]
    assert metadata["license"] == "llama3"
    expected = (
        "ab" * 32,
        "torch 2.11.0",
        "12,345",
        "8.46",
        "1.5000, 1.2500",
        "1.2000 to 1.3000",
        "NVIDIA A100",
        "r=8, alpha=12, dropout=0.0",
        "q_proj, v_proj",
        "CC BY-NC 4.0",
    )
    for fact in (
        *expected,
        "learning_rate",
        "Built with Meta Llama 3",
        "stopped after 2 tokens",
        "cut after 12",
    ):
        assert fact in text, fact


def test_a_card_says_how_to_ask(tmp_path):
    text = write(tmp_path).read_text(encoding="utf-8")
    assert f"```text\n{PROMPT.strip()}\n```" in text
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert 'from_pretrained("meta-llama/Meta-Llama-3-8B"' in snippet
    compile(snippet, "snippet", "exec")
    given = next(line for line in snippet.splitlines() if line.startswith("prompt = "))
    assert ast.literal_eval(given.removeprefix("prompt = ")) == PROMPT
    for command in ("llama-completion -m model-q8_0.gguf", "ollama create my-model -f Modelfile"):
        assert command in text


def test_the_licence_is_that_of_the_data(tmp_path):
    for dataset_id, said in (("/my/rows.csv", "the trainer's own"), (str(ROWS), "Apache-2.0")):
        text = write(tmp_path, profile=read_profile("ci-tiny", dataset_id=dataset_id)).read_text("utf-8")
        assert said in text
        assert "CC BY-NC" not in text


def test_a_local_model_is_named_without_its_path_and_without_llama_terms(tmp_path):
    profile = read_profile("ci-tiny", model_id="/somewhere/private/tiny-llama", dataset_id="/somewhere/rows")
    text = write(tmp_path, profile=profile).read_text(encoding="utf-8")
    assert "/somewhere" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "Built with Meta Llama 3" not in text


def test_answers_cannot_break_out_of_their_blocks(tmp_path):
    text = write(tmp_path).read_text(encoding="utf-8")
    assert "`````text\n````x````\n`````" in text
    assert "````text\n```python\nprint()\n```\n````" in text


def test_what_looks_like_a_template_stays_text(tmp_path):
    answers = ANSWERS.assign(prompt=["{{ 1234 * 1000 }}", "{% raw %}"], tuned=["{{ cell }}", "{# note #}"])
    losses = LOSSES.rename(index={"base": "<b>|{{ 1234 * 1000 }}"})
    text = write(tmp_path, generations=answers, losses=losses).read_text(encoding="utf-8")
    for kept in ("```text\n{{ 1234 * 1000 }}\n```", "{% raw %}", "{{ cell }}", "{# note #}"):
        assert kept in text, kept
    assert "| &lt;b>\\|{{ 1234 * 1000 }} | 1.5000 |" in text
    assert "1234000" not in text


def test_a_card_is_renewed_but_a_foreign_or_edited_one_is_left_alone(tmp_path):
    path = write(tmp_path)
    first = path.read_text(encoding="utf-8")
    write(tmp_path, device="NVIDIA L4")
    second = path.read_text(encoding="utf-8")
    assert first != second
    form = "# Model Card for Model ID\n[More Information Needed]\n"  # what PEFT leaves
    path.write_text(form, encoding="utf-8")
    write(tmp_path)
    assert form not in path.read_text(encoding="utf-8")
    for text in ("# My own card\n", second + "A sentence of mine.\n", second.replace("1.2500", "0.2500")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(PublishError, match="left as it is"):
            write(tmp_path)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_card_is_kept_while_an_adapter_is_saved_beside_it(tmp_path, tiny_model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"]))
    card = write(tmp_path / "adapter").read_text(encoding="utf-8")
    with keep_model_card(tmp_path / "adapter"):
        model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8") == card
    with keep_model_card(tmp_path / "new"):
        model.save_pretrained(tmp_path / "new")
    write(tmp_path / "new")


def test_a_file_in_a_folder_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    profile = dataclasses.replace(read_profile("colab-a100"), dataset_id="sample_data/my.csv")
    assert "- sample_data/my.csv" in write(tmp_path / "hub", profile=profile).read_text(encoding="utf-8")
    (tmp_path / "sample_data").mkdir()
    (tmp_path / "sample_data" / "my.csv").touch()
    text = write(tmp_path / "own", profile=profile).read_text(encoding="utf-8")
    assert "datasets:" not in text
    assert "the trainer's own" in text


def test_a_summary_is_read_or_explained(tmp_path):
    path = tmp_path / "training_summary.json"
    with pytest.raises(FilesError, match="Run notebook 06 first"):
        read_training_summary(path)
    path.write_text('{"eval_loss_before": 1')
    with pytest.raises(FilesError, match="damaged"):
        read_training_summary(path)
    path.write_text('{"eval_loss_before": 1}')
    with pytest.raises(FilesError, match="lacks eval_loss_after, train_seconds"):
        read_training_summary(path)


def test_rows_have_a_hash_of_their_content_only():
    rows = [{"prompt": "a", "completion": "é"}]
    assert hash_rows(rows) == hash_rows([{"completion": "é", "prompt": "a"}])
    assert hash_rows(rows) != hash_rows([{"prompt": "aé", "completion": ""}])
    # sha256sum of the one JSON line
    assert hash_rows([{"a": 1}]) == "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama/Meta-Llama-3-8B", True),
        ("meta-llama/Llama-3-8B", True),
        ("HuggingFaceTB/SmolLM2-135M", False),
        ("meta-llama/Llama-2-7b", False),
        ("NousResearch/Meta-Llama-3-8B", True),
        ("unsloth/llama-3-8b", True),
        ("/content/Meta-Llama-3-8B", True),
    ],
)
def test_llama_3_is_told_from_other_models(name, expected):
    assert is_llama3(name) is expected


def test_repository_names():
    check_repo_id("ada/Llama-3-8B-alpaca", "meta-llama/Meta-Llama-3-8B")
    check_repo_id("ada/anything", "HuggingFaceTB/SmolLM2-135M")
    with pytest.raises(PublishError, match="must begin with 'Llama-3'"):
        check_repo_id("ada/my-alpaca", "meta-llama/Meta-Llama-3-8B")
    with pytest.raises(PublishError, match="your-name/model-name"):
        check_repo_id("my-alpaca", "x/y")
    for name in ("../my", "me/a--b", "me/.x"):
        with pytest.raises(PublishError, match="your-name/model-name"):
            check_repo_id(name, "x/y")


# --- The hub ---


@pytest.fixture
def hub():
    with UploadHub() as hub:
        hub.accounts |= {"w": Account("ada", role="write"), "r": Account("bob", role="read")}
        yield hub


def push(hub, folder, card, token="w", repo_id="ada/model"):
    """What notebook 07 does, with the endpoint and token given instead of found."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=token)
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns="README.md")
        api.upload_file(repo_id=repo_id, path_or_fileobj=card, path_in_repo="README.md")


@pytest.fixture
def upload(tmp_path):
    from safetensors.torch import save_file

    files = tmp_path / "files"
    files.mkdir()
    save_file({"a": torch.arange(4.0)}, files / "adapter_model.safetensors")
    (files / "adapter_config.json").write_text("{}")
    (files / "README.md").write_text("PEFT's own")
    return files, write(tmp_path / "card")


def test_an_upload_arrives_whole_and_private(hub, upload):
    files, card = upload
    push(hub, files, card)
    assert hub.repos["ada/model"] == "private:ada"
    arrived = {path: content for (_, path), content in hub.files.items()}
    assert set(arrived) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert arrived["adapter_model.safetensors"] == (files / "adapter_model.safetensors").read_bytes()
    assert arrived["README.md"] == card.read_bytes()


@pytest.mark.parametrize(
    ("token", "repo_id", "status"),
    [("unknown", "ada/model", 401), ("r", "bob/model", 403), ("w", "eve/model", 403)],
)
def test_refusals_are_explained(hub, upload, token, repo_id, status):
    with pytest.raises(PublishError, match=rf"HTTP {status}\)") as caught:
        push(hub, *upload, token=token, repo_id=repo_id)
    assert "Use your own name" in str(caught.value) or "Make one" in str(caught.value)
    assert not hub.files


def test_a_name_that_exists_is_not_uploaded_to(hub, upload):
    hub.repos["ada/model"] = "open"
    with pytest.raises(PublishError, match=r"exists already; nothing was uploaded.*HTTP 409"):
        push(hub, *upload)
    assert not hub.files


def test_other_statuses_and_a_dead_hub_are_explained(hub, upload):
    hub.fail_status = 418
    with pytest.raises(PublishError, match=r"refused: .*418.*HTTP 418"):
        push(hub, *upload)
    hub.fail_status = 0
    dead = UploadHub()
    with dead:
        pass
    with pytest.raises(PublishError, match="cannot be reached"):
        push(dead, *upload)


NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "07_evaluation.ipynb"


def publish_cell():
    cells = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "code"]
    return next(source for source in cells if source.startswith("publish_to ="))


PRELUDE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from huggingface_hub import create_repo, upload_file
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama_sft_helpers import evaluation
shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
card_path, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
profile, training = SimpleNamespace(model_id="some/base"), {"eval_loss_after": 1.0}
"""


def test_the_notebooks_cell_uploads_after_a_yes_only(hub, tmp_path, upload, tiny_model_dir):
    """The notebook's own cell in a process of its own, twice: answered no, then yes."""
    cell = publish_cell().replace('publish_to = ""', 'publish_to = "ada/model"')
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "w", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{cell}\n{cell}", str(upload[1]), str(tiny_model_dir)],
        input="no\nyes\n",
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Had the first run uploaded, the second would have failed: the name would have been taken.
    assert done.returncode == 0, done.stderr
    assert hub.requests.count(("POST", "/api/repos/create", "ada")) >= 1
    assert hub.repos["ada/model"] == "private:ada"
    assert hub.files["ada/model", "README.md"].decode() == upload[1].read_text(encoding="utf-8")
    needed = {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert needed <= {path for _, path in hub.files}


def test_the_notebook_as_it_is_uploads_nothing():
    assert publish_cell().splitlines()[0].startswith('publish_to = ""')

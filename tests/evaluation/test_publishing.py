"""The model card and the upload, against the real client and a hub on loopback."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch
import yaml
from fake_hub import Account
from fake_hub_upload import UploadHub
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from llama_sft_helpers.core.files import FilesError
from llama_sft_helpers.evaluation import (
    PublishError,
    check_repo_id,
    hash_rows,
    hub_errors,
    write_model_card,
)
from llama_sft_helpers.profiles import read_profile
from llama_sft_helpers.training import read_training_summary

ROOT = Path(__file__).parents[2]
LLAMA, DATA = "meta-llama/Meta-Llama-3-8B", "yahma/alpaca-cleaned"
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
ANSWERS = pd.DataFrame({"prompt": ["Say | hi", "Code"]}).assign(
    base=["hello <script>", "```python\nprint()\n```"],
    base_tokens=[3, 12],
    base_stopped=[True, False],
    tuned=["hi", "````x````"],
    tuned_tokens=[2, 5],
    tuned_stopped=True,
)


def write(
    folder, *, model_id=LLAMA, dataset_id=DATA, losses=LOSSES, generations=ANSWERS, device="NVIDIA A100"
):
    return write_model_card(
        folder,
        profile=read_profile("colab-a100", model_id=model_id, dataset_id=dataset_id),
        peft_config=LoraConfig(r=8, lora_alpha=12, target_modules=["v_proj", "q_proj"]),
        prompt=PROMPT,
        training_summary=SUMMARY,
        data_sha256="ab" * 32,
        losses=losses,
        generations=generations,
        device=device,
    )


def read(folder, **changes):
    return write(folder, **changes).read_text(encoding="utf-8")


def test_a_card_names_what_was_run_and_measured(tmp_path):
    text = read(tmp_path)
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["datasets"], metadata["license"]) == (LLAMA, [DATA], "llama3")
    versions, run = ("torch 2.11.0", "NVIDIA A100"), ("12,345", "8.46", "1.5000, 1.2500", "1.2000 to 1.3000")
    lora, answers = (
        ("r=8, alpha=12, dropout=0.0", "q_proj, v_proj"),
        ("stopped after 2 tokens", "cut after 12"),
    )
    terms = ("CC BY-NC 4.0", "Built with Meta Llama 3")
    for fact in (*versions, *run, *lora, *answers, *terms, "ab" * 32, "learning_rate"):
        assert fact in text, fact


def test_a_card_says_how_to_ask(tmp_path):
    text = read(tmp_path)
    assert f"```text\n{PROMPT.strip()}\n```" in text
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert f'from_pretrained("{LLAMA}"' in snippet
    compile(snippet, "snippet", "exec")
    given = next(line for line in snippet.splitlines() if line.startswith("prompt = "))
    assert ast.literal_eval(given.removeprefix("prompt = ")) == PROMPT
    for command in ("llama-completion -m model-q8_0.gguf", "ollama create my-model -f Modelfile"):
        assert command in text


@pytest.mark.parametrize(
    ("dataset_id", "said"),
    [("/my/rows.csv", "the trainer's own"), (str(ROOT / "llama_sft_helpers" / "datasets"), "Apache-2.0")],
)
def test_a_local_model_and_data_are_named_without_path_and_llama_terms(tmp_path, dataset_id, said):
    text = read(tmp_path, model_id="/somewhere/private/tiny-llama", dataset_id=dataset_id)
    for wrong in ("/somewhere", "/my", "CC BY-NC", "Built with Meta Llama 3"):
        assert wrong not in text
    assert said in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert not {"base_model", "datasets"} & set(metadata)


def test_a_file_in_a_folder_is_no_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "- sample_data/my.csv" in read(tmp_path / "hub", dataset_id="sample_data/my.csv")
    (tmp_path / "sample_data").mkdir()
    (tmp_path / "sample_data" / "my.csv").touch()
    text = read(tmp_path / "own", dataset_id="sample_data/my.csv")
    assert "datasets:" not in text
    assert "the trainer's own" in text


def test_answers_and_what_looks_like_a_template_stay_text(tmp_path):
    text = read(tmp_path)
    assert "`````text\n````x````\n`````" in text
    assert "````text\n```python\nprint()\n```\n````" in text
    answers = ANSWERS.assign(prompt=["{{ 1234 * 1000 }}", "{% raw %}"], tuned=["{{ cell }}", "{# note #}"])
    text = read(tmp_path, generations=answers, losses=LOSSES.rename(index={"base": "<b>|{{ 1234 * 1000 }}"}))
    for kept in ("```text\n{{ 1234 * 1000 }}\n```", "{% raw %}", "{{ cell }}", "{# note #}"):
        assert kept in text, kept
    assert "| &lt;b>\\|{{ 1234 * 1000 }} | 1.5000 |" in text
    assert "1234000" not in text


def test_a_card_is_renewed_and_pefts_form_replaced(tmp_path):
    first = read(tmp_path)
    assert read(tmp_path, device="NVIDIA L4") != first
    form = "# Model Card for Model ID\n[More Information Needed]\n"  # what PEFT leaves
    (tmp_path / "README.md").write_text(form, encoding="utf-8")
    assert read(tmp_path) == first
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "edit",
    [
        lambda card: "# My own card\n",
        lambda card: card + "A sentence of mine.\n",
        lambda card: card.replace("1.2500", "0.2500"),
    ],
)
def test_an_edited_or_foreign_card_is_kept_and_the_new_one_lies_beside_it(tmp_path, edit):
    """Else nothing that follows in a second run of 07 or 09 would run: no zip, no merged model."""
    path = write(tmp_path)
    edited = edit(path.read_text(encoding="utf-8"))
    path.write_text(edited, encoding="utf-8")
    for device in ("NVIDIA L4", "NVIDIA T4"):
        with pytest.warns(UserWarning, match=r"README.md was edited, .*is kept .*README.new.md beside it"):
            assert write(tmp_path, device=device) == path
        assert path.read_text(encoding="utf-8") == edited
        assert device in (tmp_path / "README.new.md").read_text(encoding="utf-8")
    (tmp_path / "README.new.md").replace(path)
    write(tmp_path)  # no warning: it is this function's own again


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "Run notebook 06 first"),
        ('{"eval_loss_before": 1', "damaged"),
        ('{"eval_loss_before": 1}', "lacks eval_loss_after, train_seconds"),
    ],
)
def test_a_summary_that_cannot_be_read_is_explained(tmp_path, text, told):
    path = tmp_path / "training_summary.json"
    if text:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(FilesError, match=told):
        read_training_summary(path)


def test_rows_have_a_hash_of_their_content_only():
    rows = [{"prompt": "a", "completion": "é"}]
    assert hash_rows(rows) == hash_rows([{"completion": "é", "prompt": "a"}])
    assert hash_rows(rows) != hash_rows([{"prompt": "aé", "completion": ""}])
    # sha256sum of the one JSON line
    assert hash_rows([{"a": 1}]) == "e8c628edc9968ef0c668f54e0ba2636b35503357eb1aca0ddc828aeace432f67"


def named(trained_on, loaded=None):
    """A model whose adapter and base bear these names."""
    base, config = SimpleNamespace(name_or_path=loaded or trained_on), LoraConfig()
    config.base_model_name_or_path = trained_on
    return SimpleNamespace(active_peft_config=config, get_base_model=lambda: base)


@pytest.mark.parametrize(
    ("repo_id", "bases", "told"),
    [
        ("ada/Llama-3-8B-alpaca", [LLAMA], None),
        ("ada/anything", ["HuggingFaceTB/SmolLM2-135M"], None),
        ("ada/my-alpaca", [LLAMA], "must begin with 'Llama-3'"),
        *((name, ["x/y"], "your-name/model-name") for name in ("my-alpaca", "../my", "me/a--b", "me/.x")),
        ("ada/Llama-3-8B", [str(ROOT), LLAMA], "which only this machine has"),
        ("ada/Llama-3-8B", [LLAMA, str(ROOT)], "which only this machine has"),
        ("ada/demo", ["local:smollm2-135m-instruct"], "'local:smollm2-135m-instruct', which only this"),
    ],
)
def test_names_that_cannot_be_published_are_told_before_a_repository_is_made(repo_id, bases, told):
    if told is None:
        check_repo_id(repo_id, named(*bases))
        return
    with pytest.raises(PublishError, match=told):
        check_repo_id(repo_id, named(*bases))


def test_a_local_base_of_pefts_own_is_refused(tiny_model):
    model = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(PublishError, match="which only this machine has"):
        check_repo_id("ada/model", model)


# --- The hub ---


@pytest.fixture
def hub():
    with UploadHub() as hub:
        hub.accounts |= {"w": Account("ada", role="write"), "r": Account("bob", role="read")}
        yield hub


def push(hub, files, token="w", repo_id="ada/model"):
    """What notebook 07 does, with the endpoint and token given instead of found."""
    api = HfApi(endpoint=hub.url, token=token)
    with hub_errors(repo_id):
        api.create_repo(repo_id, private=True)
        api.upload_folder(repo_id=repo_id, folder_path=files)


@pytest.fixture
def files(tmp_path):
    """An adapter folder with its card."""
    folder = write(tmp_path / "files").parent
    save_file({"a": torch.arange(4.0)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("token", "repo_id", "remedy"),
    [
        ("unknown", "ada/model", r"Make one .*HTTP 401\)"),
        ("r", "bob/model", r"Use your own name.*HTTP 403\)"),
        ("w", "eve/model", r"Use your own name.*HTTP 403\)"),
        ("w", "ada/taken", r"exists already; nothing was uploaded.*HTTP 409\)"),
    ],
)
def test_refusals_are_explained(hub, files, token, repo_id, remedy):
    hub.repos["ada/taken"] = "open"
    with pytest.raises(PublishError, match=remedy):
        push(hub, files, token=token, repo_id=repo_id)
    assert not hub.files


def test_other_statuses_and_a_dead_hub_are_explained(hub, files):
    hub.fail_status = 418
    with pytest.raises(PublishError, match=r"refused: .*418.*HTTP 418"):
        push(hub, files)
    with UploadHub() as dead:
        pass
    with pytest.raises(PublishError, match="cannot be reached"):
        push(dead, files)


def test_a_missing_token_is_explained():
    with pytest.raises(PublishError, match="Log in first"), hub_errors("ada/model"):
        HfApi().create_repo("ada/model", token=True)


PRELUDE = """
import sys
from pathlib import Path
from huggingface_hub import create_repo, upload_file
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama_sft_helpers import evaluation
shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, name_or_path="some/base", **shape))
model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
card_path, tokenizer = Path(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[2])
training = {"eval_loss_after": 1.0}
"""


def test_the_notebooks_cell_uploads_after_a_yes_only(hub, tmp_path, tiny_model_dir):
    """The notebook's own cell in a process of its own, as it is and with a name: answered no, then yes."""
    cells = nbformat.read(ROOT / "notebooks" / "07_evaluation.ipynb", 4).cells
    as_it_is = next(cell.source for cell in cells if cell.source.startswith('publish_to = ""'))
    cell = as_it_is.replace('publish_to = ""', 'publish_to = "ada/model"')
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "w", "HF_HOME": str(tmp_path / "home")}
    card = write(tmp_path / "card")
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{as_it_is}\n{cell}\n{cell}", str(card), str(tiny_model_dir)],
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
    assert hub.files["ada/model", "README.md"].decode() == card.read_text(encoding="utf-8")
    needed = {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}
    assert needed <= {path for _, path in hub.files}

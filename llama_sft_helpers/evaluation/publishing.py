"""Notebook 07: the model card, and the hub's refusals explained."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.core.files import full_disk_explained, write_text
from llama_sft_helpers.core.llama import is_llama3
from llama_sft_helpers.evaluation.answers import list_answers
from llama_sft_helpers.evaluation.serving import MESSAGE

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import ModelCardData
    from peft import LoraConfig, PeftModel

    from llama_sft_helpers.profiles import Profile

_CARD_MARK = "<!-- written by llama_sft_helpers, sha256 of the text below: {} -->\n"
_TEMPLATE = Path(__file__).parent.parent / "templates" / "model_card.md"
_SHIPPED_ROWS = Path(__file__).parent.parent / "datasets"


class PublishError(RuntimeError):
    """Something cannot be published as it is, or the hub refused it; nothing was changed."""


def hash_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of rows as JSON lines with sorted keys, so that a card names its data exactly."""
    return _sha256("".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


def write_model_card(
    folder: str | Path,
    *,
    profile: Profile,
    peft_config: LoraConfig,
    prompt: str,
    training_summary: Mapping[str, Any],
    data_sha256: str,
    losses: pd.DataFrame,
    generations: pd.DataFrame,
    device: str,
) -> Path:
    """Write ``README.md``: what the adapter is, how to use it, what it was trained on, what was measured.

    In the adapter's own folder, as a rule; the form that PEFT leaves there is replaced. A card that was
    edited, or that somebody else wrote, is kept and its path returned, and a warning says that the new one
    lies beside it, as ``README.new.md``.

    Args:
        folder: Made if missing.
        profile: The run's profile.
        peft_config: The adapter's ``LoraConfig``.
        prompt: The prompt of training, as it is for the message ``{{ .Prompt }}``.
        training_summary: ``read_training_summary`` of the run.
        data_sha256: ``hash_rows`` of the training rows.
        losses: ``summarize_perplexity``.
        generations: ``summarize_generations``.
        device: Name of the GPU, or ``CPU``, that evaluated; the summary's own ``device`` names the trainer.

    Raises:
        FilesError: The disk is full.
    """
    from huggingface_hub import ModelCard

    card = ModelCard.from_template(
        _metadata(profile),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        model=_shown(profile.model_id),
        dataset=_shown(profile.dataset_id),
        data_licence=_data_licence(profile.dataset_id),
        prompt=prompt,
        message=MESSAGE,
        llama3=is_llama3(profile.model_id),
        facts=_facts(profile, peft_config, training_summary, data_sha256, device),
        settings=_settings(profile),
        losses=losses.to_dict("index"),
        generations=list_answers(generations),
        cell=_cell,
        fenced=_fenced,
        quoted=repr,
    )
    path = Path(folder) / "README.md"
    _write_card(path, str(card).rstrip("\n") + "\n")
    return path


def _write_card(path: Path, text: str) -> None:
    """Write the card with its mark; a card of somebody else's is kept, and the new one lies beside it."""
    header, end, body = text.partition("\n---\n")
    if path.is_file() and not _is_own_card(path.read_text(encoding="utf-8")):
        kept, path = path, path.with_name("README.new.md")
        warnings.warn(
            f"{kept} was edited, or written by somebody else: it is kept as it is. The card of this run is "
            f"{path.name} beside it; take over what has changed, or move it to {kept.name}.",
            stacklevel=3,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with full_disk_explained(path):
        write_text(path, f"{header}{end}{_CARD_MARK.format(_sha256(text))}{body}")


@contextlib.contextmanager
def keep_model_card(folder: str | Path) -> Iterator[None]:
    """Leave a card, if there is one, as it is while an adapter is saved: PEFT writes its versions into it."""
    path = Path(folder) / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        yield
    finally:
        if text is not None:
            write_text(path, text)


def _is_own_card(text: str) -> bool:
    """Whether the mark is there and its hash is that of the text around it; or it is PEFT's unfilled form."""
    found = re.search(r"sha256 of the text below: (\w{64}) ", text)
    if found and _sha256(text.replace(_CARD_MARK.format(found[1]), "")) == found[1]:
        return True
    return "[More Information Needed]" in text and "# Model Card for Model ID" in text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _licence(model_id: str) -> str:
    if is_llama3(model_id):
        return "llama3"
    return "apache-2.0" if Path(model_id).name in ("smollm2-135m-instruct", "tiny-llama") else "other"


def _data_licence(dataset_id: str) -> str:
    """What is known of the data's licence; of somebody's own file only its owner can say."""
    if Path(dataset_id) == _SHIPPED_ROWS:
        return "The rows are shipped with llama-sft-helpers, under Apache-2.0."
    if not _is_hub_id(dataset_id):
        return "The data are the trainer's own: whoever passes this adapter on says under which licence."
    alpaca = " Stanford's original Alpaca rows are CC BY-NC 4.0." if "alpaca" in dataset_id.lower() else ""
    return f"The data set's licence stands on its page.{alpaca}"


def _is_hub_id(name: str) -> bool:
    """``owner/name``, unless it is the path of a file or folder that lies here."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()


def _shown(name: str) -> str:
    """A hub id, or a folder's own name: a card does not tell where its writer's files lie."""
    if _is_hub_id(name):
        return name
    files = sorted(Path(name).glob("*.jsonl"))
    return files[0].stem if len(files) == 1 else Path(name).name


def _metadata(profile: Profile) -> ModelCardData:
    from huggingface_hub import ModelCardData

    # The hub refuses a card whose base_model or datasets is no hub id: local demo names stay in the text.
    return ModelCardData(
        base_model=profile.model_id if _is_hub_id(profile.model_id) else None,
        datasets=[profile.dataset_id] if _is_hub_id(profile.dataset_id) else None,
        license=_licence(profile.model_id),
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "sft"],
    )


def _facts(
    profile: Profile, peft_config: Any, summary: Mapping[str, Any], data_sha256: str, device: str
) -> dict[str, Any]:
    """The run in a table's lines."""
    targets = peft_config.target_modules
    return {
        "base model": _shown(profile.model_id),
        "data": _shown(profile.dataset_id),
        "SHA-256 of the training rows": data_sha256,
        "profile": summary["profile"],
        "trained on": summary.get("device", device),
        "evaluated on": device,
        "training time, seconds": f"{summary['train_seconds']:.0f}",
        "training tokens": f"{int(summary['train_tokens']):,}",
        "peak memory, GiB": f"{summary['peak_gib']:.2f}",
        "held-out loss before and after (trainer)": (
            f"{summary['eval_loss_before']:.4f}, {summary['eval_loss_after']:.4f}"
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
        "LoRA": f"r={peft_config.r}, alpha={peft_config.lora_alpha}, dropout={peft_config.lora_dropout}",
        "LoRA's layers": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }


def _settings(profile: Profile) -> dict[str, Any]:
    values = profile.to_frame()["value"].items()
    return {str(key): _shown(str(value)) if str(key).endswith("_id") else value for key, value in values}


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _fenced(text: object) -> str:
    """Text as a code block whose fence is longer than any run of backticks in it."""
    text = str(text).strip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def check_repo_id(repo_id: str, model: PeftModel) -> None:
    """Check the names that an upload would carry, before a repository is made.

    Args:
        repo_id: ``your-name/model-name``; Llama 3's license wants derived names to begin with "Llama 3".
        model: The ``PeftModel`` to upload.

    Raises:
        PublishError: The name is not valid, or not as the license asks; or the base model is named by a
            folder of this machine.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    owner, _, name = repo_id.rpartition("/")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        owner = ""
    if not owner:
        raise PublishError(f"{repo_id!r} is no repository name; expected your-name/model-name.")
    bases = [str(model.active_peft_config.base_model_name_or_path), str(model.get_base_model().name_or_path)]
    for base in bases:
        if not _is_hub_id(base):
            raise PublishError(
                f"The base model is named {base!r}, which only this machine has; others could not use the "
                "adapter, and the hub refuses such a card. Give base_model_name_or_path in the adapter's "
                "adapter_config.json and model_id in the profile its name on the hub, and run this again."
            )
    if any(map(is_llama3, bases)) and not re.match(r"llama[-_. ]?3", name, flags=re.IGNORECASE):
        raise PublishError(
            f"{name!r} must begin with 'Llama-3': the Meta Llama 3 license asks for it in derived names."
        )


@contextlib.contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turn the hub's refusals into one sentence with a remedy.

    Raises:
        PublishError: 401, 403, 409, another refusal, no token, or no connection.
    """
    # HTTPError is the client's own (httpx with huggingface_hub 1.x, httpx2 with 2.x): also a lost connection
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        yield
    except HfHubHTTPError as error:
        raise PublishError(_refusal(repo_id, error.response.status_code, str(error))) from error
    except LocalTokenNotFoundError as error:
        raise PublishError("There is no token. Log in first: notebook 02.") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise PublishError(f"The hub cannot be reached ({error}). Try again; nothing is lost.") from error


def _refusal(repo_id: str, status: int, detail: str) -> str:
    remedies = {
        401: "The hub does not accept the token. Make one with write access, and log in again: notebook 02.",
        403: f"The token may not write to {repo_id}. Use your own name, and a token with write access.",
        404: f"{repo_id} is not there, or the token may not see it. Create it first.",
        409: f"{repo_id} exists already; nothing was uploaded. Choose another name, or delete it on the hub.",
    }
    return f"{remedies.get(status, f'The hub refused: {detail.strip().splitlines()[0]}')} (HTTP {status})"

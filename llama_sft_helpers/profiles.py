"""Profiles: the settings that depend on the machine, one TOML file each.

What belongs to the recipe (8-bit weights, LoRA's rank and targets) stands literally in the notebooks; a
profile holds what changes between an A100, a T4 and a laptop: model and dataset ids, lengths, batch, steps,
precision.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_sft_helpers.settings import PATHS, SettingsError, absolute_path, environment_settings

if TYPE_CHECKING:
    import pandas as pd
    import torch

_PACKAGE = Path(__file__).parent
OWN_PROFILE = Path("llama-sft.toml")
_DRIVE = Path("/content/drive")  # where Colab's own examples and its Files panel mount Google Drive
Setting = tuple[Any, str]  # a value and its reason
EXPORTS = ("adapter", "adapter and GGUF")  # what notebook 09 makes to take away
_CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "attn_implementation": ("sdpa", "varlen"),
    "prompt_format": ("auto", "alpaca", "chat", "plain"),
    "export": EXPORTS,
}
# what notebook 08 adds, switched off
_PLAIN = {
    "attn_implementation": "sdpa",
    "fast_int8": False,
    "compile_layers": False,
    "activation_memory_budget": 1.0,
}
# (least GiB of GPU memory as the driver reports it, profile): the first that fits is taken
_BY_GPU_GIB = ((36.0, "colab-a100"), (20.0, "colab-l4"), (0.1, "colab-t4"), (0.0, "cpu-demo"))


class ProfileError(SettingsError):
    """A profile, one of its keys or one of its values is not valid."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the notebooks read from a profile; see ``profiles/*.toml`` for each value's reason."""

    name: str
    gpu_gib: float  # GPU memory that it is planned for; 0 for none
    model_id: str  # hub id or folder for from_pretrained
    dataset_id: str  # file, folder or hub id for data.load_rows
    columns: str  # the data's columns and what they are, question=instruction,answer=output; "" for none
    prompt_format: str  # alpaca, chat, plain, or auto (data.choose_prompt_format)
    export: str  # what notebook 09 makes to take away, one of EXPORTS
    train_rows: int  # 0 takes all
    eval_rows: int  # held out
    max_length: int  # longest row, and the block size when packing, in tokens
    packing: bool  # whether documents share a block
    per_device_train_batch_size: int  # rows (or blocks) in a micro-batch
    gradient_accumulation_steps: int  # micro-batches in an optimizer step
    max_steps: int  # optimizer steps
    epochs: float | None  # how often each row is seen; sets max_steps by data.plan_steps unless None
    learning_rate: float  # its peak
    dtype: str  # the 16- or 32-bit type of everything that is not quantized
    attn_implementation: str  # sdpa, or varlen (speed.register_varlen_attention)
    gradient_checkpointing: bool  # whether activations are recomputed in the backward pass
    fast_int8: bool  # whether speed.use_fast_int8 is switched on
    compile_layers: bool  # whether speed.compile_decoder_layers is switched on
    activation_memory_budget: float  # share of activations that compiled layers keep, in (0, 1]
    eval_steps: int  # optimizer steps between held-out losses
    save_steps: int  # optimizer steps between checkpoints
    max_new_tokens: int  # longest generated answer
    sweep_seconds: int  # how long notebook 04's comparison of adapters may take
    reasons: dict[str, str] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The ``torch.dtype`` that ``dtype`` names."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def output_dir(self) -> Path:
        """Where a run writes: ``$SFT_OUTPUT_DIR``, else Google Drive if mounted, else ``outputs/``."""
        if folder := os.environ.get("SFT_OUTPUT_DIR"):
            return Path(folder).expanduser().resolve()
        drive = _DRIVE / "MyDrive"
        parent = drive / "llama-sft" if drive.is_dir() else Path("outputs").resolve()
        return parent / self.name

    def to_frame(self) -> pd.DataFrame:
        """The settings as a table: setting (index), value, reason."""
        import pandas as pd

        rows = [(key, getattr(self, key), self.reasons.get(key, "")) for key in _fields()]
        return pd.DataFrame(rows, columns=["setting", "value", "reason"]).set_index("setting")

    def _repr_html_(self) -> str:
        table = self.to_frame().to_html(justify="left", notebook=True)
        return f"<b>Profile {self.name}</b>{table}"


def connect_drive() -> str:
    """On Colab, ask to mount Google Drive, so that ``output_dir`` outlives the machine.

    Colab itself shows the dialog that asks. After a no, or a failure, results go to the machine's own disk.
    Nothing is asked where ``$SFT_OUTPUT_DIR`` names a folder, or Drive is mounted already. See
    https://colab.research.google.com/notebooks/io.ipynb.

    Returns:
        A sentence that says where results go, and whether they outlive the machine.
    """
    if os.environ.get("SFT_OUTPUT_DIR"):
        return "Results go to the folder that SFT_OUTPUT_DIR names."
    if "google.colab" not in sys.modules:
        return "This is not Colab: results go to the folder outputs, and stay on this machine."
    if reason := _mount_drive():
        return (
            f"Google Drive is not mounted ({reason}). Results go to {Path('outputs').resolve()} on this "
            "machine and will be lost with it: the next notebook, on a machine of its own, will not find "
            "them. Run this cell again to be asked again."
        )
    return f"Google Drive is mounted: results go to {_DRIVE / 'MyDrive' / 'llama-sft'} and stay there."


def _mount_drive() -> str:
    """Mount Drive unless it is mounted: "" or why it is not."""
    try:
        if not (_DRIVE / "MyDrive").is_dir():
            from google.colab import drive

            drive.mount(str(_DRIVE))
    except Exception as error:  # Colab raises MessageError after a refusal, ValueError after a failed mount
        return f"{type(error).__name__}: {error}"
    return "" if (_DRIVE / "MyDrive").is_dir() else f"there is no {_DRIVE / 'MyDrive'}"


def available_profiles() -> list[str]:
    """Names of the shipped profiles, sorted."""
    return sorted(path.stem for path in (_PACKAGE / "profiles").glob("*.toml"))


def device_map() -> dict[str, int | str]:
    """``{"": 0}``, the whole model on the first GPU, or ``{"": "cpu"}`` where there is none.

    See https://huggingface.co/docs/accelerate/concept_guides/big_model_inference#designing-a-device-map.
    """
    import torch

    return {"": 0} if torch.cuda.is_available() else {"": "cpu"}


def load_profile(
    name: str | None = None, *, fast: bool = True, form: Mapping[str, Any] | None = None, **overrides: Any
) -> Profile:
    """Load a profile by name, by ``$SFT_PROFILE``, or by the GPU memory that is there.

    A ``local:`` model id becomes a folder, built on first use (see ``demo_model``); ``local:alpaca_mini``
    becomes the folder of the shipped rows.

    Args:
        name: A profile's name, or a TOML file of one's own that changes some settings of a shipped profile
            (see ``read_profile``); None reads ``$SFT_PROFILE`` or looks at the GPU.
        fast: False turns off what notebook 08 adds (varlen attention, ``fast_int8``, compiled layers) and
            turns gradient checkpointing on where those had replaced it.
        form: Settings of notebook 09's form; a file of one's own and ``$SFT_SETTINGS`` go before them.
        overrides: Settings that replace the profile's, ``max_steps=60`` for instance.

    Raises:
        ProfileError: The name, a key or a value is not valid; the message lists the valid ones.
    """
    profile = read_profile(name, fast=fast, form=form, **overrides)
    model_id, dataset_id = profile.model_id, profile.dataset_id
    if model_id.startswith("local:"):
        from llama_sft_helpers.demo_model import ensure_model

        model_id = str(ensure_model(model_id.removeprefix("local:")))
    if dataset_id == "local:alpaca_mini":
        dataset_id = str(_PACKAGE / "datasets")
    return dataclasses.replace(profile, model_id=model_id, dataset_id=dataset_id)


def read_profile(
    name: str | None = None, *, fast: bool = True, form: Mapping[str, Any] | None = None, **overrides: Any
) -> Profile:
    """As ``load_profile``, with ``local:`` ids left as they are and nothing built.

    Settings come from the profile, then ``form``, the file, ``$SFT_SETTINGS`` and at last ``overrides``.
    Without a name or ``$SFT_PROFILE``, ``llama-sft.toml`` in the current folder is such a file. It names the
    shipped profile it starts from, and what it changes; a file or folder that it names lies beside it::

        profile = "colab-a100"
        [settings]
        max_steps = 200
        learning_rate = { value = 1e-4, reason = "our rows are long" }
    """
    name = pick_profile(name)
    name, own = _read_changes(Path(name)) if name.endswith(".toml") else (name, {})
    if name not in available_profiles():
        raise ProfileError(
            f"There is no profile {name!r}. Valid profiles: {', '.join(available_profiles())}."
        )
    content = tomllib.loads((_PACKAGE / "profiles" / f"{name}.toml").read_text(encoding="utf-8"))
    # TOML has no null: its value is left out
    settings = {key: (entry.get("value"), entry["reason"]) for key, entry in content["settings"].items()}
    if not fast:
        settings |= _plain(settings)
    in_form, by_you = _because("set in the form", form or {}), _because("set by you", overrides)
    for changes in (in_form, own, _because("set in SFT_SETTINGS", environment_settings()), by_you):
        if "max_steps" in changes:  # then epochs that were asked for before no longer count
            changes.setdefault("epochs", (None, changes["max_steps"][1]))
        settings |= changes
    reasons = {key: reason for key, (_, reason) in settings.items()}
    return Profile(name=name, reasons=reasons, **_checked(name, {k: v for k, (v, _) in settings.items()}))


def _plain(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    """What turns off the settings that notebook 08 adds."""
    checkpointing = settings["gradient_checkpointing"][0] or settings["compile_layers"][0]
    plain = {**_PLAIN, "gradient_checkpointing": checkpointing}
    changed = {key: value for key, value in plain.items() if settings[key][0] != value}
    return _because("fast=False: the plain path", changed)


def _because(reason: str, values: Mapping[str, Any]) -> dict[str, Setting]:
    return {key: (value, reason) for key, value in values.items()}


def _read_changes(path: Path) -> tuple[str, dict[str, Setting]]:
    """A reader's own file: the shipped profile it starts from, and what it changes."""
    example = 'profile = "colab-a100", then [settings] and max_steps = 200'
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ProfileError(
            f"Cannot read the profile {path.absolute()}: {error}. Expected a TOML file: {example}."
        ) from error
    base, settings = content.get("profile"), content.get("settings", {})
    if not isinstance(base, str) or not isinstance(settings, dict):
        raise ProfileError(
            f"{path.absolute()} must name the shipped profile that it starts from, one of "
            f"{', '.join(available_profiles())}: {example}. Found the keys {', '.join(content) or 'none'}."
        )
    changes = {}
    for key, entry in settings.items():
        table = entry if isinstance(entry, dict) else {"value": entry}
        if "value" not in table:
            raise ProfileError(f"{path.absolute()}, setting {key!r}: a table must hold value = ...")
        value = table["value"]
        if key in PATHS:
            value = absolute_path(str(value), path.parent)
        changes[key] = value, str(table.get("reason", f"set in {path.name}"))
    return base, changes


def _fields() -> dict[str, str]:
    """Setting -> its type's name."""
    hidden = ("name", "reasons")
    return {f.name: str(f.type) for f in dataclasses.fields(Profile) if f.name not in hidden}


def _checked(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, whole numbers made floats where a float is meant."""
    fields = _fields()
    if unknown := sorted(set(values) - set(fields)):
        raise ProfileError(
            f"Profile {name!r} has no setting {', '.join(map(repr, unknown))}. "
            f"Valid settings: {', '.join(fields)}."
        )
    if missing := sorted(set(fields) - set(values)):
        raise ProfileError(f"Profile {name!r} lacks the setting {', '.join(map(repr, missing))}.")
    for key, value in values.items():
        if fault := _fault(key, value, fields[key]):
            raise ProfileError(f"Profile {name!r}, setting {key!r}: {value!r} {fault}.")
    return {
        key: float(value) if "float" in fields[key] and value is not None else value
        for key, value in values.items()
    }


def _fault(key: str, value: Any, type_name: str) -> str:
    """What is wrong with a value; empty where nothing is."""
    found = type(value).__name__
    if value is None and type_name.endswith("None"):
        return ""
    if found not in type_name.split(" | ") and not (found == "int" and type_name.startswith("float")):
        return f"is of type {found}, expected {type_name}"
    if key in _CHOICES and value not in _CHOICES[key]:
        return f"is not one of {', '.join(map(repr, _CHOICES[key]))}"
    least = 0 if key in ("gpu_gib", "train_rows") else 1 if type_name == "int" else None
    if least is not None and value < least:
        return f"is too small, expected at least {least}"
    if key == "epochs" and not 0 < value < float("inf"):
        return "is not above 0"
    outside = key in ("learning_rate", "activation_memory_budget") and not 0 < value <= 1
    return "is outside (0, 1]" if outside else ""


@functools.cache
def _gpu_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def pick_profile(name: str | None = None) -> str:
    """The profile to load: the one named, by the environment, by a file that lies here, or by the GPU."""
    name = name or os.environ.get("SFT_PROFILE") or (str(OWN_PROFILE) if OWN_PROFILE.is_file() else "")
    if name:
        return str(Path(name).absolute()) if name.endswith(".toml") else name
    return next(profile for least, profile in _BY_GPU_GIB if _gpu_gib() >= least)

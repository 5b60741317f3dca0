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

from llama_sft_helpers.settings import SettingsError, absolute_path, environment_settings

if TYPE_CHECKING:
    import pandas as pd
    import torch

_PACKAGE = Path(__file__).parent
OWN_PROFILE = Path("llama-sft.toml")
_DRIVE = Path("/content/drive")  # where Colab's own examples and its Files panel mount Google Drive
_CHOICES = {
    "dtype": ("bfloat16", "float16", "float32"),
    "attn_implementation": ("sdpa", "varlen"),
    "prompt_format": ("auto", "alpaca", "chat", "plain"),
}
# what notebook 08 adds, switched off
_PLAIN = {
    "attn_implementation": "sdpa",
    "fast_int8": False,
    "compile_layers": False,
    "activation_memory_budget": 1.0,
}
# (least GiB of GPU memory as the driver reports it, profile): the first that fits is taken
_BY_GPU_GIB = ((36.0, "colab-a100"), (20.0, "colab-l4"), (0.0, "colab-t4"))


class ProfileError(SettingsError):
    """A profile, one of its keys or one of its values is not valid."""


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the notebooks read from a profile; see ``profiles/*.toml`` for each value's reason.

    Attributes:
        name: The profile's name.
        gpu_gib: GPU memory the profile is planned for, in GiB; 0 for none.
        model_id: Hub id or folder for ``from_pretrained``.
        dataset_id: File, folder or hub id for ``data.load_rows``.
        columns: What the data's columns are here, ``question=instruction,answer=output``; empty for none.
        prompt_format: ``alpaca``, ``chat``, ``plain``, or ``auto`` (``data.choose_prompt_format``).
        train_rows: Rows to train on; 0 takes all.
        eval_rows: Rows held out.
        max_length: Longest row, and the block size when packing, in tokens.
        packing: Whether documents share a block.
        per_device_train_batch_size: Rows (or blocks) in a micro-batch.
        gradient_accumulation_steps: Micro-batches in an optimizer step.
        max_steps: Optimiser steps.
        epochs: How often each row is seen; sets ``max_steps`` by ``data.plan_steps``. None: it does not.
        learning_rate: Peak learning rate.
        dtype: Name of the 16- or 32-bit type of everything that is not quantized.
        attn_implementation: ``sdpa``, or ``varlen`` (``speed.register_varlen_attention``).
        gradient_checkpointing: Whether activations are recomputed in the backward pass.
        fast_int8: Whether ``speed.use_fast_int8`` is switched on.
        compile_layers: Whether ``speed.compile_decoder_layers`` is switched on.
        activation_memory_budget: Share of activations that compiled layers keep, in (0, 1].
        eval_steps: Optimiser steps between held-out losses.
        save_steps: Optimiser steps between checkpoints.
        max_new_tokens: Longest generated answer, in tokens.
        sweep_seconds: Seconds that notebook 04's comparison of adapters may take.
        reasons: One line for each setting.
    """

    name: str
    gpu_gib: float
    model_id: str
    dataset_id: str
    columns: str
    prompt_format: str
    train_rows: int
    eval_rows: int
    max_length: int
    packing: bool
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_steps: int
    epochs: float | None
    learning_rate: float
    dtype: str
    attn_implementation: str
    gradient_checkpointing: bool
    fast_int8: bool
    compile_layers: bool
    activation_memory_budget: float
    eval_steps: int
    save_steps: int
    max_new_tokens: int
    sweep_seconds: int
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
    return dataclasses.replace(
        profile, model_id=_resolve_model(profile.model_id), dataset_id=_resolve_dataset(profile.dataset_id)
    )


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
    layers = [{key: (value, "set in the form") for key, value in (form or {}).items()}]
    if name.endswith(".toml"):
        name, changed = _read_changes(Path(name))
        layers.append(changed)
    path = _PACKAGE / "profiles" / f"{name}.toml"
    if name not in available_profiles():
        raise ProfileError(
            f"There is no profile {name!r}. Valid profiles: {', '.join(available_profiles())}."
        )
    settings = tomllib.loads(path.read_text(encoding="utf-8"))["settings"]
    values = {key: entry.get("value") for key, entry in settings.items()}  # TOML has no null: left out
    reasons = {key: entry["reason"] for key, entry in settings.items()}
    if not fast:
        checkpointing = values["gradient_checkpointing"] or values["compile_layers"]
        plain = {**_PLAIN, "gradient_checkpointing": checkpointing}
        reasons |= {key: "fast=False: the plain path" for key, value in plain.items() if values[key] != value}
        values |= plain
    layers.append({key: (value, "set in SFT_SETTINGS") for key, value in environment_settings().items()})
    layers.append({key: (value, "set by you") for key, value in overrides.items()})
    for changes in layers:
        if "max_steps" in changes:  # then epochs that were asked for before no longer count
            changes.setdefault("epochs", (None, changes["max_steps"][1]))
        values |= {key: value for key, (value, _) in changes.items()}
        reasons |= {key: reason for key, (_, reason) in changes.items()}
    return Profile(name=name, reasons=reasons, **_validated(name, values))


def _read_changes(path: Path) -> tuple[str, dict[str, tuple[Any, str]]]:
    """A reader's own file: the shipped profile it starts from, and setting -> (value, reason)."""
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
    entries = {key: entry if isinstance(entry, dict) else {"value": entry} for key, entry in settings.items()}
    if lacking := [key for key, entry in entries.items() if "value" not in entry]:
        raise ProfileError(f"{path.absolute()}, setting {lacking[0]!r}: a table must hold value = ...")
    for key in {"model_id", "dataset_id"} & set(entries):
        entries[key] = entries[key] | {"value": absolute_path(str(entries[key]["value"]), path.parent)}
    return base, {
        key: (e["value"], str(e.get("reason", f"set in {path.name}"))) for key, e in entries.items()
    }


def _fields() -> dict[str, str]:
    """Setting -> its type's name."""
    hidden = ("name", "reasons")
    return {f.name: str(f.type) for f in dataclasses.fields(Profile) if f.name not in hidden}


def _validated(name: str, values: dict[str, Any]) -> dict[str, Any]:
    fields = _fields()
    if unknown := sorted(set(values) - set(fields)):
        raise ProfileError(
            f"Profile {name!r} has no setting {', '.join(map(repr, unknown))}. "
            f"Valid settings: {', '.join(fields)}."
        )
    if missing := sorted(set(fields) - set(values)):
        raise ProfileError(f"Profile {name!r} lacks the setting {', '.join(map(repr, missing))}.")
    return {key: _checked(name, key, value, fields[key]) for key, value in values.items()}


def _checked(name: str, key: str, value: Any, type_name: str) -> Any:
    if value is None and type_name.endswith("None"):
        return None
    expected: Any = {"str": str, "int": int, "float": float, "bool": bool}[type_name.removesuffix(" | None")]
    if expected is float and type(value) is int:
        value = float(value)
    where = f"Profile {name!r}, setting {key!r}"
    if type(value) is not expected:
        raise ProfileError(f"{where}: {value!r} is of type {type(value).__name__}, expected {type_name}.")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ProfileError(f"{where}: {value!r} is not one of {', '.join(_CHOICES[key])}.")
    least = 0 if key in ("gpu_gib", "train_rows") else 1 if expected is int else None
    if least is not None and value < least:
        raise ProfileError(f"{where}: {value!r} is too small, expected at least {least}.")
    if key == "epochs" and not 0 < value < float("inf"):
        raise ProfileError(f"{where}: {value!r} is not above 0.")
    if key in ("learning_rate", "activation_memory_budget") and not 0 < value <= 1:
        raise ProfileError(f"{where}: {value!r} is outside (0, 1].")
    return value


@functools.cache
def _gpu_gib() -> float:
    import torch

    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def pick_profile(name: str | None = None) -> str:
    """The profile to load: the one named, by the environment, by a file that lies here, or by the GPU."""
    name = name or os.environ.get("SFT_PROFILE") or (str(OWN_PROFILE) if OWN_PROFILE.is_file() else "")
    if name:
        return str(Path(name).absolute()) if name.endswith(".toml") else name
    gib = _gpu_gib()
    if not gib:
        return "cpu-demo"
    return next(profile for least, profile in _BY_GPU_GIB if gib >= least)


def _resolve_model(model_id: str) -> str:
    if not model_id.startswith("local:"):
        return model_id
    from llama_sft_helpers.demo_model import ensure_model

    return str(ensure_model(model_id.removeprefix("local:")))


def _resolve_dataset(dataset_id: str) -> str:
    return str(_PACKAGE / "datasets") if dataset_id == "local:alpaca_mini" else dataset_id

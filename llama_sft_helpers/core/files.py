"""Files and folders that are written whole or not at all, and the hash of what lies in one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_STAMP = "written_by_llama_sft_helpers.txt"
_FULL = (errno.ENOSPC, errno.EDQUOT)
# Errors that name no number: torch.save's C++ writer, and libraries that pass on the system's words only.
_FULL_IN_WORDS = ("PytorchStreamWriter", "inline_container", "No space left", "Disk quota exceeded")


class FilesError(RuntimeError):
    """A folder could not be written or read; nothing that was there before has been changed."""


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed because there was no room, whichever library reports it.

    safetensors and other Rust libraries name the system's error number in their text only, ``torch.save``
    none at all.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found.group(1))
    return number in _FULL if number is not None else any(sign in str(error) for sign in _FULL_IN_WORDS)


def free_bytes(folder: str | Path) -> int:
    """Free space of the disk on which a folder lies, or will lie once it is made."""
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all: a hidden file beside it is renamed when complete.

    Raises:
        OSError: It could not be written; what was there before is as it was.
    """
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: str | Path, needed_bytes: int = 0, stamp: str = _STAMP) -> Iterator[Path]:
    """Write a folder whole or not at all: files go to a hidden folder beside it, renamed when complete.

    A folder that an earlier run wrote this way is replaced; any other is left alone.

    Args:
        target: The folder to write.
        needed_bytes: What will be written; checked against the free disk space before anything is.
        stamp: The file by which such a folder is known; written here unless the block does.

    Yields:
        The hidden folder to write into.

    Raises:
        FilesError: The target holds something else, or the disk is full.
    """
    target = Path(target)
    _refuse_foreign(target, stamp)
    target.parent.mkdir(parents=True, exist_ok=True)
    if needed_bytes > (free := free_bytes(target.parent)):
        sizes = f"{needed_bytes / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free"
        raise FilesError(_no_room(target, sizes))
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        building, old = Path(scratch) / "new", Path(scratch) / "old"
        building.mkdir()
        with full_disk_explained(target):
            yield building
            if not (building / stamp).exists():
                (building / stamp).write_text("This folder is replaced by the next run.\n", encoding="utf-8")
        if target.exists():
            target.rename(old)
        try:
            building.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise


def _refuse_foreign(target: Path, stamp: str) -> None:
    if not target.exists() or (target / stamp).is_file() or (target.is_dir() and not any(target.iterdir())):
        return
    raise FilesError(
        f"{target} exists and was not written by this series; nothing was changed. Move it away, or choose "
        "another folder."
    )


@contextlib.contextmanager
def full_disk_explained(target: Path) -> Iterator[None]:
    """Turn the system's and safetensors' errors about a full disk into a ``FilesError``."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_full_disk(error):
            raise FilesError(_no_room(target, str(error))) from error
        raise


def _no_room(target: Path, detail: str) -> str:
    return (
        f"The disk is too full to write {target} ({detail}). Nothing was overwritten, and what was "
        "half-written is gone. Free some space, or choose a folder on another disk."
    )


def hash_files(folder: str | Path) -> str:
    """SHA-256 over the names and bytes of a folder's safetensors files, in the order of their names.

    Raises:
        FilesError: There is none.
    """
    digest = hashlib.sha256()
    paths = sorted(Path(folder).glob("*.safetensors"))
    if not paths:
        raise FilesError(f"{folder} has no safetensors file; pass the folder that save_pretrained wrote.")
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

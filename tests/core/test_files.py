"""Folders arrive whole or not at all, also when the disk is full."""

import errno
import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llama_sft_helpers.core import files
from llama_sft_helpers.core.files import FilesError, free_bytes, is_full_disk, write_text
from llama_sft_helpers.evaluation import new_folder
from llama_sft_helpers.training import hash_files


@pytest.fixture
def target(tmp_path):
    """A folder that an earlier run has written."""
    target = tmp_path / "deep" / "merged"
    with new_folder(target) as folder:
        (folder / "weights").write_text("old", encoding="utf-8")
        assert not target.exists()
    return target


def test_a_folder_is_replaced_by_the_next_run_when_complete(target):
    with new_folder(target) as folder:
        (folder / "more").write_text("new", encoding="utf-8")
        assert (target / "weights").exists()
    assert not (target / "weights").exists()
    assert (target / "more").read_text(encoding="utf-8") == "new"
    assert list(target.parent.iterdir()) == [target]


FULL = "too full to write.*Nothing was overwritten"


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (KeyError("a fault of the block's own"), KeyError, "fault"),
        (OSError(errno.ENOSPC, "full"), FilesError, FULL),
        (SafetensorError("I/O error (os error 28)"), FilesError, FULL),
    ],
)
def test_an_error_leaves_the_earlier_folder_as_it_was(target, error, kind, told):
    with pytest.raises(kind, match=told), new_folder(target):
        raise error
    assert (target / "weights").read_text(encoding="utf-8") == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_somebody_else_wrote_is_left_alone(tmp_path, kind):
    target = tmp_path / "mine"
    kept = target / "thesis.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("precious", encoding="utf-8")
    told = "not written by this series; nothing was changed"
    with pytest.raises(FilesError, match=told), new_folder(target):
        pytest.fail("the body must not run")
    assert kept.read_text(encoding="utf-8") == "precious"


def test_too_little_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 2**29)
    told = r"1.00 GiB needed, 0.50 GiB free"
    with pytest.raises(FilesError, match=told), new_folder(tmp_path / "m", 2**30):
        pytest.fail("the body must not run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), False),
        (RuntimeError("[enforce fail at inline_container.cc:672] PytorchStreamWriter failed writing"), True),
        (RuntimeError(f"I/O error: quota (os error {errno.EDQUOT})"), True),
        (RuntimeError("I/O error: Permission denied (os error 13)"), False),
        (PermissionError(errno.EACCES, "No space left, says a file's name"), False),
        (OSError(errno.EROFS, "Read-only file system"), False),
        (ValueError("shapes differ"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, full):
    assert is_full_disk(error) is full


def test_free_space_of_a_folder_that_is_not_there_yet(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert free_bytes(tmp_path / "a" / "b") == pytest.approx(free, rel=0.05)


def test_the_hash_covers_names_and_bytes(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"x")
    (tmp_path / "notes.txt").write_bytes(b"not counted")
    by_hand = hashlib.sha256(b"a.safetensors" + hashlib.sha256(b"x").digest()).hexdigest()
    assert hash_files(tmp_path) == by_hand
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    assert hash_files(tmp_path) != by_hand
    with pytest.raises(FilesError, match="has no safetensors file"):
        hash_files(tmp_path.parent)


def test_a_rename_that_fails_puts_the_old_folder_back(target, monkeypatch):
    rename = Path.rename

    def failing(self, to):
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"), new_folder(target) as folder:
        (folder / "weights").write_text("new", encoding="utf-8")
    assert (target / "weights").read_text(encoding="utf-8") == "old"


def test_two_writers_of_one_file_never_show_half_of_it(tmp_path):
    path, texts = tmp_path / "file.txt", ["a" * 200_000, "b" * 200_000]
    seen = set()

    def write(text):
        for _ in range(30):
            write_text(path, text)
            seen.add(path.read_text(encoding="utf-8"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, texts))
    assert seen <= set(texts)
    assert [item.name for item in tmp_path.iterdir()] == ["file.txt"]

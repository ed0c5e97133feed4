"""A file or a folder is whole or not there, and what was there before stays until the new one is."""

import os
from pathlib import Path

import pytest

from icu_nb.plumbing import atomic_path


@pytest.fixture
def folder(tmp_path):
    """A folder that holds years of work, and is about to be replaced."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    return tmp_path / "model"


def write(folder, text="new"):
    with atomic_path(folder) as new:
        new.mkdir()
        (new / "weights").write_text(text)


def fail_at_rename(monkeypatch, numbers, error):
    """The renames of these numbers raise."""
    rename, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) in numbers:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)


ERRORS = [PermissionError(13, "in use, says Windows"), KeyboardInterrupt()]


def test_a_folder_is_replaced(folder):
    write(folder)
    assert (folder / "weights").read_text() == "new" and os.listdir(folder.parent) == ["model"]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("number", [1, 2])
def test_a_failed_rename_leaves_the_old_folder(folder, monkeypatch, number, error):
    fail_at_rename(monkeypatch, [number], error)
    with pytest.raises(type(error)):
        write(folder)
    assert (folder / "weights").read_text() == "old" and os.listdir(folder.parent) == ["model"]


def test_where_it_cannot_be_put_back_either_it_is_kept_aside(folder, monkeypatch):
    fail_at_rename(monkeypatch, [2, 3], PermissionError(13, "in use"))
    with pytest.raises(PermissionError):
        write(folder)
    (kept,) = folder.parent.rglob("old/weights")
    assert kept.read_text() == "old"


def test_interrupted_between_the_renames(folder, monkeypatch):
    rename = os.replace

    def replace(source, target):
        rename(source, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write(folder)
    assert (folder / "weights").read_text() == "old" and os.listdir(folder.parent) == ["model"]


def test_a_disk_that_is_full_at_last_leaves_the_old_one(folder, monkeypatch):
    """Some drives say so only when they are told to write for good."""

    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        write(folder)
    assert (folder / "weights").read_text() == "old" and os.listdir(folder.parent) == ["model"]

"""Files and groups of files appear whole or not at all, and a full disk is told with its path."""

import errno

import pytest

from data_pipeline import atomic

NAMES = ("page.html", "viewer.html")


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def contents(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_files_that_belong_together_take_their_places_together(tmp_path):
    for name, text in (("table.csv", "old"), ("page.html", "old"), ("viewer.html", "old"), ("notes.txt", "mine")):
        (tmp_path / name).write_text(text)
    with pytest.raises(OSError), atomic.replacing_files(tmp_path, NAMES) as folder:
        (folder / "table.csv").write_text("new")
        full_disk()
    assert contents(tmp_path) == dict.fromkeys(("table.csv", *NAMES), "old") | {"notes.txt": "mine"}
    with atomic.replacing_files(tmp_path, NAMES) as folder:
        for name in ("table.csv", "page.html"):
            (folder / name).write_text("new")
    assert contents(tmp_path) == {"table.csv": "new", "page.html": "new", "notes.txt": "mine"}


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".unfinished").mkdir()
    (tmp_path / ".unfinished" / "page.html").write_text("half")
    with atomic.replacing_files(tmp_path, NAMES) as folder:
        (folder / "table.csv").write_text("new")
    assert contents(tmp_path) == {"table.csv": "new"}


def test_a_full_disk_is_told_with_the_path_that_was_to_be_written(tmp_path):
    with pytest.raises(OSError) as found, atomic.replacing(tmp_path / "label.nii.gz"):
        full_disk()
    assert found.value.filename == str(tmp_path / "label.nii.gz") and not any(tmp_path.iterdir())
    with pytest.raises(OSError) as found, atomic.replacing_files(tmp_path / "out", NAMES):
        full_disk()
    assert found.value.filename == str(tmp_path / "out")

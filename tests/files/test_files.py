"""Files that are written whole or not at all, whoever else writes them."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import drive
from drive.files import atomic, write_atomic


def test_a_link_stays_one_and_its_target_is_written(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "real"
    target.parent.mkdir()
    for link, to in (("one", target), ("two", Path("one")), ("dangling", tmp_path / "elsewhere" / "new")):
        os.symlink(to, tmp_path / link)
    for link, leads_to in (("one", "real"), ("two", "real"), ("dangling", "new")):
        write_atomic(tmp_path / link, link.encode())
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / "elsewhere" / leads_to).read_bytes() == link.encode()
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["new", "real"]


def test_masks_are_saved_through_a_link(tmp_path: Path) -> None:
    drive.Masks({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "real")
    os.symlink("real", tmp_path / "link")
    drive.Masks({"a": torch.zeros(3, dtype=torch.bool)}).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert not drive.Masks.load(tmp_path / "real")["a"].any()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_refused(tmp_path: Path, make: object) -> None:
    make(tmp_path / "there")  # type: ignore[operator]
    os.symlink("there", tmp_path / "link")
    for name in ("there", "link"):
        with pytest.raises(OSError, match="must be a regular file, got a folder or a special file"):
            write_atomic(tmp_path / name, b"new")
    assert sorted(os.listdir(tmp_path)) == ["link", "there"]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def pieces() -> Iterator[bytes]:
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, pieces())
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_permissions_stay_and_new_files_have_the_usual_ones(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "new", b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_atomic(tmp_path / "new", b"again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    write_atomic(path, b"content")
    assert path.read_bytes() == b"content"


def test_writers_of_one_process_do_not_meet(tmp_path: Path) -> None:
    path, errors = tmp_path / "shared", list[Exception]()
    contents = [bytes([number]) * (1 << 20) for number in range(4)]
    write_atomic(path, contents[0])

    def work(content: bytes) -> None:
        for _ in range(10):
            try:
                write_atomic(path, content)
                assert path.read_bytes() in contents
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and os.listdir(tmp_path) == ["shared"]


def test_the_place_may_be_filled_by_name(tmp_path: Path) -> None:
    with atomic(tmp_path / "file") as partial:
        partial.write_text("content")
        assert not (tmp_path / "file").exists()
    assert (tmp_path / "file").read_text() == "content"

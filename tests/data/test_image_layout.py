"""Which files of a folder are images of which class: links, hidden ones, layouts, and what is left out."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from images import image_folder
from rich.console import Console

from drive.experiments.cli.console import name_skipped
from drive.experiments.data import sources as data
from drive.experiments.data.layout import Layout, layout_of
from drive.experiments.data.names import left_out, shown
from drive.experiments.runs.inputs import InputError

SUBFOLDER = "in a sub-folder of a class"
OUTSIDE = "in the folder of no class"
SUFFIX = "without the suffix of an image"
NOWHERE = "gone, or a link that leads nowhere"
LATIN = "caf\udce9"  # in Latin-1, as Python has bytes that are no UTF-8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", count=2)


def look(folder: Path) -> Layout:
    return layout_of(folder, folder)


def names(images: list[tuple[Path, int]], folder: Path) -> dict[str, int]:
    return {os.path.relpath(path, folder): label for path, label in images}


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "hidden",
    [
        "train/.ipynb_checkpoints/0.png", "train/red/.ipynb_checkpoints/0.png", "train/red/._0.png",
        "train/.DS_Store", "train/red/Thumbs.db", "val/desktop.ini", ".git/train/x", "readme.txt",
        "runs/x.csv",
    ],
)  # fmt: skip
def test_hidden_files_are_none_of_the_data(folder: Path, hidden: str) -> None:
    before = look(folder)
    put(folder / hidden)
    assert look(folder) == before and not before.skipped and before.classes == ["blue", "red"]


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".jpe", ".jp2", ".tga", ".WebP", ".pbm", ".tiff"])
def test_suffixes_are_those_of_pillow(folder: Path, suffix: str) -> None:
    put(folder / f"train/red/x{suffix}")
    assert names(look(folder).train, folder)[f"train/red/x{suffix}"] == 1


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("train/red/more/1.png", SUBFOLDER), ("train/red/images/more/1.png", SUBFOLDER),
        ("val/red/a/b/c.txt", SUBFOLDER), ("train/red/x", SUFFIX), ("train/red/x.json", SUFFIX),
        ("train/red/x.png.part", SUFFIX), ("train/red/images/x.txt", SUFFIX), ("train/5.png", OUTSIDE),
        ("val/labels.csv", OUTSIDE),
    ],
)  # fmt: skip
def test_files_that_are_left_out(folder: Path, path: str, why: str) -> None:
    before = look(folder)
    put(folder / path)
    after = look(folder)
    assert after.skipped == [(path, why)] and (after.train, after.test) == (before.train, before.test)


@pytest.mark.parametrize(
    ("path", "to", "found"),
    [
        ("train/red/x.png", "gone", ("train/red/x.png", NOWHERE)),
        ("train/red/x.png", "x.png", ("train/red/x.png", NOWHERE)),
        ("train/red/x.png", "0.png/x", ("train/red/x.png", NOWHERE)),
        ("train/green", "gone", ("train/green", NOWHERE)),
        ("val/green", "green", ("val/green", NOWHERE)),
        ("train/red/up", "..", ("train/red/up/", SUBFOLDER)),
        ("train/red/images", ".", ("train/red/images/", SUBFOLDER)),
        ("train/red/all", "/", ("train/red/all/", SUBFOLDER)),
        ("train/red/zero.png", "/dev/zero", ("train/red/zero.png", "a pipe, socket or device")),
    ],
)
def test_links_that_lead_nowhere_or_in_a_circle(
    folder: Path, path: str, to: str, found: tuple[str, str]
) -> None:
    before = look(folder)
    (folder / path).symlink_to(to)
    after = look(folder)
    assert after.skipped == [found] and (after.train, after.test) == (before.train, before.test)


def test_pipes_are_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "train/red/pipe.png")
    assert data.load("imagefolder", str(folder)).skipped == (
        ("train/red/pipe.png", "a pipe, socket or device"),
    )


@pytest.mark.parametrize("link", ["train", "train/red", "val/blue", "train/blue/0.png"])
def test_links_are_followed(folder: Path, link: str) -> None:
    before = look(folder)
    away = folder.parent / "away"
    (folder / link).rename(away)
    (folder / link).symlink_to(away)
    assert look(folder) == before


def test_a_class_within_itself(folder: Path) -> None:
    (folder / "train/green").symlink_to(".")
    with pytest.raises(
        InputError, match="of every class to train, got none of class green; left out 5 files"
    ):
        data.load("imagefolder", str(folder))


def test_a_class_that_is_called_images(folder: Path) -> None:
    for part in ("train", "val"):
        shutil.copytree(folder / part / "red", folder / part / "images")
    found = look(folder)
    assert found.classes == ["blue", "images", "red"] and not found.skipped
    for images, part in ((found.train, "train"), (found.test, "val")):
        assert names(images, folder) == {
            f"{part}/{name}/{i}.png": label for label, name in enumerate(found.classes) for i in range(2)
        }


def test_images_of_a_class_beside_its_folder_images(folder: Path) -> None:
    for path in ("train/red/images/0.png", "train/red/images/7.png", "val/blue/images/0.png"):
        put(folder / path)
    found = look(folder)
    assert names(found.train, folder) == {
        "train/blue/0.png": 0, "train/blue/1.png": 0, "train/red/0.png": 1, "train/red/1.png": 1,
        "train/red/images/0.png": 1, "train/red/images/7.png": 1,
    }  # fmt: skip
    assert "val/blue/images/0.png" in names(found.test, folder) and not found.skipped


def read_beside(part: str) -> str:
    return f"beside train/ and {part}/, which are read"


@pytest.mark.parametrize(
    ("made", "read", "skipped"),
    [
        ("test/red/0.png test/blue/0.png", "test", ["val/"]),
        ("test/images/0.png", "val", ["test/"]),  # without labels, as Tiny ImageNet's
        ("test/0.png", "val", ["test/"]),
        ("Train/red/9.png Val/blue/9.png", "val", ["Train/", "Val/"]),
        ("valid/red/9.png other/9.png", "val", ["valid/"]),
    ],
)
def test_the_other_folders_of_images_are_named(
    folder: Path, made: str, read: str, skipped: list[str]
) -> None:
    for path in made.split():
        put(folder / path)
    found = look(folder)
    assert {name.partition("/")[0] for name in names(found.test, folder)} == {read}
    assert found.skipped == [(name, read_beside(read)) for name in skipped]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ("val/images/0.png", "class images is in val only"),
        ("val/RED/0.png", "class RED is in val only"),
        (f"val/{LATIN}/0.png", r"class caf\\xe9 is in val only"),
    ],
)
def test_classes_of_test_alone(folder: Path, made: str, message: str) -> None:
    put(folder / made)
    with pytest.raises(InputError, match=f"the same two or more classes to train and test, got {message}"):
        look(folder)


def annotate(folder: Path, lines: bytes) -> None:
    """The images of val all in one folder, as x0.png for class x."""
    for name in ("blue", "red"):
        for path in (folder / "val" / name).iterdir():
            put(folder / "val/images" / f"{name}{path.name}")
        shutil.rmtree(folder / "val" / name)
    (folder / "val/val_annotations.txt").write_bytes(lines)


ALL = b"red0.png\tred\t0\t0\nblue0.png\tblue\nred1.png\tred\nblue1.png\tblue\n"


@pytest.mark.parametrize(
    ("lines", "skipped"),
    [
        (ALL, []),
        (ALL.replace(b"\n", b"\r\n"), []),
        (ALL + ALL + b"\n", []),
        (ALL.replace(b"red1", b"red2"), [
            ("val/images/red1.png", "without a line in val_annotations.txt"),
            ("val/images/red2.png", "missing, but with a line in val_annotations.txt"),
        ]),
        (ALL + b"/etc/passwd\tred\n../images/red1.png\tblue\n", [
            (f"val/images/{name}", "missing, but with a line in val_annotations.txt")
            for name in ("../images/red1.png", "/etc/passwd")
        ]),
        (ALL + b"caf\xe9.png\tred\n", [
            (r"val/images/caf\xe9.png", "missing, but with a line in val_annotations.txt")
        ]),
    ],
)  # fmt: skip
def test_annotations(folder: Path, lines: bytes, skipped: list[tuple[str, str]]) -> None:
    annotate(folder, lines)
    found = look(folder)
    assert found.skipped == skipped
    expected = {
        f"val/images/{name}{i}.png": label for label, name in enumerate(found.classes) for i in (0, 1)
    }
    assert names(found.test, folder) == {n: y for n, y in expected.items() if n not in dict(skipped)}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (ALL + b"x.png red\n", "in each line of val_annotations.txt, got 'x.png red' in line 5"),
        (ALL + b"red0.png\tblue\n", r"got 'red0.png\\\\tblue' in line 5"),
        (ALL + b"x.png\tgreen\n", "got green in test only"),
        (b"\xff" * 9, r"xff' in line 1"),
    ],
)
def test_annotations_that_are_none(folder: Path, lines: bytes, message: str) -> None:
    annotate(folder, lines)
    with pytest.raises(InputError, match=message):
        look(folder)


@pytest.mark.parametrize("left", [[], ["val/images/blue0.png"]])
def test_annotations_that_are_left_over(folder: Path, left: list[str]) -> None:
    """Images were sorted into folders of classes by a script, as is often done with Tiny ImageNet."""
    before = look(folder)
    (folder / "val/images").mkdir()
    (folder / "val/val_annotations.txt").write_bytes(ALL)
    for path in left:
        put(folder / path)
    found = look(folder)
    assert found.test == before.test
    assert found.skipped == [(name, OUTSIDE) for name in ("val/val_annotations.txt", *left)]


@pytest.mark.parametrize("kind", ["empty", "below", "broken", "hidden"])
def test_a_class_without_training_images(folder: Path, kind: str) -> None:
    red = folder / "train/red"
    for path in list(red.iterdir()):
        path.unlink()
    why = ""
    if kind == "below":
        put(red / "a/0.png")
        why = "; left out 1 file (in a sub-folder of a class): train/red/a/0.png"
    elif kind == "broken":
        put(red / "0.png")
        why = "; left out 1 file (broken or no image): train/red/0.png"
    elif kind == "hidden":
        put(red / ".0.png")
    with pytest.raises(InputError) as error:
        data.load("imagefolder", str(folder))
    expected = "--data-dir must have readable images of every class to train, got none of class red"
    assert str(error.value) == expected + why


@pytest.mark.parametrize("damage", [shutil.rmtree, lambda red: [p.write_bytes(b"") for p in red.iterdir()]])
def test_a_class_without_test_images(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder / "val/red")
    found = data.load("imagefolder", str(folder))
    assert found.skipped[-1] == ("red/", "a class without a test image")
    assert (found.classes, found.test_y.tolist()) == (2, [0, 0])


@pytest.mark.parametrize("path", ["train/red/{}.txt", "train/{}/0.png", "val/red/{}.png", "{}.txt", "{}"])
def test_names_that_are_no_utf8(folder: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    if path == "{}":
        folder = folder.rename(folder.with_name(LATIN))
    else:
        put(folder / path.format(LATIN))
    if path.startswith("train/{"):
        for part in ("train", "val"):
            (folder / part / LATIN).mkdir(exist_ok=True)
            shutil.copy(folder / "train/red/0.png", folder / part / LATIN / f"{LATIN}.png")
    for _ in ("cold", "warm"):
        found = data.load("imagefolder", str(folder))
        assert found.classes == 2 + path.startswith("train/{")
        json.dumps(found.skipped, ensure_ascii=False).encode()
        name_skipped(found, Console())
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * len(found.skipped) and all(r"caf\xe9" in line for line in printed)


def test_messages_have_names_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / LATIN).mkdir()
    with pytest.raises(InputError, match=rf"got {tmp_path}/caf\\xe9 \(no folder train\)"):
        data.load("imagefolder", str(tmp_path / LATIN))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize(("owner", "function"), [(os, "listdir"), (Path, "stat"), (Path, "read_bytes")])
def test_what_the_system_does_not_read(
    folder: Path, owner: object, function: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never without these images, which may be readable the next time: they would be gone from the cache."""
    real = getattr(owner, function)

    def fail(path: str | Path, **options: object) -> object:
        if "/red" in os.fspath(path):
            raise OSError(number, "no", None if function == "read_bytes" else os.fspath(path))
        return real(path, **options)

    monkeypatch.setattr(owner, function, fail)
    message = rf"--data-dir must be readable, got .*/photos \(\[Errno {number}\] no: '.*/photos/train/red"
    with pytest.raises(InputError, match=message):
        data.load("imagefolder", str(folder))


def test_a_folder_below_a_class_that_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder / "train/red/more/x.png")
    real = os.scandir

    def fail(path: str) -> object:
        if "more" in os.fspath(path):
            raise PermissionError(errno.EACCES, "no", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert look(folder).skipped == [("train/red/more/", SUBFOLDER)]


def test_a_file_that_vanishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*real(path), "gone.png"])
    assert ("train/red/gone.png", NOWHERE) in look(folder).skipped
    monkeypatch.undo()
    found = look(folder)
    (folder / "train/red/0.png").unlink()
    monkeypatch.setattr("drive.experiments.data.imagefolder.layout_of", lambda *_: found)
    with pytest.raises(InputError, match="--data-dir must be readable"):
        data.load("imagefolder", str(folder))


def test_a_line_for_each_reason() -> None:
    skipped = [(f"{i}.png", "broken") for i in range(7)] + [("val/", "beside"), ("x", "broken"), ("y", "odd")]
    assert left_out(skipped) == [
        "left out 8 files (broken): 0.png, 1.png, 2.png, 3.png, 4.png, ...",
        "left out 1 folder (beside): val/",
        "left out 1 file (odd): y",
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("caf\u00e9", "caf\u00e9"), (LATIN, r"caf\xe9"), ("a\nb", r"a\nb"), ("\x1b[31m", r"\x1b[31m"),
        ("\u202egnp", r"\u202egnp"), ("a b", "a b"),
    ],
)  # fmt: skip
def test_names_are_shown_as_text(name: str, text: str) -> None:
    assert shown(f"/photos/{name}", Path("/photos")) == text


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("name", ["[bold]x.xml", "\u0142\u00e9.xml", f"{LATIN}.xml", "a" * 150])
def test_lines_are_printed_whole_on_every_terminal(folder: Path, name: str, encoding: str) -> None:
    put(folder / "train/red" / name)
    written = io.BytesIO()
    file = io.TextIOWrapper(written, encoding)
    name_skipped(data.load("imagefolder", str(folder)), Console(file=file, width=40))
    file.flush()
    (line,) = written.getvalue().decode(encoding).splitlines()
    shown_name = shown(name).encode(encoding, "backslashreplace").decode(encoding)
    assert line == f"left out 1 file (without the suffix of an image): train/red/{shown_name}"

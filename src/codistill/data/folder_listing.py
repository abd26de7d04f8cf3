"""Listing a folder of images: its parts (train, val, test), and the classes and files of each; nothing is decoded."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from codistill.data.decode import ENDINGS
from codistill.data.image_files import ImageFiles
from codistill.utils import InputError

SYSTEM_NAMES = frozenset(
    {"__macosx", "@eadir", "lost+found", "#recycle", "$recycle.bin", "system volume information", "__pycache__"}
    | {"@recycle", "@recently-snapshot", "@tmp", "#snapshot", "network trash folder", "temporary items"}
    | {"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"}
)
"""Folders and files that systems write, in lower case; they are passed over, as are names that begin with a dot."""
PART_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Usual names of the parts, in lower case; `set`, `data`, `images` or `split` may follow."""
_PART_SUFFIX = re.compile(r"[ _-]?(set|data|images|split)$")


@dataclass(frozen=True)
class Part:
    """The files of one part, and their labels."""

    files: ImageFiles
    labels: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Part:
        return Part(self.files[index], self.labels[index])


@dataclass
class LeftOut:
    """What is in a folder and is not read."""

    endings: Counter[str] = field(default_factory=Counter)
    """Number of files of each ending that is none of `ENDINGS`."""
    loose: int = 0
    """Number of files beside the classes' folders."""
    folders: list[str] = field(default_factory=list)
    """Folders beside the parts."""
    hidden: list[str] = field(default_factory=list)
    """Hidden and system folders."""

    def messages(self) -> list[str]:
        """Return what is left out, in sentences."""
        messages = []
        if self.folders:
            messages.append(f"folders beside the parts are left out: {_enumerate(self.folders)}")
        if self.hidden:
            messages.append(f"hidden and system folders are left out: {_enumerate(self.hidden)}")
        if self.loose:
            messages.append(f"files beside the folders of the classes are left out: {self.loose:,}")
        if self.endings:
            counts = ", ".join(f"{ending or 'no ending'} {count:,}" for ending, count in self.endings.most_common(5))
            messages.append(
                f"{self.endings.total():,} files are left out for their endings ({counts}); read are "
                f"{', '.join(sorted(ENDINGS))}"
            )
        return messages


def _enumerate(names: Iterable[str]) -> str:
    """Return the first five names, and how many more there are.

    >>> _enumerate("gfedcbaa")
    'a, b, c, d, e and 2 more'
    """
    names = sorted({*names})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is passed over: its name begins with a dot, or a system writes it."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def list_parts(path: Path) -> tuple[tuple[str, ...], dict[str, Part], LeftOut]:
    """List the classes, the parts by name (train, val, test), and what is left out.

    Where there are no parts, the only one is called "all". Parts are found under the names of `PART_NAMES`, also one
    folder down.

    Raises:
        InputError: the folder is missing or has no classes, its parts differ in their classes, or a class has no image.
    """
    left_out = LeftOut()
    path, names = _find_parts(path, left_out)
    if not names:
        part, classes = list_part(path, left_out)
        return classes, {"all": part}, left_out
    listed = {part: list_part(path / name, left_out) for part, name in names.items()}
    classes = listed["train"][1]
    for part, (_, part_classes) in listed.items():
        if part_classes != classes:
            different = ", ".join(sorted(set(classes) ^ set(part_classes))[:5])
            raise InputError(f"--data folder:{path}: train and {part} differ in their classes ({different})")
    return classes, {part: listed[part][0] for part in listed}, left_out


def list_judged_part(path: Path) -> tuple[Part, tuple[str, ...], LeftOut]:
    """List a folder's test (or else val) part and its classes, or all of it where it has no parts."""
    left_out = LeftOut()
    path, names = _find_parts(path, left_out)
    name = names.get("test", names.get("val"))
    return *list_part(path if name is None else path / name, left_out), left_out


def _find_parts(path: Path, left_out: LeftOut) -> tuple[Path, dict[str, str]]:
    """Return the folder that holds the parts, or else the classes, and the folder's name of each part.

    Raises:
        InputError: there is no such folder, two folders are the same part, or a part is missing.
    """
    if not path.is_dir():
        raise InputError(f"--data folder:{path}: there is no such folder; one that has moved is named with --data-dir")
    parts = _parts_of(path)
    folders = [name for name in _visible_folders(path) if not is_hidden(name)]
    if not parts:
        with_parts = [name for name in folders if _holds_parts_or_classes(path / name) and _parts_of(path / name)]
        if len(with_parts) > 1:
            raise InputError(
                f"--data folder:{path}: {' and '.join(sorted(with_parts)[:3])} have parts of their own; name "
                "one of them"
            )
        inside = with_parts or [name for name in folders if len(folders) == 1 and _holds_parts_or_classes(path / name)]
        if inside and _part_of(inside[0]) is None:
            left_out.folders += [name for name in folders if name not in inside]
            path = path / inside[0]
            parts = _parts_of(path)
            folders = _visible_folders(path)
    if not parts and [*map(_part_of, folders)] == ["train"]:
        raise InputError(f"--data folder:{path} has a folder {folders[0]}, but none called test (or val) beside it")
    left_out.folders += [name for name in folders if parts and name not in parts.values()]
    return path, parts


def _parts_of(path: Path) -> dict[str, str]:
    """Return the folder's name of each part, train first; nothing where train, or both others, are missing.

    Raises:
        InputError: two folders are the same part.
    """
    found: dict[str, str] = {}
    for name in sorted(_visible_folders(path)):
        part = _part_of(name)
        if part in found and _holds_parts_or_classes(path / name):
            raise InputError(f"--data folder:{path}: {found[part]} and {name} are both the part {part}; move one away")
        if part is not None and _holds_parts_or_classes(path / name):
            found[part] = name
    return {part: found[part] for part in ("train", "val", "test") if part in found} if _is_whole(found) else {}


def _is_whole(found: dict[str, str]) -> bool:
    return "train" in found and len(found) > 1


def _part_of(name: str) -> str | None:
    """Return which part a folder of this name is.

    >>> _part_of("Training_set"), _part_of("valid"), _part_of("cat")
    ('train', 'val', None)
    """
    return PART_NAMES.get(_PART_SUFFIX.sub("", name.casefold()))


def _visible_folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return [entry.name for entry in entries if _is_folder(entry) and not is_hidden(entry.name)]


def _holds_parts_or_classes(path: Path) -> bool:
    """Return whether a folder holds folders and no images; a list of files beside them, or a text, is no image."""
    any_folder = False
    with os.scandir(path) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                if _is_folder(entry):
                    any_folder = True
                elif os.path.splitext(entry.name)[1].lower() in ENDINGS:
                    return False
    return any_folder


def _has_folders_only(path: Path) -> bool:
    """Return whether a folder holds folders and no files, apart from hidden ones."""
    any_folder = False
    with os.scandir(path) as entries:
        for entry in entries:
            if not is_hidden(entry.name):
                if not _is_folder(entry):
                    return False
                any_folder = True
    return any_folder


def list_part(path: Path, left_out: LeftOut) -> tuple[Part, tuple[str, ...]]:
    """List one part and its classes, in the order of torchvision's `ImageFolder`.

    Class names are compared in Unicode's composed form (NFC): a Mac and Linux may write the same one differently.

    Raises:
        InputError: there are no classes, one of them has no images or holds folders only, or a link leads outside.
    """
    root = os.path.realpath(path)
    folders: dict[str, list[str]] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            _check_link(entry, path, root, is_top=True)
            if not _is_folder(entry):
                if not is_hidden(entry.name):
                    left_out.loose += 1
            elif is_hidden(entry.name):
                left_out.hidden.append(entry.name)
            else:
                folders.setdefault(unicodedata.normalize("NFC", entry.name), []).append(entry.name)
    if not folders:
        raise InputError(f"--data folder:{path}: there is no folder of a class; give each class a folder of its images")
    for name in folders:
        if any(_has_folders_only(path / folder) for folder in folders[name]):
            others = [other for other in sorted(folders) if other != name][:2]
            _check_unsorted_part(path, name, others)
            raise InputError(
                f"--data folder:{path}: {name} contains only folders, so it and {' and '.join(others) or 'others'} are "
                "parts and not classes; call parts train, val and test, or put the images into the classes' folders"
            )
    files: list[bytes] = []
    labels: list[np.ndarray] = []
    classes = tuple(sorted(folders))
    for label, name in enumerate(classes):
        before = len(files)
        for folder in sorted(folders[name]):
            for place, names in sorted(_walk(path, folder, root, left_out)):
                files += [os.fsencode(f"{place}{os.sep}{file}") for file in sorted(names)]
        if len(files) == before:
            raise InputError(
                f"--data folder:{path}: no image file is in the class {name}; add some (endings "
                f"{', '.join(sorted(ENDINGS))}), or remove the folder"
            )
        labels.append(np.full(len(files) - before, label, dtype=np.int64))
    return Part(ImageFiles(str(path), np.array(files, dtype=np.bytes_)), np.concatenate(labels)), classes


def _check_unsorted_part(path: Path, name: str, others: list[str]) -> None:
    """Raise InputError where a part has classes and another one has images in no class."""
    for other in others:
        if _part_of(name) and _part_of(other) and not _has_folders_only(path / other):
            raise InputError(
                f"--data folder:{path}: {name} has a folder for each class and {other} has not; sort its images into "
                "such folders, or move it away"
            )


def _walk(path: Path, folder: str, root: str, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder at and under `path/folder`, by its path in `path`, and the names of its image files."""
    pending = [folder]
    while pending:
        place = pending.pop()
        names = []
        with os.scandir(os.path.join(path, place)) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name.casefold() in SYSTEM_NAMES:
                    continue
                if entry.is_symlink():
                    _check_link(entry, path, root, is_top=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{place}{os.sep}{name}")
                elif (ending := os.path.splitext(name)[1].lower()) in ENDINGS:
                    names.append(name)  # whatever it is: decoding names what is no regular file
                else:
                    left_out.endings[ending] += 1
        yield place, names


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; a link that leads to itself leads to none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _check_link(entry: os.DirEntry[str], path: Path, root: str, *, is_top: bool) -> None:
    """Raise for a link out of the folder, or one that could make a recursive walk loop.

    A downloaded archive could link to any file of this machine, or contain links that form a circle. A link beside the
    classes to a folder inside is followed at most once, so it is allowed.
    """
    if not entry.is_symlink():
        return
    target = os.path.realpath(entry.path)
    if os.path.commonpath([root, target]) != root:
        raise InputError(
            f"--data folder: {entry.path} is a link out of {path}; only links inside are followed, so copy the file "
            "there"
        )
    if _is_folder(entry) and (not is_top or target == root):
        raise InputError(
            f"--data folder: {entry.path} is a link to a folder, as only the folder of a class may be; copy its target"
        )

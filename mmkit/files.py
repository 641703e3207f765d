"""Files that are complete or absent, and hashes of their content."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from mmkit.errors import InputError

# What the place is to blame for, and what the user can do about it. Missing rights are the command line's.
_MEND_DISK = {
    errno.ENOSPC: "free some space, then run the same command again",
    errno.EDQUOT: "free some of your quota, then run the same command again",
    errno.EROFS: "choose another place, or have it mounted writable",
    errno.EIO: "look at the disk, or choose another place, then run the same command again",
    errno.ESTALE: "look at the network mount, then run the same command again",
}


def disk_trouble(error: BaseException | None, where: object) -> InputError | None:
    """The one line for an error that the disk is to blame for; None for any other.

    Args:
        error: What came out of a write. safetensors wraps the system's error and leaves only its number in the text.
        where: The file or folder that was written.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number not in _MEND_DISK:
        return None
    return InputError(f"cannot be written ({os.strerror(number)})", where=where, mend=_MEND_DISK[number])


class Writing:
    """A block that writes: a full, read-only or broken disk becomes an :class:`InputError` that names the place."""

    # A class, because it has to look at errors of every type (safetensors has its own) without catching any.
    def __init__(self, where: object) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if (trouble := disk_trouble(error, self.where)) is not None:
            raise trouble from None


def write_text(path: Path, text: str) -> None:
    """Write beside, fsync, rename: a reader sees the old text or the new one, never half of it.

    Raises:
        InputError: The disk is full, read-only or broken.
    """
    with Writing(path), new_file(path) as file:
        file.write(text.encode())


def check_target(path: Path) -> None:
    """Refuse a place that no file can be written to, before the work that it is for.

    Raises:
        InputError: It is a folder, or below something that is none or must not be written to.
    """
    if path.is_dir():
        raise InputError("is a folder", where=path, mend=f"name a file, such as {path / 'scores.json'}")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        what = "must not be written to" if above.is_dir() else "is a file, not a folder"
        raise InputError(what, where=above, mend="choose another place, or mend its rights")


@contextlib.contextmanager
def new_file(path: Path, *, flush: bool = True) -> Iterator[IO[bytes]]:
    """A file that appears at ``path`` only when the block ends well; an older one there is replaced.

    Args:
        path: Its folder is made.
        flush: To the disk, before it gets its name; without it a crash of the machine may leave an empty file of that name.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic only within one file system. The dot keeps a leftover out of hash_folder.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            if flush:
                os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; others read runs on a shared disk.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        # After a rename there is nothing left; after a failure the half-written file goes.
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with a final newline."""
    # NaN is no JSON: other readers would stumble over the file, so it fails here.
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, *, mend: str = "") -> Any:
    """Read a JSON file.

    Raises:
        InputError: Missing, not UTF-8, or cut off; with line and column.
    """
    try:
        # With or without a byte order mark, which some editors put in front.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError("no such file", where=path, mend=mend) from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=path, mend=mend) from None
    except json.JSONDecodeError as error:
        # Nothing after the fault means that the text ends too early; a cut string is reported at its beginning instead.
        cut = " (the file looks cut off)" if not error.doc[error.pos :].strip() or "Unterminated" in error.msg else ""
        where = f"{path}:{error.lineno}:{error.colno}"
        raise InputError(f"is not JSON: {error.msg}{cut}", where=where, mend=mend or "fetch or write the file again") from None


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at ``path`` only when the block ends well; an older one there is replaced.

    Raises:
        InputError: The disk is full, read-only or broken; the half-written folder is gone.
    """
    with Writing(path), _new_folder(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """The work of :func:`new_folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    # mkdtemp's folders are closed to everybody else.
    temporary.chmod(0o755)
    try:
        yield temporary
        # Before the rename: a complete name must stand for complete files, after a power cut too.
        sync_folder(temporary)
        # A folder that is not empty cannot be renamed over: the old one steps aside, and a crash in between leaves it there.
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(old / path.name)
            temporary.replace(path)
            shutil.rmtree(old)
        else:
            temporary.replace(path)
    finally:
        # After success it is gone already; after an error the error is what the caller must see.
        shutil.rmtree(temporary, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush every file below a folder to the disk, so that a rename cannot outrun the data."""
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    # Through the system's own call: a folder cannot be opened as a file.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """BLAKE2 of a file's content, 32 hex digits."""
    # 128 bits: against accidents, not against a forger; short enough for a manifest.
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        # 4 MiB at a time: weights of many gigabytes are hashed in flat memory.
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: Path) -> str:
    """BLAKE2 over names and contents of all files below a folder (hidden ones left out)."""
    digest = hashlib.blake2b(digest_size=16)
    # Sorted, and by relative name: a copy elsewhere has the same hash. Hidden files are leftovers or other programs'.
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{hash_file(path)}\n".encode())
    return digest.hexdigest()


def hash_text(*parts: str) -> str:
    """BLAKE2 of some strings."""
    # surrogatepass: file names need not be UTF-8. A separator, or ("ab", "c") and ("a", "bc") would be the same.
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

"""Files that are either complete or absent: written beside the destination, then moved onto it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from detector.errors import InputError

# The differences from the defaults of the options. In a wheel they lie in the package, in a clone beside it.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir())


# What text that UTF-8 cannot say becomes in a file: names of files that are no UTF-8, half a surrogate pair. In JSON,
# \udce9 is read back as it was.
UNENCODABLE = "backslashreplace"


def shortened(name: str, size: int) -> str:
    """The first characters of a file name, at most `size` bytes of them."""
    encoded = os.fsencode(name)
    return name if len(encoded) <= size else encoded[:size].decode("utf-8", "ignore")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; it becomes `path` when the block ends, and vanishes when the block fails.

    A reader, and a run that is killed, never sees half a file. The suffix is kept, because writers of images choose
    their format by it. Missing parent folders are made. An OSError names `path`, not what is written meanwhile.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stem = shortened(path.stem, 150)  # file systems allow 255 bytes
    if stem != path.stem:
        stem += f".{zlib.crc32(os.fsencode(path.stem)):08x}"
    partial = path.with_name(f".{stem}.{os.getpid()}.partial{shortened(path.suffix, 50)}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # PyAV's own cannot be given another name
    finally:
        with suppress(OSError):  # of a disk that fails, or can no longer be written, the first error tells more
            if partial.is_dir():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)


def check_writable(place: str | Path, option: str = "out", *, file: bool = False) -> None:
    """Make a folder, and find out before the work whether files can be written there.

    Args:
        place: the folder, or with `file` the one file that will be written.
        option: what another place is given by.

    Raises:
        InputError: they cannot.
    """
    folder = Path(place).parent if file else Path(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        if file and Path(place).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise InputError(f"Cannot write to '{place}': {error.strerror or error}. Choose another {option}=.") from error


def check_not_read(out: str | Path, source: str | Path) -> None:
    """
    Raises:
        InputError: what is written to `out` would replace the file that it is made from.
    """
    if os.path.exists(out) and os.path.exists(source) and os.path.samefile(out, source):
        raise InputError(f"out={out}: is the file that is read, and would be replaced; give another name.")


def check_sums(archive: zipfile.ZipFile) -> None:
    """
    Raises:
        zipfile.BadZipFile: an entry has other bytes than were written, which torch does not see.
    """
    # torch can leave out the sums of all entries (torch.serialization.set_crc32_options).
    if any(entry.CRC for entry in archive.infolist()) and (name := archive.testzip()):
        raise zipfile.BadZipFile(f"its entry {name} has other bytes than were written")


def write_json(path: str | Path, data: Any) -> None:
    """Write data as indented JSON, complete or not at all.

    numpy values become plain ones.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot say; use None.
        TypeError: something in data has no JSON form.
    """
    text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False, default=_plain)
    with replacing(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8", errors=UNENCODABLE)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no JSON form")

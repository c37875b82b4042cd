"""Files and folders that are complete or absent."""

import glob
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside a file; what is written there replaces the file in one step at the end.

    Readers see the old file or the new one, never a part. After an error the old file stays. Devices, pipes and links
    are written in place, because replacing one would turn it into an ordinary file.

    Args:
        path: The file. Missing folders are made.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.bin"
        >>> with replacing(path) as temporary:
        ...     _ = temporary.write_bytes(b"1234")
        >>> path.read_bytes()
        b'1234'
    """
    target = Path(path)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    here = f".{target.name}.{platform.node()}-"
    for stale in target.parent.glob(f"{glob.escape(here)}*.tmp"):  # of a process that was killed on this machine
        if not Path(f"/proc/{stale.name[len(here) : -len('.tmp')]}").exists() and Path("/proc").is_dir():
            stale.unlink(missing_ok=True)
    temporary = target.with_name(f"{here}{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a complete file: [`replacing`] with bytes, or text, which is UTF-8 with its line ends unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_atomic(path, "<p>done</p>")
        >>> path.read_text()
        '<p>done</p>'
    """
    with replacing(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that exists, or is made now, by one process at a time: `make` fills an empty one.

    It is made under another name and moved into place when it is whole: a process that is killed leaves all of it or
    nothing. `seconds.json` in it says how much processor time it took ([`seconds_of`]).
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process was faster
            return folder
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        start = time.process_time()
        make(partial)
        write_atomic(partial / "seconds.json", json.dumps({"seconds": time.process_time() - start}))
        partial.rename(folder)
    return folder


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Be the only process that writes something; the system frees it when the process ends, however that ends.

    Args:
        file: The lock. It holds the number of the process, and is removed at the end with a folder made for it.
        what: What is written, for the message. Of processes that are launched together the first one holds the lock.

    Raises:
        OSError: If another process holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = not file.parent.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = file.read_text(encoding="utf-8") if file.is_file() else ""
        named = f" {owner}" if owner else ""
        raise OSError(f"Another process{named} writes {what}. Wait until it ends, or choose another place.") from None
    try:
        file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
        if made:
            with suppress(OSError):  # not empty
                file.parent.rmdir()


def seconds_of(folder: Path) -> float:
    """Processor seconds that a folder of [`made_once`] took to make."""
    return json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]

"""Files that are complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a complete file: [`replacing`] with the content at hand.

    Args:
        path: The file. Missing folders are made.
        content: Bytes, or text, which is written as UTF-8 with its line ends unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_atomic(path, "<p>done</p>")
        >>> path.read_text()
        '<p>done</p>'
    """
    with replacing(path) as file:
        file.write_bytes(content.encode() if isinstance(content, str) else content)

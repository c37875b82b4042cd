"""Files that are whole or not there."""

import os
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a whole file so that readers see the old file or the new one, never a part.

    Args:
        path: The file. Missing folders are made.
        content: What it will hold: bytes, or text, as UTF-8, line ends as they are.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "report.html"
        >>> write_atomic(path, "<p>done</p>")
        >>> path.read_text()
        '<p>done</p>'
    """
    target, data = Path(path), content.encode() if isinstance(content, str) else content
    if target.is_symlink() or (
        target.exists() and not target.is_file()
    ):  # a device, a pipe, a link: to be kept as it is
        target.write_bytes(data)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)

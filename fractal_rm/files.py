"""Files and folders that are complete or absent."""

import glob
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

# Maximum nesting depth of JSON; brackets inside strings do not count.
_DEEPEST = 500
_BRACKET, _JSON_TEXT = re.compile(rb"[\[\]{}]"), re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def parse_json(content: bytes, what: str) -> Any:
    """Parse JSON in UTF-8.

    Args:
        content: The JSON.
        what: Its name in messages, such as the file and the row.

    Raises:
        ValueError: If it is not UTF-8 or not JSON, repeats a name in an object, is nested too deeply, or has a number
            that is too large.

    Example:
        >>> parse_json(b'{"a": 1, "a": 2}', "the line")
        Traceback (most recent call last):
        ValueError: the line has the name 'a' twice in an object; leave one of them.
    """
    try:
        if _is_deep(content):
            raise RecursionError
        return json.loads(content.decode("utf-8-sig").strip(), object_pairs_hook=_named_once)
    except _TwiceError as error:
        raise ValueError(f"{what} has the name {error.args[0]!r} twice in an object; leave one of them.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 (byte {error.start}); write it in UTF-8.") from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}" if error.lineno > 1 else f"{error.msg} at column {error.colno}"
        raise ValueError(f"{what} is invalid JSON ({reason}); fix or delete it.") from None
    except (ValueError, RecursionError):  # a number with thousands of digits, deep nesting
        raise ValueError(f"{what} is JSON that Python cannot hold; fix or delete it.") from None


def _is_deep(content: bytes) -> bool:
    """Whether JSON is nested too deeply; Python's own limit depends on its version."""
    if content.count(b"[") + content.count(b"{") <= _DEEPEST:
        return False
    depth = 0
    for found in _BRACKET.finditer(_JSON_TEXT.sub(b"", content)):
        depth += 1 if found[0] in b"[{" else -1
        if depth > _DEEPEST:
            return True
    return False


class _TwiceError(Exception):
    """An object repeats a name, so it is unclear which value is meant."""


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for name in names if names.count(name) > 1))
    return found


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a JSON file; raises as [`parse_json`], and OSError if the file cannot be read."""
    return parse_json(Path(path).read_bytes(), str(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, not YAML or not a mapping, is nested too deeply, or repeats a key.
    """
    try:
        # The loader in pure Python reads the same as the one in C, and its errors name the line.
        content = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or "it cannot be parsed"
        raise ValueError(f"{path}{where} is invalid YAML: {reason}. Fix the line.") from None
    # Invalid dates, deep nesting, lists as keys, and values that do not fit their tag.
    except (ValueError, RecursionError, TypeError, OverflowError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is YAML that cannot be read ({str(error)[:200]}). Fix it.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a mapping. Write one `name: value` a line.")
    return content


# Numbers that YAML 1.1 reads in base 8 or 60: `010` is 8 and `1:30` is 90.
_OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
# A decimal number; underscores may group its digits by three.
DECIMAL = re.compile(
    r"[-+]?(?:(?:[0-9]+|[0-9]{1,3}(?:_[0-9]{3})+)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", re.ASCII
)


def is_number(text: str) -> bool:
    """Whether a text is a decimal number; NaN and infinity too, which ranges refuse by name.

    Example:
        >>> [text for text in ("1e-3", " 5", "-.5", "inf", "ten", "1_0", "") if is_number(text)]
        ['1e-3', ' 5', '-.5', 'inf']
    """
    text = text.strip()
    return bool(DECIMAL.fullmatch(text)) or text.lower().lstrip("+-") in ("nan", "inf", "infinity")


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, without repeated keys and without aliases, which can expand without bound.

    Numbers are decimal, or have the prefix `0x` or `0b`.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "an alias (`*name`) is not taken", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                problem = f"the key {name!r} comes twice"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        _check_decimal(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        _check_decimal(node)
        return super().construct_yaml_float(node)


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)


def _check_decimal(node: Any) -> None:
    if _OTHER_BASE.fullmatch(node.value) or ("_" in node.value and not DECIMAL.fullmatch(node.value)):
        problem = f"`{node.value}` is not a decimal number; write one, or quote a text"
        raise ConstructorError(None, None, problem, node.start_mark)


def remove_abandoned(folder: Path, names: str) -> None:
    """Remove temporary files of [`replacing`] whose process was killed on this machine.

    Args:
        folder: The folder of the files.
        names: Glob pattern of the names of their target files.
    """
    for stale in folder.glob(f".{names}.{glob.escape(platform.node())}-*.tmp"):
        process = stale.name.removesuffix(".tmp").rpartition("-")[2]
        if not Path(f"/proc/{process}").exists() and Path("/proc").is_dir():
            stale.unlink(missing_ok=True)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to a file; its content replaces the file in one step at the end.

    Readers see the old or the new file, never part of it. After an error the old file stays. Devices, pipes and links
    are written in place, because replacing one would turn it into an ordinary file.

    Args:
        path: The file. Missing folders are created.

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
        with naming_file(target):
            yield target
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent, glob.escape(target.name))
    temporary = target.with_name(f".{target.name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with naming_file(target):
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming_file(target: Path) -> Iterator[None]:
    """Add the file's name to errors of the operating system, which lack it when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.strerror is not None:
            error.filename = str(target)
        raise


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
    """A folder that exists, or is made now by one process at a time: `make` fills an empty one.

    It is made under another name and moved into place when it is complete, so a killed process leaves all of it or
    nothing. Its file `seconds.json` holds the CPU time that it took ([`seconds_of`]).
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # made by another process meanwhile
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
    """Be the only process that writes something; the operating system frees the lock however the process ends.

    Args:
        file: The lock. It holds the process id, and is removed at the end, with folders created for it.
        what: What is written, for the message. Of processes launched together, only the first takes the lock.

    Raises:
        OSError: If another process holds the lock.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        lock = _hold(file)
    except Timeout:
        owner = ""
        with suppress(FileNotFoundError):  # it has just ended
            owner = file.read_text(encoding="utf-8", errors="replace")
        named = f" {owner}" if owner else ""
        raise OSError(f"Another process{named} writes {what}. Wait until it ends, or choose another place.") from None
    try:
        file.write_text(str(os.getpid()), encoding="utf-8")
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _hold(file: Path) -> FileLock:
    """Acquire the lock on a file and create missing folders; raises Timeout if another process holds it.

    The owner removes the file when it ends. A process that opened the file just before would lock one that nobody else
    sees, so it tries again.
    """
    lock = FileLock(file)
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            file.touch()
            opened = file.stat().st_ino
            lock.acquire(timeout=0)
            if file.stat().st_ino == opened:
                return lock
        lock.release()


def seconds_of(folder: Path) -> float:
    """CPU seconds that [`made_once`] took to make a folder."""
    return json.loads((folder / "seconds.json").read_text(encoding="utf-8"))["seconds"]

"""Read TFRecord files of `tf.train.Example` without TensorFlow: the texts in them."""

import struct
from collections.abc import Iterator
from pathlib import Path

# CRC-32C (Castagnoli), reflected polynomial, a byte at a time.
_POLYNOMIAL = 0x82F63B78


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_CRC_TABLE = tuple(map(_table_entry, range(256)))


def crc32c(content: bytes) -> int:
    """Check sum CRC-32C.

    Args:
        content: What to sum.

    Returns:
        The check sum.

    Source:
        RFC 3720, appendix B.4.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc32c(content: bytes) -> int:
    """The check sum as TFRecord files store it: turned by 15 bits, plus a constant.

    Args:
        content: What to sum.

    Returns:
        The masked check sum.

    Source:
        TensorFlow's documentation, "TFRecord and tf.train.Example".
    """
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_texts(path: Path) -> list[dict[str, list[str]]]:
    """The features of each record that hold texts.

    Args:
        path: A TFRecord file, not compressed, of `tf.train.Example` messages.

    Returns:
        One dictionary a record: the texts of each feature that holds bytes.

    Raises:
        ValueError: If the file is no TFRecord file, is cut off or damaged, or a record is no such message.

    Source:
        TensorFlow's documentation, "TFRecord and tf.train.Example": each record is its length (8 bytes, little
        endian), the masked check sum of the length, the record, and the masked check sum of the record. Messages:
        `example.proto` and `feature.proto` of TensorFlow; Protocol Buffers' documentation, "Encoding".
    """
    content, position, records = path.read_bytes(), 0, []
    while position < len(content):
        number = len(records) + 1
        header = content[position : position + 12]
        if len(header) < 12 or masked_crc32c(header[:8]) != struct.unpack("<I", header[8:])[0]:
            raise ValueError(f"{path}, row {number}: this is no TFRecord, or it is cut off; download the file again.")
        (length,) = struct.unpack("<Q", header[:8])
        record = content[position + 12 : position + 12 + length]
        check = content[position + 12 + length : position + 16 + length]
        if len(check) < 4 or masked_crc32c(record) != struct.unpack("<I", check)[0]:
            raise ValueError(f"{path}, row {number}: the record is cut off or damaged; download the file again.")
        try:
            records.append(_example_texts(record))
        except (IndexError, ValueError):
            raise ValueError(f"{path}, row {number}: the record is no tf.train.Example; check the file.") from None
        position += 16 + length
    return records


def _example_texts(record: bytes) -> dict[str, list[str]]:
    """Example {features = 1}, Features {map<string, Feature> feature = 1}, Feature {bytes_list = 1}."""
    texts: dict[str, list[str]] = {}
    for features in _fields(record, 1):
        for entry in _fields(features, 1):
            name = b"".join(_fields(entry, 1)).decode()
            lists = [found for feature in _fields(entry, 2) for found in _fields(feature, 1)]
            if lists:
                texts[name] = [value.decode() for found in lists for value in _fields(found, 1)]
    return texts


def _fields(message: bytes, wanted: int) -> Iterator[bytes]:
    """Contents of the fields of a message with one number and a length; others are passed over."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, length = key & 7, 0
        if kind == 0:
            _, position = _varint(message, position)
        elif kind == 2:
            length, position = _varint(message, position)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError("unknown wire type")
        if position + length > len(message):
            raise IndexError("a field leaves its message")
        if kind == 2 and key >> 3 == wanted:
            yield message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position

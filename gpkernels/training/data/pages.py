"""What the pages of a parquet column claim to hold, read before they are: pyarrow allocates what a page's header says,
up to 2 GiB, and shows neither headers nor a way to bound it.

A page is a header, a PageHeader in Thrift's compact protocol (parquet-format, parquet.thrift), and compressed bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

from gpkernels.training.data.sources import refuse_ratio

_DICTIONARY = 2
_TYPE, _UNCOMPRESSED, _COMPRESSED = 1, 2, 3
_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY = range(1, 9)
_STRUCT = 12


def dictionary_bytes(file: Path, chunk: Any) -> int:
    """The uncompressed bytes of the dictionary of a column chunk, a pyarrow ColumnChunkMetaData; 0 without one.

    Raises ValueError, before any page is decompressed, if the chunk does not lie in the file, is not a sequence of
    pages, or one of them claims far more than its compressed bytes.
    """
    starts = [chunk.data_page_offset, chunk.dictionary_page_offset if chunk.has_dictionary_page else None]
    place = min(start for start in starts if start is not None)
    end = place + chunk.total_compressed_size
    if not 0 <= place <= end <= file.stat().st_size:
        raise ValueError(f"wanted a column within the file, got bytes {place} to {end}")
    dictionary = 0
    with file.open("rb") as content:
        while place < end:
            content.seek(place)
            header = _numbers(content)
            if not {_TYPE, _UNCOMPRESSED, _COMPRESSED} <= header.keys() or min(header.values()) < 0:
                raise ValueError(f"wanted the header of a page at byte {place}, got none")
            refuse_ratio(header[_UNCOMPRESSED], header[_COMPRESSED])
            if header[_TYPE] == _DICTIONARY:
                dictionary = max(dictionary, header[_UNCOMPRESSED])
            place = content.tell() + header[_COMPRESSED]
    if place != end:
        raise ValueError(f"wanted pages to byte {end}, got them to byte {place}")
    return dictionary


def _numbers(content: BinaryIO) -> dict[int, int]:
    """The fields 1 to 3 of the struct at the file's position, which goes to its end."""
    found: dict[int, int] = {}
    field = 0
    while head := _bytes(content, 1)[0]:
        kind, step = head & 15, head >> 4
        field = field + step if step else _zigzag(content)
        if kind == _I32 and field <= _COMPRESSED:
            found[field] = _zigzag(content)
        else:
            _skip(content, kind, _DEPTH)
    return found


def _skip(content: BinaryIO, kind: int, depth: int) -> None:
    """A field of the struct; booleans lie in its head."""
    if kind in (_BYTE, _DOUBLE):
        _bytes(content, 1 if kind == _BYTE else 8)
    elif kind in (_I16, _I32, _I64):
        _varint(content)
    elif kind == _BINARY:
        content.seek(_varint(content), 1)
    elif kind == _STRUCT and depth:
        while head := _bytes(content, 1)[0]:
            if not head >> 4:
                _varint(content)
            _skip(content, head & 15, depth - 1)
    elif kind not in (_TRUE, _FALSE):  # lists, sets and maps: a PageHeader has none
        raise ValueError(f"wanted the header of a page, got a field of type {kind}")


def _bytes(content: BinaryIO, count: int) -> bytes:
    got = content.read(count)
    if len(got) < count:
        raise ValueError("wanted the header of a page, got the end of the file")
    return got


def _varint(content: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _bytes(content, 1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("wanted a number in the header of a page, got more than 10 bytes")


def _zigzag(content: BinaryIO) -> int:
    value = _varint(content)
    return value >> 1 ^ -(value & 1)

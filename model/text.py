"""Documents from text files: .txt (one document a file), .jsonl and .jsonl.gz (one a line), .parquet (one a row).

Files are read as streams: of each, one document with the line around it, or a batch of rows, is in memory at a time. No
document is larger than MAX_DOCUMENT_BYTES: to encode one takes many times its size. What cannot be read is refused by
file and line; nothing is replaced or left out silently.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from model.config import DataError

TEXT_KEY = "text"
PARQUET_ROWS = 256  # decoded at a time
MAX_DOCUMENT_BYTES = 64_000_000  # of its text in UTF-8


class Document(NamedTuple):
    text: str
    num_bytes: int
    digest: bytes

    @classmethod
    def of(cls, text: str) -> Document:
        raw = text.encode("utf-8")
        return cls(text, len(raw), hashlib.sha256(raw).digest())

    def split(self, val_frac: float) -> str:
        """The first 8 bytes of the document's sha256, as a fraction of 2^64, decide."""
        return "val" if int.from_bytes(self.digest[:8], "big") < val_frac * 2**64 else "train"


def read_txt(path: Path, text_key: str) -> Iterator[str]:
    """A .txt file is one document. Line ends and byte-order marks stay as they are."""
    _refuse_huge(path.stat().st_size, str(path))
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as fault:
        raise DataError(
            f"{path} is not UTF-8: byte {fault.start} is {fault.object[fault.start]:#04x} ({fault.reason}). "
            "Convert the file to UTF-8, or leave it out."
        ) from fault


def read_jsonl(path: Path, text_key: str) -> Iterator[str]:
    """One JSON object a line, the text under `text_key`. Blank lines are skipped."""
    is_gzip = path.suffix.lower() == ".gz"
    if is_gzip and path.stat().st_size == 0:  # gzip takes it for no lines at all
        raise DataError(f"{path} holds 0 bytes, which is no gzip file. Fetch it anew, or leave it out.")
    with gzip.open(path) if is_gzip else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line.strip().decode("utf-8"))
            except (ValueError, RecursionError) as fault:  # bad JSON, bad UTF-8, nested without end
                raise DataError(f"{path}:{number} is not JSON: {fault}. Mend the line, or leave it out.") from fault
            if not isinstance(entry, dict):
                raise DataError(
                    f"{path}:{number} holds a {type(entry).__name__}, not an object. Write each line as "
                    f'{{"{text_key}": "..."}}.'
                )
            if text_key not in entry:
                raise DataError(f"{path}:{number} {_lacks(text_key, list(entry))}")
            yield _checked(entry[text_key], f"{path}:{number}", text_key)


def read_parquet(path: Path, text_key: str) -> Iterator[str]:
    """One document a row, the text in column `text_key`."""
    try:
        import pyarrow  # here and not above: it takes time to load, and few need it
        import pyarrow.parquet
    except ImportError as fault:
        raise DataError(f"{path} needs the package pyarrow, which is missing. Run: pip install pyarrow.") from fault
    try:
        with open(path, "rb") as stream, pyarrow.parquet.ParquetFile(stream) as table:
            columns = table.schema_arrow.names
            if text_key not in columns:
                raise DataError(f"{path} {_lacks(text_key, columns)}")
            row = 0
            for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    row += 1
                    yield _checked(value.as_py(), f"{path}: row {row}", text_key)
    except (pyarrow.ArrowException, UnicodeDecodeError) as fault:
        raise _damaged(path, fault) from fault


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": read_txt,
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".parquet": read_parquet,
}


def kind_of(path: Path) -> str | None:
    """The key in READERS that says how `path` is read, or None."""
    return next((kind for kind in READERS if path.name.lower().endswith(kind)), None)


def find_files(inputs: Iterable[Path]) -> tuple[list[Path], Counter[str]]:
    """What is to be read in the inputs and the folders below them, and how many files of each other kind are there.

    Files come once each, by sorted path. Links to folders are not followed, and counted.
    """
    known = ", ".join(READERS)
    found: set[Path] = set()
    left_out: Counter[str] = Counter()
    for path in inputs:
        if path.is_dir():
            inside = [file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
            read = [file for file in inside if kind_of(file) and not file.is_dir()]
            if not read:
                raise DataError(f"--input {path} has no file in it that is read ({known}). Name a folder that has.")
            for file in read:
                if not file.is_file():
                    raise DataError(f"{file} is a link to nothing, or no file. Mend it, or leave it out.")
            found.update(Path(os.path.abspath(file)) for file in read)  # no resolve(): links may lack a suffix
            others = set(inside) - set(read)
            left_out.update("links to folders" if file.is_dir() else file.suffix or file.name for file in others)
        elif not path.exists():
            raise DataError(f"--input {path} is missing. Name a file ({known}) or a folder of such files.")
        elif not kind_of(path):
            raise DataError(f"--input {path} is of a kind that is not read. Use {known}, or a folder of such files.")
        else:
            found.add(Path(os.path.abspath(path)))
    return sorted(found), left_out


def read_texts(path: Path, text_key: str) -> Iterator[str]:
    """Every text of one file, in its order, empty ones too. Raises DataError naming the file, and the line if known."""
    kind = kind_of(path)
    assert kind is not None, path
    try:
        yield from READERS[kind](path, text_key)
    except (EOFError, zlib.error) as fault:
        raise _damaged(path, fault) from fault
    except OSError as fault:
        if fault.errno is None:  # not the system's, but gzip's or pyarrow's
            raise _damaged(path, fault) from fault
        raise DataError(f"{path} cannot be read: {fault.strerror}. Make it readable, or leave it out.") from fault


def documents(files: Iterable[Path], text_key: str = TEXT_KEY) -> Iterator[Document]:
    """Every document of the files, in their order, empty ones too."""
    for path in files:
        for text in read_texts(path, text_key):
            yield Document.of(text)


def _checked(value: Any, where: str, text_key: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {text_key!r} is {'null' if value is None else f'of type {type(value).__name__}'}, not a string. "
            "Mend it, leave it out, or name another key with --text_key."
        )
    num_bytes = len(value)
    if not value.isascii():
        try:
            num_bytes = len(value.encode("utf-8"))
        except UnicodeEncodeError as fault:  # JSON can write half of a pair: "\ud83d"
            raise DataError(
                f"{where}: {text_key!r} has a lone surrogate at character {fault.start}, which is no text. "
                "Mend it, or leave it out."
            ) from fault
    _refuse_huge(num_bytes, where)
    return value


def _refuse_huge(num_bytes: int, where: str) -> None:
    if num_bytes > MAX_DOCUMENT_BYTES:
        raise DataError(
            f"{where} is one document of {num_bytes / 1e6:,.1f} MB, more than {MAX_DOCUMENT_BYTES / 1e6:g} MB take too "
            "much memory to encode. Split it: one document a line in .jsonl."
        )


def _lacks(text_key: str, names: list[str]) -> str:
    listed = ", ".join(map(repr, names[:8])) or "nothing"
    return f"has no {text_key!r}, it has {listed}. Name the one that holds the text with --text_key, or leave it out."


def _damaged(path: Path, fault: Exception) -> DataError:
    reason = (str(fault).splitlines() or [type(fault).__name__])[0].rstrip(".")
    return DataError(f"{path} is damaged: {reason}. Fetch it anew, or leave it out.")

"""Files of every kind give their documents, in order, whole; what is damaged is refused by file and line."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model import text
from model.config import DataError
from model.text import PARQUET_ROWS, Document, documents, kind_of

TEXTS = ["first\r\n", "", "naïve 漢字 👑", " \ufeff\x00 "]


def texts_of(path: Path, text_key: str = "text") -> list[str]:
    return [document.text for document in documents([path], text_key)]


def jsonl(path: Path, *lines: str | bytes) -> Path:
    content = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_line_is_a_document_and_blank_lines_are_none(tmp_path, name):
    lines = [json.dumps({"id": 1, "text": text}) for text in TEXTS]
    assert texts_of(jsonl(tmp_path / name, "", *lines[:2], "  \r", *lines[2:], "")) == TEXTS


def test_a_row_of_a_parquet_file_is_a_document(tmp_path):
    texts = TEXTS * PARQUET_ROWS  # several batches
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    assert texts_of(tmp_path / "a.parquet") == texts


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_strings_of_every_width_are_read_from_parquet(tmp_path, kind):
    column = pa.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(getattr(pa, kind)())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == TEXTS


def test_another_key_can_hold_the_text(tmp_path):
    assert texts_of(jsonl(tmp_path / "a.jsonl", '{"text": 1, "body": "b"}'), "body") == ["b"]
    pq.write_table(pa.table({"text": [1], "body": ["b"]}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet", "body") == ["b"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": ', "is not JSON: Expecting value: line 1 column 9 (char 8). Mend the line, or leave it out."),
        (b'{"text": "\xff"}', "is not JSON: 'utf-8' codec can't decode byte 0xff in position 10"),
        ("[" * 100_000, "is not JSON: maximum recursion depth exceeded"),
        ('["a"]', 'holds a list, not an object. Write each line as {"text": "..."}.'),
        ('{"id": 1, "body": "b"}', "has no 'text', it has 'id', 'body'. Name the one that holds the text with --text_"),
        ("{}", "has no 'text', it has nothing. Name the one"),
        ('{"text": null}', "'text' is null, not a string. Mend it, leave it out, or name another key with --text_key."),
        ('{"text": ["a"]}', "'text' is of type list, not a string."),
        (r'{"text": "ab\ud83d"}', "'text' has a lone surrogate at character 2, which is no text. Mend it,"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_bad_line_is_refused_by_file_and_number(tmp_path, name, line, words):
    path = jsonl(tmp_path / name, '{"text": "good"}', "", line, '{"text": "good"}')
    with pytest.raises(DataError) as refusal:
        texts_of(path)
    where = f"{path}:3"
    assert str(refusal.value).startswith(where)
    assert words in str(refusal.value).removeprefix(where).lstrip(": ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b'{"text": "a"}\n' * 1000)[:-9], "Compressed file ended before the end-of-stream marker"),
        (b'{"text": "a"}\n', "Not a gzipped file"),
        (gzip.compress(b'{"text": "a"}\n')[:10] + b"\xff" * 30, "invalid"),
        (gzip.compress(b'{"text": "a"}\n')[:-8] + bytes(8), "CRC check failed"),
    ],
)
def test_a_damaged_gz_file_is_refused(tmp_path, content, words):
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz is damaged: .*{words}.* Fetch it anew, or leave it out\.$"):
        texts_of(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"id": [1], "body": ["b"]}, "a.parquet has no 'text', it has 'id', 'body'. Name the one that holds the text"),
        ({"text": ["a", None]}, "a.parquet: row 2: 'text' is null, not a string."),
        ({"text": [b"a"]}, "a.parquet: row 1: 'text' is of type bytes, not a string."),
    ],
)
def test_a_column_without_text_is_refused(tmp_path, table, words):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError) as refusal:
        texts_of(tmp_path / "a.parquet")
    assert words in str(refusal.value)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path)
    whole = path.read_bytes()
    ends = pa.array([0, 1], pa.int32()).buffers()[1]
    not_utf8 = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"\xff")])
    for content in (whole[:-20], whole[20:], b"", b"PAR1" + bytes(100) + whole[104:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet is damaged: .* Fetch it anew, or leave it out\.$") as refusal:
            texts_of(path)
        assert "\n" not in str(refusal.value)
    pq.write_table(pa.table({"text": not_utf8}), path)
    with pytest.raises(DataError, match=r"a\.parquet is damaged: 'utf-8' codec can't decode byte 0xff"):
        texts_of(path)


def test_parquet_without_pyarrow_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"a\.parquet needs the package pyarrow, which is missing\. Run: pip install"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_an_unreadable_file_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()  # root may read anything else
    with pytest.raises(DataError, match=r"cannot be read: Is a directory\. Make it readable, or leave it out\.$"):
        texts_of(tmp_path / name)


def test_the_name_says_the_kind():
    names = ("a.txt", "b.jsonl", "c.jsonl.gz", "d.x.parquet", "e.gz", "f.txt.gz", "g.json", "jsonl")
    kinds = [".txt", ".jsonl", ".jsonl.gz", ".parquet", None, None, None, None]
    assert [kind_of(Path(name)) for name in names] == kinds


def test_the_split_threshold_excludes_its_own_value():
    half = Document("", 0, bytes([128]) + bytes(31))  # exactly 2^63 of 2^64
    assert (half.split(0.5), half.split(0.500001)) == ("train", "val")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_document_that_is_too_long_to_encode_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(text, "MAX_DOCUMENT_BYTES", 200_000)
    path = tmp_path / name
    for words, fits in (("é" * 100_000, True), ("é" * 100_000 + "e", False)):
        if name == "a.txt":
            path.write_text(words)
        elif name == "a.jsonl":
            jsonl(path, json.dumps({"text": words}))
        else:
            pq.write_table(pa.table({"text": [words]}), path)
        if fits:
            assert texts_of(path) == [words]
            continue
        where = {"a.txt": "a.txt", "a.jsonl": "a.jsonl:1", "a.parquet": "a.parquet: row 1"}[name]
        with pytest.raises(DataError) as refusal:
            texts_of(path)
        assert str(refusal.value) == (
            f"{tmp_path}/{where} is one document of 0.2 MB, more than 0.2 MB take too much memory to encode. "
            "Split it: one document a line in .jsonl."
        )


def test_an_empty_gzip_file_is_refused_and_an_empty_text_is_not(tmp_path):
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"a\.jsonl\.gz holds 0 bytes, which is no gzip file\. Fetch it anew"):
        texts_of(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl").touch()
    assert texts_of(tmp_path / "a.jsonl") == []


def test_kinds_are_known_in_capitals_too(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "a"}'))
    assert texts_of(tmp_path / "A.JSONL.GZ") == ["a"]

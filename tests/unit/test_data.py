"""Token files, the order of samples, validation windows, tokenizers and manifests."""

import contextlib
import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from model import data
from model.config import DataError
from model.data import (
    EOD_TOKEN,
    IGNORED_TARGET,
    ShuffledSamples,
    SyntheticTokens,
    TokenFile,
    TokenFileWriter,
    Tokenizer,
    TrainBatches,
    ValBatches,
    builtin_dir,
    data_fingerprint,
    mix64,
    permute,
    read_manifest,
    token_dtype,
)

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [0], [9, 10, 11, 12, 0]]
STREAM = list(itertools.chain(*DOCUMENTS))
EOD = 0


def write(prefix: Path, documents=DOCUMENTS, dtype=np.uint16) -> Path:
    prefix.parent.mkdir(exist_ok=True)
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=np.int64))
    return prefix


class Counting:
    """The tokens 0, 1, 2, ...: each token is its own position."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def tokens(self, start: int, length: int) -> np.ndarray:
        assert 0 <= start <= self.num_tokens - length
        return np.arange(start, start + length)


def train_batches(num_tokens=101, seq_len=4, seed=7, micro_batch_size=2, rank=0, world_size=1) -> TrainBatches:
    samples = ShuffledSamples(Counting(num_tokens), seq_len=seq_len, seed=seed)
    return TrainBatches(samples, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_what_is_written_is_read_back(tmp_path, dtype):
    token_file = TokenFile(write(tmp_path / "train", dtype=dtype))
    assert (token_file.num_tokens, token_file.num_documents, token_file.dtype) == (12, 4, np.dtype(dtype))
    for start, stop in itertools.combinations(range(13), 2):
        read = token_file.tokens(start, stop - start)
        assert read.dtype == np.int64
        assert read.tolist() == STREAM[start:stop]


def test_files_are_laid_out_as_megatron_lays_them_out(tmp_path):
    prefix = write(tmp_path / "train", documents=[[65535, 0], [3, 4, 0]])
    assert prefix.with_suffix(".bin").read_bytes() == struct.pack("<5H", 65535, 0, 3, 4, 0)
    assert prefix.with_suffix(".idx").read_bytes() == (
        b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 2, 3) + struct.pack("<2i2q3q", 2, 3, 0, 4, 0, 1, 2)
    )


def test_a_prefix_may_have_a_dot_in_its_name(tmp_path):
    assert TokenFile(write(tmp_path / "v1.5")).num_tokens == 12


def test_the_narrowest_dtype_that_holds_every_id_is_chosen():
    assert [token_dtype(size).name for size in (257, 65536, 65537)] == ["uint16", "uint16", "int32"]


def test_ids_that_do_not_fit_the_dtype_are_refused_and_leave_no_file(tmp_path):
    with pytest.raises(DataError, match=r"train: token ids 1\.\.65536 do not fit uint16 \(0\.\.65535\)"):
        write(tmp_path / "train", documents=[[1, 65536]])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writer_leaves_no_file(tmp_path):
    def interrupted():
        yield [1, 2, 0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "train", documents=interrupted())
    assert list(tmp_path.iterdir()) == []


def write_until_interrupted(prefix: Path, *more: np.ndarray) -> None:
    with contextlib.suppress(KeyboardInterrupt), TokenFileWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.array(STREAM[:6]), np.array([4, 2]))
        assert writer.sync() == (2, 6)
        for document in more:
            writer.add_document(document)
        raise KeyboardInterrupt


@pytest.mark.parametrize("more", [(), (np.arange(100), np.arange(7))])
def test_a_writer_goes_on_from_where_another_was_sure_to_be(tmp_path, more):
    """What the first wrote after its sync is of no account."""
    write_until_interrupted(tmp_path / "train", *more)
    with TokenFileWriter(tmp_path / "train", np.uint16, resume_at=(2, 6)) as writer:
        for document in DOCUMENTS[2:]:
            writer.add_document(np.array(document))
    write(tmp_path / "at_once")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"train{suffix}").read_bytes() == (tmp_path / f"at_once{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_writer_does_not_go_on_from_files_that_are_shorter_than_recorded(tmp_path):
    write_until_interrupted(tmp_path / "train")
    for resume_at, words in (
        ((2, 7), r"bin\.tmp holds 12 bytes, 14 were"),
        ((3, 6), r"lengths\.tmp holds 8 bytes, 12 were"),
    ):
        with pytest.raises(DataError, match=rf"train\.{words} written\. Delete .* and start again\."):
            TokenFileWriter(tmp_path / "train", np.uint16, resume_at)


def test_missing_files_are_refused_with_the_command_that_makes_them(tmp_path):
    with pytest.raises(DataError, match=r"train\.idx is missing. Prepare the data: .*prepare_data --help\.$"):
        TokenFile(tmp_path / "train")
    write(tmp_path / "train")
    (tmp_path / "train.bin").unlink()
    with pytest.raises(DataError, match=r"train\.bin is missing"):
        TokenFile(tmp_path / "train")


def test_missing_builtin_data_is_refused_with_its_own_command():
    with pytest.raises(DataError, match=r"python -m tools\.prepare_data --builtin --vocab_size 999999\.$"):
        TokenFile(builtin_dir(999999) / "train")


def idx(code=8, version=1, magic=b"MMIDIDX\x00\x00", lengths=(4, 8), offsets=(0, 8), ends=(0, 1, 2)) -> bytes:
    """An index of two sequences, sound unless told otherwise; it goes with the 24-byte .bin of STREAM as uint16."""
    header = magic + struct.pack("<QBQQ", version, code, len(lengths), len(ends))
    return header + struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(ends)}q", *lengths, *offsets, *ends)


def test_the_index_that_the_next_test_damages_is_sound(tmp_path):
    write(tmp_path / "train").with_suffix(".idx").write_bytes(idx())
    assert TokenFile(tmp_path / "train").num_documents == 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", r"train\.idx holds 0 bytes, a token index at least 34\."),
        (idx()[:33], r"train\.idx holds 33 bytes, a token index at least 34\."),
        (idx()[:-1], r"train\.idx holds 81 bytes, its header says 82 \(2 sequences, 3 document ends\)\."),
        (idx() + b"x", r"train\.idx holds 83 bytes, its header says 82 \(2 sequences, 3 document ends\)\."),
        (
            idx(magic=b"NOTANIDX\x00"),
            r"train\.idx is not a token index: it starts with b'NOTANIDX\\x00', not b'MMIDIDX",
        ),
        (idx(version=2), r"train\.idx has format version 2, this reader knows 1\."),
        (idx(code=7), r"train\.idx has dtype code 7 \(float32\), tokens are one of 1 uint8, .*, 8 uint16\."),
        (idx(code=6), r"train\.idx has dtype code 6 \(float64\)"),
        (idx(code=9), r"train\.idx has dtype code 9 \(unknown\)"),
        (idx(lengths=(-4, 16)), r"train\.idx has a sequence of length -4\."),
        (idx(offsets=(0, 10)), r"train\.idx: sequence 1 starts at byte 10 of the \.bin, 8 expected"),
        (idx(ends=(0, 1, 3)), r"train\.idx: document ends cover 0\.\.3, 0\.\.2 expected\."),
        (idx(ends=()), r"train\.idx: document ends cover nothing, 0\.\.2 expected\."),
        (idx(lengths=(4, 9)), r"train\.bin holds 24 bytes, its index says 26 \(13 tokens of uint16\)\."),
        (idx(code=4, offsets=(0, 16)), r"train\.bin holds 24 bytes, its index says 48 \(12 tokens of int32\)\."),
    ],
)
def test_a_damaged_index_is_refused_by_name_and_size(tmp_path, content, words):
    write(tmp_path / "train").with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=words) as refusal:
        TokenFile(tmp_path / "train")
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(f"delete {tmp_path} and prepare it again: python -m tools.prepare_data --help.")


@pytest.mark.parametrize("change", [-2, -1, 1])
def test_a_bin_of_another_size_than_its_index_says_is_refused(tmp_path, change):
    path = write(tmp_path / "train").with_suffix(".bin")
    path.write_bytes((path.read_bytes() + b"x")[: 24 + change])
    with pytest.raises(
        DataError, match=rf"train\.bin holds {24 + change} bytes, its index says 24 \(12 tokens of uint16"
    ):
        TokenFile(tmp_path / "train")


def test_an_empty_dataset_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train\.bin holds 0 tokens"):
        TokenFile(write(tmp_path / "train", documents=[]))


def test_a_dataset_of_another_tool_has_no_manifest(tmp_path):
    assert read_manifest(write(tmp_path / "train")) is None


def test_a_manifest_that_agrees_with_its_token_file_is_returned(tmp_path):
    write(tmp_path / "train")
    manifest = {"splits": {"train": {"tokens": 12, "documents": 4, "bin_sha256": "0123456789abcdef0123"}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert read_manifest(tmp_path / "train") == manifest
    assert data_fingerprint(tmp_path / "train") == "0123456789abcdef"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", r"manifest\.json is not JSON: "),
        ("\udcff", r"manifest\.json is not JSON: .*utf-8"),
        ("[]", r"manifest\.json describes no split 'train'"),
        ('{"splits": {"val": {"tokens": 12, "documents": 4}}}', r"manifest\.json describes no split 'train'"),
        (
            '{"splits": {"train": {"tokens": 13, "documents": 4}}}',
            r"manifest\.json says 13 tokens for 'train', its index says 12",
        ),
        (
            '{"splits": {"train": {"tokens": 12, "documents": 5}}}',
            r"manifest\.json says 5 documents for 'train', its index says 4",
        ),
    ],
)
def test_a_manifest_that_contradicts_its_token_file_is_refused(tmp_path, content, words):
    write(tmp_path / "train")
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=words):
        read_manifest(tmp_path / "train")


def test_fingerprints_without_a_manifest_tell_datasets_apart(tmp_path):
    prints = {
        data_fingerprint(write(tmp_path / "a")),
        data_fingerprint(write(tmp_path / "b", documents=DOCUMENTS[:3])),
        data_fingerprint(write(tmp_path / "c", dtype=np.int32)),
    }
    assert len(prints) == 3
    assert data_fingerprint(write(tmp_path / "d")) == data_fingerprint(tmp_path / "a")
    assert all(len(each) == 16 for each in prints)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 9])
def test_fingerprints_without_a_manifest_tell_other_tokens_of_the_same_lengths(tmp_path, monkeypatch, blocks):
    """8 blocks of 4 tokens: with so many or more all of the file counts, with fewer its two ends at least."""
    monkeypatch.setattr(data, "FINGERPRINT_BLOCKS", blocks)
    monkeypatch.setattr(data, "FINGERPRINT_BLOCK_BYTES", 8)
    first = data_fingerprint(write(tmp_path / "a", documents=[[1] * 31]))
    for place in range(31) if blocks >= 8 else (0, 1, 2, 3) if blocks == 1 else (0, 1, 2, 3, 27, 28, 29, 30):
        tokens = [1] * 31
        tokens[place] = 2
        assert data_fingerprint(write(tmp_path / "b", documents=[tokens])) != first
    if blocks < 7:
        tokens = [1] * 31
        tokens[8] = 2
        assert data_fingerprint(write(tmp_path / "b", documents=[tokens])) == first, "as its docstring says"


def test_mix64_is_splitmix64():
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)  # the first two states of a generator seeded with 0
    assert mix64(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def shuffle(size: int, seed: int, epoch: int) -> list[int]:
    return permute(np.arange(size), size, seed, np.full(size, epoch)).tolist()


def slow_mix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def slow_permute(index: int, size: int, seed: int, epoch: int) -> int:
    """The formula of `permute`, one number at a time in Python's own integers."""
    h = 1
    while 4**h < size:
        h += 1
    key = slow_mix64(slow_mix64(seed) ^ epoch)
    while True:
        left, right = divmod(index, 2**h)
        for r in range(6):
            left, right = right, left ^ slow_mix64(right ^ slow_mix64((key + r) % 2**64)) % 2**h
        index = left * 2**h + right
        if index < size:
            return index


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 10**6, 2**33 + 1])
def test_the_permutation_is_the_formula_in_its_docstring(size):
    index = np.arange(0, size, max(1, size // 50))
    for seed, epoch in itertools.product((0, 1337, 2**64 - 1), (0, 3)):
        expected = [slow_permute(int(i), size, seed, epoch) for i in index]
        assert permute(index, size, seed, np.full(index.size, epoch)).tolist() == expected


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000])
def test_the_permutation_is_a_bijection(size):
    for seed, epoch in itertools.product((0, 1, -1, 2**64 - 1), (0, 1, 12345)):
        assert sorted(shuffle(size, seed, epoch)) == list(range(size))


def test_the_permutation_differs_by_epoch_and_seed():
    orders = [shuffle(100, seed, epoch) for seed, epoch in itertools.product(range(5), range(5))]
    assert len({tuple(order) for order in orders}) == 25


def test_every_order_of_three_comes_up_about_equally_often():
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(600):
        order = tuple(shuffle(3, 5, epoch))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(60 < count < 140 for count in counts.values())  # 100 expected, standard deviation 9


def test_the_order_of_samples_never_changes():
    """Golden values: a run that resumes with a newer moelab must go on with the data that it has not seen."""
    assert shuffle(10, seed=1337, epoch=0) == [5, 6, 9, 4, 0, 3, 7, 8, 1, 2]
    assert shuffle(10, seed=1337, epoch=1) == [8, 1, 9, 5, 2, 7, 4, 0, 6, 3]
    order = permute(np.arange(5), 668_231, 42, np.array([0, 0, 1, 2, 3])).tolist()
    assert order == [573553, 332855, 489592, 152316, 502644]
    synthetic = SyntheticTokens(100, 50, seed=3).tokens(5, 12).tolist()
    assert synthetic == [20, 21, 22, 47, 48, 49, 0, 1, 2, 3, 4, 10]


def test_a_sample_is_one_window_and_its_targets_are_one_token_on():
    batches = train_batches()
    order = shuffle(25, seed=7, epoch=0) + shuffle(25, seed=7, epoch=1)
    assert batches.samples.samples_per_epoch == 25
    for first in (0, 10, 24):  # 24 spans two epochs
        x_BS, y_BS = batches.micro_batch(first)
        windows = order[first : first + 2]
        assert x_BS.tolist() == [list(range(w * 4, w * 4 + 4)) for w in windows]
        assert y_BS.tolist() == [list(range(w * 4 + 1, w * 4 + 5)) for w in windows]
        assert str(x_BS.dtype) == str(y_BS.dtype) == "torch.int64"
        assert x_BS.is_contiguous()
        assert y_BS.is_contiguous()


@pytest.mark.parametrize(("num_tokens", "num_windows"), [(99, 24), (100, 24), (101, 25), (102, 25)])
def test_an_epoch_predicts_every_token_of_its_windows_once(num_tokens, num_windows):
    batches = train_batches(num_tokens, micro_batch_size=1)
    assert batches.samples.samples_per_epoch == num_windows
    for epoch in range(2):
        samples = range(epoch * num_windows, (epoch + 1) * num_windows)
        predicted = sorted(token for sample in samples for token in batches.micro_batch(sample)[1].flatten().tolist())
        assert predicted == list(range(1, 4 * num_windows + 1))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_global_order_does_not_depend_on_the_number_of_ranks(world_size):
    alone = train_batches(micro_batch_size=8).micro_batch(16)[0]
    ranks = [train_batches(micro_batch_size=8 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    assert {each.samples_per_micro_step for each in ranks} == {8}
    rows = [row for each in ranks for row in each.micro_batch(16)[0].tolist()]
    assert rows == alone.tolist()
    assert len({tuple(row) for row in rows}) == 8  # disjoint


def test_a_micro_batch_depends_on_nothing_but_its_first_sample():
    batches = train_batches()
    forward = [batches.micro_batch(first)[0].tolist() for first in range(0, 60, 2)]
    backward = [train_batches().micro_batch(first)[0].tolist() for first in reversed(range(0, 60, 2))]
    assert forward == backward[::-1]


def test_a_source_shorter_than_one_sample_is_refused(tmp_path):
    source = TokenFile(write(tmp_path / "train"))
    assert ShuffledSamples(source, seq_len=11, seed=0).samples_per_epoch == 1
    words = r"train has 12 tokens, one sample of seq_len=12 needs 13\. Use a seq_len of at most 11"
    with pytest.raises(DataError, match=words):
        ShuffledSamples(source, seq_len=12, seed=0)


def test_synthetic_tokens_are_a_pure_function_of_seed_and_position():
    source = SyntheticTokens(1000, vocab_size=50, seed=3)
    whole = source.tokens(0, 1000)
    assert all(source.tokens(start, 37).tolist() == whole[start : start + 37].tolist() for start in range(0, 900, 13))
    assert whole.min() >= 0
    assert whole.max() < 50
    assert len(set(whole.tolist())) == 50
    assert whole.tolist() != SyntheticTokens(1000, vocab_size=50, seed=4).tokens(0, 1000).tolist()


def test_synthetic_tokens_can_be_learnt():
    tokens = SyntheticTokens(1000, vocab_size=50, seed=3).tokens(0, 1000)
    assert ((tokens[:-1] + 1) % 50 == tokens[1:]).mean() > 0.85  # 7 of 8 by construction


def val_batches(num_tokens: int, micro_batch_size: int, world_size: int) -> list[ValBatches]:
    return [
        ValBatches(
            Counting(num_tokens),
            seq_len=4,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            eod_id=999,
        )
        for rank in range(world_size)
    ]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 16, 17, 63, 64, 65])
@pytest.mark.parametrize(("micro_batch_size", "world_size"), [(1, 1), (3, 1), (2, 2), (1, 4), (2, 4)])
def test_validation_predicts_every_token_once_from_the_one_before(num_tokens, micro_batch_size, world_size):
    ranks = val_batches(num_tokens, micro_batch_size, world_size)
    batches = [list(each) for each in ranks]
    assert {len(each) for each in ranks} == {len(each) for each in batches} == {len(ranks[0])}  # equal calls
    in_order = [batch for step in zip(*batches, strict=True) for batch in step]
    assert {tuple(tensor.shape) for batch in in_order for tensor in batch} == {(micro_batch_size, 4)}
    x = [token for x_BS, _ in in_order for token in x_BS.flatten().tolist()]
    y = [token for _, y_BS in in_order for token in y_BS.flatten().tolist()]
    padding = len(y) - num_tokens
    assert y == list(range(num_tokens)) + [IGNORED_TARGET] * padding  # padding is at the very end
    assert x == [999, *range(num_tokens - 1)] + [999] * padding
    assert padding < 4 * micro_batch_size * world_size


def make_tokenizer(path: Path, special_tokens=(EOD_TOKEN,), **settings) -> Path:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=264, special_tokens=list(special_tokens), initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(["the state of the union"], trainer)
    if settings.get("truncation"):
        raw.enable_truncation(settings["truncation"])
        raw.enable_padding(length=settings["truncation"])
    raw.save(str(path))
    return path


ODD_TEXTS = ["", " ", "the  union\r\n\ttabs", "naïve 漢字 🙂 \ufeff", "\x00\x7f\u202e", f"text {EOD_TOKEN} text"]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_text_comes_back_from_its_ids(tmp_path, text):
    tokenizer = Tokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, "x"])[0] == tokenizer.encode(text)


def test_text_that_spells_the_end_of_document_token_does_not_end_a_document(tmp_path):
    tokenizer = Tokenizer(make_tokenizer(tmp_path / "tokenizer.json"))
    assert (tokenizer.eod_id, tokenizer.vocab_size) == (EOD, 264)
    assert EOD not in tokenizer.encode(f"one{EOD_TOKEN}two")
    assert tokenizer.decode([EOD]) == EOD_TOKEN


def test_truncation_and_padding_in_the_file_have_no_effect(tmp_path):
    tokenizer = Tokenizer(make_tokenizer(tmp_path / "tokenizer.json", truncation=4))
    assert len(tokenizer.encode("0123456789")) == 10
    assert [len(ids) for ids in tokenizer.encode_batch(["0123456789", "0"])] == [10, 1]


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer\.json is missing\."):
        Tokenizer(path)
    make_tokenizer(path, special_tokens=["</s>"])
    with pytest.raises(DataError, match=r"tokenizer\.json has no token '<\|endoftext\|>'"):
        Tokenizer(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json is not JSON"):
        Tokenizer(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json has no key 'model'"):
        Tokenizer(path)

"""Token shards on disk: llm.c's layout, whole documents, ready-made folders, named damage."""

import json
import struct

import numpy as np
import pytest
from conftest import one_error_line, run
from corpus_cases import documents, hub_folder, prepare, texts_in

from parts.data import corpus, shard_writer, shards
from parts.data.batches import TrainBatches, val_batches
from parts.data.shards import Shards, read_index
from parts.data.tokenizers import byte_tokenizer
from prep_dataset import TokenizeConfig, prepare_tokens


@pytest.fixture
def source(tmp_path):
    return hub_folder(tmp_path / "data")


def test_every_document_is_written_once_with_one_end_of_text_after_it(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one")
    train, val = texts_in(folder, "train"), texts_in(folder, "val")
    assert sorted(train + val) == sorted(documents(200)) and not set(train) & set(val)
    assert all(corpus.in_validation(t, 0.1) for t in val) and 5 < len(val) < 50
    index = read_index(folder)
    assert sum(s["documents"] for s in index["shards"]) == 200
    assert sum(s["bytes"] for s in index["shards"]) == sum(len(t.encode()) for t in documents(200))


def test_a_shard_has_the_layout_of_llm_c(source, tmp_path):
    path = prepare(source, tmp_path, dataset_subset="one") / "train_000000.bin"
    data = path.read_bytes()
    magic, version, n_tokens = struct.unpack("<3i", data[:12])
    assert (magic, version) == (20240520, 1) and len(data) == 1024 + 2 * n_tokens


def test_a_vocabulary_over_65536_is_written_in_32_bits(tmp_path):
    class Wide:
        vocab_size, eot, name, fingerprint = 70_000, 69_999, "wide", "f"

        def encode_documents(self, documents):
            ids = [id for text in documents for id in (69_000 + len(text), self.eot)]
            return np.array(ids, dtype=np.uint32)

        def to_json(self):
            return b"{}"

    def chunks(_):
        yield [{"text": "abc"}], 1

    def tokenise(rows):
        return corpus.tokenise(rows, Wide(), 0.0)

    folder = shard_writer.build(tmp_path / "x", Wide(), chunks, tokenise, {}, 1)
    path = folder / "train_000000.bin"
    assert struct.unpack("<3i", path.read_bytes()[:12]) == (20240801, 7, 2)
    assert Shards(folder, "train", read_index(folder)).read(0, 0, 2).tolist() == [69_003, 69_999]


def test_published_shards_load_as_they_are(tmp_path):
    """llm.c writes end-of-text before each document and no index; `val` names a validation file."""
    rng = np.random.default_rng(0)
    for name in ("fineweb_train_000001.bin", "fineweb_val_000000.bin"):
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, 5000
        tokens = rng.integers(0, 50257, 5000).astype(np.uint16)
        (tmp_path / name).write_bytes(header.tobytes() + tokens.tobytes())
    assert prepare_tokens(TokenizeConfig(dataset_name=str(tmp_path))) == tmp_path
    index = read_index(tmp_path)
    train, val = Shards(tmp_path, "train", index), Shards(tmp_path, "val", index)
    assert (len(train), len(val)) == (5000, 5000)
    assert np.array_equal(val.read(0, 0, 5000), tokens)
    assert TrainBatches(train, 64, 0, 50257).rows(0, 3).shape == (3, 65)
    (tmp_path / "fineweb_val_000000.bin").write_bytes(b"no shard" * 200)
    with pytest.raises(ValueError, match="fineweb_val_000000.bin.*not a token shard"):
        read_index(tmp_path)


@pytest.mark.parametrize("how", ["flip", "truncate", "append", "header"])
def test_damage_is_named_by_verify_and_by_the_first_read(source, tmp_path, how):
    folder = prepare(source, tmp_path, dataset_subset="one")
    path = folder / "train_000000.bin"
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
    elif how == "truncate":
        del data[-7:]
    elif how == "append":
        data += b"x" * 8
    elif how == "header":
        data[0] ^= 1
    path.write_bytes(data)
    result = run("prep_dataset.py", "verify", "--path", folder, cwd=tmp_path)
    assert "train_000000.bin" in one_error_line(result, 2)
    with pytest.raises((ValueError, OSError), match="train_000000.bin"):
        train = Shards(folder, "train", read_index(folder))
        train.read(0, 0, len(train.tokens[0]))


@pytest.mark.parametrize(
    "setting",
    [{"tokenizer": "bpe:300"}, {"max_documents": 10}, {"val_share": 0.5}, {"text_field": "body"}],
    ids=str,
)
def test_a_setting_that_ready_made_shards_cannot_follow_is_refused(source, tmp_path, setting):
    made = prepare(source, tmp_path, dataset_subset="one")
    assert prepare_tokens(TokenizeConfig(dataset_name=str(made))) == made
    assert prepare(made, tmp_path) == made
    (flag,) = setting
    with pytest.raises(ValueError, match=f"--{flag}: .* was built with"):
        prepare_tokens(TokenizeConfig(dataset_name=str(made), **setting))


def test_verify_claims_no_hashes_if_there_are_none(tmp_path):
    (tmp_path / "pub").mkdir()
    for name in ("x_train_000.bin", "x_val_000.bin"):
        tokens = np.arange(4, dtype=np.uint16)
        (tmp_path / "pub" / name).write_bytes(shards.header_of(4, np.uint16) + tokens.tobytes())
    out = run("prep_dataset.py", "verify", "--path", "pub", cwd=tmp_path).stdout
    assert "no hashes to compare" in out and "sha256" not in out


def test_validation_is_whole_and_the_last_row_is_filled_up(source, tmp_path):
    folder = prepare(source, tmp_path, dataset_subset="one")
    val = Shards(folder, "val", read_index(folder))
    for T, B in ((16, 4), (7, 3), (100_000, 2)):
        batches = list(val_batches(val, T, B, 257))
        assert all(b["inputs"].shape == b["targets"].shape == (B, T) for b in batches)
        targets = np.concatenate([b["targets"].flatten().numpy() for b in batches])
        assert np.array_equal(targets[targets != -100], val.read(0, 1, len(val)))
    first = list(val_batches(val, 16, 4, 257, max_tokens=100))
    assert sum(int((b["targets"] != -100).sum()) for b in first) == 100


def published(folder, *names) -> None:
    """Shards of 40 tokens as others publish them."""
    folder.mkdir(exist_ok=True)
    for name in names:
        tokens = np.arange(40, dtype=np.uint16)
        (folder / name).write_bytes(shards.header_of(40, np.uint16) + tokens.tobytes())


def test_val_is_a_word_in_the_name_of_a_published_shard(tmp_path):
    names = ("medieval_000000.bin", "x_train_0.bin", "x_val_0.bin", "valid-1.bin", "VAL.bin")
    published(tmp_path / "p", *names)
    index = read_index(tmp_path / "p")
    found = [sorted(s["name"] for s in shards.shards_of(index, split)) for split in shards.SPLITS]
    assert found == [["medieval_000000.bin", "x_train_0.bin"], sorted(names[2:])]


def test_published_shards_without_validation_are_not_told_to_raise_val_share(tmp_path):
    published(tmp_path / "p", "x_train_0.bin")
    flags = ("--dataset_name", "p", "--tokenizer", "bytes", "--device", "cpu")
    line = one_error_line(run("pretraining_advanced.py", *flags, cwd=tmp_path), 2)
    assert "no validation file; add one with val in its name" in line and "val_share" not in line


def test_bin_files_that_are_no_shards_are_not_taken_for_them(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.bin").write_bytes(np.arange(4000, dtype=np.uint16).tobytes())  # nanoGPT's
    flags = ("tokenize", "--dataset_name", "mine", "--tokenizer", "bytes", "--val_share", "0.5")
    line = one_error_line(run("prep_dataset.py", *flags, cwd=tmp_path), 2)
    assert "train.bin is not a token shard (nanoGPT's files have bare ids)" in line
    assert "delete" not in line
    (folder / "a.txt").write_text("A text.\n\n" * 3000, encoding="utf-8")
    result = run("prep_dataset.py", *flags, cwd=tmp_path)
    assert result.returncode == 0 and "tokens" in result.stdout, result.stderr


def test_a_folder_is_called_damaged_only_if_it_had_token_shards(source, tmp_path):
    for name, what in (("nowhere", "does not exist"), ("mine", "has no token shards")):
        with pytest.raises(FileNotFoundError, match=f"{name}: {what}; give a folder") as e:
            read_index(tmp_path / name)
        assert "delete" not in str(e.value)
        (tmp_path / "mine").mkdir(exist_ok=True)
    made = prepare(source, tmp_path, dataset_subset="one")
    (made / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match="index.json is missing; delete the folder"):
        read_index(made)


def masked_build(folder, n_threads=1, chunk_of=10):
    """A build whose documents i have i % 7 + 3 tokens, of which the first i % 3 are not trained."""
    tokenizer = byte_tokenizer()

    def chunks(state):
        for first in range(state or 0, 400, chunk_of):
            yield range(first, first + chunk_of), first + chunk_of

    def tokenise(numbers):
        parts = {"train": [], "val": []}
        for i in numbers:
            ids = np.full(i % 7 + 3, i % 256, dtype=np.uint32)
            parts["val" if i % 10 == 0 else "train"].append((ids, np.arange(len(ids)) >= i % 3))
        empty = (np.zeros(0, np.uint32), np.zeros(0, bool))
        joined = {}
        for split, pairs in parts.items():
            ids, trained = map(np.concatenate, zip(*(pairs or [empty]), strict=True))
            joined[split] = (ids, len(pairs), 0, trained)
        return joined

    return shard_writer.build(folder, tokenizer, chunks, tokenise, {"num_shards": 1}, n_threads)


def test_masks_lie_beside_their_tokens_and_are_checked_like_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 500)
    folder = masked_build(tmp_path / "a", n_threads=2)
    index = shards.verify(folder)
    for split in ("train", "val"):
        part = Shards(folder, split, index)
        numbers = [i for i in range(400) if (i % 10 == 0) == (split == "val")]
        trained = np.concatenate([np.arange(i % 7 + 3) >= i % 3 for i in numbers])
        ids = np.concatenate([np.full(i % 7 + 3, i % 256) for i in numbers])
        assert np.concatenate(part.masks).tolist() == trained.astype(int).tolist()
        assert np.concatenate(part.tokens).tolist() == ids.tolist()
        assert [len(mask) for mask in part.masks] == [len(tokens) for tokens in part.tokens]
    merged = shard_writer.merge([folder], tmp_path / "merged")
    assert shards.content_hash(shards.verify(merged)) == shards.content_hash(index)
    path = folder / "train_000001.mask"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(OSError, match=r"train_000001\.mask: block 0 differs from index\.json"):
        Shards(folder, "train", index).read(1, 0, 10)
    with pytest.raises(ValueError, match=r"train_000001\.mask: damaged"):
        shards.verify(folder)
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=r"train_000001\.mask: is missing or has not the"):
        Shards(folder, "train", index)


def test_a_masked_build_that_was_stopped_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 500)
    straight = shards.read_index(masked_build(tmp_path / "straight"))
    monkeypatch.setattr(shard_writer, "SAVE_EVERY", 50)
    write, calls = shard_writer._Writer.write, []

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) in (33, 61):
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(shard_writer._Writer, "write", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            masked_build(tmp_path / "stopped")
    folder = masked_build(tmp_path / "stopped")
    assert shards.read_index(folder) == straight


def test_a_build_that_an_earlier_version_began_starts_again(tmp_path):
    part = tmp_path / ".a.part"
    part.mkdir()
    (part / "train_000000.bin").write_bytes(b"x" * 2000)
    shard = {"name": "train_000000.bin", "tokens": 5, "documents": 1, "bytes": 5}
    old = {"tokenizer": byte_tokenizer().fingerprint, "state": {"examples_iterable": {}}}
    old["shards"] = {"train": [shard], "val": []}
    (part / "progress.json").write_text(json.dumps(old), encoding="utf-8")
    index = shards.verify(masked_build(tmp_path / "a"))
    assert sum(shard["documents"] for shard in index["shards"]) == 400


def test_a_token_that_the_mask_leaves_out_is_no_target(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "SHARD_TOKENS", 500)
    folder = masked_build(tmp_path / "a")
    index = read_index(folder)
    part = Shards(folder, "train", index)
    T, batches = 8, TrainBatches(part, 8, 1, 257)
    plain = TrainBatches(part, 8, 1, 257)
    plain.mask_views = []
    seen = []
    for first in range(0, batches.n_rows - 3, 3):
        batch, without = batches.batch(first, 3), plain.batch(first, 3)
        assert (batch["inputs"] == without["inputs"]).all()
        is_target = batch["targets"] != -100
        assert (batch["targets"][is_target] == without["targets"][is_target]).all()
        seen.append(int(is_target.sum()))
    assert 0 < sum(seen) < len(seen) * 3 * T
    for split in ("train", "val"):
        part = Shards(folder, split, index)
        targets = sum(int((b["targets"] != -100).sum()) for b in val_batches(part, T, 4, 257))
        # the first token of each file is no target either way
        assert targets == sum(int(mask[1:].sum()) for mask in part.masks)

"""Small corpora, and the documents in what a build made of them; used by several tests."""

import json

import numpy as np

from parts.data.shards import Shards, read_index
from parts.data.tokenizers import byte_tokenizer
from prep_dataset import TokenizeConfig, prepare_tokens

WORDS = (
    "the old man and a small dog went down to the sea "
    "where ships of every kind lay still in the light"
).split()


def document(i: int) -> str:
    """Document number i: the number, and 20 to 49 words."""
    chosen = [(i * 7 + j * (i % 5 + 1)) % len(WORDS) for j in range(20 + i % 30)]
    return f"{i}. " + " ".join(WORDS[k] for k in chosen)


def documents(n: int) -> list[str]:
    """n different documents."""
    return [document(i) for i in range(n)]


def write_jsonl(path, texts, field="text"):
    """Write one line {field: text, "n": number} per text; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({field: text, "n": i}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def hub_folder(folder):
    """
    Write a folder in the hub's layout; returns it.

    Subset `one` has four files, `two` has two whose column is `content`, `code` has no text.
    """
    texts = documents(400)
    for i in range(4):
        write_jsonl(folder / f"one/train-{i}.jsonl", texts[i * 50 : i * 50 + 50])
    for i in range(2):
        chosen = texts[200 + i * 100 : 300 + i * 100]
        write_jsonl(folder / f"two/train-{i}.jsonl", chosen, field="content")
    write_jsonl(folder / "code/train-0.jsonl", texts[:3], field="blob_id")
    return folder


def prepare(source, tmp_path, **settings):
    """Build the token shards of a source, of bytes and with a tenth for validation by default."""
    defaults = {"tokenizer": "bytes", "cache_dir": str(tmp_path / "cache"), "val_share": 0.1}
    return prepare_tokens(TokenizeConfig(dataset_name=str(source), **{**defaults, **settings}))


def texts_in(folder, split) -> list[str]:
    """The documents of one split, decoded; each must end with end-of-text."""
    tokenizer = byte_tokenizer()
    part = Shards(folder, split, read_index(folder))
    texts = []
    for i, shard in enumerate(part.tokens):
        ids = part.read(i, 0, len(shard))
        assert ids[-1] == tokenizer.eot
        ends = np.flatnonzero(ids == tokenizer.eot)
        for one in np.split(ids, ends + 1)[:-1]:
            texts.append(tokenizer.decode(one[one != tokenizer.eot].tolist()))
    return texts

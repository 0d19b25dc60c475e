"""Loss of a text and figures of HellaSwag equal a plain computation, for any stride and batch."""

import gzip
import json
import math
import random
import re
import socket
import time

import numpy as np
import pytest
import torch
from conftest import shared
from prep_cases import book_server

from gpt_train import GPT, GPTConfig, evaluate_model
from parts.data.tokenizers import byte_tokenizer
from parts.report import scoring
from parts.report.scoring import (
    fetch_hellaswag,
    read_hellaswag,
    score_hellaswag,
    score_tokens,
    windows,
)

CPU = torch.device("cpu")
BYTES = byte_tokenizer()


def small_model(seed=0, **changes) -> GPT:
    """A random GPT with large weights; with the usual small ones all tokens are equally likely."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


# ------------------------------------------------------------------------------------------ windows


def test_windows_of_a_hand_worked_example():
    assert list(windows(8, 4, 2)) == [(0, 4, 1), (2, 6, 5), (4, 7, 7)]
    assert list(windows(9, 4, 4)) == [(0, 4, 1), (4, 8, 5)]  # plain, nothing left over
    assert list(windows(6, 3, 1)) == [(0, 3, 1), (1, 4, 4), (2, 5, 5)]
    assert list(windows(3, 1024, 512)) == [(0, 2, 1)]  # shorter than a window
    assert list(windows(2, 1, 1)) == [(0, 1, 1)]


def test_windows_score_each_token_but_the_first_once_with_the_context_that_the_stride_leaves():
    for T in (1, 2, 3, 7, 8):
        for stride in range(1, T + 1):
            for n in range(2, 40):
                scored = []
                for start, end, first in windows(n, T, stride):
                    assert 0 <= start < end <= start + T and start < first <= end
                    assert first == 1 or first - start == T - stride + 1
                    scored += range(first, end + 1)
                assert scored == list(range(1, n)), (n, T, stride)


@pytest.mark.parametrize("n", [0, 1])
def test_a_text_with_nothing_to_predict_is_an_error_in_plain_words(n):
    with pytest.raises(ValueError, match=f"the text to score has {n} tokens"):
        score_tokens(small_model(), np.zeros(n, dtype=np.uint16), 8, 8, 1, CPU)


@pytest.mark.parametrize("stride", [-1, 0, 9])
def test_a_stride_that_leaves_tokens_out_is_refused(stride):
    message = f"--stride: {stride} is not between 1 and the context length, 8"
    with pytest.raises(ValueError, match=message):
        windows(100, 8, stride)
    with pytest.raises(ValueError, match="--batch_size: 0"):
        score_tokens(small_model(), np.zeros(9, dtype=np.uint16), 8, 8, 0, CPU)


# ----------------------------------------------------------------------------------- loss of a text


@torch.no_grad()
def plain_loss(model, ids, block_size, stride) -> float:
    """Each token by itself, in float64; the window moves by `stride` tokens when it is full."""
    start, total = 0, 0.0
    for t in range(1, len(ids)):
        if t > start + block_size:
            start += stride
        logits = model(torch.tensor([ids[start:t]]))[0, -1].double()
        total -= logits.log_softmax(0)[ids[t]].item()
    return total / (len(ids) - 1)


@pytest.mark.parametrize("n", [2, 20, 33, 34, 150])
@pytest.mark.parametrize("stride", [1, 11, 32])
def test_the_loss_is_that_of_each_token_by_itself_in_float64(n, stride):
    model = small_model().double()
    ids = np.random.default_rng(n).integers(257, size=n)
    expected = plain_loss(model, ids.tolist(), 32, stride)
    for batch_size in (1, 3):
        result = score_tokens(model, ids.astype(np.uint16), 32, stride, batch_size, CPU)
        assert result["tokens"] == n - 1 and result["loss"] == pytest.approx(expected, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)


def test_bits_per_byte_and_loss_are_those_of_evaluate_model():
    model = small_model()
    ids = BYTES.encode_documents(["a wind \u0434\u0443\u043b", "from the sea " * 20])
    pairs = []
    for start, end, _ in windows(len(ids), 32, 32):
        inputs, targets = ids[start:end].tolist(), ids[start + 1 : end + 1].tolist()
        pairs.append((torch.tensor([inputs]), torch.tensor([targets])))
    expected = evaluate_model(model, pairs, CPU, BYTES.token_bytes())
    result = score_tokens(model, ids, 32, 32, 4, CPU, BYTES.token_bytes())
    assert result == pytest.approx(expected, rel=1e-6) and set(result) == set(expected)


def test_tiny_shakespeare_has_the_same_loss_in_batches_of_1_3_and_8(tmp_path):
    text = shared("data/reference/tinyshakespeare.txt").read_text(encoding="utf-8")[:20_000]
    BYTES.encode(text).astype(np.uint16).tofile(tmp_path / "ids.bin")
    ids = np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r")  # as token shards are read
    model, seen = small_model(block_size=128, n_embd=64), []
    results = [
        score_tokens(model, ids, 128, 64, b, CPU, BYTES.token_bytes(), seen.append)
        for b in (1, 3, 8)
    ]
    assert sum(seen) == 3 * (len(ids) - 1) == 3 * results[0]["tokens"]
    for result in results[1:]:
        assert abs(result["loss"] - results[0]["loss"]) < 1e-6
        assert abs(result["bits_per_byte"] - results[0]["bits_per_byte"]) < 1e-6
    no_overlap = score_tokens(model, ids, 128, 128, 8, CPU)
    assert no_overlap["tokens"] == results[0]["tokens"] and no_overlap["loss"] != results[0]["loss"]


def test_a_text_is_scored_as_it_is_trained_on(tmp_path):
    """Separators are end-of-text, jsonl is its texts, and the same documents give the same ids."""
    documents = [" ".join(f"word{i * j}" for j in range(40)) for i in range(9)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(documents) + "\n", encoding="utf-8")
    rows = [json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(documents)]
    (tmp_path / "a.jsonl").write_text("".join(rows), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / f"folder/{i}.TXT").write_text(text, encoding="utf-8")
    expected = [BYTES.eot, *BYTES.encode_documents(documents)]
    for name in ("a.txt", "a.jsonl", "a.jsonl.gz", "folder"):
        (ids,) = scoring.ids_to_score(str(tmp_path / name), BYTES)
        assert ids.tolist() == expected, name
    assert expected.count(BYTES.eot) == 10


def test_a_diverged_model_has_no_score():
    def diverged(ids):
        return torch.full((*ids.shape, 257), torch.nan)

    with pytest.raises(RuntimeError, match="not finite"):
        score_tokens(diverged, np.zeros(9, dtype=np.uint16), 8, 8, 1, CPU)
    items = [{"ctx": "x", "endings": ["a", "b"], "label": 0}]
    with pytest.raises(RuntimeError, match="not finite"):
        score_hellaswag(diverged, items, BYTES.encode, BYTES.eot, 32, 2, CPU)


# ---------------------------------------------------------------------------------------- HellaSwag


def raw_item(n: int) -> dict:
    """An item as in hellaswag_val.jsonl: of ActivityNet or, with marks in brackets, of WikiHow."""
    rng = random.Random(n)
    words = "man dog ladder snow slowly then takes a the of wax board climbs sits down again and "
    words = (words + "smiles \u00e9t\u00e9").split()

    def sentence(longest):
        return " ".join(rng.choices(words, k=rng.randint(1, longest)))

    ctx_a, ctx_b = sentence(30).capitalize() + ".", "" if n % 3 == 0 else f"the {sentence(2)}"
    endings = [sentence(12) + "." for _ in range(4)]
    if n % 2:
        if n % 3 == 0:
            ctx_a = f"[header] How to {ctx_a} [title] {sentence(4)}. [step]"
        else:
            ctx_a = f"[header] How to {ctx_a}  [title] {sentence(4)}."
        endings = [
            f"{e} [substeps] {sentence(3)}." if i % 2 else f"[step] {e}"
            for i, e in enumerate(endings)
        ]
    item = {"ind": n, "activity_label": "Roof shingle removal", "ctx_a": ctx_a, "ctx_b": ctx_b}
    item |= {"ctx": f"{ctx_a} {ctx_b}".strip(), "split": "val", "split_type": "indomain"}
    item |= {"endings": endings, "source_id": f"activitynet~v_{n}"}
    return item | {"label": n % 4 if n % 5 else str(n % 4)}


@pytest.fixture(scope="module")
def hellaswag(tmp_path_factory):
    path = tmp_path_factory.mktemp("hellaswag") / "hellaswag_val.jsonl"
    path.write_text("".join(json.dumps(raw_item(n)) + "\n" for n in range(100)), encoding="utf-8")
    return path


def plain_preprocess(text: str) -> str:
    """As lm-evaluation-harness 0.4.13 does in lm_eval/tasks/hellaswag/utils.py."""
    text = text.strip()
    text = text.replace(" [title]", ". ")
    text = re.sub("\\[.*?\\]", "", text)
    return text.replace("  ", " ")


@torch.no_grad()
def plain_hellaswag(model, path, block_size) -> tuple[float, float]:
    """One ending at a time, in float64."""
    right, right_norm, lines = 0, 0, path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        raw = json.loads(line)
        ctx = raw["activity_label"] + ": " + raw["ctx_a"] + " " + raw["ctx_b"].capitalize()
        ctx = plain_preprocess(ctx)
        sums, norms = [], []
        for ending in raw["endings"]:
            ending = plain_preprocess(ending)
            question = BYTES.encode(ctx.rstrip()).tolist()
            whole = BYTES.encode(ctx + " " + ending).tolist()
            kept, n_scored = whole[-block_size - 1 :], len(whole) - len(question)
            log_p = model(torch.tensor([kept[:-1]]))[0].log_softmax(dim=1)  # (T, V)
            places = range(len(kept) - n_scored, len(kept))
            total = sum(log_p[t - 1, kept[t]].item() for t in places)
            sums.append(total)
            norms.append(total / len(ending))
        right += int(np.argmax(sums)) == int(raw["label"])
        right_norm += int(np.argmax(norms)) == int(raw["label"])
    return right / len(lines), right_norm / len(lines)


def test_an_item_is_cleaned_as_the_harness_does(tmp_path):
    item = raw_item(1) | {"ctx_a": "[header] How to wax [title] Take  it. [step]", "ctx_b": ""}
    item |= {"endings": ["[step] x.", "y  z", "a", "b"], "label": "2"}
    (tmp_path / "one.jsonl").write_text(json.dumps(item), encoding="utf-8")
    expected = {"ctx": "Roof shingle removal: How to wax. Take it. "}
    expected |= {"endings": [" x.", "y z", "a", "b"], "label": 2}
    assert read_hellaswag(tmp_path / "one.jsonl") == [expected]


def test_hellaswag_equals_one_ending_at_a_time_in_float64_in_any_batch(hellaswag):
    items = read_hellaswag(hellaswag)
    short = [
        item | {"ctx": item["ctx"][:60], "endings": [e[:40] for e in item["endings"]]}
        for item in items
    ]
    # with the whole question, and with some of it cut off
    for seed, block_size, some in ((0, 320, items), (1, 64, short)):
        model = small_model(seed, block_size=block_size)
        if some is short:
            hellaswag = hellaswag.with_name("short.jsonl")
            rows = []
            for item in short:
                label, ctx_a = item["ctx"].split(": ")[:2]
                rows.append({"activity_label": label, "ctx_a": ctx_a, "ctx_b": "", **item})
            hellaswag.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            some = read_hellaswag(hellaswag)
        expected = plain_hellaswag(model.double(), hellaswag, block_size)
        model.float()
        for batch_size in (1, 3, 8):
            sizes = (block_size, batch_size)
            result = score_hellaswag(model, some, BYTES.encode, BYTES.eot, *sizes, CPU)
            assert (result["accuracy"], result["accuracy_norm"]) == expected
            assert result["items"] == 100


def test_a_model_that_knows_the_answers_has_them_all_right():
    """With logits that favour the letter r, the ending written in it is chosen of every item."""

    def knows(ids):
        return torch.nn.functional.one_hot(torch.full_like(ids, ord("r")), 257) * 9.0

    items = [
        {"ctx": "q", "endings": ["rr" if i == n % 4 else "xx" for i in range(4)], "label": n % 4}
        for n in range(8)
    ]
    seen = []
    result = score_hellaswag(knows, items, BYTES.encode, BYTES.eot, 32, 5, CPU, seen.append)
    assert result == {"accuracy": 1.0, "accuracy_norm": 1.0, "items": 8} and sum(seen) == 32
    # the second ending is longer, yet likelier per character
    per_character = [{"ctx": "", "endings": ["x", "xrrrrr"], "label": 1}]
    result = score_hellaswag(knows, per_character, BYTES.encode, BYTES.eot, 32, 5, CPU)
    assert result["accuracy"] == 0.0 and result["accuracy_norm"] == 1.0


def test_an_ending_longer_than_the_context_is_an_error(hellaswag):
    items = read_hellaswag(hellaswag)
    with pytest.raises(ValueError, match=r"longest ending has \d+ tokens, this model reads 8"):
        score_hellaswag(small_model(), items, BYTES.encode, BYTES.eot, 8, 4, CPU)


GOOD = json.dumps(raw_item(0))
BAD = {
    "half a line": GOOD[:50],
    "empty line": "",
    "a list": "[1, 2]",
    "nested too deep": "[" * 100_000,
    "not UTF-8": "\udcff\udcfe",
    "no ctx_b": json.dumps({k: v for k, v in raw_item(0).items() if k != "ctx_b"}),
    "ctx_a is a number": json.dumps(raw_item(0) | {"ctx_a": 1}),
    "three endings": json.dumps(raw_item(0) | {"endings": ["a", "b", "c"]}),
    "an ending is none": json.dumps(raw_item(0) | {"endings": ["a", "b", "c", None]}),
    "endings are text": json.dumps(raw_item(0) | {"endings": "abcd"}),
    "label 4": json.dumps(raw_item(0) | {"label": 4}),
    "label of the test part": json.dumps(raw_item(0) | {"label": ""}),
    "label true": json.dumps(raw_item(0) | {"label": True}),
    "label 1.0": json.dumps(raw_item(0) | {"label": 1.0}),
}


@pytest.mark.parametrize("line", BAD.values(), ids=BAD.keys())
def test_a_line_that_is_not_an_item_is_named(line, tmp_path):
    text = f"{GOOD}\n{line}\n{GOOD}\n"
    (tmp_path / "bad.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"bad\.jsonl: line 2 is not a HellaSwag item") as error:
        read_hellaswag(tmp_path / "bad.jsonl")
    assert "\n" not in str(error.value)


def test_an_empty_file_and_none_are_errors(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="holds no items"):
        read_hellaswag(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError):
        read_hellaswag(tmp_path / "none.jsonl")


# ------------------------------------------------------------------------------------- the download


def test_hellaswag_is_fetched_once(hellaswag, tmp_path):
    body, path = hellaswag.read_bytes(), tmp_path / "data/hellaswag_val.jsonl"
    with book_server(lambda _: (200, len(body), body)) as (url, asked, _):
        assert fetch_hellaswag(path, url) == fetch_hellaswag(path, url) == path
        assert len(asked) == 1 and path.read_bytes() == body
        assert len(list(path.parent.iterdir())) == 1


def test_what_is_not_hellaswag_or_not_whole_leaves_nothing_behind(hellaswag, tmp_path, monkeypatch):
    body, path = hellaswag.read_bytes(), tmp_path / "hellaswag_val.jsonl"
    line = len(body.split(b"\n")[0]) + 1
    monkeypatch.setattr(scoring, "MAX_BYTES", len(body))
    for answer, why in [
        ((200, 5, b"<html"), "line 1 is not a HellaSwag item"),
        ((404, 0, b""), "404"),
        ((200, len(body), body[:line]), "cut off"),
        ((200, len(body) + 1, body + b"\n"), "longer than"),
        ((200, 0, b""), "holds no items"),
        ((200, None, [b" "] * 20), "not complete after 1 s"),
    ]:
        message = f"{why}.*; put HellaSwag's hellaswag_val.jsonl there"
        failing = pytest.raises(OSError, match=message)
        with book_server(lambda _, answer=answer: answer) as (url, _, _), failing as error:
            fetch_hellaswag(path, url, timeout_s=0.5, whole_s=1.0)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        assert not list(tmp_path.iterdir())


def test_a_server_that_never_answers_costs_the_timeout(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, started = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(OSError, match="no answer within|timed out"):
            fetch_hellaswag(tmp_path / "x.jsonl", url, timeout_s=0.3)
        assert time.monotonic() - started < 2


def test_a_file_that_exists_is_never_fetched(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.touch()
    assert fetch_hellaswag(path, "http://127.0.0.1:9/") == path

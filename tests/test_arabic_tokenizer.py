"""tokenizer_extension.py of the recipe arabic_bert: which tokens, which ids, which rows."""

import copy
import functools
import json
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import ROOT, one_error_line, run, shared

from parts.cli.config import from_yaml
from parts.data.tokenizers import Tokenizer
from recipes.arabic_bert import bpe_continued, new_rows, tokenizer_extension
from recipes.arabic_bert.bpe_continued import (
    AFFIXES,
    PieceCounter,
    all_ids,
    check_family,
    continued,
    merges_of,
    to_printable,
    whole_words,
    with_arabic_split,
)
from recipes.arabic_bert.new_rows import library_tokenizer
from recipes.arabic_bert.tokenizer_extension import ExtendConfig, extend

SCRIPT = "recipes/arabic_bert/tokenizer_extension.py"
METHODS = {"continued": continued, "words": whole_words}
STEMS = "كتاب مدرسة رئيس سوق عالم طالب مهندس جامعة سيارة مدينة حكومة وزير برنامج تاريخ".split()
ENGLISH = "The old man went down to the sea, where 12 ships lay; it's 5+1 and +6 (x+y).\n\n  End"
OTHERS = [
    ENGLISH,
    "def f(x):\n    return x + 1  # \t tabs\r\n",
    "Старик и море: +7 с+б",
    "שלום +עולם",
    "\u0710\u0712+\u0713 \u0780\u0781",  # Syriac and Thaana, beside Arabic
    "日本語 \U0001f600+\u00e9+\u00df",
    "\ufefb \ufe8d",  # presentation forms, which take three bytes
]


def arabic_lines(n: int = 400, segmented: bool = False) -> list[str]:
    """Lines of words with and without affixes, all of which occur often."""
    rng, plus = random.Random(0), "+" if segmented else ""
    lines = []
    for _ in range(n):
        words = []
        for _ in range(rng.randrange(4, 12)):
            prefix = rng.choice(["", "", "و", "ال", "ب"])
            suffix = rng.choice(["", "", "ات", "ها"])
            word = f"{prefix}{plus if prefix else ''}{rng.choice(STEMS)}"
            words.append(f"{word}{plus if suffix else ''}{suffix}")
        lines.append(" ".join(words) + rng.choice([".", "، 12", " +6"]))
    return lines


@functools.cache
def small_spec() -> dict:
    """A tokenizer of ModernBERT's kind with 460 ids, some of its added tokens in the middle."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tokenizer.train_from_iterator([text, *arabic_lines(20)], trainer)
    tokenizer.add_tokens(["  ", "|||EMAIL|||"])
    tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    tokenizer.add_tokens([f"[unused{i}]" for i in range(53)])
    return json.loads(tokenizer.to_str())


def with_merges_as_text(spec: dict) -> dict:
    """The same tokenizer in the older format."""
    return {**spec, "model": {**spec["model"], "merges": [" ".join(m) for m in merges_of(spec)]}}


def modernbert() -> dict:
    """The real tokenizer."""
    path = shared("data/tokenizers/modernbert-base/tokenizer.json")
    return json.loads(path.read_text(encoding="utf-8"))


BASES = {
    "small": small_spec,
    "small, older format": lambda: with_merges_as_text(small_spec()),
    "modernbert": modernbert,
}


def counted(spec: dict, lines: list[str], max_pieces: int = 10**6) -> PieceCounter:
    """The pieces of lines."""
    counter = PieceCounter(with_arabic_split(spec), max_pieces)
    for line in lines:
        counter.add(line)
    counter.finish()
    return counter


def extended(spec: dict, lines: list[str], method="continued", n_new=400, min_freq=2):
    """(old tokenizer, new tokenizer, new spec, new tokens)."""
    counts = counted(spec, lines).counts
    new_spec, tokens = METHODS[method](with_arabic_split(spec), counts, n_new, min_freq)
    return library_tokenizer(spec), library_tokenizer(new_spec), new_spec, tokens


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def write_base(folder: Path, spec: dict, model=None) -> Path:
    """A folder with a tokenizer, and a model if there is one."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    if model is not None:
        model.save_pretrained(folder)
    return folder


def small_model(spec: dict, n_rows: int, dtype=torch.float32, **settings):
    """A random ModernBERT with biases that are not 0."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = new_rows.random_model(spec, n_rows, 32, 1, seed=1)
        if settings:
            model = type(model)(type(model.config)(**{**model.config.to_dict(), **settings}))
        torch.nn.init.normal_(model.decoder.bias)
    return model.to(dtype)


def write_text(folder: Path, lines: list[str]) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """{relative path: contents} of the files below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


# ------------------------------------------------------------------------------------ ids


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_every_old_id_stays_and_new_ids_follow_without_a_gap(base, method):
    spec = BASES[base]()
    old, new, new_spec, tokens = extended(spec, arabic_lines(), method)
    n_old = max(old.get_vocab().values()) + 1
    assert len(tokens) > len(AFFIXES)
    expected = old.get_vocab() | {token: n_old + i for i, token in enumerate(tokens)}
    assert new.get_vocab() == expected
    assert new.token_to_id("[MASK]") == old.token_to_id("[MASK]")
    for text in ("a [MASK] b", "[CLS][SEP]", "a  b|||EMAIL|||[unused3]"):
        assert ids(new, text) == ids(old, text)
    written = {type(merge) for merge in new_spec["model"]["merges"]}
    assert len(written) == 1, "the library refuses a file with both formats"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_text_without_arabic_keeps_its_ids(base, method):
    lines = [*arabic_lines(), *arabic_lines(segmented=True), *["+اب +با"] * 50]
    old, new, _, _ = extended(BASES[base](), lines, method)
    for text in OTHERS:
        assert ids(new, text) == ids(old, text), text


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segmented", [False, True])
def test_arabic_comes_back_in_fewer_tokens(method, segmented):
    lines = arabic_lines(segmented=segmented)
    old, new, _, tokens = extended(small_spec(), lines, method)
    marks = "قالَ الرَّجُلُ: \u0634\u064e\u0651 5+1 كلمة+كلمة"  # the last in an order that is not NFC
    for text in (*lines, marks):
        text = unicodedata.normalize("NFC", text)
        assert new.decode(ids(new, text), skip_special_tokens=False) == text
    n_old, n_new = (sum(len(ids(t, line)) for line in lines) for t in (old, new))
    assert n_new < 0.6 * n_old
    assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("segmented", [False, True])
def test_every_affix_is_one_token_also_if_the_text_has_none(method, segmented):
    _, new, _, _ = extended(small_spec(), arabic_lines(segmented=segmented), method, n_new=120)
    for affix in AFFIXES:
        assert len(ids(new, affix)) == 1, affix


def test_affixes_are_pieces_of_their_own_and_marks_stay_with_their_word():
    counter = counted(small_spec(), [])
    assert counter.pieces("في و+ال+مكتب+ات ل+ها") == [" و+" if i else "في" for i in (0, 1)] + [
        *("ال+", "مكتب", "+ات", " ل+", "ها")
    ]
    assert counter.pieces("كتاب+ه، ب+كتابو+ها") == ["كتاب", "+ه", "،", " ب+", "كتابو", "+ها"]
    assert counter.pieces("قَالَ وَ+ال+رَجُل") == ["قَالَ", " وَ+", "ال+", "رَجُل"]


@pytest.mark.parametrize("segmented", [False, True])
def test_merges_are_those_of_a_trainer_in_twenty_lines(segmented):
    spec = with_arabic_split(small_spec())
    counts = counted(spec, arabic_lines(80, segmented)).counts
    affixes = bpe_continued.affix_merges(spec)
    with_affixes, _ = bpe_continued.extended(spec, affixes)
    got = bpe_continued._trained_merges(with_affixes, counts, 100, 3)
    bpe = bpe_continued.only_merges(with_affixes)
    names = []  # of symbols: the number is the order in which they are met, then made
    words = []
    for piece in sorted(counts):
        symbols = bpe.encode(to_printable(piece)).tokens
        names += [s for s in dict.fromkeys(symbols) if s not in names]
        words.append(([names.index(s) for s in symbols], counts[piece]))
    expected = []
    while True:
        pairs = Counter()
        for symbols, n in words:
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += n
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < 3 or len(expected) == 40:
            break
        expected.append((names[best[0]], names[best[1]]))
        names.append("".join(expected[-1]))
        for symbols, _ in words:
            for i in range(len(symbols) - 1):
                if tuple(symbols[i : i + 2]) == best:
                    symbols[i : i + 2] = [len(names) - 1]
    assert len(expected) == 40
    assert got[:40] == expected


def test_words_are_added_in_the_order_of_their_counts_after_the_affixes():
    spec = with_arabic_split(small_spec())
    counts = {" ققق": 7, " ضضض": 9, " ظظظ": 7, "غغغ": 1}
    n = len(AFFIXES)
    _, tokens = whole_words(spec, counts, n + 10, min_freq=2)
    assert tokens[:n] == [to_printable(affix) for affix in AFFIXES]
    assert tokens[n:] == [to_printable(word) for word in (" ضضض", " ظظظ", " ققق")]
    assert len(whole_words(spec, counts, n + 1, min_freq=2)[1]) == n + 1


def test_words_are_refused_if_the_merges_do_not_make_every_old_token():
    spec = copy.deepcopy(small_spec())
    spec["model"]["vocab"]["zqzqz"] = len(spec["model"]["vocab"]) + 60
    with pytest.raises(ValueError, match="--method words: 1 of the old tokens, such as 'zqzqz'"):
        whole_words(with_arabic_split(spec), {}, 1000, 2)


def test_an_extended_tokenizer_can_be_extended_again():
    _, first, spec, _ = extended(small_spec(), arabic_lines(100), n_new=80)
    check_family(spec)
    _, second, _, tokens = extended(spec, arabic_lines(400), n_new=80)
    assert len(tokens) > 20
    assert first.get_vocab().items() <= second.get_vocab().items()
    assert all(ids(second, text) == ids(first, text) for text in OTHERS)


def test_counting_is_bounded_and_keeps_the_frequent_words():
    rare = [chr(0x621 + i // 26) * 3 + chr(0x641 + i % 10) * (1 + i % 26) for i in range(260)]
    lines = [f"{STEMS[i % 3]} {word}" for i, word in enumerate(rare)]
    everything = counted(small_spec(), lines)
    bounded = counted(small_spec(), lines, max_pieces=50)
    assert len(bounded.counts) <= 50 < len(everything.counts)
    assert bounded.n_dropped > 150
    assert bounded.n_not_counted >= 1
    for stem in STEMS[:3]:  # at the beginning of a line
        assert bounded.counts[stem] == everything.counts[stem]
    long = counted(small_spec(), ["ب" * 10_000, "كتاب"])
    assert (long.n_too_long, long.counts) == (1, {"كتاب": 1})


def test_more_words_than_the_trainer_is_fed_are_scaled_down(monkeypatch):
    spec, lines = small_spec(), arabic_lines()
    _, _, _, exact = extended(spec, lines)
    monkeypatch.setattr(bpe_continued, "MAX_FED", 1000)
    assert bpe_continued.scale_of(counted(spec, lines).counts) > 2
    _, _, _, scaled = extended(spec, lines)
    assert len(set(exact[:100]) & set(scaled)) > 80


# ------------------------------------------------------------------------------------ rows


def test_a_new_row_is_the_mean_of_the_rows_of_its_old_tokens():
    spec = small_spec()
    old, _, _, tokens = extended(spec, arabic_lines())
    n_old = max(old.get_vocab().values()) + 1
    weights = new_rows.mean_weights(spec, tokens, n_old)
    model = small_model(spec, n_old)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new_rows.grow(model, n_old + len(tokens), n_old, weights)
    matrix = model.get_input_embeddings().weight
    bpe = bpe_continued.only_merges(spec)
    for i in range(0, len(tokens), 7):
        rows = before["model.embeddings.tok_embeddings.weight"][bpe.encode(tokens[i]).ids]
        torch.testing.assert_close(matrix[n_old + i], rows.mean(0))
    assert torch.equal(model.decoder.bias[:n_old], before["decoder.bias"])
    assert not model.decoder.bias[n_old:].any()


# ARABIC -> translation; as many pairs as words, one word twice, one of two words, one affix
PAIRS = [
    ("كتاب", "book"),
    ("كتاب", "letter"),
    ("مدرسة", "school"),
    ("رئيس", "president"),
    ("سوق", "market"),
    ("عالم", "world"),
    ("طالب", "student"),
    ("مهندس", "engineer"),
    ("جامعة", "university"),
    ("سيارة", "car"),
    ("مدينة", "city"),
    ("حكومة", "government"),
    ("وزير", "minister"),
    ("برنامج", "program"),
    ("تاريخ", "history"),
    ("كتاب طالب", "a student's book"),
    ("سوق مدينة", "city market"),
    ("وزير", "vizier"),
    ("عالم", "scholar"),
    ("+ها", "her"),
]


class OneIdAWord:
    """Stands for a tokenizer in a sum by hand: an id for each word, blanks left out."""

    def __init__(self, of_word: dict[str, int]):
        self.of_word = of_word

    def encode(self, text: str, add_special_tokens: bool):
        assert not add_special_tokens
        found = [self.of_word[word] for word in text.split()]
        return type("Encoding", (), {"ids": found})


def test_weights_of_twenty_translations_are_those_by_hand():
    english = sorted({w for _, t in PAIRS for w in t.split()})
    old = OneIdAWord({word: i for i, word in enumerate(english)})
    arabic = list(dict.fromkeys(w for a, _ in PAIRS for w in a.split()))
    new = OneIdAWord({word: 100 + i for i, word in enumerate(arabic)})
    pairs = [(a, t, 3.0 if t == "letter" else 1.0) for a, t in PAIRS]
    weights = new_rows.translation_weights(pairs, old, new, 100)

    def of(word: str) -> dict[str, float]:
        return {english[i]: w for i, w in weights[new.of_word[word]].items()}

    def near(**shares):
        return pytest.approx({k.replace("_s", "'s"): v for k, v in shares.items()})

    assert len(weights) == len(arabic) == 15
    # book 1 and letter 3 of its own lines; of "a student's book" 1/6 for each word: in all 4.5
    sixth = 1 / 6 / 4.5
    assert of("كتاب") == near(book=1 / 4.5 + sixth, letter=3 / 4.5, a=sixth, student_s=sixth)
    # student 1, and 1/6 for each word: in all 1.5
    assert of("طالب") == near(student=2 / 3, a=1 / 9, student_s=1 / 9, book=1 / 9)
    # market 1, and 1/4 each for city and market: in all 1.5
    assert of("سوق") == near(market=5 / 6, city=1 / 6)
    assert of("مدينة") == near(city=5 / 6, market=1 / 6)
    assert of("عالم") == near(world=1 / 2, scholar=1 / 2)
    assert of("وزير") == near(minister=1 / 2, vizier=1 / 2)
    assert of("+ها") == near(her=1)
    for word in ("مدرسة", "رئيس", "مهندس", "جامعة", "سيارة", "حكومة", "برنامج", "تاريخ"):
        translation = next(t for a, t in PAIRS if a == word)
        assert of(word) == {translation: pytest.approx(1)}


def test_rows_by_translation_are_weighted_means_and_the_others_means(tmp_path):
    spec = small_spec()
    model = small_model(spec, len(all_ids(spec)))
    base = write_base(tmp_path / "base", spec, model)
    text = write_text(tmp_path / "text", arabic_lines(segmented=True))
    table = tmp_path / "pairs.tsv"
    lines = [f"{a}\t{t}" for a, t in PAIRS]
    lines[1] += "\t3"  # letter
    table.write_text("# Arabic, English\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    result = run(
        *(SCRIPT, "--model-name", base, "--input-dir", text, "--output-dir", tmp_path / "out"),
        *("--min-freq", 2, "--init", "translate", table),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    new = tokenizers.Tokenizer.from_file(str(tmp_path / "out/Tokenizer/tokenizer.json"))
    old = library_tokenizer(spec)
    rows = load(tmp_path / "out/Model").get_input_embeddings().weight
    old_rows = model.get_input_embeddings().weight
    n_old = len(old_rows)

    def mean(text: str) -> torch.Tensor:
        return old_rows[ids(old, text)].mean(0)

    (school,) = ids(new, " مدرسة")
    torch.testing.assert_close(rows[school], mean(" school"))
    (school,) = ids(new, "مدرسة")  # without a blank, as after a prefix
    torch.testing.assert_close(rows[school], mean("school"))
    (her,) = ids(new, "+ها")
    torch.testing.assert_close(rows[her], mean("her"))
    (book,) = ids(new, " كتاب")
    n_words = len(ids(new, " كتاب طالب"))
    assert n_words == 2
    by_hand = mean(" book") + 3 * mean(" letter") + mean(" a student's book") / 2
    torch.testing.assert_close(rows[book], by_hand / 4.5)
    (of_no_pair,) = ids(new, " ب+")
    torch.testing.assert_close(rows[of_no_pair], mean(" ب+"))
    assert of_no_pair >= n_old
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert 20 < report["tokens_with_translation"] < report["new_tokens"]


def load(folder):
    """The model in a folder, as a user loads it."""
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.parametrize("kind", ["mean", "random"])
@pytest.mark.parametrize(
    ("dtype", "n_spare", "tied"),
    [(torch.float32, 0, True), (torch.bfloat16, 0, True), (torch.float32, 36, False)],
)
def test_old_rows_stay_to_the_bit_and_so_do_the_logits(tmp_path, kind, dtype, n_spare, tied):
    spec = small_spec()
    n_old = len(all_ids(spec))
    model = small_model(spec, n_old + n_spare, dtype, tie_word_embeddings=tied)
    base = write_base(tmp_path / "base", spec, model)
    text = write_text(tmp_path / "text", arabic_lines())
    report = extend(
        ExtendConfig(str(base), str(text), str(tmp_path / "out"), min_freq=2, init=(kind,))
    )
    grown = load(tmp_path / "out/Model")
    assert grown.config.vocab_size == n_old + report["new_tokens"]
    assert not report["random_model"]
    before, after = model.state_dict(), grown.state_dict()
    assert before.keys() == after.keys()
    by_row = {"model.embeddings.tok_embeddings.weight", "decoder.weight", "decoder.bias"}
    for name, tensor in before.items():
        assert after[name].dtype == dtype
        n = n_old if name in by_row else len(tensor)
        assert torch.equal(after[name][:n], tensor[:n]), name
    matrix = grown.get_input_embeddings().weight
    assert (grown.get_output_embeddings().weight is matrix) == tied
    new = matrix[n_old:].detach().float()
    assert new.isfinite().all()
    assert new.std(0).min() > 0
    if kind == "random":
        assert new.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    some = torch.tensor([ids(library_tokenizer(spec), ENGLISH)])
    logits, grown_logits = model(some).logits, grown(some).logits
    within = {} if dtype == torch.float32 else {"atol": 0.01, "rtol": 0.016}
    torch.testing.assert_close(grown_logits[..., :n_old], logits[..., :n_old], **within)


# ------------------------------------------------------------------------------------ the script


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_with_another_hash_seed_write_the_same_files(tmp_path, method):
    base = write_base(tmp_path / "base", small_spec())
    text = write_text(tmp_path / "text", arabic_lines())
    found = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        result = run(
            *(SCRIPT, "--model-name", base, "--input-dir", text, "--output-dir", out),
            *("--min-freq", 2, "--method", method, "--max-counted-words", 40),
            cwd=tmp_path,
            env={"PYTHONHASHSEED": seed},
        )
        assert result.returncode == 0, result.stderr
        assert "has no weights: the model is random, 4 layers of 128" in result.stdout
        found.append({k: v for k, v in tree(out).items() if k != "report.json"})
    assert found[0] == found[1]
    assert {Path(name).parts[0] for name in found[0]} == {"Tokenizer", "Model"}


def test_both_folders_load_and_the_report_says_what_was_measured(tmp_path):
    from transformers import AutoTokenizer

    spec = small_spec()
    base = write_base(tmp_path / "base", spec)
    lines = arabic_lines(1500, segmented=True)
    text = write_text(tmp_path / "text", lines)
    out, log = tmp_path / "out", tmp_path / "log.txt"
    result = run(
        *(SCRIPT, "--model-name", base, "--input-dir", text, "--output-dir", out, "--min-freq", 2),
        *("--hidden-size", 64, "--num-layers", 2, "--log-file", log),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert {p.name for p in out.iterdir()} == {"Tokenizer", "Model", "report.json"}
    model = load(out / "Model")
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (64, 2)
    tokenizer = AutoTokenizer.from_pretrained(out / "Tokenizer")
    ours = Tokenizer.load(out / "Tokenizer/tokenizer.json")
    library = tokenizers.Tokenizer.from_file(str(out / "Tokenizer/tokenizer.json"))
    n_ids = len(tokenizer)
    assert n_ids == ours.vocab_size == model.config.vocab_size
    assert n_ids == len(all_ids(spec)) + report["new_tokens"]
    assert tokenizer.mask_token_id == all_ids(spec)["[MASK]"]
    assert tokenizer.pad_token_id == model.config.pad_token_id == all_ids(spec)["[PAD]"]
    for line in [*lines[:20], ENGLISH]:
        expected = ids(library, line)
        assert tokenizer.encode(line, add_special_tokens=False) == expected
        np.testing.assert_array_equal(ours.encode(line), expected)
        logits = model(torch.tensor([expected])).logits
        assert logits.shape == (1, len(expected), n_ids)
    # what the report says, counted again
    held_out = [line for line in lines if tokenizer_extension.is_measured(line)]
    assert report["text"]["measured_lines"] == len(held_out) > 5
    assert report["text"]["held_out"]
    n_words = sum(len(line.split()) for line in held_out)
    for when, tokenizer_then in (("before", library_tokenizer(spec)), ("after", library)):
        n_tokens = sum(len(ids(tokenizer_then, line)) for line in held_out)
        assert report[when]["tokens_per_word"] == pytest.approx(n_tokens / n_words)
        assert report[when]["unknown_tokens"] == 0
        assert report[when]["speed_mb_per_s"] > 0
    assert report["after"]["coverage"] > 0.95 > report["before"]["coverage"]
    assert report["after"]["embedding_bytes"] == n_ids * 64 * 4
    counter = counted(spec, [line for line in lines if line not in set(held_out)])
    occurrences = Counter()
    for piece, n in counter.counts.items():
        for i in ids(library, piece):
            occurrences[i] += n
    for token, n in report["most_frequent_new_tokens"][:5]:
        assert occurrences[ids(library, token)[0]] == n
    assert f"added {report['new_tokens']:,} tokens" in result.stdout
    assert log.read_text(encoding="utf-8").endswith(result.stdout)


def test_a_short_text_is_counted_and_measured_as_a_whole(tmp_path):
    base = write_base(tmp_path / "base", small_spec())
    text = write_text(tmp_path / "text", ["كتاب كتاب كتاب"])
    report = extend(ExtendConfig(str(base), str(text), str(tmp_path / "out"), min_freq=2))
    assert (report["text"]["arabic_words"], report["text"]["held_out"]) == (3, False)
    assert report["after"]["tokens_per_word"] < report["before"]["tokens_per_word"]


def test_the_default_configuration_is_a_file_for_config(tmp_path):
    result = run(SCRIPT, "--print_default_config", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "config.yaml"
    path.write_text(result.stdout, encoding="utf-8")
    assert from_yaml(ExtendConfig, str(path)) == ExtendConfig(config=str(path))
    for written, expected in (
        ("translate, a b.tsv", ("translate", "a b.tsv")),
        ("random", ("random",)),
    ):
        path.write_text(f"min_freq: 3\ninit: [{written}]\n", encoding="utf-8")
        config = from_yaml(ExtendConfig, str(path))
        assert (config.min_freq, config.init) == (3, expected)


# ------------------------------------------------------------------------------------ bad input


def bad_setups(tmp_path) -> dict:
    """Folders and files that are wrong, beside a tokenizer and a text that are right."""
    spec = small_spec()
    write_base(tmp_path / "base", spec)
    write_text(tmp_path / "text", arabic_lines(50))
    write_text(tmp_path / "english", [ENGLISH])
    write_text(tmp_path / "blank", ["", "  "])
    (tmp_path / "empty").mkdir()
    wordpiece = {**spec, "model": {"type": "WordPiece", "vocab": {"[UNK]": 0}}}
    write_base(tmp_path / "wordpiece", wordpiece)
    no_mask = [t for t in spec["added_tokens"] if t["content"] != "[MASK]"]
    write_base(tmp_path / "no_mask", {**spec, "added_tokens": no_mask})
    llama = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first"}
    write_base(tmp_path / "metaspace", {**spec, "pre_tokenizer": llama})
    bert = write_base(tmp_path / "bert", spec)
    (bert / "model.safetensors").write_bytes(b"")
    (bert / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    write_base(tmp_path / "fewer_rows", spec, small_model(spec, 450, pad_token_id=0))
    write_base(tmp_path / "weights", spec, small_model(spec, len(all_ids(spec))))
    (tmp_path / "taken/Model").mkdir(parents=True)
    for name, line in {
        "bad.tsv": "كتاب book",
        "odd.tsv": "كتاب\tbook\t-1",
        "far.tsv": "x\ty",
    }.items():
        (tmp_path / name).write_text(line, encoding="utf-8")


BAD = {
    "--max-vocab-size 5": r"--max_vocab_size: 5 new tokens are fewer than the \d+ that the affixes",
    "--max-vocab-size 5 --method words": "--max_vocab_size: 5 new tokens are fewer than",
    "--max-vocab-size 0": "--max_vocab_size: 0 is below 1",
    "--min-freq 0": "--min_freq: 0 is below 1",
    "--model-name wordpiece": "its model is WordPiece, not the byte-level BPE of ModernBERT",
    "--model-name metaspace": "it splits a text in another way than ModernBERT's",
    "--model-name no_mask": r"it has no \[MASK\]",
    "--model-name bert": "its model is of type 'bert', not 'modernbert'",
    "--model-name fewer_rows": "its tokenizer has 460 ids, its model 450",
    "--model-name empty": "tokenizer.json: missing",
    "--model-name not/there": "not/there: not in the hub's cache",
    "--model-name weights --hidden-size 64": "--hidden_size: is for a random model",
    "--hidden-size 50": "--hidden_size: 50 is not a multiple of 32",
    "--num-layers 0": "--num_layers: 0 is below 1",
    "--input-dir english": "--input_dir: english has no Arabic text",
    "--input-dir blank": "--input_dir: blank: holds no documents",
    "--input-dir empty": "--input_dir: empty has no",
    "--input-dir absent": "--input_dir: absent does not exist",
    "--output-dir taken": "--output_dir: taken/Model already exists; delete it",
    "--init translate": "--init: 'translate' is not mean, random, or translate FILE.tsv",
    "--init median": "--init: 'median' is not mean",
    "--init translate absent.tsv": "absent.tsv: No such file",
    "--init translate bad.tsv": "bad.tsv: line 1: 'كتاب book' is not ARABIC<tab>TRANSLATION",
    "--init translate odd.tsv": "odd.tsv: line 1: the weight -1 is not above 0",
    "--init translate far.tsv": "--init: none of the 1 lines of far.tsv has a new token",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, line):
    bad_setups(tmp_path)
    before = tree(tmp_path)
    given = line.split()
    for flag, value in {"--model-name": "base", "--input-dir": "text", "--min-freq": "2"}.items():
        given += [] if flag in given else [flag, value]
    error = one_error_line(run(SCRIPT, *given, cwd=tmp_path), 2)
    assert re.search(BAD[line], error), error
    assert tree(tmp_path) == before
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".extending")]


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base", small_spec())
    text = write_text(tmp_path / "text", arabic_lines(50))

    def fail(folder, _):
        (folder / "..").resolve().joinpath("half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new_rows, "write_model", fail)
    with pytest.raises(OSError, match="No space left"):
        extend(ExtendConfig(str(base), str(text), str(tmp_path / "out"), min_freq=2))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ real text


def real_lines() -> tuple[list[str], list[str]]:
    """(news lines 1-500 and classical text without its vowel marks, the last 100 news lines)."""
    path = shared("data/arabic/txt/news_lines.txt")
    news = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    path = shared("data/arabic/tashkeela/val.txt")
    classical = re.sub("[\u064b-\u0652\u0670]", "", path.read_text(encoding="utf-8")).split("\n")
    return news[:500] + classical, news[-100:]


def share_of_tokens(train: list[str], test: list[str]) -> float:
    """Tokens of test lines, as a share of what ModernBERT's tokenizer needs."""
    old, new, _, tokens = extended(modernbert(), train, n_new=20_000)
    assert 19_000 < len(tokens) <= 20_000
    n_old, n_new = (sum(len(ids(t, line)) for line in test) for t in (old, new))
    n_words = sum(len(line.split()) for line in test)
    print(f"{n_old / n_words:.3f} -> {n_new / n_words:.3f} tokens per word: {n_new / n_old:.3f}")
    return n_new / n_old


def test_plain_news_takes_at_most_two_fifths_of_the_tokens():
    assert share_of_tokens(*real_lines()) <= 0.40


def test_segmented_news_takes_at_most_45_percent_of_the_tokens():
    segmentation = pytest.importorskip("recipes.arabic_bert.segmentation")
    from recipes.arabic_bert.arabic_text import normalise

    train, test = ([normalise(line) for line in lines] for lines in real_lines())
    segment = segmentation.RulesSegmenter(segmentation.WordList.of_texts(train)).segment
    assert share_of_tokens(list(map(segment, train)), list(map(segment, test))) <= 0.45


def test_text_that_keeps_its_vowel_marks_takes_a_quarter_of_the_tokens():
    path = shared("data/arabic/tashkeela/val.txt")
    lines = path.read_text(encoding="utf-8").split("\n")
    assert share_of_tokens(lines[:-100], lines[-100:]) <= 0.25

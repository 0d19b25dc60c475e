"""Segments of Arabic words and back: recipes/arabic_bert/segmentation.py."""

import difflib
import re
import stat
import sys
import time

import pytest
from conftest import shared

from recipes.arabic_bert.arabic_text import LETTERS, MARKS, normalise, to_arabic, without_marks
from recipes.arabic_bert.segmentation import (
    Farasa,
    RulesSegmenter,
    WordList,
    desegment,
    keep_whole,
    uncut,
)

WORD = re.compile(f"[{LETTERS}{MARKS}+]*[{LETTERS}][{LETTERS}{MARKS}+]*")
CONFUSED = str.maketrans(to_arabic("|><{pY"), to_arabic("AAAAhy"))


def lines(path):
    text = shared(f"data/arabic/{path}").read_text(encoding="utf-8")
    return [normalise(line) for line in text.split("\n")]


@pytest.fixture(scope="module")
def news():
    return lines("txt/news_lines.txt")


@pytest.fixture(scope="module")
def words(news):
    return WordList.of_texts(news)


def comparable(line):
    """Segmented words of a line, in the letters of the reference."""
    found = WORD.findall(without_marks(line).translate(CONFUSED))
    return [word.strip("+") for word in found]


def letters_of(words):
    return [word.replace(to_arabic("l+Al+"), to_arabic("ll")).replace("+", "") for word in words]


def equal_words(segment, first, last):
    """(words segmented as in the reference, words in both) of lines first to last."""
    n_equal = n_aligned = 0
    texts = lines("farasa_reference/input.txt")[first - 1 : last]
    references = lines("farasa_reference/segmented.txt")[first - 1 : last]
    for text, reference in zip(texts, references, strict=True):
        ours, theirs = comparable(segment(text)), comparable(reference)
        blocks = difflib.SequenceMatcher(None, letters_of(ours), letters_of(theirs), autojunk=False)
        for i, j, n in blocks.get_matching_blocks():
            n_aligned += n
            n_equal += sum(ours[i + k] == theirs[j + k] for k in range(n))
    return n_equal, n_aligned


def test_words_are_cut_as_farasa_cuts_them(words):
    # lines 1-150 were looked at while the rules were written
    n_equal, n_aligned = equal_words(RulesSegmenter(words).segment, 151, 300)
    assert n_aligned > 3000
    assert n_equal >= 0.93 * n_aligned
    # the comparison can fail: words that are left whole do not pass
    n_equal, n_aligned = equal_words(uncut, 151, 300)
    assert n_equal < 0.5 * n_aligned


def test_fifty_thousand_words_per_second(words, news):
    segmenter = RulesSegmenter(words)
    n_words = sum(len(line.split()) for line in news)
    start = time.process_time()
    for line in news:
        segmenter.segment(line)
    assert n_words / (time.process_time() - start) >= 50_000


def all_lines():
    """Lines of every shared Arabic text; of XML files with their tags."""
    for path in sorted(shared("data/arabic").rglob("*")):
        if path.suffix in (".txt", ".xml"):
            encoding = "cp1256" if "1256" in path.name else "utf-8"
            yield from path.read_text(encoding=encoding, errors="replace").split("\n")


def test_the_round_trip_is_exact_on_all_real_text(words):
    segmenter = RulesSegmenter(words)
    n_with_plus = 0
    for line in map(normalise, all_lines()):
        segmented = segmenter.segment(line)
        assert desegment(segmented) == without_marks(line)
        n_with_plus += "5+1" in line or "+6" in line
        assert ("5+1" in line) == ("5+1" in segmented)
    assert n_with_plus >= 6


def test_the_round_trip_is_exact_whatever_the_word_list_and_the_text(words, news):
    # segmented text as raw text has a + between letters everywhere
    segmented = [RulesSegmenter(words).segment(line) for line in news[:100]]
    for counts in ({}, dict.fromkeys(map(to_arabic, ("lh", "AlktAb", "ktAb", "h", "lAlA")), 9)):
        segmenter = RulesSegmenter(WordList(counts))
        for line in [*news[:100], *segmented, *map(normalise, segmented)]:
            line = normalise(line)
            assert desegment(segmenter.segment(line)) == without_marks(line)


@pytest.mark.parametrize(
    "word, segments",
    (
        ("wAlmktbAt", "w+Al+mktb+At"),
        ("llmdynp", "l+Al+mdyn+p"),  # for the city
        ("wlldwlp", "w+l+Al+dwl+p"),
        ("lh", "l+h"),
        ("wbhA", "w+b+hA"),
        ("mn", "mn"),
        ("wAl", "wAl"),
        ("Allh", "Allh"),
        (">", ">"),
        ("5+1", "5+1"),
        ("+6", "+6"),
    ),
)
def test_cases(words, word, segments):
    word = "".join(map(to_arabic, word))
    assert RulesSegmenter(words).segment(word) == to_arabic(segments)
    assert desegment(to_arabic(segments)) == word


def test_fathatan_marks_a_suffix_and_diacritics_are_removed(words):
    segment = RulesSegmenter(words).segment
    for vocalised in ("Emwd\u064bA", "EmwdA\u064b"):
        assert segment(to_arabic(vocalised)) == to_arabic("Emwd+A")
    assert segment(to_arabic("k\u0650tAb\u064c")) == to_arabic("ktAb")


def test_punctuation_blanks_and_other_scripts_stay(words):
    line = to_arabic("wAlmdynp") + "\u060c (" + to_arabic("AlHrb") + ") ABC-12 \u0661+\u0662"
    expected = to_arabic("w+Al+mdyn+p") + "\u060c (" + to_arabic("Al+Hrb")
    assert RulesSegmenter(words).segment(line) == expected + ") ABC-12 \u0661+\u0662"


def test_a_plus_of_the_text_between_letters_is_not_joined():
    for raw in map(to_arabic, ("w+ktAb", "A+b", "+ktAb", "ktAb+", "A++b", "b+A+")):
        line = f"x {raw} y"
        for segmented in (RulesSegmenter(WordList()).segment(line), uncut(line)):
            assert desegment(segmented) == line
            assert segmented.replace("\u2060", "") == line
    assert keep_whole("+") == "+"


def test_the_word_list_is_bounded_and_does_not_depend_on_hashing():
    words = WordList(most=10)
    words.add({f"w{n}": n for n in range(11)})
    assert words.counts == {f"w{n}": n for n in range(6, 11)}


# ---------------------------------------------------------------------------------- Farasa

JAVA = """#!{python}
import re, sys, time
jar, log = sys.argv[3], {log!r}
open(log, "a").write("start " + " ".join(sys.argv[1:]) + "\\n")
sys.stdin.reconfigure(encoding="utf-8")
sys.stdout.reconfigure(encoding="utf-8")
for line in sys.stdin:
    open(log, "a").write("line\\n")
    {behaviour}
    line = line.translate({{0x623: 0x627, 0x629: 0x647}})
    print(re.sub("\\\\bال", "  ال+", line.strip()) + "  .", flush=True)
"""


@pytest.fixture
def java(tmp_path, monkeypatch):
    """java(behaviour): puts a stand-in on PATH that cuts the article off; returns (jar, log)."""

    def install(behaviour="pass"):
        program = tmp_path / "bin/java"
        program.parent.mkdir(exist_ok=True)
        log = tmp_path / "log"
        script = JAVA.format(python=sys.executable, log=str(log), behaviour=behaviour)
        program.write_text(script, encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(program.parent))
        jar = tmp_path / "farasa.jar"
        jar.write_bytes(b"")
        return jar, log

    return install


LINE = to_arabic(">H\u064emd Almdynp, w") + " 5+1 " + to_arabic("Alktb")
CUT = to_arabic(">Hmd Al+mdynp, w") + " 5+1 " + to_arabic("Al+ktb")


def test_farasa_gives_the_cuts_and_the_letters_stay(java):
    jar, log = java()
    farasa = Farasa(jar)
    for _ in range(3):
        assert farasa.segment(LINE) == CUT
    assert farasa.segment("") == ""  # is not sent
    assert farasa.segment("abc 5+1") == "abc 5+1"
    farasa.close()
    start = f"start -Dfile.encoding=UTF-8 -jar {jar}\n"
    assert log.read_text() == start + 3 * "line\n"
    assert farasa.n_failed == 0


def test_farasa_is_started_again_and_a_line_that_fails_again_is_kept(java):
    jar, log = java(f"if {to_arabic('mwt')!r} in line: sys.exit(1)")
    farasa = Farasa(jar)
    death = to_arabic("Almwt A+b")
    assert farasa.segment(LINE) == CUT
    assert desegment(farasa.segment(death)) == death
    assert farasa.segment(LINE) == CUT
    farasa.close()
    assert farasa.n_failed == 1
    assert log.read_text().count("start -D") == 3  # at first, to try again, for the last line


def test_farasa_that_hangs_is_killed(java):
    jar, _ = java(f"if {to_arabic('mwt')!r} in line: time.sleep(60)")
    farasa = Farasa(jar, timeout_s=1)
    assert farasa.segment(to_arabic("Almwt")) == to_arabic("Almwt")
    assert farasa.segment(LINE) == CUT
    farasa.close()


@pytest.mark.parametrize("behaviour", ("continue", "print('no'); continue", "raise OSError('bad')"))
def test_a_jar_that_gives_no_segments_is_an_error(java, behaviour):
    jar, _ = java(behaviour)
    farasa = Farasa(jar, timeout_s=0.5)
    assert farasa.segment(LINE) == uncut(LINE)
    farasa.segment(LINE)
    with pytest.raises(ValueError, match="farasa.jar: gave no segments for 3 lines"):
        farasa.segment(LINE)
    farasa.close()


def test_no_java_and_no_jar_are_named(tmp_path, java, monkeypatch):
    jar, _ = java()
    with pytest.raises(FileNotFoundError, match="--farasa_jar: .*none.jar: no such file"):
        Farasa(tmp_path / "none.jar")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="needs Java.*default-jre-headless"):
        Farasa(jar)

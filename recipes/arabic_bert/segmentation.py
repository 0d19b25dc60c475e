"""
Cut Arabic words into affixes and stem, `w+al+mktb+at`, and join them again.

    words = WordList.of_texts(texts)                # counted from the corpus
    segment = RulesSegmenter(words).segment         # or Farasa(jar).segment
    desegment(segment(line)) == without_marks(line)  # for every normalised line

Rules: the article and the conjunctions before it are always cut off; single letters and suffixes
if the rest occurs as a word in the corpus, or behind the article, more often than the whole; words
without a meaning of their own are in a table. "ll..." (for the ...) is written l+al+..., as Farasa
does. 0.96 of the words are cut as Farasa cuts them (lines 151-300 of a reference of Wikipedia
sentences, word list from news, 2026-11-26).

A word of the text that has a + between letters is left whole: word joiners around the +, which
normalised text does not have, say that desegment() must not join it.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from pathlib import Path

from parts.base.text import one_line
from recipes.arabic_bert.arabic_text import (
    FATHATAN,
    LETTERS,
    MARKS,
    WORD_JOINER,
    to_arabic,
    without_marks,
)

_RUN = re.compile(f"[{LETTERS}{MARKS}+]+")  # a word with its affixes, or with a + of its own
_SEGMENTED_RUN = re.compile(f"[{LETTERS}+]*[{LETTERS}][{LETTERS}+]*")
_MARKED_RUN = re.compile(f"[{LETTERS}+{WORD_JOINER}]*\\+[{LETTERS}+{WORD_JOINER}]*")
_JOINED = re.compile(f"(?<=[{LETTERS}])\\+(?=[{LETTERS}])")
_LETTER = re.compile(f"[{LETTERS}]")
_ESCAPED = f"{WORD_JOINER}+{WORD_JOINER}"

# one letter for those that writers confuse; a word keeps its length
_FOLD = str.maketrans(to_arabic("|><{pY") + "\u06cc\u06a9", to_arabic("AAAAhyyk"))


def _pattern(latin: str) -> re.Pattern:
    """The pattern with its Latin letters, in Buckwalter's transliteration, in Arabic."""
    return re.compile(re.sub("[A-Za-z]", lambda found: to_arabic(found[0]), latin))


_ARTICLE = _pattern(r"([wf])?(?:([bk])?(Al)|(l)(l))(?=...)")
_AFTER_ARTICLE = _pattern(r"(?:(?:[wbfk]|wb)?Al(?=..)|w?ll(?=...))")
_SPELT_LL = _pattern(r"^([wf]\+)?l\+l\+")  # as it is spelt, as it is segmented
_SEGMENTED_LL = _pattern(r"^([wf]\+)?l\+Al\+")

MAX_REMEMBERED = 1_000_000  # words of which the segments are kept; 200 bytes each
MAX_COUNTED = 2_000_000  # words of a list, see WordList.add


# ---------------------------------------------------------------------------------- word list


class WordList:
    """
    How often each word occurs in a corpus, as evidence for stems.

    Memory is bounded: when there are more than `most` words, the rarer half is forgotten.
    """

    def __init__(self, counts: dict | None = None, most: int = MAX_COUNTED):
        self.counts = Counter(counts or {})
        self.most = most
        self._stems = None

    @classmethod
    def of_texts(cls, texts, most: int = MAX_COUNTED) -> WordList:
        """Count the words of normalised texts."""
        words = cls(most=most)
        for text in texts:
            words.add(count_words(text))
        return words

    def add(self, counts: dict) -> None:
        """Add counts; the result depends on their order only beyond `most` words."""
        self.counts.update(counts)
        self._stems = None
        if len(self.counts) > self.most:
            kept = sorted(self.counts.items(), key=lambda pair: (-pair[1], pair[0]))
            self.counts = Counter(dict(kept[: self.most // 2]))

    def stems(self) -> Counter:
        """How often each string occurs as a word or after the article."""
        if self._stems is None:
            self._stems = Counter(self.counts)
            for word, n in self.counts.items():
                found = _AFTER_ARTICLE.match(word)
                if found:
                    self._stems[word[found.end() :]] += n
        return self._stems


def count_words(text: str) -> Counter:
    """{word with folded letters and without marks: how often it occurs} of a normalised text."""
    counts = Counter()
    for word, n in Counter(_RUN.findall(text)).items():
        if "+" not in word and (bare := without_marks(word)):
            counts[bare.translate(_FOLD)] += n
    return counts


# ---------------------------------------------------------------------------------- tables

# words that are not cut, though they look as if they had an affix
_WHOLE = (
    "hy hw mn fy qd mA lA lm kAn An tm En hm hmA kl Aw A* A*A lmA ln lw mE bEd qbl Ely Aly"
    " *lk tlk h*A h*h h&lA' Alty Al*y Al*yn lkn kmA k*lk byn Hyv End gyr mn* vm Allh $bh wjh fqT"
    " Alf wAl AlA"
).split()
# words and prepositions that take a pronoun
_TAKE_PRONOUNS = "l b mn En fy Aly Ely An lkn byn End mE ldy bEd qbl Hwl bED kl".split()
_PRONOUNS = "h hA hm hmA nA k km y".split()
_NO_PRONOUN = {("l", "y"), ("b", "y"), ("kl", "y")}  # these are other words
_AFTER_F = "An qd hw hy mn fy kAn lA lm".split()


def _function_words() -> dict[str, str]:
    """{folded word: its segments} of the words that the rules do not decide."""
    table = {
        base + pronoun: f"{base}+{pronoun}"
        for base in _TAKE_PRONOUNS
        for pronoun in _PRONOUNS
        if (base, pronoun) not in _NO_PRONOUN
    }
    table |= {word: word for word in _WHOLE}
    for word, segments in list(table.items()):
        table.setdefault("w" + word, f"w+{segments}")
    for word in _AFTER_F:
        table.setdefault("f" + word, f"f+{word}")
    table |= {"kAnt": "kAn+t", "wkAnt": "w+kAn+t", "AyDA": "AyD+A"}
    table.setdefault("lAn", "l+An")
    table.setdefault("bAn", "b+An")
    return {to_arabic(word): to_arabic(segments) for word, segments in table.items()}


_FUNCTION_WORDS = _function_words()
_NEVER_SUFFIXED = frozenset(map(to_arabic, ("Allh", "Aly")))
_TAKES_SUFFIX = frozenset(map(to_arabic, "mn En fy Aly Ely l b An lkn kAn".split()))
_W, _F, _L, _B, _K, _S = map(to_arabic, "wflbks")
_ALEF, _HEH, _TEH = map(to_arabic, "Aht")
_YEH_ALEF, _YEH_HEH = map(to_arabic, ("yA", "yh"))
_AT, _AN, _WA = map(to_arabic, ("At", "An", "wA"))
_PRONOUN_SUFFIXES = tuple(map(to_arabic, ("hmA", "hA", "hm", "nA")))
_LL_SEGMENTED = to_arabic(r"\1l+Al+")
_LL_CUT = to_arabic(r"\1l+l+")
_LL_SPELT = to_arabic(r"\1ll")
_PLURAL_SUFFIXES = tuple(map(to_arabic, ("wn", "yn")))
_IMPERFECT = tuple(map(to_arabic, "ytn"))
# how much more often than the whole word the rest must occur
_MARGIN = {_L: 1.0, _B: 1.0, _K: 4.0}


# ---------------------------------------------------------------------------------- rules


class RulesSegmenter:
    """Segments by affix rules and a word list; 250,000 words/s and more on one core (news)."""

    def __init__(self, words: WordList):
        self._stems = words.stems()
        self._words = words.counts
        self._of_run = {}

    def segment(self, line: str) -> str:
        """A normalised line with `+` between the segments of its words, without diacritics."""
        return without_marks(_RUN.sub(self._segment_run, line))

    def _segment_run(self, found: re.Match) -> str:
        run = found[0]
        segments = self._of_run.get(run)
        if segments is None:
            if len(self._of_run) >= MAX_REMEMBERED:
                self._of_run.clear()
            segments = self._of_run[run] = self._segments(run)
        return segments

    def _segments(self, run: str) -> str:
        bare = without_marks(run)
        if "+" in bare:
            return keep_whole(bare)
        segments = self.segment_word(bare, FATHATAN in run)
        return segments if desegment(segments) == bare else bare

    def segment_word(self, bare: str, has_fathatan: bool) -> str:
        """A word of Arabic letters with + between its segments."""
        folded = bare.translate(_FOLD)
        segments = _FUNCTION_WORDS.get(folded)
        if segments is None:
            segments = self._by_rule(folded, has_fathatan)
        return _cut_like(segments, bare)

    def _known(self, stem: str) -> int:
        """How often a string occurs as a stem: by itself or with teh marbuta."""
        return self._stems[stem] + self._stems[stem + _HEH]

    def _by_rule(self, word: str, has_fathatan: bool) -> str:
        prefixes, stem, has_article = self._cut_prefixes(word)
        suffixes = []
        if stem not in _NEVER_SUFFIXED:
            stem, suffixes = self._cut_suffixes(stem, has_article, has_fathatan)
        return "+".join([*prefixes, stem, *suffixes])

    def _cut_prefixes(self, word: str) -> tuple[list[str], str, bool]:
        """(prefixes, rest, whether the article is among them)."""
        if found := _ARTICLE.match(word):
            return [part for part in found.groups() if part], word[found.end() :], True
        prefixes = []
        stem = word
        if len(stem) >= 4 and self._begins_with_conjunction(stem):
            prefixes.append(stem[0])
            stem = stem[1:]
        if len(stem) >= 4 and stem[0] in _MARGIN:
            n_rest = self._known(stem[1:])
            if n_rest > 1 and n_rest > _MARGIN[stem[0]] * self._stems[stem]:
                prefixes.append(stem[0])
                stem = stem[1:]
        will = len(stem) >= 4 and stem[0] == _S and stem[1] in _IMPERFECT
        if will and self._words[stem[1:]] > self._words[stem]:
            prefixes.append(stem[0])
            stem = stem[1:]
        return prefixes, stem, False

    def _begins_with_conjunction(self, word: str) -> bool:
        n_rest = self._known(word[1:])
        if word[0] == _W:
            return n_rest > 0 or self._stems[word] < 8
        return word[0] == _F and n_rest > 20 * self._stems[word]

    def _cut_suffixes(self, stem: str, has_article: bool, has_fathatan: bool) -> tuple[str, list]:
        """(stem, suffixes)."""
        if has_fathatan and stem.endswith(_ALEF) and len(stem) >= 3:
            shorter, suffixes = self._cut_suffixes(stem[:-1], has_article, False)
            return shorter, [*suffixes, _ALEF]
        if stem.endswith(_YEH_ALEF):  # asyA, swryA
            return stem, []
        if not has_article and (cut := self._cut_pronoun(stem)):
            return cut
        return self._cut_ending(stem, has_article)

    def _cut_pronoun(self, stem: str) -> tuple[str, list] | None:
        for pronoun in _PRONOUN_SUFFIXES:
            noun = stem.removesuffix(pronoun)
            if noun == stem or len(noun) < 2:
                continue
            if noun.endswith(_AT) and len(noun) >= 5:
                return noun[:-2], [_AT, pronoun]
            if noun.endswith(_TEH) and len(noun) >= 4 and self._stems[noun[:-1] + _HEH]:
                return noun[:-1], [_TEH, pronoun]  # teh marbuta is written teh before a suffix
            if self._known(noun) > 0.3 * self._stems[stem] or noun in _TAKES_SUFFIX:
                return noun, [pronoun]
        return None

    def _cut_ending(self, stem: str, has_article: bool) -> tuple[str, list]:
        n = len(stem)
        if stem.endswith(_AT) and n >= 5:
            return stem[:-2], [_AT]
        if stem.endswith(_PLURAL_SUFFIXES) and n >= 5 and self._known(stem[:-2]):
            return stem[:-2], [stem[-2:]]
        if stem.endswith(_AN) and n >= 6 and self._known(stem[:-2]) > 2:
            return stem[:-2], [_AN]
        if stem.endswith(_WA) and n >= 4:
            return stem[:-2], [_WA]
        if stem.endswith(_HEH) and n >= 3:
            if stem.endswith(_AT + _HEH) and n >= 5:
                return stem[:-3], [_AT, _HEH]
            is_his = stem.endswith(_TEH + _HEH) and n >= 5 and not has_article
            if is_his and self._stems[stem[:-2] + _HEH]:
                return stem[:-2], [_TEH, _HEH]
            return stem[:-1], [_HEH]
        if has_article or n < 4:
            return stem, []
        n_whole = self._stems[stem]
        n_shorter = self._stems[stem[:-1]]
        is_alef = stem.endswith(_ALEF) and self._known(stem[:-1]) >= 3
        if is_alef and n_shorter > 0.3 * n_whole:
            return stem[:-1], [_ALEF]
        if stem.endswith(_TEH) and n_shorter > 0.5 * n_whole:
            return stem[:-1], [_TEH]
        return stem, []


# ---------------------------------------------------------------------------------- Farasa


class Farasa:
    """
    Segments by a Farasa jar that the user has: `java -jar JAR`, a line in, a line out.

    Only the cuts are taken from its output, which unifies letters and moves blanks. A process that
    ends, prints something else or takes more than timeout_s seconds for a line is started again;
    if that line fails again, it stays as it is, and n_failed counts it. Raises FileNotFoundError
    without Java or the jar, ValueError if MOST_FAILURES lines fail one after another.
    """

    MOST_FAILURES = 3

    def __init__(self, jar, java: str = "java", timeout_s: float = 60):
        program = shutil.which(java)
        if program is None:
            what = f"--segmenter farasa: needs Java, there is no program {java!r}"
            fix = "apt install default-jre-headless, or name it by --java"
            raise FileNotFoundError(f"{what}; {fix}")
        if not Path(jar).is_file():
            raise FileNotFoundError(f"--farasa_jar: {jar}: no such file")
        self.jar = jar
        self.command = [program, "-Dfile.encoding=UTF-8", "-jar", str(jar)]
        self.timeout_s = timeout_s
        self.n_failed = 0
        self._n_failed_in_a_row = 0
        self._process = None
        self._stderr = None  # file that the process writes to
        self._complaint = ""  # its beginning, of the last process that was ended

    def segment(self, line: str) -> str:
        """A normalised line with `+` between the segments of its words, without diacritics."""
        if not _LETTER.search(line):  # Farasa prints nothing for an empty line
            return uncut(line)
        for _ in range(2):
            segmented = _with_cuts_of(self._answer(line), line)
            if segmented is not None:
                self._n_failed_in_a_row = 0
                return segmented
            self.close()
        self.n_failed += 1
        self._n_failed_in_a_row += 1
        if self._n_failed_in_a_row >= self.MOST_FAILURES:
            why = one_line(self._complaint, 150)
            what = f"{self.jar}: gave no segments for {self.MOST_FAILURES} lines, one after another"
            raise ValueError(f"--farasa_jar: {what}{f' ({why})' if why else ''}; try it by hand")
        return uncut(line)

    def _answer(self, line: str) -> str:
        """What the jar prints for a line; "" if it ends or takes too long."""
        if self._process is None:
            pipe = subprocess.PIPE
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it
            self._process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=self._stderr
            )
        process = self._process
        alarm = threading.Timer(self.timeout_s, process.kill)
        alarm.start()
        try:
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
            return process.stdout.readline().decode("utf-8", "replace")
        except OSError:  # it has ended
            return ""
        finally:
            alarm.cancel()

    def close(self) -> None:
        """End the process; segment() starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._process.stdout.close()
        with contextlib.suppress(OSError):  # what it did not read cannot be flushed
            self._process.stdin.close()
        self._process.wait()
        self._process = None
        with self._stderr:
            self._stderr.seek(0)
            self._complaint = self._stderr.read(4000).decode(errors="replace")


MAX_SKIPPED = 5  # words of the output, to find the one that belongs to a word of the line


def _with_cuts_of(answer: str, line: str) -> str | None:
    """The line with the cuts that another program made in its words; None if no word is in both."""
    found = [run.strip("+") for run in _SEGMENTED_RUN.findall(without_marks(answer))]
    spelt = [desegment(run).translate(_FOLD) for run in found]
    at = n_found = 0

    def cut(match: re.Match) -> str:
        nonlocal at, n_found
        bare = without_marks(match[0])
        if "+" in bare or not bare:
            return keep_whole(bare)
        folded = bare.translate(_FOLD)
        for i in range(at, min(at + MAX_SKIPPED, len(spelt))):
            if spelt[i] == folded:
                at = i + 1
                n_found += 1
                segments = _cut_like(found[i], bare)
                return segments if desegment(segments) == bare else bare
        return bare

    segmented = without_marks(_RUN.sub(cut, line))
    return segmented if n_found else None


def uncut(line: str) -> str:
    """A line whose words are not cut."""
    return without_marks(_RUN.sub(lambda run: keep_whole(without_marks(run[0])), line))


# ---------------------------------------------------------------------------------- both ways


def _cut_like(segments: str, word: str) -> str:
    """The word with a + wherever `segments`, the same word in folded letters, has one."""
    parts = []
    start = 0
    for segment in _SEGMENTED_LL.sub(_LL_CUT, segments).split("+"):
        parts.append(word[start : start + len(segment)])
        start += len(segment)
    return _SPELT_LL.sub(_LL_SEGMENTED, "+".join(parts))


def keep_whole(run: str) -> str:
    """A run of letters and + as it must be in segmented text, so that desegment() returns it."""
    return run.replace("+", _ESCAPED) if _JOINED.search(run) else run


def desegment(line: str) -> str:
    """The text of a segmented line: a + between letters is removed."""
    return _MARKED_RUN.sub(_join, line)


def _join(found: re.Match) -> str:
    run = found[0]
    if WORD_JOINER in run:
        return run.replace(WORD_JOINER, "")
    return _JOINED.sub("", _SEGMENTED_LL.sub(_LL_SPELT, run))

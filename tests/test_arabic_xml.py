"""Texts of XML files and Wikipedia's markup: recipes/arabic_bert/xml_text.py."""

import html
import io
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT, shared

from recipes.arabic_bert import xml_text
from recipes.arabic_bert.arabic_text import to_arabic
from recipes.arabic_bert.xml_text import (
    XmlTexts,
    encoding_of,
    is_redirect,
    open_text,
    without_markup,
)

WIKI = "data/arabic/xml_wikipedia/arwiki-sample-pages-articles"
FILES = {  # file -> articles in it
    "data/arabic/xml_abuelkhair/Alittihad_utf_8_hf_dummy.xml": 1,
    "data/arabic/xml_abuelkhair/Alyaum_utf_8.xml": 200,
    "data/arabic/xml_abuelkhair/Okaz_windows_1256.xml": 100,
    "data/arabic/xml_abuelkhair/Ryiadh_utf_8_misspelled.xml": 100,
    "data/arabic/xml_abuelkhair/Sabanews_utf_8_hf_dummy.xml": 1,
    f"{WIKI}.xml": 121,
    f"{WIKI}-multistream.xml.bz2": 60,
}


def texts_of(path):
    with open_text(path) as (file, head):
        return list(XmlTexts(file, encoding_of(head)[0]))


def scan(document: str, encoding="utf-8"):
    texts = XmlTexts(io.BytesIO(document.encode(encoding)), encoding)
    return list(texts), texts


@pytest.mark.parametrize("name", FILES)
def test_every_article_of_the_shared_files_is_read(name):
    path = shared(name)
    with open_text(path) as (file, head):
        encoding = encoding_of(head)[0]
        whole = file.read().decode(encoding, "replace")
    reference = re.findall(r"<text\b[^>]*>(.*?)</text>", whole, re.IGNORECASE | re.DOTALL)
    texts = texts_of(path)
    assert len(texts) == FILES[name]
    assert texts == [html.unescape(text) for text in reference]
    assert not any("\ufffd" in text for text in texts)


def test_a_well_formed_dump_reads_as_in_an_xml_parser():
    tree = ElementTree.parse(shared(f"{WIKI}.xml"))
    expected = [e.text or "" for e in tree.iter() if e.tag.endswith("}text")]
    assert texts_of(shared(f"{WIKI}.xml")) == expected


@pytest.mark.parametrize("chunk", (1, 7, 100))
def test_the_size_of_the_pieces_read_does_not_matter(chunk, monkeypatch):
    document = '<ns>0</ns><text a="1">x &amp; y</text><b><TEXT/><Text>z</Text ><ns> 10 </ns><text>'
    document += to_arabic("mdynp") + "</text><text bytes='0' /><text>open<text>inner</text><text>"
    whole, facts = scan(document)
    assert whole == ["x & y", "", "z", to_arabic("mdynp"), "", "inner"]
    assert (facts.n_articles, facts.n_unfinished, facts.n_too_long) == (8, 2, 0)
    monkeypatch.setattr(xml_text, "CHUNK", chunk)
    pieces, facts = scan(document)
    assert pieces == whole
    assert (facts.n_articles, facts.n_unfinished, facts.n_too_long) == (8, 2, 0)


def test_namespaces_tell_articles_from_templates(monkeypatch):
    monkeypatch.setattr(xml_text, "CHUNK", 5)
    document = "<ns>0</ns><text>a</text><ns>10</ns><text>b</text><text>c</text><ns>-1</ns><text>d"
    texts = XmlTexts(io.BytesIO((document + "</text>").encode()), "utf-8")
    assert [(text, texts.namespace) for text in texts] == list(
        zip("abcd", (0, 10, None, -1), strict=True)
    )


def test_a_text_without_end_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(xml_text, "CHUNK", 1000)
    monkeypatch.setattr(xml_text, "MAX_TEXT_CHARS", 20_000)
    texts, facts = scan("<text>" + "a" * 30_000 + "</text><text>b</text><text>" + "c" * 90_000)
    assert texts == ["b"]
    assert (facts.n_articles, facts.n_unfinished, facts.n_too_long) == (3, 1, 1)


def test_cdata_and_other_tags():
    assert scan("<text><![CDATA[a & <b>]]></text><textarea>n</textarea>")[0] == ["a & <b>"]
    assert scan("no element")[0] == []


ARABIC = to_arabic("Almdynp fy AlHrb")


@pytest.mark.parametrize(
    "declared, actual, is_wrong",
    (
        (None, "utf-8", False),
        (None, "cp1256", False),
        (None, "utf-16", False),
        (None, "utf-8-sig", False),
        ("UTF-8", "utf-8", False),
        ("windows-1256", "cp1256", False),
        ("utf-8", "cp1256", True),
        ("windows-1256", "utf-8", True),
        ("no-such", "utf-8", True),
        ("hex", "cp1256", True),
        ("iso-8859-6", "iso-8859-6", False),
    ),
)
def test_encodings(declared, actual, is_wrong):
    xml = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    data = f"{xml}<text>{ARABIC}</text>".encode(actual)
    encoding, problem = encoding_of(data)
    assert data.decode(encoding).endswith(f"<text>{ARABIC}</text>")
    assert (problem is not None) == is_wrong
    assert list(XmlTexts(io.BytesIO(data), encoding)) == [ARABIC]


def test_one_bad_byte_does_not_change_the_encoding():
    data = f"<text>{ARABIC}</text>".encode()
    assert encoding_of(data[:-9] + b"\x1a\xff" + data[-9:])[0] == "utf-8"
    assert encoding_of(data[:7]) == ("utf-8", None)  # ends inside a character
    assert encoding_of(b"") == ("utf-8", None)


@pytest.mark.parametrize(
    "markup, text",
    (
        ("'''a''' ''b'' [[c]] [[d|e]] [[:f]]", "a b c e f"),
        ("x{{n|{{m|[[a]]}}|b}}y", "xy"),
        ("a\n{| class=x\n| {{t}} || [[b]]\n|}\nc", "a\n\nc"),
        ("[[File:a.jpg|thumb|with [[b|c]] in]]d", "d"),
        (f"[[{to_arabic('mlf')}:a.jpg|b]][[{to_arabic('tSnyf')}:c]][[fr:x]]d", "d"),
        ("a<ref name=b>c</ref>d<ref name=b/>e", "ade"),
        ("a<ref>b<ref>c</ref>d", "ad"),
        ("a</ref>b<ref>c", "abc"),
        ("== H ==\n* one\n## two\n: three\n----\nfour", "H\none\ntwo\nthree\n\nfour"),
        ("[http://a.b c d] [http://a.b] http://x.y/z e", "c d   e"),
        ("a<!-- b -->c<br/>d<math>\\x</math>e&nbsp;f", "acde\u00a0f"),
        ("__TOC__a_b__c", "a_b__c"),
        ("a}}b]]c|}d", "abcd"),
        ("a{{b[[c", "abc"),
        ("{{a|b|}}c", "c"),
        ("plain 5+1", "plain 5+1"),
    ),
)
def test_markup(markup, text):
    assert without_markup(markup) == text


def test_plain_articles_stay_as_they_are():
    for text in texts_of(shared(f"{WIKI}.xml"))[:50]:
        if not re.search(r"[\[{<]|''|^[*#:;= ]|&", text, re.MULTILINE):
            assert without_markup(text) == text.strip()


def test_redirects():
    assert is_redirect("#REDIRECT [[a]]")
    assert is_redirect(f"#{to_arabic('tHwyl')} [[a]]")
    assert not is_redirect("a #redirect")


@pytest.mark.parametrize(
    "part", ("[[", "]]", "{{", "}}", "<ref>", "</ref>", "<!--", "{|", "[http://")
)
def test_odd_brackets_take_no_quadratic_time(part):
    start = time.process_time()
    without_markup(part * 30_000)
    without_markup((part + "a ") * 30_000 + "]]}}" * 10_000)
    assert time.process_time() - start < 5


SCAN = """
import sys
from recipes.arabic_bert.xml_text import XmlTexts, encoding_of, open_text
with open_text(sys.argv[1]) as (file, head):
    texts = XmlTexts(file, encoding_of(head)[0])
    n = sum(1 for text in texts)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(n, texts.n_articles, int(peak.split()[1]) * 1024)
"""


def test_200_mb_of_xml_take_at_most_60_mb_of_memory(tmp_path):
    dump = shared(f"{WIKI}.xml").read_bytes()
    first, last = dump.index(b"<page>"), dump.rindex(b"</page>") + len(b"</page>")
    n = 200_000_000 // (last - first) + 1
    with open(tmp_path / "big.xml", "wb") as f:
        f.write(dump[:first])
        for _ in range(n):
            f.write(dump[first:last])
        f.write(dump[last:])
    command = [sys.executable, "-c", SCAN, str(tmp_path / "big.xml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    n_read, n_articles, n_bytes = map(int, result.stdout.split())
    assert n_read == n_articles == n * 121
    assert n_bytes <= 60e6

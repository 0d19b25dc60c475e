"""q's comments, strings, brackets and functions; what describes a file; names of licences."""

import json
import random
import re
import time

import pytest
from conftest import shared

from recipes.q_lora.licences import PERMISSIVE, permissive, read_licences
from recipes.q_lora.q_code import (
    TOKENS,
    describe,
    describes,
    function_names,
    is_balanced,
    leading_comment,
    without_comments,
)


def real_texts() -> list[str]:
    """The different texts of the real files."""
    lines = shared("data/q_code/q_files.jsonl").read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(json.loads(line)["text"] for line in lines))


BALANCED = {
    "nothing": "",
    "all kinds, nested": "f:{[x;y] (x+y)*z[0;(1;2)]}",
    "over lines": "f:{\n  x+1\n  }\n",
    "in a string": 'a:"((("',
    "an escaped quote": 'a:"\\"(";b:"\\\\"',
    "a string over lines": 'a:"one (\n two ]"\n',
    "a line of comment": "/ it's ( here\na:1",
    "a comment after code": 'a:1 / not [ here, nor "\nb:2',
    "a comment after a tab": "a:1\t/ not [ here",
    "a block": '/\n ( [ {\n "\n\\\na:1',
    "a block with blanks and CR": "/ \r\n (\r\n\\\t\r\na:1",
    "a block to the end": "a:1\n/\n(((",
    "a block in a block's first line only": "/\n/ (\n\\\na:(1;2)",
    "all after a lone backslash": 'a:1\n\\\n(((\n"',
    "a backslash command": "\\d .a\nf:{x}",
    "a slash that is an adverb": "(+/)1 2 3",
    "python of embedPy": "p)print('(:')\n  x = '['\na:1",
    "k": "k)f:{x}\nq)g:(1;2)",
    "a shebang": "#!/usr/bin/env q (\na:1",
}
UNBALANCED = {
    "open": "f:{x",
    "closed twice": "f:{x}}",
    "crossed": "f:{(x})",
    "closed first": ")(",
    "an open string": 'a:"abc\nb:1',
    "a string that ends in an escaped quote": 'a:"abc\\"',
    "after a block": "/\n\\\n(",
    "after an adverb, which is no comment": "a:(+/[1;2]",
    "a slash inside of a string is no comment": 'a:("a / b";1',
    "an indented slash opens no block": " /\n(",
    "in a line of k": "k)f:{x",
    "behind python": "p)x\n y\nf:{",
    "a quote in a comment opens no string": 'a:1 / "\n(',
}


@pytest.mark.parametrize("name", BALANCED)
def test_brackets_are_paired(name):
    assert is_balanced(BALANCED[name])


@pytest.mark.parametrize("name", UNBALANCED)
def test_brackets_are_not_paired(name):
    assert not is_balanced(UNBALANCED[name])


def test_every_real_file_is_balanced_and_without_any_one_of_its_brackets_it_is_not():
    """By counting brackets, 28 of them would be dropped."""
    rng, n_counted = random.Random(0), 0
    for text in real_texts():
        assert is_balanced(text), text[:300]
        n_counted += any(text.count(a) != text.count(b) for a, b in ("()", "[]", "{}"))
        places = [token.start() for token in TOKENS.finditer(text) if token["bracket"]]
        for place in rng.sample(places, min(len(places), 3)):
            assert not is_balanced(text[:place] + text[place + 1 :])
    assert n_counted == 28


@pytest.mark.parametrize(
    "piece", ["/\n", "/", '"', "\\\n", "/ a\n\n", "f:{", " /", "\n", "p)x\n y\n", '"\\"', "a.b:"]
)
def test_the_time_does_not_grow_with_the_square_of_a_text(piece):
    text = piece * (300_000 // len(piece)) + "x"
    started = time.monotonic()
    is_balanced(text)
    describe({"path": "a.q", "text": text})
    assert time.monotonic() - started < 3


def test_comments_are_left_out_and_strings_stay():
    text = 'a:"x / y" / no\n/ no\n/\nno\n\\\nb:1\n\\\nno'
    assert without_comments(text).split() == ['a:"x', "/", 'y"', "b:1"]


def test_functions_are_named_in_order_and_once():
    text = """
f:{x}
g: {[a]
  h:{a};
  }
.ns.i.add:{[x;y] x+y}
/ no:{x}
/
no:{x}
\\
k)l::{x}
f:{y}
v:1
w:(1;{x})
s:"
no:{x}"
"""
    assert function_names(text) == ["f", "g", ".ns.i.add", "l"]


LEADING = {
    "none": ("a:1\n/ later\n", ""),
    "only blank lines": ("\n\na:1", ""),
    "lines": ("/ one\n// two\n\na:1", "/ one\n// two\n\n"),
    "lines right above the code": ("/ one\n/ two\na:1", "/ one\n/ two\n"),
    "the last paragraph is of the code": ("/ one\n\n/ of a\na:1", "/ one\n\n"),
    "the last paragraph is not of the code": ("/ one\n\n/ two\n\na:1", "/ one\n\n/ two\n\n"),
    "a block with a blank line in it": ("/\none\n\ntwo\n\\\na:1", "/\none\n\ntwo\n\\\n"),
    "a block and lines": ("/\none\n\\\n\n/ of a\na:1", "/\none\n\\\n\n"),
    "blank lines above": ("\n\n/ one\na:1", "\n\n/ one\n"),
    "line ends of Windows": ("/ one\r\n\r\n/ of a\r\na:1", "/ one\r\n\r\n"),
    "after a shebang": ("#!/usr/bin/env q\n/ one\na:1", "#!/usr/bin/env q\n/ one\n"),
    "an adverb is none": ("/:x\na:1", "/:x\n"),
}


@pytest.mark.parametrize("name", LEADING)
def test_the_leading_comment(name):
    text, comment = LEADING[name]
    assert leading_comment(text) == comment


NOTICES = {
    "copyright": "// Copyright (c) 2021 Kx Systems Inc\n",
    "name and copyright": "// Logging\n// Copyright (c) 2015 Someone Ltd, all rights reserved\n",
    "spdx": "/ SPDX-License-Identifier: MIT\n",
    "MIT": """/ The MIT License
/ Copyright 2020 Jane Doe
//
/ Permission is hereby granted, free of charge, to any person obtaining a copy of this software
/ and associated documentation files, to deal in the Software without restriction.
//
/ The above copyright notice and this permission notice shall be included in all copies or
/ substantial portions of the Software.
//
/ THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED.
""",
    "Apache": """// Copyright 2020 Jane Doe
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
""",
    "GPL, in a block": """/
This program is free software: you can redistribute it and/or modify
it under the terms of the GNU General Public License.

This program is distributed in the hope that it will be useful,
but WITHOUT ANY WARRANTY; without even the implied warranty of
MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE.

You should have received a copy of the GNU General Public License
along with this program.
\\
""",
    "BSD": """/ Redistribution and use in source and binary forms are permitted provided that:
/ 1. Redistributions of source code must retain the above copyright notice.
//
/ Neither the name of the author nor the names of its contributors may be used.
""",
}


@pytest.mark.parametrize("name", NOTICES)
def test_a_licence_alone_describes_nothing(name):
    notice = NOTICES[name]
    assert not describes(notice)
    text = notice + "\nf:{x}\n"
    assert describe({"path": "src/a.q", "text": text}) == ("/ src/a.q: f\n", text)
    described = f"// Reads and writes tables\n//\n{notice}\nf:{{x}}\n"
    if not notice.startswith("/\n"):
        prompt, completion = describe({"path": "src/a.q", "text": described})
        assert completion == "f:{x}\n" and prompt + completion == described


def test_a_slash_alone_opens_a_block_also_between_lines_of_comment():
    assert not without_comments("/ one\n/\n/ two\nf:{x}\n").strip()


def test_a_file_without_a_comment_is_described_by_path_and_functions():
    assert describe({"path": "a.q", "text": "f:{x}\ng:{y}"}) == ("/ a.q: f, g\n", "f:{x}\ng:{y}")
    assert describe({"path": "a.q", "text": "x:1"}) == ("/ a.q\n", "x:1")
    assert describe({"path": None, "text": "f:{x}"}) == ("/ f\n", "f:{x}")
    assert describe({"path": "a\nb.q", "text": "x:1"}) == ("/ a b.q\n", "x:1")
    assert describe({"path": None, "text": "x:1"}) is None


def test_what_has_no_code_is_not_described():
    for text in (
        "/ only a comment",
        "/ one two\n\n",
        "/\nblock\n",
        "#!/usr/bin/q\n/ a b\n",
        "\\\nx",
    ):
        assert describe({"path": "a.q", "text": text}) is None


def test_prompt_and_completion_of_real_files_are_the_file():
    kinds = {"comment": 0, "names": 0}
    for text in real_texts():
        prompt, completion = describe({"path": "dir/a.q", "text": text})
        assert prompt.endswith("\n") and completion.strip() and not without_comments(prompt).strip()
        if prompt + completion == text:
            kinds["comment"] += 1
        else:
            assert completion == text and re.match(r"/ dir/a\.q(: [\w., ]+)?\n\Z", prompt)
            kinds["names"] += 1
    assert kinds["comment"] == 380 and kinds["names"] == 180


@pytest.mark.parametrize(
    ("written", "name"),
    [
        *[(name, name) for name in PERMISSIVE],
        ("mit license", "MIT"),
        ("The MIT Licence", "MIT"),
        ("Apache License 2.0", "Apache-2.0"),
        ("Apache License, Version 2.0", "Apache-2.0"),
        ("apache-2.0", "Apache-2.0"),
        ("BSD 3-Clause", "BSD-3-Clause"),
        ('BSD 2-Clause "Simplified" License', "BSD-2-Clause"),
        ('BSD 3-Clause "New" or "Revised" License', "BSD-3-Clause"),
        ("BSD Zero Clause License", "0BSD"),
        ("Creative Commons Zero v1.0 Universal", "CC0-1.0"),
        ("Boost Software License 1.0", "BSL-1.0"),
        ("The Unlicense", "Unlicense"),
        ("zlib License", "Zlib"),
        ("MIT OR GPL-3.0", "MIT"),
        ("(MIT OR Apache-2.0)", "MIT OR Apache-2.0"),
        ("MIT AND Apache-2.0", "MIT AND Apache-2.0"),
        ("MIT AND GPL-2.0", None),
        ("GPL-3.0", None),
        ("LGPL-2.1", None),
        ("BSL-1.1", None),  # the Business Source License
        ("BUSL-1.1", None),
        ("CC-BY-NC-4.0", None),
        ("MIT-0", None),
        ("see LICENSES", None),
        ("license", None),
        ("unknown", None),
        ("", None),
        (None, None),
    ],
)
def test_permissive_licences_by_their_spdx_name(written, name):
    assert permissive(written) == name


def test_licences_of_repositories_are_read_from_lines_or_json(tmp_path):
    file = tmp_path / "licences"
    expected = {"a/b": "MIT", "c/d": "Apache License 2.0"}
    for text in (
        "a/b MIT\nc/d   Apache License 2.0\n",
        "# of us\n\na/b: MIT  # ours\r\nc/d: Apache License 2.0",
        '{"a/b": "MIT", "c/d": "Apache License 2.0"}',
        "\ufeffa/b=MIT\nc/d,Apache License 2.0\na/b MIT",
    ):
        file.write_bytes(text.encode())
        assert read_licences(file) == expected


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a/b\n", "'a/b' has no licence"),
        (b"a/b MIT\na/b ISC\n", "a/b has two licences"),
        (b"\n# none\n", "is empty"),
        (b'{"a/b": 1}', "'a/b' has no licence"),
        (b'{"a/b": "MIT"', "not readable"),
        (b"\xff\xfe\x00", "not readable"),
        (b"{" * 9 + b'"a":' * 5, "not readable"),
    ],
)
def test_a_wrong_file_of_licences_is_one_line(tmp_path, data, words):
    (tmp_path / "licences").write_bytes(data)
    with pytest.raises(ValueError, match="--licenses: ") as e:
        read_licences(tmp_path / "licences")
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_file_of_licences_that_is_missing_or_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="--licenses: .* does not exist"):
        read_licences(tmp_path / "none")
    with pytest.raises(ValueError, match="--licenses: .* is not a file"):
        read_licences(tmp_path)

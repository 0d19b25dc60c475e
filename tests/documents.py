"""README.md and docs/*.md, taken apart: sections, code blocks, commands. For the tests of them."""

import re

from conftest import ROOT

DOCS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
# After a command, or in the comment above it: it does not run here as it stands.
MARK = re.compile(r"# .*?\bneeds (GPUs|a GPU|the network)")


def sections(text: str) -> dict[str, str]:
    """Heading -> text below it, for each heading of a document."""
    # a comment in a code block is not a heading
    text = re.sub(r"(?ms)^```.*?^```", lambda block: block[0].replace("\n#", "\n\0"), text)
    parts = re.split(r"^##? (.*)\n", text, flags=re.MULTILINE)[1:]
    bodies = [body.replace("\n\0", "\n#") for body in parts[1::2]]
    return dict(zip(parts[::2], bodies, strict=True))


def blocks(text: str, kind: str) -> list[str]:
    """The code blocks of one language; "" is the blocks without one."""
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, str | None]]:
    """
    (command, what it needs that is not here) of each line of the bash blocks, and of any block
    without a language that has commands.
    """
    starts = re.compile(r"^(python|pip|torchrun|marimo) ", re.MULTILINE)
    others = [block for block in blocks(text, "") if starts.search(block)]
    found, above = [], None
    for line in "\n".join(blocks(text, "bash") + others).splitlines():
        mark = MARK.search(line)
        if line.startswith("#"):
            above = mark
        elif line.strip():
            mark = mark or above
            found.append((line.split("  #")[0].strip(), mark and mark[1]))
            above = None
    return found


# "README.md: More" -> the text of that section
PARTS = {
    f"{name}: {heading}": body
    for name, text in DOCS.items()
    for heading, body in sections(text).items()
}

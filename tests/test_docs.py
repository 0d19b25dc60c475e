"""Every flag, command, message and link target that README.md and docs/ name exists."""

import ast
import re
import shlex

import pytest
import yaml
from conftest import ROOT
from documents import DOCS, blocks

import gpt_train
import prep_dataset
import pretraining_advanced
import pretraining_simple
import wt_load

CONFIGS = [
    gpt_train.SampleConfig,
    pretraining_simple.SimpleConfig,
    pretraining_advanced.TrainConfig,
    *prep_dataset.COMMANDS.values(),
    *(config for config, _ in wt_load.COMMANDS.values()),
]
FIELDS = {field for config in CONFIGS for field in config.__dataclass_fields__}
FLAGS = FIELDS | {f"no_{field}" for field in FIELDS} | {"help"}
OF_OTHERS = {  # flag -> the program that has it
    "nproc_per_node": "torchrun",
    "nnodes": "torchrun",
    "master_port": "torchrun",
    "nightly": "tests/conftest.py",
    "all": "tests/conftest.py",
    "data": "benchmarks/tokenizing.py",
    "size": "benchmarks/load_weights.py",
    "index-url": "pip",
    "model": "lm_eval",
    "model_args": "lm_eval",
    "tasks": "lm_eval",
    "include_path": "lm_eval",
    "port": "marimo",
    "part": "benchmarks/llama_parts.py",
}


@pytest.mark.parametrize("name", DOCS)
def test_every_flag_is_one_of_a_script(name):
    flags = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", DOCS[name]))
    assert not flags - FLAGS - OF_OTHERS.keys()
    for flag in flags & OF_OTHERS.keys():
        if (file := ROOT / OF_OTHERS[flag]).is_file():
            assert f'"--{flag}"' in file.read_text(encoding="utf-8"), flag


@pytest.mark.parametrize("name", DOCS)
def test_a_command_inside_a_sentence_names_a_script_and_a_command_that_exist(name):
    of_project = {path.name for path in ROOT.rglob("*.py")}
    subcommands = {"prep_dataset.py": prep_dataset.COMMANDS, "wt_load.py": wt_load.COMMANDS}
    for span in re.findall(r"`((?:python )?[\w/]+\.py(?: [^`]*)?)`", DOCS[name]):
        script, *words = shlex.split(span.removeprefix("python "))
        in_page = f"# {script}\n" in DOCS[name]  # an example that the page has the code of
        assert (ROOT / script).exists() or script in of_project or in_page, span
        if words and words[0].isalpha() and script in subcommands:
            assert words[0] in subcommands[script], span


def texts_of_the_sources() -> list[str]:
    """Every string in the code; a value that is filled in is a character that no document has."""
    found = []
    for path in [*ROOT.glob("*.py"), *(ROOT / "parts").glob("*/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                found.append("".join(parts))
    return found


def test_every_message_in_the_first_column_of_troubleshooting_is_in_the_code():
    sources, n_long = texts_of_the_sources(), 0
    rows = re.findall(r"^\| (.*?) \|", DOCS["docs/troubleshooting.md"], flags=re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    for message in messages:
        for fragment in filter(None, (f.strip() for f in message.split("..."))):
            found = any(fragment in text for text in sources)
            assert found, f"{message!r}: nothing prints {fragment!r}"
            n_long += len(fragment) > 8
    assert n_long > 40


def anchors(path) -> set[str]:
    """The names of the headings of a Markdown file in links."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCS)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", DOCS[name]):
        if target.startswith("http"):
            continue
        file, _, place = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if place and path.suffix == ".md":
            assert place in anchors(path), target


def test_blocks_are_commands_code_a_yaml_file_or_output():
    for name, text in DOCS.items():
        fences = re.findall(r"^```(\w*)$", text, flags=re.MULTILINE)
        assert set(fences) <= {"bash", "python", "yaml", ""} and len(fences) % 2 == 0, name
        for block in blocks(text, "yaml"):
            assert isinstance(yaml.safe_load(block), dict)
        for block in blocks(text, "python"):
            # The first line names the file, so that the commands below the block can run it.
            assert re.match(r"# \w+\.py\n", block)
            assert max(map(len, block.splitlines())) <= 140 and block.isascii(), name

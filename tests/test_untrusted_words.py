"""Words of a file in a message: one line, cut where it is long, without a terminal's commands."""

import json
import shutil

import given_runs
import pytest
import torch
from conftest import run
from given_runs import refused, weights
from safetensors.torch import save_file
from weight_cases import calls, remanifest, text_op, zipped

from parts.base.text import one_line
from parts.cli.launch import error_line
from parts.data.tokenizers import Tokenizer, byte_tokenizer

home = given_runs.home

RED, TITLE, UP = "\x1b[31m", "\x1b]0;mine\x07", "\x1b[1A\x1b[2K"
EVIL = f"a{RED}b{TITLE}c{UP}d\x9be\u202ef\x08g\x00h"
SHOWN = r"a\x1b[31mb\x1b]0;mine\x07c\x1b[1A\x1b[2Kd\x9be\u202ef\x08g\x00h"


def harmless(line: str) -> bool:
    """Whether a terminal prints the line and does nothing else."""
    return line.isprintable()


def test_control_characters_are_shown_and_the_rest_stays():
    assert one_line(EVIL) == SHOWN
    assert one_line("two\n  lines\r\n and\ttabs\u2028") == "two lines and tabs"
    persian, emoji = "\u0645\u06cc\u200c\u0631\u0648\u0645", "\U0001f469\u200d\U0001f467"
    for text in ("C:\\x1b\\new", "na\u00efve", persian, emoji, ""):
        assert one_line(text) == text
    assert one_line("a lone \ud800") == r"a lone \ud800"


def test_a_cut_is_marked_and_never_inside_what_stands_for_a_character():
    for most in range(1, 40):
        cut = one_line("ab" + "\x1b" * 9, most)
        assert len(cut) <= most + 3
        assert cut == "ab" + r"\x1b" * 9 or cut in (
            "a...",
            *("ab" + r"\x1b" * n + "..." for n in range(9)),
        )
    assert one_line("x" * 10, 10) == "x" * 10 and one_line("x" * 11, 10) == "x" * 10 + "..."


def test_an_error_line_is_harmless_whatever_the_error_quotes():
    for e in (
        ValueError(EVIL),
        RuntimeError(f"x\n{EVIL}"),
        FileNotFoundError(2, f"No such file{RED}", f"{EVIL}.txt"),
        OSError(28, "No space left on device", EVIL),
    ):
        assert harmless(error_line(e)) and r"\x1b[31m" in error_line(e)


# ------------------------------------------------------------------------------------ in each file

PICKLES = {
    "class": b"}" + text_op("a") + calls(f"mod{RED}ule", f"cl{TITLE}ass", "x") + b"s.",
    "a long class": b"}" + text_op("a") + calls("m", "c" * 90 + RED + "d" * 999, "x") + b"s.",
    "blocked": b"}" + text_op("a") + calls("os", f"sys{UP}tem", "x") + b"s.",
    "plain": b"cgalore_torch.galore_projector\nGaLoreProjector\n)\x81.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_the_name_of_a_pickled_class(case, tmp_path):
    zipped(tmp_path / "a.pt", PICKLES[case])
    for command in ("info", "verify"):
        line = refused(weights, command, tmp_path / "a.pt")
        assert harmless(line) and "which is code and not a tensor" in line
        assert "weights_only" not in line, "torch's advice is to load it unsafely"
    if case == "plain":
        assert "(it asks for galore_torch.galore_projector.GaLoreProjector, which" in line
    if case == "class":
        assert r"mod\x1b[31mule.cl\x1b]0;mine\x07ass" in line


def test_names_of_tensors(tmp_path):
    named = {EVIL: torch.zeros(2), "wte.weight": torch.zeros(257, 8)}
    save_file(named, tmp_path / "a.safetensors")
    torch.save(named, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        line = refused(weights, "info", tmp_path / name, "--n_head", "2")
        assert harmless(line) and r"\x1b[31m" in line
    more = {**given_runs.GPT(given_runs.SHAPE).state_dict(), EVIL: torch.zeros(2)}
    torch.save(more, tmp_path / "b.pt")
    line = refused(weights, "info", tmp_path / "b.pt", "--n_head", "2")
    assert harmless(line) and "is not part of this model" in line


@pytest.mark.parametrize("key", ["model_type", "activation_function", "n_embd", "n_head"])
def test_words_of_a_configuration(key, home, tmp_path):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**settings, key: EVIL}), encoding="utf-8")
    assert harmless(refused(weights, "info", folder))


def test_words_of_a_tokenizer(tmp_path):
    spec = json.loads(byte_tokenizer().to_json())
    token = {**spec["added_tokens"][0], "content": EVIL}
    for change in (
        {"added_tokens": [token]},
        {"added_tokens": [{**token, "special": False}]},
        {"model": {**spec["model"], "type": EVIL}},
        {"decoder": {"type": EVIL}},
    ):
        (tmp_path / "t.json").write_text(json.dumps({**spec, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match="t.json") as e:
            Tokenizer.load(tmp_path / "t.json")
        assert harmless(error_line(e.value))


def test_what_a_checkpoint_says_about_itself(home, tmp_path):
    a = shutil.copytree(home / "a", tmp_path / "a")
    folder = a / "checkpoints/step_000003"
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    state |= {"script": EVIL, "kind": EVIL, "data": EVIL, "tokenizer": EVIL}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    remanifest(folder)
    (a / "run.json").write_text(json.dumps({"resume": f"rm {EVIL}"}), encoding="utf-8")
    for line in weights("info", a).splitlines():
        assert harmless(line), line
    # the warning about a damaged checkpoint, and the list
    manifest = json.loads((folder / "MANIFEST.json").read_text(encoding="utf-8"))
    manifest["files"][f"{EVIL}.txt".replace("\x00", "")] = {"bytes": 1, "sha256": "x"}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert harmless(weights("list", a).strip())
    result = run("wt_load.py", "info", a, cwd=tmp_path)
    assert result.returncode == 2 and "damaged" in result.stdout + result.stderr
    for line in (result.stdout + result.stderr).splitlines():
        assert harmless(line), line

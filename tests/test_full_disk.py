"""On a full disk a conversion says so, leaves nothing, and the same command works afterwards."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, one_error_line
from test_wt_load import as_run, gpt

LIMITED = """
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
COMMANDS = {
    "import": ("import", "a", "new/deep/run"),
    "average": ("average", "a", "a", "--out", "new/deep/run"),
    "hf": ("export", "a", "--to", "hf", "new/deep/out"),
    "gguf": ("export", "a", "--to", "gguf", "new/deep/out.gguf"),
    "nanogpt": ("export", "a", "--to", "nanogpt", "new/deep/out.pt"),
}


def convert(name: str, cwd, limit: int | None = None, **places) -> subprocess.CompletedProcess:
    """wt_load.py, whose files may not grow beyond `limit` bytes. places: words to replace."""
    words = [ROOT / "wt_load.py", *(places.get(word, word) for word in COMMANDS[name])]
    command = [sys.executable, *words]
    if limit:
        command = [sys.executable, "-c", LIMITED, str(limit), *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, check=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a small run in `a`."""
    folder = tmp_path_factory.mktemp("full")
    as_run(gpt(), folder / "a")
    return folder


@pytest.mark.parametrize("name", ["import", "hf", "nanogpt"])
def test_a_file_that_cannot_be_written_leaves_nothing_and_the_retry_works(name, trained):
    line = one_error_line(convert(name, trained, limit=50_000), 1)
    assert "new/deep/" in line and ("File too large" in line or "cannot be written" in line)
    assert sorted(p.name for p in trained.iterdir()) == ["a"]
    if name in ("import", "hf"):
        done = convert(name, trained)
        assert done.returncode == 0, done.stderr
        shutil.rmtree(trained / "new")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_named(name, trained, tmp_path):
    if name == "gguf":
        pytest.importorskip("gguf")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        target = COMMANDS[name][-1].replace("new", str(disk))
        line = one_error_line(convert(name, trained, **{COMMANDS[name][-1]: target}), 1)
        assert line.startswith(f"error: {target}") and "No space left on device; " in line
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)

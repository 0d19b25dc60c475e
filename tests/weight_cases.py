"""
One small model in every format that wt_load.py reads, and ways to damage or falsify its files.

`refused` and `same_bits` judge what the commands make of a file: one line of error that names it,
or the weights of the undamaged file, bit for bit.
"""

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_tf_bundle import save as save_tensorflow

import gpt_train
import wt_load as W
from gpt_train import GPT, GPTConfig, SampleConfig
from parts.base.dtypes import SAFETENSORS_NAMES
from parts.cli.launch import BAD_INPUT, error_line
from parts.data.tokenizers import byte_tokenizer
from parts.storage.checkpoint import load_tensors, save_checkpoint

SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)
MOST_CHARS, MOST_SECONDS, MOST_BYTES = 1000, 30, 500 << 20
LOOK, ALL = ("info", "verify", "import"), ("info", "verify", "import", "sample")

# ------------------------------------------------------------------------ the model in every format


def small_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**asdict(SHAPE), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def scratch_weights(model) -> dict:
    """The model's tensors under the names of LLMs-from-scratch."""
    t, c = model.state_dict(), model.config
    names = {
        "tok_emb.weight": "wte.weight",
        "pos_emb.weight": "wpe.weight",
        "out_head.weight": "wte.weight" if c.tied else "lm_head.weight",
        "final_norm.scale": "ln_f.weight",
        "final_norm.shift": "ln_f.bias",
    }
    linears = {
        "att.out_proj": "attn.c_proj",
        "ff.layers.0": "mlp.c_fc",
        "ff.layers.2": "mlp.c_proj",
    }
    found = {}
    for i in range(c.n_layer):
        block = f"trf_blocks.{i}"
        for theirs, ours in (("norm1", "ln_1"), ("norm2", "ln_2")):
            names[f"{block}.{theirs}.scale"] = f"h.{i}.{ours}.weight"
            names[f"{block}.{theirs}.shift"] = f"h.{i}.{ours}.bias"
        for kind in ("weight", "bias"):
            for theirs, ours in linears.items():
                names[f"{block}.{theirs}.{kind}"] = f"h.{i}.{ours}.{kind}"
            parts = t[f"h.{i}.attn.c_attn.{kind}"].split(c.n_embd)
            for letter, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{block}.att.W_{letter}.{kind}"] = part.clone()
        found[f"{block}.att.mask"] = torch.ones(c.block_size, c.block_size).triu(1)
    return found | {theirs: t[ours].clone() for theirs, ours in names.items()}


def openai_weights(model) -> dict:
    """The model's tensors under the names, and in the shapes, of OpenAI's TensorFlow variables."""
    found = {}
    for name, t in model.state_dict().items():
        *place, kind = name.split(".")
        if place[0] in ("wte", "wpe"):
            kind = None
        elif place[-1].startswith("ln_"):
            kind = {"weight": "g", "bias": "b"}[kind]
        else:
            kind = {"weight": "w", "bias": "b"}[kind]
        if kind == "w":  # (out, in) here, (1, in, out) there
            t = t.t()[None]
        if place[0] == "h":  # h.0.attn -> h0/attn
            place = [f"h{place[1]}", *place[2:]]
        found["/".join(filter(None, ["model", *place, kind]))] = t.contiguous()
    return found


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """
    One small model in every format, and the hash of its weights.

    run; hf (one file), parts (two and an index) and bin; nano.pt; scratch.pth; tf; hash.
    """
    folder, model, tokenizer = tmp_path_factory.mktemp("hostile"), small_model(), byte_tokenizer()
    state = {
        "script": "wt_load.py",
        "step": 3,
        "tokens": 7,
        "model_config": asdict(SHAPE),
        "tokenizer": tokenizer.fingerprint,
        "best": None,
        "config": {},
    }
    files = {"tokenizer.json": tokenizer.to_json()}
    weights = {"model.safetensors": model.state_dict()}
    save_checkpoint(folder / "run", 3, weights, state, files, 1)
    (folder / "bytes.json").write_bytes(tokenizer.to_json())
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, name in (("hf", "hf"), ("nanogpt", "nano.pt")):
            W.main(W.ExportConfig(str(folder / "run"), (kind, str(folder / name))))
    tensors = load_tensors(folder / "hf/model.safetensors")
    for name in ("parts", "bin"):
        shutil.copytree(folder / "hf", folder / name)
        (folder / name / "model.safetensors").unlink()
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    places = {name: f"model-{int(i >= 9)}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        part = {name: tensors[name].contiguous() for name, place in places.items() if place == file}
        save_file(part, folder / "parts" / file)
    index = folder / "parts/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    torch.save(scratch_weights(model), folder / "scratch.pth")
    (folder / "tf").mkdir()
    save_tensorflow(folder / "tf/model.ckpt", openai_weights(model))
    (folder / "tf/checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n', encoding="utf-8")
    settings = {"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 2, "n_layer": 2}
    (folder / "tf/hparams.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "tf/tokenizer.json").write_bytes(tokenizer.to_json())
    (folder / "hash").write_text(W.weights_hash(model.state_dict()), encoding="utf-8")
    return folder


@pytest.fixture
def ours(home, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")


# --------------------------------------------------------------------- what the commands make of it


class Hangs(Exception):
    """Not one of the errors that are meant for people."""


@pytest.fixture(autouse=True)
def bounded():
    """Fails a test that waits for a pipe, or that allocates much memory."""

    def too_long(*_):
        raise Hangs(f"longer than {MOST_SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(MOST_SECONDS)
    yield
    signal.alarm(0)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_BYTES


def act(action: str, path, out: Path, n_head=None) -> str:
    """What one command prints, in this process."""
    tokenizer = out.parent / "bytes.json"
    tokenizer.write_bytes(byte_tokenizer().to_json())
    spec = None if (Path(path) / "checkpoints").is_dir() else str(tokenizer)
    configs = {
        "info": W.InfoConfig(str(path), n_head, tensors=True),
        "verify": W.VerifyConfig(str(path), n_head),
        "import": W.ImportConfig(str(path), str(out), spec, n_head),
        "sample": SampleConfig(str(path), max_new_tokens=3, device="cpu"),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        (gpt_train if action == "sample" else W).main(configs[action])
    return printed.getvalue()


def refused(path, tmp_path, actions=LOOK, n_head=None, named=None, kinds=BAD_INPUT) -> None:
    """Each command prints one line that names the path, and leaves nothing behind."""
    for action in actions:
        with pytest.raises(kinds) as e:
            print(act(action, path, tmp_path / "out", n_head))
        line = error_line(e.value)
        assert type(e.value) in (*kinds, json.JSONDecodeError), (action, type(e.value))
        assert str(named or path) in line and len(line) < MOST_CHARS, (action, line)
        assert not os.path.exists(tmp_path / "out"), action


def same_bits(path, tmp_path, home, actions=LOOK, n_head=None) -> None:
    """Each command works, and has the weights of the undamaged file."""
    want = (home / "hash").read_text(encoding="utf-8")
    for action in actions:
        printed = act(action, path, tmp_path / "out", n_head)
        if action == "verify":
            assert printed.splitlines()[-1] == want
        if action == "import":
            assert act("verify", tmp_path / "out", tmp_path / "no").splitlines()[-1] == want
            shutil.rmtree(tmp_path / "out")


def either(path, tmp_path, home, actions=LOOK, n_head=None) -> None:
    """Refused, or the same bits: for damage that may hit a byte that means nothing."""
    for action in actions:
        try:
            act(action, path, tmp_path / "out", n_head)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        except Exception:  # noqa: BLE001  refused() checks that it is one of the allowed kinds
            refused(path, tmp_path, [action], n_head)
        else:
            same_bits(path, tmp_path, home, [action], n_head)


# ---------------------------------------------------------------------------------- falsified files

DEEP = "[" * 100_000
LONG = "9" * 5000


def remanifest(folder: Path) -> None:
    """Write a manifest that fits the files as they are now."""
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
        if f.name != "MANIFEST.json"
    }
    text = json.dumps({"version": 1, "files": files})
    (folder / "MANIFEST.json").write_text(text, encoding="utf-8")


def flip(path: Path, at: float = 0.5) -> None:
    """Flip a bit of the byte at this share of the file."""
    data = bytearray(path.read_bytes())
    data[min(int(at * len(data)), len(data) - 1)] ^= 4
    path.write_bytes(data)


def instead(make):
    """A damage that makes something else in place of the file."""

    def damage(path):
        path.unlink()
        make(path)

    return damage


def raw_safetensors(
    tensors: dict, change=lambda header, data: None, text=None, length=None
) -> bytes:
    """A safetensors file whose header `change` may falsify, or is `text`."""
    header, data = {}, bytearray()
    for name, t in tensors.items():
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        header[name] = {
            "dtype": SAFETENSORS_NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = (text or json.dumps(change(header, data) or header)).encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + bytes(data)


def text_op(text) -> bytes:
    """The pickle opcode of a text."""
    raw = str(text).encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def calls(module: str, name: str, *arguments) -> bytes:
    """Opcodes that call module.name(*arguments) when they are unpickled."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text_op, arguments)) + b"tR"


def zipped(path, pickled: bytes, more=None, kind=zipfile.ZIP_STORED) -> None:
    """Write a file in torch.save's format around a pickle."""
    members = {"x/data.pkl": pickled, "x/version": b"3\n", "x/byteorder": b"little", **(more or {})}
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def opcodes(marker) -> dict[str, bytes]:
    """Pickles that create the file `marker` if their code runs, and some that are broken."""
    shell = f"touch {marker}"
    system = calls("os", "system", shell)
    python = f"open({str(marker)!r}, 'w')"
    inside = b"}" + text_op("wte.weight") + calls("posix", "system", shell) + b"s."
    getattr_ = b"cbuiltins\ngetattr\n(cos\nsystem\n" + text_op("__call__") + b"tR("
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n)\x81}"
    stored = b"(" + text_op("storage") + b"cos\nsystem\n"
    return {
        "os.system": system + b".",
        "posix.system": calls("posix", "system", shell) + b".",
        "subprocess": calls("subprocess", "getoutput", shell) + b".",
        "open": calls("builtins", "open", marker, "w") + b".",
        "eval": calls("builtins", "eval", python) + b".",
        "exec": calls("builtins", "exec", python) + b".",
        "getattr": getattr_ + text_op(shell) + b"tR.",
        "torch's own": calls("torch.hub", "_load_local", marker, "x") + b".",
        "torch.load": calls("torch", "load", marker) + b".",
        "numpy": calls("numpy", "fromfile", marker) + b".",
        "pathlib": calls("pathlib", "Path.touch", marker) + b".",
        "importlib": calls("importlib", "import_module", "antigravity") + b".",
        "instance": f"(iposix\nsystem\n{marker}\n.".encode(),
        "object": b"(cposix\nsystem\n" + text_op(shell) + b"o.",
        "newobj": b"cposix\nsystem\n(" + text_op(shell) + b"t\x81.",
        "stack global": text_op("posix") + text_op("system") + b"\x93(" + text_op(shell) + b"tR.",
        "setstate": rebuild + text_op("x") + system + b"sb.",
        "inside a dict": inside,
        "inside model": b"}" + text_op("model") + inside[:-1] + b"s.",
        "persistent id": stored + text_op("0") + text_op("cpu") + b"K\x01tQ.",
        "no end": system,
        "nothing": b".",
        "pop": b"0.",
        "mark": b"(" * 10_000,
        "memo": b"j\xff\xff\xff\x7f.",
        "put": b"}r\xff\xff\xff\x7f.",
        "long text": b"X\xff\xff\xff\x7fabc.",
        "long bytes": b"\x8e" + (2**62).to_bytes(8, "little") + b"x.",
        "frame": b"\x95" + (2**62).to_bytes(8, "little") + b".",
        "deep": b"(" * 9_000 + b"t" * 9_000 + b".",
        "long int": b"\x8b\xff\xff\xff\x7f.",
        "protocol 255": b"\x80\xff}.",
        "laughs": b"]" + b"".join(b"q\x00(h\x00h\x00h\x00h\x00l" for _ in range(40)) + b".",
    }

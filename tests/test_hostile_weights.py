"""Damaged and hostile weights: named in one line, or read as the same bits; no code of theirs runs, nothing hangs, nothing large is taken."""

import contextlib
import hashlib
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import one_error_line, run
from safetensors.torch import save_file
from test_tf_bundle import save as save_tensorflow

import gpt_train
import wt_load as W
from gpt_train import GPT, GPTConfig, SampleConfig
from parts.cli.launch import BAD_INPUT, error_line
from parts.data.tokenizers import byte_tokenizer
from parts.storage.checkpoint import load_tensors, save_checkpoint

SHAPE = GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=2, n_embd=32)
MOST_CHARS, MOST_SECONDS, MOST_BYTES = 1000, 30, 500 << 20
LOOK, ALL = ("info", "verify", "import"), ("info", "verify", "import", "sample")

# ------------------------------------------------------------------------------------------- what is damaged, and who judges


def small_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**asdict(SHAPE), **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def scratch_weights(model) -> dict:
    """The same model by the names of LLMs-from-scratch."""
    t, C = model.state_dict(), SHAPE.n_embd
    names = {
        "tok_emb.weight": "wte.weight",
        "pos_emb.weight": "wpe.weight",
        "out_head.weight": "wte.weight",
    }
    names |= {"final_norm.scale": "ln_f.weight", "final_norm.shift": "ln_f.bias"}
    found = {}
    for i in range(SHAPE.n_layer):
        for theirs, ours in (("norm1", "ln_1"), ("norm2", "ln_2")):
            names |= {
                f"trf_blocks.{i}.{theirs}.scale": f"h.{i}.{ours}.weight",
                f"trf_blocks.{i}.{theirs}.shift": f"h.{i}.{ours}.bias",
            }
        for kind in ("weight", "bias"):
            for theirs, ours in (
                ("att.out_proj", "attn.c_proj"),
                ("ff.layers.0", "mlp.c_fc"),
                ("ff.layers.2", "mlp.c_proj"),
            ):
                names[f"trf_blocks.{i}.{theirs}.{kind}"] = f"h.{i}.{ours}.{kind}"
            for n, letter in enumerate(("query", "key", "value")):
                found[f"trf_blocks.{i}.att.W_{letter}.{kind}"] = t[f"h.{i}.attn.c_attn.{kind}"][
                    n * C : (n + 1) * C
                ].clone()
        found[f"trf_blocks.{i}.att.mask"] = torch.ones(SHAPE.block_size, SHAPE.block_size).triu(1)
    return found | {theirs: t[ours].clone() for theirs, ours in names.items()}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One small model in every format: run, hf (one file), parts (and an index), bin, nano.pt, scratch.pth, tf; and its hash."""
    folder, model, tokenizer = tmp_path_factory.mktemp("hostile"), small_model(), byte_tokenizer()
    state = {
        "script": "wt_load.py",
        "step": 3,
        "tokens": 7,
        "model_config": asdict(SHAPE),
        "tokenizer": tokenizer.fingerprint,
    }
    files = {"tokenizer.json": tokenizer.to_json()}
    run_dir = folder / "run"
    save_checkpoint(
        run_dir,
        3,
        {"model.safetensors": model.state_dict()},
        state | {"best": None, "config": {}},
        files,
        1,
    )
    (folder / "bytes.json").write_bytes(tokenizer.to_json())
    with contextlib.redirect_stdout(io.StringIO()):
        for to in (("hf", "hf"), ("nanogpt", "nano.pt")):
            W.main(W.ExportConfig(str(run_dir), (to[0], str(folder / to[1]))))
    tensors = load_tensors(folder / "hf/model.safetensors")
    for name in ("parts", "bin"):
        shutil.copytree(folder / "hf", folder / name)
        (folder / name / "model.safetensors").unlink()
    torch.save(tensors, folder / "bin/pytorch_model.bin")
    names = sorted(tensors)
    for n, some in enumerate((names[:9], names[9:])):
        save_file(
            {name: tensors[name].contiguous() for name in some},
            folder / f"parts/model-{n}.safetensors",
        )
    index = {
        "weight_map": {name: f"model-{int(i >= 9)}.safetensors" for i, name in enumerate(names)}
    }
    (folder / "parts/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    torch.save(scratch_weights(model), folder / "scratch.pth")
    (folder / "tf").mkdir()
    save_tensorflow(folder / "tf/model.ckpt", openai_weights(model))
    (folder / "tf/checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n', encoding="utf-8")
    (folder / "tf/hparams.json").write_text(
        json.dumps({"n_vocab": 257, "n_ctx": 32, "n_embd": 32, "n_head": 2, "n_layer": 2}),
        encoding="utf-8",
    )
    (folder / "tf/tokenizer.json").write_bytes(tokenizer.to_json())
    (folder / "hash").write_text(W.weights_hash(model.state_dict()), encoding="utf-8")
    return folder


def openai_weights(model) -> dict:
    found = {}
    for name, t in model.state_dict().items():
        if name.endswith(W.LINEAR):
            t = t.t()[None]
        name = (
            name.removesuffix(".weight")
            if name.startswith(("wte", "wpe"))
            else name.replace("ln_1.weight", "ln_1.g").replace("ln_2.weight", "ln_2.g")
        )
        name = name.replace("ln_f.weight", "ln_f.g").replace(".bias", ".b").replace(".weight", ".w")
        found[
            "model/" + name.replace("h.", "h", 1).replace(".", "/")
            if name.startswith("h.")
            else "model/" + name.replace(".", "/")
        ] = t.contiguous()
    return found


class Hangs(Exception):
    """Not one of the errors that are for people."""


@pytest.fixture(autouse=True)
def bounded():
    """No test waits for a pipe, and none takes memory in earnest."""

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
    tokenizer = str(out.parent / "bytes.json")
    Path(tokenizer).write_bytes(byte_tokenizer().to_json())
    configs = {
        "info": W.InfoConfig(str(path), n_head, tensors=True),
        "verify": W.VerifyConfig(str(path), n_head),
        "import": W.ImportConfig(
            str(path),
            str(out),
            None if (Path(path) / "checkpoints").is_dir() else tokenizer,
            n_head,
        ),
        "sample": SampleConfig(str(path), max_new_tokens=3, device="cpu"),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        (gpt_train if action == "sample" else W).main(configs[action])
    return printed.getvalue()


def refused(path, tmp_path, actions=LOOK, n_head=None, named=None, kinds=BAD_INPUT) -> None:
    """Every one of the commands tells one line that names the path, and leaves nothing."""
    for action in actions:
        with pytest.raises(kinds) as e:
            print(act(action, path, tmp_path / "out", n_head))
        line = error_line(e.value)
        assert type(e.value) in (*kinds, json.JSONDecodeError), (action, type(e.value))
        assert str(named or path) in line and len(line) < MOST_CHARS, (action, line)
        assert not os.path.exists(tmp_path / "out"), action


def same_bits(path, tmp_path, home, actions=LOOK, n_head=None) -> None:
    """Every one of the commands works, and has the weights of the undamaged file."""
    want = (home / "hash").read_text(encoding="utf-8")
    for action in actions:
        printed = act(action, path, tmp_path / "out", n_head)
        if action == "verify":
            assert printed.splitlines()[-1] == want
        if action == "import":
            assert act("verify", tmp_path / "out", tmp_path / "no").splitlines()[-1] == want
            shutil.rmtree(tmp_path / "out")


def either(path, tmp_path, home, actions=LOOK, n_head=None) -> None:
    """Refused, or the same bits: for damage that may fall on a byte that means nothing."""
    for action in actions:
        try:
            act(action, path, tmp_path / "out", n_head)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
        except Exception:  # noqa: BLE001  refused() says whether it is one of those that may be
            refused(path, tmp_path, [action], n_head)
        else:
            same_bits(path, tmp_path, home, [action], n_head)


def test_undamaged_they_are_all_one_model(home, tmp_path):
    same_bits(home / "run", tmp_path, home, ALL)
    for name in ("hf", "parts", "bin", "nano.pt", "tf"):
        same_bits(home / name, tmp_path, home)
    same_bits(home / "scratch.pth", tmp_path, home, n_head=2)


# ---------------------------------------------------------------------------------------------------- damage to any file


def changed(at: float, change):
    def damage(path):
        data = bytearray(path.read_bytes())
        change(data, min(int(at * len(data)), len(data) - 1))
        path.write_bytes(data)

    return damage


def flip(data, i):
    data[i] ^= 4


def zeros(data, i):
    data[i : i + 64] = bytes(len(data[i : i + 64]))


def instead(make):
    def damage(path):
        path.unlink()
        make(path)

    return damage


def twisted(path):
    data = path.read_bytes()
    half = len(data) // 2
    path.write_bytes(data[half:] + data[:half])


DAMAGES = {
    **{f"flip at {at}": changed(at, flip) for at in (0, 0.01, 0.3, 0.6, 1)},
    **{f"zeros at {at}": changed(at, zeros) for at in (0, 0.5, 0.9)},
    **{
        f"cut at {at}": changed(at, lambda data, i: data.__delitem__(slice(i, None)))
        for at in (0, 0.001, 0.5, 1)
    },
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\x01\x02\x03"),
    "halves swapped": twisted,
    "random": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a page": lambda path: path.write_bytes(
        b"<!DOCTYPE html><html><body>Quota exceeded</body></html>\n"
    ),
    "length first": changed(
        0, lambda data, _: data.__setitem__(slice(0, 8), (2**63 - 1).to_bytes(8, "little"))
    ),
    "gone": os.unlink,
    "folder": instead(os.mkdir),
    "pipe": instead(os.mkfifo),
    "loop": instead(lambda path: path.symlink_to(path.name)),
    "link to nothing": instead(lambda path: path.symlink_to("nothing")),
    "endless": instead(lambda path: path.symlink_to("/dev/zero")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json", "tokenizer.json"])
def test_a_damaged_checkpoint_is_refused_by_every_command(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")
    DAMAGES[damage](folder / name)
    refused(folder, tmp_path, ALL, named=folder / name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_or_changes_nothing(home, tmp_path, damage):
    folder = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")
    DAMAGES[damage](folder / "MANIFEST.json")
    either(folder, tmp_path, home, ALL, n_head=2)


@pytest.mark.parametrize(
    "damage",
    [
        d
        for d in DAMAGES
        if d not in ("flip at 0.3", "flip at 0.6", "flip at 1", "zeros at 0.5", "zeros at 0.9")
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model-0.safetensors"])
def test_a_damaged_safetensors_file_of_others_is_refused(home, tmp_path, name, damage):
    """It has no hash: bits flipped in its values, which the list above leaves out, cannot be noticed by anyone."""
    folder = shutil.copytree(
        home / ("hf" if name == "model.safetensors" else "parts"), tmp_path / "hf"
    )
    DAMAGES[damage](folder / name)
    refused(folder, tmp_path, named=folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["nano.pt", "scratch.pth", "pytorch_model.bin"])
def test_a_damaged_torch_file_is_refused_or_read_as_it_was(home, tmp_path, name, damage):
    path = tmp_path / name
    shutil.copy(home / "bin" / name if name.endswith("bin") else home / name, path)
    DAMAGES[damage](path)
    either(path, tmp_path, home, n_head=2)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001", "checkpoint", "hparams.json"]
)
def test_a_damaged_tensorflow_file_is_refused_or_changes_nothing(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    DAMAGES[damage](folder / name)
    if "data" in name:
        act("info", folder, tmp_path / "out")  # reads the index only
        (refused if damage != "longer" else same_bits)(
            folder,
            tmp_path,
            *([] if damage != "longer" else [home]),
            actions=("verify", "import"),
            n_head=2,
        )
    else:
        either(folder, tmp_path, home, n_head=2)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_damaged_json_of_others_is_refused_or_changes_nothing(home, tmp_path, name, damage):
    folder = shutil.copytree(home / "parts", tmp_path / "parts")
    DAMAGES[damage](folder / name)
    either(folder, tmp_path, home, n_head=2)


# ----------------------------------------------------------------------------------- our own, with a manifest that fits


def remanifest(folder: Path) -> None:
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
        for f in folder.iterdir()
        if f.name != "MANIFEST.json"
    }
    (folder / "MANIFEST.json").write_text(
        json.dumps({"version": 1, "files": files}), encoding="utf-8"
    )


@pytest.fixture
def ours(home, tmp_path):
    return shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "step_000003")


DEEP = "[" * 100_000
LONG = "9" * 5000
MANIFESTS = {
    "deep": DEEP, "deep in it": '{"files": ' + '{"a":' * 50_000, "empty": "", "null": "null", "list": "[]", "object": "{}", "number": "1e999", "many digits": LONG,
    "files null": '{"files": null}', "files list": '{"files": [["model.safetensors"]]}', "no files": '{"files": {}}', "text": '{"files": "model.safetensors"}',
    "entry null": '{"files": {"model.safetensors": null}}', "entry list": '{"files": {"model.safetensors": [1, 2]}}',
    "no hash": '{"files": {"model.safetensors": {"bytes": 1}}}', "size text": '{"files": {"model.safetensors": {"bytes": "1", "sha256": 1}}}',
    "size digits": '{"files": {"model.safetensors": {"bytes": ' + LONG + ', "sha256": ""}}}', "not utf-8": "\udcff", "surrogate": '{"files": {"\\ud800": {"bytes": 0, "sha256": ""}}}',
    **{f"name {name[:20]!r}": json.dumps({"files": {name: {"bytes": 1, "sha256": ""}}})
       for name in ("", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\0b", "a\nerror: b", "x" * 9000, "x" * 200, "/dev/zero", "\x1b[2J")},
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_hostile_manifest_is_refused(ours, tmp_path, case):
    (ours / "MANIFEST.json").write_bytes(MANIFESTS[case].encode(errors="surrogateescape"))
    refused(ours, tmp_path, ALL)


def test_a_manifest_that_leaves_out_the_weights_is_refused(ours, tmp_path):
    files = json.loads((ours / "MANIFEST.json").read_text(encoding="utf-8"))
    for name in ("model.safetensors", "trainer_state.json", "tokenizer.json"):
        fewer = {"files": {k: v for k, v in files["files"].items() if k != name}}
        (ours / "MANIFEST.json").write_text(json.dumps(fewer), encoding="utf-8")
        refused(ours, tmp_path, ALL, named=ours / name)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe"])
def test_a_listed_file_that_never_ends_is_not_read(ours, tmp_path, name):
    (ours / "extra").symlink_to(name) if name != "pipe" else os.mkfifo(ours / "extra")
    files = json.loads((ours / "MANIFEST.json").read_text(encoding="utf-8"))["files"] | {
        "extra": {"bytes": 0, "sha256": ""}
    }
    (ours / "MANIFEST.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    refused(ours, tmp_path, ALL, named=ours / "extra")


def test_a_link_to_the_same_bytes_is_the_same(ours, tmp_path, home):
    (ours / "model.safetensors").rename(tmp_path / "elsewhere")
    (ours / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    same_bits(ours, tmp_path, home, ALL)


SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
WRONG = (0, -1, 3, 10**9, 10**12, 10**30, "2", 2.5, math.nan, math.inf, None, [2], {}, True)
STATES = {
    **{f"{name} {value!r}": {"model_config": {name: value}} for name in SIZES for value in WRONG},
    **{f"dropout {value!r}": {"model_config": {"dropout": value}} for value in (1, -1, "0", math.nan, None, [])},
    **{f"tied {value!r}": {"model_config": {"tied": value}} for value in (False, "yes", None, [])},
    "another setting": {"model_config": {"n_kv_head": 2}}, "code": {"model_config": {"__class__": "os.system"}},
    **{f"model_config {value!r}": {"model_config": value} for value in (None, [], "x", 1)},
    **{f"step {value!r}": {"step": value} for value in (None, "3", 3.5, math.nan, [])},
    **{f"tokens {value!r}": {"tokens": value} for value in (None, "many", 7.5, math.inf, {})},
    **{f"best {value!r}": {"best": value} for value in ([1], "x", 3, {"step": "3", "val_loss": 1.0}, {"step": 3}, {"step": 3, "val_loss": "low"})},
    **{f"config {value!r}": {"config": value} for value in (None, [], "x")},
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_lies_is_refused_before_anything_is_built(ours, tmp_path, case):
    state = json.loads((ours / "trainer_state.json").read_text(encoding="utf-8"))
    for name, value in STATES[case].items():
        state[name] = (
            state[name] | value if name == "model_config" and isinstance(value, dict) else value
        )
    (ours / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    remanifest(ours)
    refused(ours, tmp_path, ALL)


@pytest.mark.parametrize(
    "text",
    [
        DEEP,
        "",
        "null",
        "[]",
        '"x"',
        "{}",
        "NaN",
        LONG,
        '{"step": 3}',
        '{"step":' + LONG + "}",
        "\udcff\udcfe",
        '{"step": 3, "model_config": {}}',
    ],
    ids=lambda t: t[:12],
)
def test_a_state_that_is_none_is_refused(ours, tmp_path, text):
    (ours / "trainer_state.json").write_bytes(text.encode(errors="surrogateescape"))
    remanifest(ours)
    refused(ours, tmp_path, ALL)


@pytest.mark.parametrize(
    "more",
    [
        {"unknown": [1]},
        {"best": {}},
        {"script": None},
        {"data": [1]},
        {"tokenizer": 3},
        {"tokens": 10**40},
        {"step": 10**40},
        {"best": {"step": 1, "val_loss": math.nan}},
    ],
    ids=str,
)
def test_what_is_odd_but_harmless_in_a_state_changes_nothing(ours, tmp_path, home, more):
    state = json.loads((ours / "trainer_state.json").read_text(encoding="utf-8")) | more
    (ours / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    remanifest(ours)
    same_bits(ours, tmp_path, home, ALL)


def tokenizer_with(change):
    spec = json.loads(byte_tokenizer().to_json())
    return json.dumps(change(spec) or spec)


VOCAB = {i: c for c, i in json.loads(byte_tokenizer().to_json())["model"]["vocab"].items()}
TOKENIZERS = {
    "deep": DEEP, "empty": "", "list": "[]", "null": "null", "no model": "{}", "digits": LONG,
    **{f"id {value!r}": tokenizer_with(lambda s, v=value: s["model"]["vocab"].update({VOCAB[65]: v})) for value in (-1, 66, 300, 2**32 - 1, 2**40, 10**30, "a", 1.5, None, [], math.nan)},
    **{f"end {value!r}": tokenizer_with(lambda s, v=value: s["added_tokens"][0].update({"id": v})) for value in (-1, 5, 258, 2**32 - 1, 2**40, "a", None, [])},
    **{f"pattern {value!r}": tokenizer_with(lambda s, v=value: s["pre_tokenizer"]["pretokenizers"][0]["pattern"].update({"Regex": v})) for value in ("(", "", "a*", "x|", "(?=a)", "(a{1000}){1000}", 3, None, [])},
    "no bytes": tokenizer_with(lambda s: s["model"]["vocab"].clear()), "no added": tokenizer_with(lambda s: s["added_tokens"].clear()),
    "added text": tokenizer_with(lambda s: s.update({"added_tokens": "x"})), "surrogate": tokenizer_with(lambda s: s["added_tokens"].append({"id": 257, "content": "\ud800"})),
    "merge of nothing": tokenizer_with(lambda s: s["model"].update({"merges": [["zz", "yy"]]})), "merge 3": tokenizer_with(lambda s: s["model"].update({"merges": 3})),
    "unreached": tokenizer_with(lambda s: (s["model"]["vocab"].update({"abc": 257}))),
    "more than the model": tokenizer_with(lambda s: [s["model"]["vocab"].update({"ab": 257}), s["model"].update({"merges": ["a b"]})] and s),
    "unigram": tokenizer_with(lambda s: s["model"].update({"type": "Unigram"})), "lowercase": tokenizer_with(lambda s: s.update({"normalizer": {"type": "Lowercase"}})),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_hostile_tokenizer_is_refused(ours, tmp_path, case):
    (ours / "tokenizer.json").write_text(TOKENIZERS[case], encoding="utf-8")
    remanifest(ours)
    refused(ours, tmp_path, ("sample",))
    with pytest.raises(BAD_INPUT) as e, contextlib.redirect_stdout(io.StringIO()):
        W.main(W.ImportConfig(str(ours), str(tmp_path / "out")))
    assert len(error_line(e.value)) < MOST_CHARS and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- safetensors by hand


def raw_safetensors(
    tensors: dict, change=lambda header, data: None, text=None, length=None
) -> bytes:
    """A file with a header that `change` may falsify, or that is `text`."""
    names = {
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float64: "F64",
        torch.int64: "I64",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
    header, data = {}, bytearray()
    for name, t in tensors.items():
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
        header[name] = {
            "dtype": names[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = text or json.dumps(change(header, data) or header)
    text = text.encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(data)


def of_header(change):
    return lambda tensors: raw_safetensors(tensors, change)


def of_entry(**entry):
    """Falsify what is said of the final bias."""
    return of_header(
        lambda header, data: next(
            e for name, e in header.items() if name.endswith("ln_f.bias")
        ).update(entry)
    )


def of_tensors(change):
    """Other tensors; `p` is what stands before their names."""

    def make(tensors):
        p = next(name for name in tensors if name.endswith("ln_f.bias")).removesuffix("ln_f.bias")
        found = {name: t.clone() for name, t in tensors.items()}
        return raw_safetensors(change(found, p) or found)

    return make


def twice(tensors):
    """One name two times in the header, the second time for other bytes."""
    text = json.dumps(json.loads(raw_safetensors(tensors)[8:].split(b"}}")[0] + b"}}"))
    name = next(name for name in tensors if name.endswith("ln_f.bias"))
    other = next(name for name in tensors if name.endswith("ln_f.weight"))
    entry = json.dumps(json.loads(text)[other])
    return raw_safetensors(tensors, text=text[:-1] + f', "{name}": {entry}' + "}")


def put(name, value):
    return of_tensors(lambda t, p: t.update({p + name: value}))


def without(*names):
    return of_tensors(lambda t, p: [t.pop(p + name) for name in names] and None)


SAFETENSORS = {
    "nothing": lambda t: b"", "seven bytes": lambda t: bytes(7), "length 0": lambda t: bytes(8), "no tensors": lambda t: raw_safetensors({}),
    **{f"length {n}": (lambda t, n=n: raw_safetensors(t, length=n)) for n in (1, 10**6, 2**31, 2**40, 2**63 - 1, 2**64 - 1)},
    **{f"header {text[:9]}": (lambda t, text=text: raw_safetensors(t, text=text)) for text in ("[]", "null", "{", "{}x", DEEP, '{"a":' * 9999, "\x00", LONG, '{"a": 1}', '{"__metadata__": 3}', '{"__metadata__": {"a": {}}}')},
    **{f"dtype {d}": of_entry(dtype=d) for d in ("F33", "f32", "", "I32", "U32", "F8_E4M3", "C64", "BOOL", "os.system", 3, None)},
    **{f"shape {s}": of_entry(shape=s) for s in ([], [33], [31], [-32], [2**62, 2**62], [0], [16, 2], [1, 32], ["32"], 32, None, [32.0], [1] * 1000)},
    **{f"offsets {o}": of_entry(data_offsets=o) for o in ([0, 128], [128, 0], [-128, 0], [2**63, 2**63 + 128], [0, 2**64 - 1], [5], [], [1.5, 3], None)},
    "entry list": of_header(lambda h, d: h.update(x=[])), "hole": lambda t: raw_safetensors(t, lambda h, d: d.extend(bytes(100))), "short": lambda t: raw_safetensors(t)[:-1],
    "twice": twice,
    "final bias gone": without("ln_f.bias"), "tokens gone": without("wte.weight"), "positions gone": without("wpe.weight"),
    "block 0 gone": of_tensors(lambda t, p: {n: x for n, x in t.items() if not n.startswith(f"{p}h.0.")}),
    "block 1 gone": of_tensors(lambda t, p: {n: x for n, x in t.items() if not n.startswith(f"{p}h.1.")}),
    "one more": put("extra", torch.ones(3)), "block 9999": put("h.9999.x", torch.ones(1)), "block -1": put("h.-1.x", torch.ones(1)), "block 10**9": put("h.1000000000.x", torch.ones(1)),
    "five thousand blocks": of_tensors(lambda t, p: t.update({f"{p}h.{i}.{n}": torch.ones(1) for i in range(2, 5_000) for n in "ab"})),
    "a name of a million": put("x" * 1_000_000, torch.ones(1)), "a name of lines": put("a\nerror: b\r\n", torch.ones(1)), "no name": of_tensors(lambda t, p: t.update({"": torch.ones(1)})),
    "tokens of width 0": put("wte.weight", torch.ones(257, 0)), "no tokens": put("wte.weight", torch.ones(0, 32)), "tokens a number": put("wte.weight", torch.tensor(1.0)),
    "tokens flat": put("wte.weight", torch.ones(257 * 32)), "positions 0": put("wpe.weight", torch.ones(0, 32)), "positions narrower": put("wpe.weight", torch.ones(32, 31)),
    "a number": put("h.0.ln_1.weight", torch.tensor(1.0)), "a linear number": put("h.0.mlp.c_fc.weight", torch.tensor(1.0)), "linear flat": put("h.0.mlp.c_fc.weight", torch.ones(128)),
    "two in one": put("h.0.attn.c_attn.weight", torch.ones(2, 32, 96)), "four dimensions": put("h.1.mlp.c_fc.weight", torch.ones(2, 1, 32, 128)), "linear of nothing": put("h.0.mlp.c_fc.weight", torch.ones(0, 0)),
    "integers": put("wpe.weight", torch.ones(32, 32, dtype=torch.int64)), "bytes": put("h.0.ln_1.bias", torch.ones(32, dtype=torch.uint8)), "truths": put("h.0.ln_1.bias", torch.ones(32, dtype=torch.bool)),
    "a head narrower": of_tensors(lambda t, p: t.update({"lm_head.weight": torch.ones(257, 31)})), "a head of integers": of_tensors(lambda t, p: t.update({"lm_head.weight": torch.ones(257, 32, dtype=torch.int64)})),
}  # fmt: skip
# what may be read: other bytes stand for what they say
HARMLESS = {
    "padded header": lambda t: raw_safetensors(
        t, text=json.dumps(json.loads(raw_safetensors(t)[8:].split(b"}}")[0] + b"}}")) + " " * 4096
    ),
    "metadata": of_header(lambda h, d: {"__metadata__": {"format": "pt", "x": "<script>"}} | h),
    "another order": of_tensors(lambda t, p: dict(reversed(t.items()))),
}


@pytest.mark.parametrize("case", SAFETENSORS)
@pytest.mark.parametrize("where", ["ours", "hf"])
def test_a_hostile_safetensors_file_is_refused(home, ours, tmp_path, where, case):
    folder = ours if where == "ours" else shutil.copytree(home / "hf", tmp_path / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(SAFETENSORS[case](load_tensors(path)))
    if where == "ours":
        remanifest(ours)
    refused(folder, tmp_path, ALL if where == "ours" else LOOK, n_head=2)


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.parametrize("where", ["ours", "hf"])
def test_a_safetensors_file_written_otherwise_is_the_same(home, ours, tmp_path, where, case):
    folder = ours if where == "ours" else shutil.copytree(home / "hf", tmp_path / "hf")
    path = folder / "model.safetensors"
    path.write_bytes(HARMLESS[case](load_tensors(path)))
    remanifest(ours)
    same_bits(folder, tmp_path, home, ALL if where == "ours" else LOOK)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_found_by_verify_and_end_a_sample(home, ours, tmp_path, value):
    path = ours / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_tensors(path).items()}
    tensors["ln_f.weight"][5] = value
    path.write_bytes(raw_safetensors(tensors))
    remanifest(ours)
    refused(ours, tmp_path, ("verify",))
    with pytest.raises(RuntimeError, match="not finite"):
        act("sample", ours, tmp_path / "out")
    act("import", ours, tmp_path / "out")  # the same bits: an import judges no weights
    assert W.weights_hash(
        {n: t.read() for n, t in W.open_weights(str(tmp_path / "out")).tensors.items()}
    ) == W.weights_hash(tensors)


# ---------------------------------------------------------------------------------------------- Hugging Face's JSON

CONFIGS = {
    **{f"model_type {value!r}"[:40]: {"model_type": value} for value in ("llama", "gpt_neox", "", 3, ["gpt2"], None, "x" * 10_000)},
    **{f"n_head {value!r}"[:40]: {"n_head": value} for value in (-2, 3, 64, 10**12, 10**30, "2", 2.0, math.nan, [2], {"a": 1}, "x" * 10_000)},
    **{f"{name} {value!r}": {name: value} for name in ("n_layer", "n_embd", "vocab_size", "n_positions") for value in (1, 10**12, "2", -5, [32], math.nan)},
    **{f"{name} {value!r}"[:60]: {name: value} for name, value in (("activation_function", "relu"), ("activation_function", ["gelu_new"]), ("layer_norm_epsilon", 1e-6), ("layer_norm_epsilon", "small"), ("layer_norm_epsilon", [[[[]]]]), ("scale_attn_weights", False), ("scale_attn_by_inverse_layer_idx", True), ("add_cross_attention", 7), ("layer_norm_epsilon", math.nan))},
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_of_another_model_is_refused(home, tmp_path, case):
    folder = shutil.copytree(home / "hf", tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8")) | CONFIGS[case]
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    refused(folder, tmp_path)


@pytest.mark.parametrize(
    "text", [DEEP, "", "[]", "null", "{", LONG, '"gpt2"', '{"a": ' * 5000], ids=lambda t: t[:8]
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "hparams.json"])
def test_json_that_is_none_is_refused(home, tmp_path, name, text):
    folder = shutil.copytree(
        home / ("tf" if name == "hparams.json" else "parts"), tmp_path / "theirs"
    )
    (folder / name).write_text(text, encoding="utf-8")
    refused(folder, tmp_path, n_head=2, named=folder / name)


INDEXES = {
    "none": {}, "null": {"weight_map": None}, "list": {"weight_map": []}, "no tensors": {"weight_map": {}}, "number": {"weight_map": {"a": 3}}, "null file": {"weight_map": {"a": None}},
    **{f"file {f[:24]!r}": {"weight_map": {"wte.weight": f}} for f in ("../hf/model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "nothing", "config.json", "folder", "x" * 5000, "pipe", "endless", "model-0.safetensors/../x", "\x1b[31m")},
    "a tensor of the other part": {"weight_map": {"transformer.wte.weight": "model-0.safetensors"}},
    "a million files": {"weight_map": {str(i): f"part-{i}" for i in range(3000)}}, "a long name": {"weight_map": {"y" * 100_000: "model-0.safetensors"}},
}  # fmt: skip


@pytest.mark.parametrize("case", INDEXES)
def test_an_index_that_points_elsewhere_is_refused(home, tmp_path, case):
    folder = shutil.copytree(home / "parts", tmp_path / "parts")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps(INDEXES[case]), encoding="utf-8"
    )
    refused(folder, tmp_path)


def test_two_tensors_of_one_name_are_refused(home, tmp_path):
    tensors = load_tensors(home / "hf/model.safetensors")
    (tmp_path / "hf.safetensors").write_bytes(
        raw_safetensors(tensors | {"wte.weight": torch.ones(257, 32)})
    )
    refused(tmp_path / "hf.safetensors", tmp_path, n_head=2)


# --------------------------------------------------------------------------------------------------------- pickles


def text_op(text) -> bytes:
    raw = str(text).encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def calls(module: str, name: str, *arguments) -> bytes:
    """Opcodes that call module.name(*arguments) when they are unpickled."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(map(text_op, arguments)) + b"tR"


def zipped(path, pickled: bytes, more=None, kind=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in {
            "x/data.pkl": pickled,
            "x/version": b"3\n",
            "x/byteorder": b"little",
            **(more or {}),
        }.items():
            archive.writestr(name, data)


def opcodes(marker) -> dict[str, bytes]:
    touch = f"open({str(marker)!r}, 'w')"
    inside = b"}" + text_op("wte.weight") + calls("posix", "system", f"touch {marker}") + b"s."
    return {
        "os.system": calls("os", "system", f"touch {marker}") + b".",
        "posix.system": calls("posix", "system", f"touch {marker}") + b".",
        "subprocess": calls("subprocess", "getoutput", f"touch {marker}") + b".",
        "open": calls("builtins", "open", marker, "w") + b".",
        "eval": calls("builtins", "eval", touch) + b".",
        "exec": calls("builtins", "exec", touch) + b".",
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\n" + text_op("__call__") + b"tR(" + text_op(f"touch {marker}") + b"tR.",
        "torch's own": calls("torch.hub", "_load_local", marker, "x") + b".",
        "torch.load": calls("torch", "load", marker) + b".",
        "numpy": calls("numpy", "fromfile", marker) + b".",
        "pathlib": calls("pathlib", "Path.touch", marker) + b".",
        "importlib": calls("importlib", "import_module", "antigravity") + b".",
        "instance": f"(iposix\nsystem\n{marker}\n.".encode(),
        "object": b"(" + b"cposix\nsystem\n" + text_op(f"touch {marker}") + b"o.",
        "newobj": b"cposix\nsystem\n(" + text_op(f"touch {marker}") + b"t\x81.",
        "stack global": text_op("posix") + text_op("system") + b"\x93(" + text_op(f"touch {marker}") + b"tR.",
        "setstate": b"ctorch._utils\n_rebuild_tensor_v2\n)\x81}" + text_op("x") + calls("os", "system", f"touch {marker}") + b"sb.",
        "inside a dict": inside,
        "inside model": b"}" + text_op("model") + inside[:-1] + b"s.",
        "persistent id": b"(" + text_op("storage") + b"cos\nsystem\n" + text_op("0") + text_op("cpu") + b"K\x01tQ.",
        "no end": calls("os", "system", f"touch {marker}"),
        "nothing": b".", "pop": b"0.", "mark": b"(" * 10_000, "memo": b"j\xff\xff\xff\x7f.", "put": b"}r\xff\xff\xff\x7f.",
        "long text": b"X\xff\xff\xff\x7fabc.", "long bytes": b"\x8e" + (2**62).to_bytes(8, "little") + b"x.", "frame": b"\x95" + (2**62).to_bytes(8, "little") + b".",
        "deep": b"(" * 9_000 + b"t" * 9_000 + b".", "long int": b"\x8b\xff\xff\xff\x7f.", "protocol 255": b"\x80\xff}.",
        "laughs": b"]" + b"".join(b"q\x00(h\x00h\x00h\x00h\x00l" for _ in range(40)) + b".",
    }  # fmt: skip


NAMES = sorted(opcodes("x"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("wrapped", ["zip", "bare"])
def test_no_pickle_runs_code(tmp_path, case, wrapped):
    marker = tmp_path / "it-ran"
    data = b"\x80\x02" + opcodes(marker)[case]
    for name in ("x.pt", "x.pth", "x.bin"):
        zipped(tmp_path / name, data) if wrapped == "zip" else (tmp_path / name).write_bytes(data)
        refused(tmp_path / name, tmp_path, ("info",) if name != "x.pt" else LOOK, n_head=2)
    (tmp_path / "hf").mkdir()
    shutil.copy(tmp_path / "x.bin", tmp_path / "hf/pytorch_model.bin")
    refused(tmp_path / "hf", tmp_path)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_old_torch_files_do_not_run_code_either(tmp_path, home):
    marker, magic = tmp_path / "it-ran", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    for n, code in enumerate(opcodes(marker).values()):
        path = tmp_path / f"{n}.pt"
        path.write_bytes(magic + b"\x80\x02M\xe9\x03." + b"\x80\x02}." + b"\x80\x02" + code)
        refused(path, tmp_path, ("import",), n_head=2)
    assert not marker.exists()
    model = torch.load(home / "nano.pt", weights_only=True)["model"]
    torch.save(model, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    same_bits(tmp_path / "old.pt", tmp_path, home, n_head=2)
    (tmp_path / "old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:-1000])
    refused(tmp_path / "old.pt", tmp_path, n_head=2)


def nothing_stored(shape):
    return torch.zeros(1).expand(shape)


CONTENTS = {
    "list": lambda t: list(t.values()), "tuple": lambda t: tuple(t.items()), "tensor": lambda t: t["wte.weight"], "none": lambda t: None, "text": lambda t: "weights", "nothing": lambda t: {},
    "number for a tensor": lambda t: t | {"ln_f.bias": 3}, "none for a tensor": lambda t: t | {"ln_f.bias": None}, "list for a tensor": lambda t: t | {"ln_f.bias": [0.0] * 32}, "dict for a tensor": lambda t: t | {"ln_f.bias": {"x": t["ln_f.bias"]}},
    "numbers as names": lambda t: dict(enumerate(t.values())), "model list": lambda t: {"model": list(t.values())}, "model number": lambda t: {"model": 3}, "model nothing": lambda t: {"model": {}},
    "model in model in": lambda t: {"model": {"a": {"b": t}}}, "only settings": lambda t: {"model_args": {"n_head": 2}},
    "integers": lambda t: t | {"ln_f.bias": torch.ones(32, dtype=torch.int64)}, "int8": lambda t: {k: (x * 127).to(torch.int8) for k, x in t.items()}, "complex": lambda t: t | {"ln_f.bias": torch.ones(32, dtype=torch.complex64)},
    "float8": lambda t: {k: x.to(torch.float8_e4m3fn) for k, x in t.items()}, "truths": lambda t: t | {"ln_f.bias": torch.ones(32, dtype=torch.bool)},
    "sparse": lambda t: t | {"wte.weight": t["wte.weight"].to_sparse()}, "csr": lambda t: t | {"wte.weight": t["wte.weight"].to_sparse_csr()}, "meta": lambda t: t | {"wte.weight": t["wte.weight"].to("meta")},
    "quantized": lambda t: t | {"wte.weight": torch.quantize_per_tensor(t["wte.weight"], 0.1, 0, torch.qint8)},
    "terabytes of one number": lambda t: t | {"wte.weight": nothing_stored((10**7, 32)), "wpe.weight": nothing_stored((10**7, 32))}, "more than there is": lambda t: t | {"wte.weight": nothing_stored((2**40, 2**20))},
    "one number": lambda t: {k: nothing_stored(x.shape) for k, x in t.items()}, "wide": lambda t: t | {"wte.weight": nothing_stored((257, 10**9)), "wpe.weight": nothing_stored((32, 10**9))},
    "no blocks": lambda t: {k: x for k, x in t.items() if not k.startswith("h.")}, "a name of a million": lambda t: t | {"x" * 1_000_000: torch.ones(1)},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONTENTS)
def test_a_torch_file_of_something_else_is_refused(home, tmp_path, case):
    torch.save(CONTENTS[case](small_model().state_dict()), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path, n_head=2)


def test_torch_files_with_odd_but_whole_contents_are_the_same(home, tmp_path):
    model = small_model()
    for contents in (
        dict(model.named_parameters()),  # which ask for gradients
        {
            "state_dict": {f"module._orig_mod.{k}": t for k, t in model.state_dict().items()},
            "epoch": 3,
        },
        {
            k: torch.stack([t, t])[1] for k, t in model.state_dict().items()
        },  # views of something larger
        {k: t.t().contiguous().t() for k, t in model.state_dict().items()},
    ):
        torch.save(contents, tmp_path / "x.pt")
        same_bits(tmp_path / "x.pt", tmp_path, home, n_head=2)


def test_archives_that_are_bombs_or_lies_are_refused(home, tmp_path):
    with zipfile.ZipFile(home / "nano.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "x.pt"
    pickled = next(data for name, data in members.items() if name.endswith("data.pkl"))

    def write(members, kind=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path

    refused(write(members, zipfile.ZIP_DEFLATED), tmp_path, n_head=2)  # torch.load would read it
    zipped(path, b"\x80\x02" + text_op(" " * 50_000_000) + b".", kind=zipfile.ZIP_DEFLATED)
    refused(path, tmp_path, n_head=2)
    refused(
        write({name: data for name, data in members.items() if not name.endswith("data.pkl")}),
        tmp_path,
        n_head=2,
    )
    refused(
        write({name: data for name, data in members.items() if not name.endswith("/data/3")}),
        tmp_path,
        n_head=2,
    )
    refused(
        write(
            {
                name: data[: len(data) // 2] if "/data/" in name else data
                for name, data in members.items()
            }
        ),
        tmp_path,
        n_head=2,
    )
    refused(
        write({f"../{name}": data for name, data in members.items()} | {"/etc/passwd": b""}),
        tmp_path,
        n_head=2,
    )
    refused(write({}), tmp_path, n_head=2)
    assert pickled.count(b"K ") and not (tmp_path.parent / "data.pkl").exists()
    huge = pickled.replace(b"M \x20", b"J\xff\xff\xff\x7f").replace(
        b"K ", b"J\xff\xff\xff\x7f"
    )  # a width of 2**31 - 1
    refused(
        write(
            {name: huge if name.endswith("data.pkl") else data for name, data in members.items()}
        ),
        tmp_path,
        n_head=2,
    )


# ------------------------------------------------------------------------------------ nanoGPT, LLMs-from-scratch, OpenAI

ARGUMENTS = {
    **{f"{name} {value!r}"[:50]: {name: value} for name in ("n_layer", "n_embd", "vocab_size", "block_size") for value in (1, 10**12, "2", [2], math.nan) if not isinstance(value, list)},
    **{f"n_head {value!r}"[:50]: {"n_head": value} for value in (-1, 3, 5.0, "2", 10**30, math.nan)},
    "no bias, but the tensors": {"model_type": "gpt2-of-theirs"},
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_nanogpt_settings_of_another_model_are_refused(home, tmp_path, case):
    found = torch.load(home / "nano.pt", weights_only=True)
    found["model_args"] |= ARGUMENTS[case]
    torch.save(found, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path)


@pytest.mark.parametrize(
    "value", [None, 3, [], "x", {}, {"n_head": torch.ones(3)}, {"n_head": [2]}, {1: 2}], ids=str
)
def test_nanogpt_settings_that_are_none_leave_the_heads_to_be_said(home, tmp_path, value):
    found = torch.load(home / "nano.pt", weights_only=True) | {"model_args": value}
    torch.save(found, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path)
    same_bits(tmp_path / "x.pt", tmp_path, home, n_head=2)


def test_a_bias_that_is_there_is_not_replaced(home, tmp_path):
    found = torch.load(home / "nano.pt", weights_only=True)
    found["model_args"]["bias"] = False
    torch.save(found, tmp_path / "x.pt")
    same_bits(tmp_path / "x.pt", tmp_path, home)


SCRATCH = {
    "no key": lambda t: t.pop("trf_blocks.0.att.W_key.weight"), "no bias of the key": lambda t: t.pop("trf_blocks.1.att.W_key.bias"), "no query": lambda t: t.pop("trf_blocks.1.att.W_query.weight"),
    "no tokens": lambda t: t.pop("tok_emb.weight"), "no positions": lambda t: t.pop("pos_emb.weight"), "no block 0": lambda t: [t.pop(k) for k in list(t) if ".0." in k[:14]],
    "query a number": lambda t: t.update({"trf_blocks.0.att.W_query.weight": torch.tensor(1.0)}), "all numbers": lambda t: t.update({f"trf_blocks.0.att.W_{n}.weight": torch.tensor(1.0) for n in ("query", "key", "value")}),
    "value narrower": lambda t: t.update({"trf_blocks.0.att.W_value.weight": torch.ones(32, 31)}), "value flat": lambda t: t.update({"trf_blocks.0.att.W_value.weight": torch.ones(1024)}),
    "key of halves": lambda t: t.update({"trf_blocks.0.att.W_key.weight": torch.ones(32, 32, dtype=torch.int32)}), "a block more": lambda t: t.update({"trf_blocks.7.att.W_query.weight": torch.ones(32, 32)}),
    "a block of no number": lambda t: t.update({"trf_blocks.x.att.W_query.weight": torch.ones(32, 32)}), "grouped keys": lambda t: [t.update({f"trf_blocks.{i}.att.W_{n}.weight": torch.ones(16, 32)}) for i in (0, 1) for n in ("key", "value")],
    "norm of two": lambda t: t.update({"final_norm.scale": torch.ones(2)}), "head of another width": lambda t: t.update({"out_head.weight": torch.ones(257, 16)}),
}  # fmt: skip


@pytest.mark.parametrize("case", SCRATCH)
def test_a_broken_model_of_llms_from_scratch_is_refused(home, tmp_path, case):
    tensors = torch.load(home / "scratch.pth", weights_only=True)
    SCRATCH[case](tensors)
    torch.save(tensors, tmp_path / "x.pth")
    refused(tmp_path / "x.pth", tmp_path, n_head=2)


@pytest.mark.parametrize(
    "change",
    [
        {"model/wte": torch.ones(257, 32, dtype=torch.int64)},
        {"model/h0/attn/c_attn/w": torch.ones(2, 32, 96)},
        {"model/h0/mlp/c_fc/w": torch.ones(4)},
        {"global_step": torch.tensor(3)},
        {"model/h9/x/w": torch.ones(3)},
        {"wte": torch.ones(257, 32)},
        {"model/ln_f/g": torch.ones(())},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_tensorflow_checkpoint_of_something_else_is_refused(home, tmp_path, change):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    save_tensorflow(folder / "model.ckpt", openai_weights(small_model()) | change)
    refused(folder, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        'model_checkpoint_path: "../../x"',
        'model_checkpoint_path: "/etc/passwd"',
        "model_checkpoint_path: ",
        "\x00" * 1000,
        'model_checkpoint_path: "' + "x" * 100_000 + '"',
    ],
    ids=lambda t: t[:30],
)
def test_the_name_of_the_newest_tensorflow_checkpoint_leads_nowhere_else(home, tmp_path, text):
    folder = shutil.copytree(home / "tf", tmp_path / "tf")
    (folder / "checkpoint").write_text(text, encoding="utf-8")
    same_bits(folder, tmp_path, home)


# ------------------------------------------------------------------------------------------------------ odd places

PLACES = {
    "nothing": lambda p: p, "empty folder": lambda p: p.mkdir(), "pipe": os.mkfifo, "loop": lambda p: p.symlink_to(p.name), "endless": lambda p: p.symlink_to("/dev/zero"), "null": lambda p: p.symlink_to("/dev/null"),
    "empty file": lambda p: p.touch(), "folder of a folder": lambda p: (p / "checkpoints").mkdir(parents=True), "empty checkpoint": lambda p: (p / "checkpoints/step_000001").mkdir(parents=True),
    "file for checkpoints": lambda p: (p.mkdir(), (p / "checkpoints").touch()), "text": lambda p: p.write_text("weights", encoding="utf-8"), "pipe for the index": lambda p: (p.mkdir(), os.mkfifo(p / "x.index")),
    "folder for the weights": lambda p: (p / "model.safetensors").mkdir(parents=True), "folder for the pickle": lambda p: (p / "pytorch_model.bin").mkdir(parents=True), "pipe for the weights": lambda p: (p.mkdir(), os.mkfifo(p / "model.safetensors")),
    "pipe for the pickle": lambda p: (p.mkdir(), os.mkfifo(p / "pytorch_model.bin")), "pipe for the manifest": lambda p: (p.mkdir(), os.mkfifo(p / "MANIFEST.json")),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("suffix", ["", ".safetensors", ".pt"])
def test_what_is_no_place_of_weights_is_refused(tmp_path, case, suffix):
    path = tmp_path / f"place{suffix}"
    PLACES[case](path)
    refused(path, tmp_path, ALL)


def test_a_pipe_beside_the_weights_is_not_waited_for(home, tmp_path):
    for n, (folder, name) in enumerate(
        (
            ("hf", "config.json"),
            ("hf", "tokenizer.json"),
            ("parts", "model.safetensors.index.json"),
            ("tf", "hparams.json"),
        )
    ):
        copy = shutil.copytree(home / folder, tmp_path / str(n))
        instead(os.mkfifo)(copy / name)
        with pytest.raises(BAD_INPUT), contextlib.redirect_stdout(io.StringIO()):
            W.main(W.ImportConfig(str(copy), str(tmp_path / "out")))
        assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- as people start it


def test_the_scripts_tell_one_line_each(home, tmp_path):
    folder = tmp_path / "step_000003"
    shutil.copytree(home / "run/checkpoints/step_000003", folder)
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    (folder / "trainer_state.json").write_text(
        json.dumps(state | {"model_config": asdict(SHAPE) | {"n_embd": 10**12}}), encoding="utf-8"
    )
    remanifest(folder)
    evil, marker = tmp_path / "evil.pt", tmp_path / "it-ran"
    zipped(evil, b"\x80\x02" + opcodes(marker)["os.system"])
    os.mkfifo(tmp_path / "pipe.pt")
    truncated = shutil.copytree(home / "hf", tmp_path / "cut")
    os.truncate(truncated / "model.safetensors", 70_000)
    for line in (
        ("wt_load.py", "info", folder),
        ("gpt_train.py", "--checkpoint", folder),
        ("wt_load.py", "import", evil, "out"),
        ("wt_load.py", "verify", tmp_path / "pipe.pt"),
        ("wt_load.py", "import", truncated, "out"),
    ):
        named = next(str(a) for a in line if isinstance(a, Path))
        assert named in one_error_line(run(*line, cwd=tmp_path, timeout=60), 2)
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_the_scripts_refuse_pickles_and_tokenizers_too(home, tmp_path):
    nan = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "nan")
    tensors = {name: t * math.nan for name, t in load_tensors(nan / "model.safetensors").items()}
    (nan / "model.safetensors").write_bytes(raw_safetensors(tensors))
    remanifest(nan)
    deep = shutil.copytree(home / "run/checkpoints/step_000003", tmp_path / "deep")
    (deep / "tokenizer.json").write_text(DEEP, encoding="utf-8")
    remanifest(deep)
    family = shutil.copytree(home / "hf", tmp_path / "family")
    (family / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    flipped = shutil.copytree(home / "run", tmp_path / "flipped")
    changed(0.5, flip)(flipped / "checkpoints/step_000003/model.safetensors")
    for code, line in (
        (1, ("gpt_train.py", "--checkpoint", nan)),
        (2, ("gpt_train.py", "--checkpoint", deep)),
        (2, ("wt_load.py", "verify", family)),
        (2, ("wt_load.py", "info", flipped)),
        (2, ("wt_load.py", "import", "hf:../../nothing", "out")),
    ):
        named = next((str(a) for a in line if isinstance(a, Path)), "hf:../../nothing")
        told = one_error_line(run(*line, cwd=tmp_path, timeout=60), code)
        assert code == 1 or named in told, told

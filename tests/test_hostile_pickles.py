"""Hostile files of torch.save: no code of theirs runs, and only plain tensors are read."""

import shutil
import zipfile

import pytest
import torch
import weight_cases
from weight_cases import LOOK, opcodes, refused, same_bits, small_model, text_op, zipped

home = weight_cases.home
bounded = weight_cases.bounded

# --------------------------------------------------------------------------------- code in a pickle


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", sorted(opcodes("x")))
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


# ------------------------------------------------------------------- a pickle without a plain model


def one_number(*shape):
    """A tensor of any size whose file holds one number: all its strides are 0."""
    return torch.zeros(1).expand(shape)


def with_bias(value):
    return lambda t: t | {"ln_f.bias": value}


def with_tokens(change):
    return lambda t: t | {"wte.weight": change(t["wte.weight"])}


def with_embeddings(tokens, positions):
    return lambda t: t | {"wte.weight": tokens, "wpe.weight": positions}


def of_each(change):
    return lambda t: {name: change(x) for name, x in t.items()}


CONTENTS = {
    "list": lambda t: list(t.values()),
    "tuple": lambda t: tuple(t.items()),
    "tensor": lambda t: t["wte.weight"],
    "none": lambda t: None,
    "text": lambda t: "weights",
    "nothing": lambda t: {},
    "number for a tensor": with_bias(3),
    "none for a tensor": with_bias(None),
    "list for a tensor": with_bias([0.0] * 32),
    "dict for a tensor": lambda t: t | {"ln_f.bias": {"x": t["ln_f.bias"]}},
    "numbers as names": lambda t: dict(enumerate(t.values())),
    "model list": lambda t: {"model": list(t.values())},
    "model number": lambda t: {"model": 3},
    "model nothing": lambda t: {"model": {}},
    "model in model in": lambda t: {"model": {"a": {"b": t}}},
    "only settings": lambda t: {"model_args": {"n_head": 2}},
    "integers": with_bias(torch.ones(32, dtype=torch.int64)),
    "int8": of_each(lambda x: (x * 127).to(torch.int8)),
    "complex": with_bias(torch.ones(32, dtype=torch.complex64)),
    "float8": of_each(lambda x: x.to(torch.float8_e4m3fn)),
    "truths": with_bias(torch.ones(32, dtype=torch.bool)),
    "sparse": with_tokens(lambda x: x.to_sparse()),
    "csr": with_tokens(lambda x: x.to_sparse_csr()),
    "meta": with_tokens(lambda x: x.to("meta")),
    "quantized": with_tokens(lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
    "terabytes of one number": with_embeddings(one_number(10**7, 32), one_number(10**7, 32)),
    "more than there is": with_tokens(lambda x: one_number(2**40, 2**20)),
    "one number": of_each(lambda x: one_number(*x.shape)),
    "wide": with_embeddings(one_number(257, 10**9), one_number(32, 10**9)),
    "no blocks": lambda t: {name: x for name, x in t.items() if not name.startswith("h.")},
    "a name of a million": lambda t: t | {"x" * 1_000_000: torch.ones(1)},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONTENTS)
def test_a_torch_file_of_something_else_is_refused(home, tmp_path, case):
    torch.save(CONTENTS[case](small_model().state_dict()), tmp_path / "x.pt")
    refused(tmp_path / "x.pt", tmp_path, n_head=2)


def test_torch_files_with_odd_but_whole_contents_are_the_same(home, tmp_path):
    model = small_model()
    tensors = model.state_dict()
    asking_for_gradients = dict(model.named_parameters())
    wrapped = {f"module._orig_mod.{name}": t for name, t in tensors.items()}
    views = {name: torch.stack([t, t])[1] for name, t in tensors.items()}
    transposed = {name: t.t().contiguous().t() for name, t in tensors.items()}
    for contents in (
        asking_for_gradients,
        {"state_dict": wrapped, "epoch": 3},
        views,
        transposed,
    ):
        torch.save(contents, tmp_path / "x.pt")
        same_bits(tmp_path / "x.pt", tmp_path, home, n_head=2)


# -------------------------------------------------------------------------------------- the archive


def test_archives_that_are_bombs_or_lies_are_refused(home, tmp_path):
    with zipfile.ZipFile(home / "nano.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "x.pt"

    def refused_with(members, kind=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        refused(path, tmp_path, n_head=2)

    def without(ending):
        return {name: data for name, data in members.items() if not name.endswith(ending)}

    refused_with(members, zipfile.ZIP_DEFLATED)  # torch.load would read it
    zipped(path, b"\x80\x02" + text_op(" " * 50_000_000) + b".", kind=zipfile.ZIP_DEFLATED)
    refused(path, tmp_path, n_head=2)
    refused_with(without("data.pkl"))
    refused_with(without("/data/3"))
    half = {name: data[: len(data) // 2] for name, data in members.items() if "/data/" in name}
    refused_with(members | half)
    refused_with({f"../{name}": data for name, data in members.items()} | {"/etc/passwd": b""})
    refused_with({})
    assert not (tmp_path.parent / "data.pkl").exists()
    pickle_name = next(name for name in members if name.endswith("data.pkl"))
    pickled, huge = members[pickle_name], b"J\xff\xff\xff\x7f"  # a width of 2**31 - 1
    assert pickled.count(b"K ")
    pickled = pickled.replace(b"M \x20", huge).replace(b"K ", huge)
    refused_with(members | {pickle_name: pickled})

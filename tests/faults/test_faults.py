"""
The fault harness on the production trainer: killed at any instant, a run ends bit-identical.

    python -m pytest tests/faults                 # two of each kind
    python -m pytest tests/faults --nightly       # thirty of each kind on all

The hash compared is that of weights, optimizer state, every logged loss and the samples
(hash_run.py). The harness is not part of the project; without it these tests skip.
"""

import importlib.util
import re
import sys

import pytest
from conftest import ROOT, SHARED

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the harness leaves files to the collector

TARGETS, MANY = ("none", "thread", "ddp", "fsdp", "galore", "muon"), ("ddp", "fsdp")
Q_TARGETS = ("q_lora", "q_qlora", "q_lora_ddp")  # of recipes/q_lora
DEEPSPEED = tuple(f"deepspeed-{stage}" for stage in range(4))
# test -> (targets every time, targets with --nightly)
WHERE = {
    "test_kill": (
        ("none", "ddp", "fsdp", "llama", "q_lora"),
        (*TARGETS, "llama", *Q_TARGETS, *DEEPSPEED),
    ),
    "test_kill_before_file_events": (("none", "ddp"), TARGETS),
    "test_signals": (("none", "ddp"), (*TARGETS, *Q_TARGETS)),
    "test_damaged_checkpoints": (("none",), ("none", "ddp", "fsdp", *Q_TARGETS)),
    "test_damaged_and_shared_caches": (("none",), ("none", "ddp")),
    "test_hostile_files_and_places": ((), ("none", "ddp")),
    "test_a_disk_that_refuses": ((), ("none", "ddp")),
    "test_a_stale_cache": (("none",), ("none", "ddp")),
    "test_many_processes": (("ddp",), (*MANY, "q_lora_ddp")),
}


def pytest_generate_tests(metafunc):
    """Each test on its targets; those of the nightly run are skipped by name otherwise."""
    always, nightly = WHERE[metafunc.function.__name__]
    skip = (
        () if metafunc.config.getoption("--nightly") else pytest.mark.skip(reason="needs --nightly")
    )
    targets = [pytest.param(target, marks=() if target in always else skip) for target in nightly]
    metafunc.parametrize("bench", targets, indirect=True, scope="module")


@pytest.fixture(scope="module")
def bench(request, tmp_path_factory):
    """The harness on one target, with its reference run."""
    if not (SHARED / "faults/faultlib.py").exists():
        pytest.skip("needs ../shared/faults")
    sys.path.insert(0, str(SHARED / "faults"))
    try:
        import archives  # noqa: F401  the harness imports it when it needs it
        import faultlib
    finally:
        sys.path.pop(0)
    name, _, stage = request.param.partition("-")
    if stage and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the package deepspeed")
    target = faultlib.Target.load(ROOT / f"tests/faults/{name}.toml")
    target.env["PYTHONPATH"] = f"{SHARED / 'faults/inject'}:{ROOT}"
    target.env["ZERO_STAGE"] = stage or "0"
    bench = faultlib.Bench(target, seed=20, root=tmp_path_factory.mktemp(request.param))
    report = bench.baseline()
    assert not report.problems, str(report)
    yield bench
    bench.close()


@pytest.fixture
def n(request) -> int:
    return 30 if request.config.getoption("--nightly") else 2


# torchrun reports ranks that ended with a traceback of its own, whose last line is a ruler. DDP
# imports the compiler, which looks for matplotlib and meets the harness's "not installed".
OF_TORCHRUN = re.compile(r"(traceback|matplotlib not installed: exit 1): =+$", re.IGNORECASE)


def is_many(bench) -> bool:
    """Whether the target runs under torchrun."""
    return bool(bench.t.train_ddp)


def check(report, many: bool = False) -> None:
    """No problem, but for what torchrun (`many`) adds."""
    print(report)
    assert report.trials, "; ".join(report.notes)
    assert not [p for p in report.problems if not (many and OF_TORCHRUN.search(p))], str(report)


def test_kill(bench, n):
    check(bench.kill(n))


def test_kill_before_file_events(bench, n):
    check(bench.every_event(limit=n))


def test_signals(bench, n):
    if not is_many(bench):
        check(bench.signals(n))
        return
    # to the ranks: torchrun itself only polls ten times a second, in which time they do ten steps
    check(bench.signals(n, scope="child"), many=True)


def test_damaged_checkpoints(bench, n):
    check(bench.mutate(n=n), many=is_many(bench))


@pytest.mark.parametrize("suite", ["mutate_cache", "concurrent"])
def test_damaged_and_shared_caches(bench, suite, n):
    check(
        getattr(bench, suite)(**{"rounds" if suite == "concurrent" else "n": n}),
        many=is_many(bench),
    )


def test_a_stale_cache(bench):
    check(bench.stale_cache())


@pytest.mark.parametrize(
    "suite", ["inputs", "hostile", "configs", "durability", "surroundings", "archives"]
)
def test_hostile_files_and_places(bench, suite):
    if suite == "archives" and bench.t.name != "none":
        pytest.skip("prep_dataset.py unpacks on one process")
    check(getattr(bench, suite)(), many=is_many(bench))


def test_a_disk_that_refuses(bench, n, monkeypatch):
    # the run continues and retries at each checkpoint, so it loses the steps since the last one
    monkeypatch.setattr(bench.t, "save_every", 0)
    check(bench.disk(n), many=is_many(bench))


@pytest.mark.parametrize("suite", ["ranks", "world"])
def test_many_processes(bench, suite, n):
    check(getattr(bench, suite)(n=max(1, n // 3)))

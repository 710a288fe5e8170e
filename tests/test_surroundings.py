"""What a shell, a container or another program leaves around a run changes nothing, or is told."""

import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Dataset

from scd.data.lists import path_problem
from scd.data.loader import training_batches
from scd.errors import ScdError
from scd.evaluation.metric_weights import MetricUnavailable, weights_path
from scd.options import load_options
from scd.training.launch import make_accelerator, run_experiment
from scd.training.run_log import read_log
from scd.utils import processes, startup
from scd.utils.signals import STOP_SIGNALS, stop_request

ROOT = Path(__file__).parent.parent
TINY = ROOT / "options/scd_doom_tiny.yml"
# What accelerate asks about other processes.
LAUNCH = (*processes.LAUNCH, *processes.MPI_SIZES)


def run_command(code: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `code` as a command of this project does, with only these variables and PATH."""
    program = (
        "import sys; from scd.cli import run_command\n"
        f"def f():\n {code}\nsys.exit(run_command(f, 'f'))"
    )
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(home)}
    variables |= {"OMP_WAIT_POLICY": "passive", **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=variables, capture_output=True, text=True, cwd=home
    )


# Accelerate's variables


@pytest.mark.usefixtures("fresh_accelerate")
def test_variables_of_accelerate_change_no_run(doom_root, tmp_path, monkeypatch, capfd):
    """The same loss and gradient norm to the bit; what contradicts the options is named once."""
    overrides = [
        f"data.root={doom_root}",
        f"output_root={tmp_path}",
        *("data.source=video", "autoencoder.path=null", "data.frames=4", "model.patch_size=16"),
        *("model.heads=1", "model.encoder_layers=1", "model.decoder_layers=1"),
        *("train.steps=2", "train.batch_size=1", "train.workers=0", "train.mixed_precision=fp32"),
        *("train.gradient_accumulation=2", "train.log_every=1"),
        *("eval.context_frames=2", "eval.new_frames=2", "eval.videos=2"),
    ]
    logs = []
    for name in ("alone", "surrounded"):
        if name == "surrounded":
            monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
            monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
            monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")  # as launchers set it
        run_experiment(load_options(TINY, [*overrides, f"name={name}"]))
        entries = [e for e in read_log(tmp_path / name / "log.jsonl") if "loss" in e]
        logs.append([(e["loss"], e["grad_norm"]) for e in entries])
    assert logs[0] == logs[1] and len(logs[0]) == 2
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note: ACC")]
    assert notes == [
        "note: ACCELERATE_DYNAMO_BACKEND=EAGER, ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4, "
        "ACCELERATE_MIXED_PRECISION=bf16: ignored, the options file decides"
    ]


@pytest.mark.usefixtures("fresh_accelerate")
def test_what_launchers_set_is_not_reported(monkeypatch, capfd):
    for name, value in (
        ("MIXED_PRECISION", "no"),
        ("DYNAMO_BACKEND", "NO"),
        ("DYNAMO_USE_FULLGRAPH", "False"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    overrides = ["train.mixed_precision=fp32", "train.gradient_accumulation=2"]
    make_accelerator(load_options(TINY, overrides))
    assert "note:" not in capfd.readouterr().err


# Left over from another launch


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs accelerate goes by LOCAL_RANK alone")
@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "2"},
        {"LOCAL_RANK": "0"},
        {"PMI_SIZE": "4"},
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    ],
)
def test_a_leftover_launch_is_named(left, monkeypatch):
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ScdError) as caught:
        processes.processes()
    assert f"unset {' '.join(left)}" in str(caught.value) and "MASTER_ADDR" in str(caught.value)


@pytest.mark.usefixtures("fresh_accelerate")
def test_processes_that_never_come_are_waited_for_only_so_long(monkeypatch):
    from datetime import timedelta

    monkeypatch.setattr(processes, "LONGEST_START", timedelta(seconds=1))
    values = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**values, "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ScdError, match=r"WORLD_SIZE=2, .*unset WORLD_SIZE RANK LOCAL_RANK MASTER"):
        processes.processes()


# Shared memory


class FullMemory(Dataset):
    """Fails as torch does where /dev/shm is full."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_7_5_0>: "
            "No space left on device (28)"
        )


def test_small_shared_memory_is_one_line_with_both_remedies():
    options = SimpleNamespace(batch_size=2, gradient_accumulation=1, steps=2, workers=1)
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    with (
        pytest.raises(ScdError, match=r"/dev/shm has .*--shm-size.*train\.workers=0") as caught,
        training_batches(0, FullMemory(), options, alone) as batches,  # type: ignore[arg-type]
    ):
        next(batches)
    assert "\n" not in str(caught.value)


def test_data_workers_end_with_the_training_though_its_batches_are_kept():
    options = SimpleNamespace(batch_size=2, gradient_accumulation=1, steps=2, workers=1)
    alone = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))
    clips = [torch.zeros(1)] * 4
    with training_batches(0, clips, options, alone) as batches:  # type: ignore[arg-type]
        first = next(batches)
        assert len(multiprocessing.active_children()) == 1
    assert not multiprocessing.active_children()
    assert first.shape == (2, 1) and batches is not None


# No home, no name


def test_without_home_and_name_caches_have_a_place(tmp_path, monkeypatch, capfd):
    import pwd

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name in ("HOME", "SCD_CACHE", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(MetricUnavailable, match="set HOME, or SCD_CACHE"):
        weights_path("lpips")
    monkeypatch.setenv("HOME", "")  # as good as none; and what is set below goes with the test
    monkeypatch.setenv("USER", "")
    startup.prepare_environment()
    home = tmp_path / f"scd-home-{os.getuid()}"
    assert weights_path("lpips") == home / ".cache/scd/metrics/lpips.safetensors"
    assert home.stat().st_mode & 0o777 == 0o700
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"caches go to {home}; set HOME" in err
    import getpass

    assert getpass.getuser() == f"uid{os.getuid()}"


def test_a_home_that_others_can_write_to_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "gone"))
    taken = tmp_path / f"scd-home-{os.getuid()}"
    taken.mkdir()
    taken.chmod(0o777)
    startup.prepare_environment()
    assert os.environ["HOME"].startswith(f"{taken}-")


# A locale that is not UTF-8


@pytest.mark.slow
@pytest.mark.parametrize(
    "locale",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_no_letter_is_too_much_for_a_locale(tmp_path, locale):
    log = tmp_path / "log.jsonl"
    code = f"""print('PSNR \\u2191')
 from pathlib import Path
 from scd.training.run_log import RunLog, read_log
 RunLog(Path({str(log)!r}), 0, True).write({{'step': 0, 'name': '\\u2191'}})
 assert read_log(Path({str(log)!r}))[0]['name'] == '\\u2191'
 from scd.errors import ScdError
 raise ScdError('\\u2191')"""
    done = run_command(code, tmp_path, HOME=str(tmp_path), **locale)
    assert (done.returncode, done.stdout) == (1, "PSNR \\u2191\n")
    assert done.stderr == "error: \\u2191\n"


def test_names_that_a_locale_cannot_open_are_one_line(tmp_path, monkeypatch):
    done = run_command(
        "open('caf\\u00e9')",
        tmp_path,
        HOME=str(tmp_path),
        **{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: f: 'caf\\xe9' cannot be written in ")
    assert "PYTHONUTF8=1" in done.stderr and done.stderr.count("\n") == 1
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")
    assert path_problem("plain.mp4") is None
    assert path_problem("caf\u00e9.mp4") == (
        "cannot be opened in this locale, whose names are ascii: set PYTHONUTF8=1"
    )


# The end of a terminal


HANGUP = """
import os, signal, sys
from scd.utils.signals import stop_request
with stop_request() as request:
    print("ready", flush=True)
    while request.signal is None:
        signal.pause()
    print("not an error", flush=True)
    open(sys.argv[1], "w").write(request.signal.name)
"""


def test_a_run_outlives_its_terminal_until_it_has_saved(tmp_path):
    """Its output goes to a terminal that is gone when it is told so: that must not end it."""
    saved = tmp_path / "saved"
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", HANGUP, str(saved)])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)  # the kernel sends SIGHUP to the session
    assert os.waitpid(child, 0)[1] == 0
    assert saved.read_text() == "SIGHUP"


def test_signals_mean_afterwards_what_they_meant_before():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop_request() as request:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
    assert request.signal == signal.SIGUSR1  # the first
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
        assert request.signal is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("nohup", [False, True])
def test_several_processes_outlive_their_terminal_under_nohup_too(nohup, tmp_path):
    """Torchrun would handle the signal, and its processes then no longer inherit that it is not."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PET_SIGNALS_TO_HANDLE $*"\n')
    python.chmod(0o755)
    script = f"source scripts/common.sh; find_python() {{ echo {python}; }}; launch train"
    command = [*(["nohup"] if nohup else []), "bash", "-c", script]
    plain = {key: value for key, value in os.environ.items() if key != "PET_SIGNALS_TO_HANDLE"}
    found = subprocess.run(
        command,
        env={**plain, "NUM_GPUS": "0", "NUM_PROCS": "2"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGHUP, signal.SIG_DFL
        ),  # the tests may be under it
    ).stdout
    signals, rest = found.split(maxsplit=1)
    assert "torch.distributed.run" in rest and "SIGTERM" in signals
    assert ("SIGHUP" in signals.split(",")) != nohup


# Another working directory


def test_own_files_are_found_from_any_folder(tmp_path, monkeypatch):
    from scd.data.published import AUTOENCODERS
    from scd.models.autoencoder import encoder_hash, load_codec
    from scd.utils.paths import project_file

    monkeypatch.chdir(tmp_path)
    assert load_options("options/scd_doom_tiny.yml").name == "scd_doom_tiny"
    for source in AUTOENCODERS.values():
        assert load_options(project_file(source.options)).task == "autoencoder"
    path = "assets/pretrained/dcae_doom"
    assert load_codec(path).channels > 0 and len(encoder_hash(path)) == 64
    mine = tmp_path / "options/scd_doom_tiny.yml"  # goes before the project's
    mine.parent.mkdir()
    mine.write_text(TINY.read_text().replace("name: scd_doom_tiny", "name: mine"))
    assert load_options("options/scd_doom_tiny.yml").name == "mine"


def test_an_installed_package_brings_its_options(tmp_path, monkeypatch):
    """Below its prefix, where pip puts data files; there is no checkout around it."""
    from scd.utils import paths

    installed = tmp_path / "share/scd/options"
    shutil.copytree(ROOT / "options", installed)
    files = [
        SimpleNamespace(
            match=lambda pattern, name=path.name: pattern == f"share/scd/options/{name}",
            locate=lambda path=path: path,
        )
        for path in installed.glob("*.yml")
    ]
    monkeypatch.setattr(paths, "CHECKOUT", tmp_path / "site-packages")
    monkeypatch.setattr("importlib.metadata.files", lambda name: files)
    monkeypatch.chdir(tmp_path)
    assert paths.project_file("options/dcae_minecraft.yml") == installed / "dcae_minecraft.yml"
    for path in installed.glob("*.yml"):  # those with a base find it beside them
        assert load_options(f"options/{path.name}") == load_options(ROOT / "options" / path.name)


def test_what_is_missing_is_reported_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ScdError, match=rf"^x\.yml: no such options file in {tmp_path}$"):
        load_options("x.yml")


def test_a_tilde_is_the_home_wherever_a_path_is_given(tmp_path, monkeypatch):
    from scd.cli import build_parser

    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(TINY, tmp_path / "mine.yml")
    overrides = ["output_root=~/runs", "data.root=~/clips", "data.val_list=~/val.json"]
    options = load_options("~/mine.yml", [*overrides, "autoencoder.path=~/vae"])
    assert options.output == tmp_path / "runs/scd_doom_tiny"
    assert options.data.root == str(tmp_path / "clips")
    assert options.data.val_list == str(tmp_path / "val.json")
    assert options.autoencoder.path == str(tmp_path / "vae")
    for file, section, key in (
        ("scd_doom_distilled.yml", None, "init_from"),
        ("scd_doom_distilled.yml", "distill", "teacher"),
        ("scd_doom_distilled.yml", "distill", "weak_teacher"),
        ("scd_doom_distilled.yml", "data", "train_list"),
        ("dcae_doom_decoder.yml", "autoencoder", "world_model"),
    ):
        name = f"{section}.{key}" if section else key
        options = load_options(ROOT / "options" / file, [f"{name}=~/x"])
        found = getattr(getattr(options, section) if section else options, key)
        assert found == str(tmp_path / "x"), name
    for command in (
        ["record", "--root=~/x"],
        ["fetch-data", "minecraft", "--root=~/x"],
        ["make-lists", "~/x"],
        ["validate", "--list=~/x"],
        ["evaluate", "~/x"],
        ["compare", "a", "--out=~/x"],
        ["benchmark", "--out=~/x"],
        ["probe", "~/x"],
        ["split", "~/x", "--encoder-layers=1", "--decoder-layers=1", "--out=~/x"],
        ["export", "~/x", "--out=~/x"],
        ["starts", "--opt=x", "--out=~/x"],
        ["play", "--model=~/x", "--starts=~/x", "--baseline=~/x"],
        ["measure", "~/x"],
    ):
        values = vars(build_parser().parse_args(command)).values()
        assert tmp_path / "x" in values and not any("~" in str(value) for value in values), command

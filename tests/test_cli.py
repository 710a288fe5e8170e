"""The command line: mistakes end in one line and status 1, and the scripts are well-formed."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from scd.cli import main, run_command
from scd.options import EncoderFrame, WanEncoderFrame, WanFusion

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "options/scd_doom_tiny.yml")
PIXELS = ["data.source=video", "autoencoder.path=null", "model.patch_size=16"]
COMMANDS = ("record", "make-lists", "validate", "train", "encode", "evaluate", "measure", "compare")
COMMANDS += ("starts", "play")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run in an empty folder, and leave nothing of accelerate behind."""
    monkeypatch.chdir(tmp_path)
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def error_of(capfd: pytest.CaptureFixture, *arguments: str) -> str:
    """The one line that a command ends in."""
    assert main(list(arguments)) == 1
    captured = capfd.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert captured.err.endswith("\n") and "Traceback" not in captured.out + captured.err
    return captured.err


def test_mistakes_in_options_are_one_line(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    for command in ("train", "encode"):
        assert "nowhere.yml: no such options file" in error_of(
            capfd, command, "--opt", "nowhere.yml"
        )
        message = error_of(capfd, command, "--opt", TINY, "train.stepz=3")
        assert "unknown key 'train.stepz'; did you mean 'train.steps'?" in message
        assert "key=value" in error_of(capfd, command, "--opt", TINY, "train.steps")
        assert "train.steps" in error_of(capfd, command, "--opt", TINY, "train.steps=a\nb")
    (tmp_path / "x.yml").write_text("name: [\n\n")
    assert "x.yml" in error_of(capfd, "train", "--opt", "x.yml")


def test_flags_of_web_pages_need_web(capfd: pytest.CaptureFixture) -> None:
    export = ("export", "assets/pretrained/scd_doom", "--out", "site")
    for flags in (["--weights", "int8"], ["--measure", "8"], ["--runtime", "file.tgz"]):
        assert f"export: {flags[0]} is for web pages: add --web" in error_of(capfd, *export, *flags)
    message = error_of(capfd, *export, "--web", "--dtype", "bfloat16")
    assert "with --web, give --weights" in message


def test_missing_data_is_one_line(capfd: pytest.CaptureFixture, tiny_autoencoder_path: str) -> None:
    data = "data.root=no/data"
    message = error_of(capfd, "train", "--opt", TINY, *PIXELS, data)
    assert "no/data/train.json: no such file" in message and "`scd record`" in message
    assert "no/data/train.json: no such file" in error_of(
        capfd, "encode", "--opt", TINY, f"autoencoder.path={tiny_autoencoder_path}", data
    )
    message = error_of(capfd, "train", "--opt", TINY, "autoencoder.path=no/autoencoder", data)
    assert "no/autoencoder: no autoencoder there" in message


def test_missing_checkpoints_are_one_line(capfd: pytest.CaptureFixture) -> None:
    for name in ("no/ema.safetensors", "no/ema.pth"):
        assert name in error_of(capfd, "evaluate", name, "--opt", TINY, *PIXELS)
    Path("ema.safetensors").write_bytes(b"")
    assert "ema.safetensors" in error_of(capfd, "evaluate", "ema.safetensors", "--opt", TINY)


def test_names_that_no_system_opens_are_one_line(capfd: pytest.CaptureFixture) -> None:
    long = "x" * 300
    assert "name too long" in error_of(capfd, "evaluate", f"{long}.safetensors")
    for key in ("autoencoder.path", "data.root"):
        message = error_of(capfd, "train", "--opt", TINY, *PIXELS, f"{key}={long}")
        assert long in message and "name too long" in message
        message = error_of(capfd, "train", "--opt", TINY, *PIXELS, f'{key}="a\\0b"')
        assert f"{key} has a zero byte" in message


def test_overrides_stand_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr("scd.evaluation.evaluate.evaluate_checkpoint", lambda *a: seen.append(a))
    monkeypatch.setattr(
        "scd.training.launch.run_experiment", lambda o: seen.append((o.seed, o.name))
    )
    for name in ("ema.pth", "a.pth", "lr=1.pth"):
        Path(name).touch()
    assert main(["evaluate", "ema.pth", "a=1", "--opt", "x.yml", "b=-2", "c=3"]) == 0
    assert main(["evaluate", "--opt", "x.yml", "ema.pth", "a=1", "b=-2", "c=3"]) == 0
    assert seen == [(Path("ema.pth"), "x.yml", ["a=1", "b=-2", "c=3"], None, False)] * 2
    seen.clear()
    assert main(["evaluate", "ema.pth", "--sweep", "d=1,2", "a=1", "--track", "b=-2"]) == 0
    assert seen == [(Path("ema.pth"), None, ["a=1", "b=-2"], ["d=1,2"], True)]
    seen.clear()
    assert main(["train", "seed=3", "--opt", TINY, "name=n", *PIXELS]) == 0
    assert seen == [(3, "n")]
    seen.clear()
    monkeypatch.setattr("scd.evaluation.compare.compare_checkpoints", lambda *a: seen.append(a))
    # A file that is there is no override.
    assert main(["compare", "a.pth", "lr=1.pth", "--out", "c", "eval.videos=1"]) == 0
    assert seen == [([Path("a.pth"), Path("lr=1.pth")], Path("c"), ["eval.videos=1"])]


def test_play_passes_everything_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from scd.play.server import Address

    seen: list[tuple] = []
    monkeypatch.setattr("scd.play.catalog.load_catalog", lambda *a: seen.append(a) or "catalog")
    monkeypatch.setattr("scd.play.server.serve", lambda *a: seen.append(a))
    server = ["--host", "::", "--port", "1", "--token", "secret", "--sessions", "3"]
    server += ["--allow-origin", "https://play.example.org"]
    worlds = ["--model", "m", "--baseline", "b", "--starts", "s", "rollout.steps=3"]
    assert main(["play", *server, *worlds]) == 0
    address = Address("::", 1, "secret", frozenset({"https://play.example.org"}))
    assert seen == [
        (Path("m"), Path("b"), Path("s"), ["rollout.steps=3"]),
        ("catalog", address, 3),
    ]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ],
)
def test_too_little_memory_is_one_line(capfd: pytest.CaptureFixture, error) -> None:
    def run() -> None:
        raise error

    assert run_command(run, "train") == 1
    found = capfd.readouterr().err
    assert found.startswith("error: train: needs more memory than there is (")
    assert found.count("\n") == 1
    with pytest.raises(RuntimeError, match="another"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("another")), "train")


def test_impossible_recordings_are_one_line(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    small = ["--train-episodes", "1", "--val-episodes", "1", "--frames", "2"]
    assert "pixels per side" in error_of(capfd, "record", "--root", "d", "--size", "0", *small)
    Path("file").write_text("")
    assert "file" in error_of(capfd, "record", "--root", "file/d", *small)


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0 and f"usage: scd {command}" in capsys.readouterr().out


def test_wrong_usage_is_reported(capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        [],
        ["trian"],
        ["train"],
        ["record", "--frames", "many"],
        ["record", "frames=8"],
        ["train", "--opt", TINY, "--seed", "3"],
        ["train", "--opt", TINY, "seed=2", "--fast"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2 and "usage: scd" in capsys.readouterr().err


def test_an_interrupt_is_reported(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scd.doom.record.record_dataset", interrupt)
    assert main(["record"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_mistakes_are_reported_before_torch_is_loaded() -> None:
    code = "import sys; sys.modules['torch'] = None; from scd.cli import main; sys.exit(main())"
    options = f"nowhere.yml: no such options file in {ROOT}"
    model = f"nowhere: no such weights file in {ROOT}"
    for arguments, message in (
        (["train", "--opt", "nowhere.yml"], options),
        (["encode", "--opt", "nowhere.yml"], options),
        (["evaluate", "nowhere"], model),
        (["compare", "nowhere", "rollout.steps=1"], model),
        (["probe", "nowhere"], model),
        (["export", "nowhere", "--out", "x"], model),
        (["split", "nowhere", "--encoder-layers=1", "--decoder-layers=1", "--out=x"], model),
        (["fetch-data", "nowhere"], "nothing is called 'nowhere'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "flag", "words"),
    [
        ("split", "--encoder-frame", EncoderFrame),
        ("wan convert", "--encoder-frame", WanEncoderFrame),
        ("wan convert", "--fusion", WanFusion),
    ],
)
def test_choices_are_those_of_the_options(
    capsys: pytest.CaptureFixture, command: str, flag: str, words
) -> None:
    """The parser has words of its own: to import the options takes longer than `scd --help`."""
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    assert f"{flag} {{{','.join(get_args(words))}}}" in capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(ROOT.glob("scripts/*.sh")), ids=lambda path: path.name)
def test_scripts_are_well_formed(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")

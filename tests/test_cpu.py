"""How a process is prepared for the CPU; in processes of their own, for it can't be undone."""

import os
import platform
import subprocess
import sys
from typing import NoReturn

import pytest
import torch

from scd.options import Options
from scd.training import launch
from scd.utils import startup
from tests.faults.runs import run_processes

CODE = """
import resource, torch
from scd.utils.startup import keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def given_back():
    tensor = torch.ones(2**24)
    held = resident()
    del tensor
    return (held - resident()) / 2**26

before = given_back()
keep_freed_memory()
print(before, given_back())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Shares of a tensor of 64 MiB that go back to the system when it is freed.
    before, after = map(float, done.stdout.split())
    assert before > 0.9 and after < 0.1


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not loaded torch, whose user has chosen nothing."""
    for name in startup.USER_CHOICES:
        monkeypatch.setenv(name, "")  # restored afterwards, whatever the code under test sets
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(startup, "keep_freed_memory", lambda: None)
    return monkeypatch


@pytest.mark.parametrize(("busy", "policy"), [(0.1, None), (1.0, "passive")])
def test_threads_sleep_beside_a_busy_program(fresh, capsys, busy, policy):
    fresh.setattr(startup, "busy_cores", lambda: (busy, 2))
    startup.prepare_process()
    assert os.environ.get("OMP_WAIT_POLICY") == policy
    said = capsys.readouterr().err
    assert ("other programs keep 1.0 of 2 cores busy" in said) == (policy is not None)


def test_nothing_is_chosen_for_a_user_who_has(fresh):
    fresh.setattr(startup, "busy_cores", lambda: pytest.fail("looked"))
    fresh.setenv("GOMP_SPINCOUNT", "7")
    startup.prepare_process()
    fresh.delenv("GOMP_SPINCOUNT")
    fresh.setitem(sys.modules, "torch", object())  # too late
    startup.prepare_process()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_a_busy_program_is_seen():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            busy, cores = startup.busy_cores()
        finally:
            other.kill()
    assert startup.BUSY_CORES < busy <= cores


def test_only_cores_that_this_process_may_use_count(monkeypatch):
    monkeypatch.setattr("psutil.cpu_percent", lambda *_, **__: [100.0, 50.0, 0.0, 100.0])
    monkeypatch.setattr(startup, "usable_cores", lambda: [1, 2])
    assert startup.busy_cores() == (0.5, 2)


def test_a_system_that_does_not_tell_is_no_error(fresh, capsys):
    def unknown() -> tuple[float, int]:
        raise FileNotFoundError("/proc/stat")

    fresh.setattr(startup, "busy_cores", unknown)
    startup.prepare_process()
    assert "OMP_WAIT_POLICY" not in os.environ and capsys.readouterr().err == ""


def print_products() -> None:
    """Print a subnormal product, and the same one as an experiment begins."""

    def product() -> float:
        return float(torch.tensor(1e-30) * torch.tensor(1e-10))

    def make_accelerator(options: Options) -> NoReturn:
        print(before, product())
        sys.exit()

    before = product()
    launch.make_accelerator = make_accelerator
    launch.run_experiment(Options())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="no choice elsewhere")
def test_subnormal_numbers_are_zero_before_anything_is_computed():
    """Threads that started earlier would stay slow."""
    (printed,) = run_processes(1, print_products, [])
    before, after = map(float, printed.split())
    assert before > 0 and after == 0

"""The allocator keeps what it has; in processes of their own, for it can't be undone."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, torch
from scd.allocator import keep_freed_memory

{first}

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

tensor = torch.ones(2**24)
held = resident()
del tensor
print((held - resident()) / 2**26)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_kept():
    def given_back(first: str) -> float:
        code = CODE.format(first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    # Shares of a tensor of 64 MiB that go back to the system when it is freed.
    assert given_back("") > 0.9
    assert given_back("keep_freed_memory()") < 0.1

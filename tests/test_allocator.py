"""The allocator keeps what it has; in processes of their own, for it can't be undone."""

import platform
import subprocess
import sys

import pytest

PAGES_OF_A_TENSOR = 2**24 * 4 // 4096
CODE = """
import resource, torch
from scd.allocator import keep_freed_memory

{first}

def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        torch.ones(2**24).mul(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(10)  # the heap grows
print(faults(5))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")
def test_freed_memory_is_not_paid_for_again():
    def faults(first: str) -> int:
        code = CODE.format(first=first)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    # Two tensors a round, and all their pages are new every time; then hardly any.
    assert faults("") > 5 * PAGES_OF_A_TENSOR
    assert faults("keep_freed_memory()") < PAGES_OF_A_TENSOR

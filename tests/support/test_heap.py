"""Freed memory stays with the process for a while, where the C library is glibc."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from tdcompile.support.heap import HEAP, keep_freed_memory

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc decides by itself")

# Each test has an interpreter of its own: what earlier tests left at the end of the heap keeps it from being returned.
SETUP = """
import resource
from pathlib import Path
from tdcompile.support.heap import keep_freed_memory

BLOCK, BLOCKS = 16 << 20, 12  # together more than glibc keeps of its own accord

def faults():
    "Of writing to blocks that are then freed; bytearray zeroes them."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(BLOCK) for _ in range(BLOCKS)]
    blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
"""


def printed(code: str) -> list[int]:
    own = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}  # huge pages, say
    ran = subprocess.run([sys.executable, "-c", SETUP + code], capture_output=True, text=True, check=False, env=own)
    assert ran.returncode == 0, ran.stderr
    return [int(number) for number in ran.stdout.split()]


@glibc
def test_blocks_are_not_mapped_again_while_it_lasts():
    returned, kept, kept_on, returned_after = printed("""
faults()  # glibc may still adjust itself
print(faults())  # pages are of any size
with keep_freed_memory():
    faults()
    print(faults())
    with keep_freed_memory():
        pass
    print(faults())
faults()  # the first ones after it are new in any case
print(faults())
""")
    assert kept < returned / 4
    assert kept_on < returned / 4, "the inner one ended it"
    assert returned_after > returned / 2


@glibc
def test_the_system_has_the_memory_back_even_after_an_error():
    meanwhile, afterwards, blocks = printed("""
@keep_freed_memory()
def fails():
    faults()
    print(resident())
    raise KeyError

try:
    fails()
except KeyError:
    print(resident(), BLOCK * BLOCKS)
""")
    assert afterwards < meanwhile - blocks / 2


@pytest.mark.parametrize("missing", ["mallopt", "malloc_trim"])
def test_nothing_happens_with_another_c_library(monkeypatch, missing):
    class Other:
        def __getattr__(self, name: str) -> object:
            if name == missing:
                raise AttributeError(name)
            return pytest.fail

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    with keep_freed_memory():
        assert not HEAP.keeping

"""Freed memory stays with the process for a while, where the C library is glibc."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest

import tdcompile.memory
from tdcompile.memory import freed_memory_kept

BLOCK, BLOCKS = 16 << 20, 12  # together more than glibc keeps of its own accord
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc decides by itself")


def faults() -> int:
    """Of writing to blocks that are then freed; ``bytearray`` zeroes them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(BLOCK) for _ in range(BLOCKS)]
    blocks.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_blocks_are_not_mapped_again_while_it_lasts():
    faults()  # glibc may still adjust itself
    returned = faults()  # pages are of any size
    with freed_memory_kept():
        faults()
        assert faults() < returned / 4
        with freed_memory_kept():
            pass
        assert faults() < returned / 4
    faults()  # the first ones after it are new in any case
    assert faults() > returned / 2


@glibc
def test_the_system_has_the_memory_back_even_after_an_error():
    meanwhile = []

    @freed_memory_kept()
    def fails() -> None:
        faults()
        meanwhile.append(resident())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert resident() < meanwhile[0] - BLOCK * BLOCKS / 2


@pytest.mark.parametrize("missing", ["mallopt", "malloc_trim"])
def test_nothing_happens_with_another_c_library(monkeypatch, missing):
    class Other:
        def __getattr__(self, name: str) -> object:
            if name == missing:
                raise AttributeError(name)
            return pytest.fail

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Other())
    with freed_memory_kept():
        assert not tdcompile.memory._keeping

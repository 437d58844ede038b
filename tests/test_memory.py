"""Freed memory stays with the process for a while, where the C library is glibc."""

import ctypes
import platform
import resource
from pathlib import Path

import pytest
import torch

import tdcompile.memory
from tdcompile.memory import freed_memory_kept

MEBIBYTES = 64  # above what glibc takes from its heap of its own accord
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc decides by itself")


def faults_of_four_blocks() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(MEBIBYTES << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@glibc
def test_a_block_is_not_mapped_again_while_it_lasts():
    pages = (MEBIBYTES << 20) // resource.getpagesize()
    assert faults_of_four_blocks() > 3 * pages
    with freed_memory_kept():
        faults_of_four_blocks()
        assert faults_of_four_blocks() < 0.5 * pages
        with freed_memory_kept():
            pass
        assert faults_of_four_blocks() < 0.5 * pages
    assert faults_of_four_blocks() > 3 * pages


@glibc
def test_the_system_has_the_memory_back_even_after_an_error():
    before = resident()
    meanwhile = []

    @freed_memory_kept()
    def fails() -> None:
        torch.ones(4 * MEBIBYTES << 18)
        meanwhile.append(resident())
        raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert meanwhile[0] > before + 3 * MEBIBYTES
    assert resident() < before + MEBIBYTES


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

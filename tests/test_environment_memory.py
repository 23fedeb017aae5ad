"""The sampled peak of anonymous memory."""

import mmap
import threading
import time
import timeit

import pytest

from pm_hf import environment as memory
from pm_hf.environment import PeakMemory

MB = 2**20
on_linux = pytest.mark.skipif(memory.anonymous_mb() is None, reason="needs /proc with RssAnon")


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@on_linux
def test_memory_that_was_given_back_is_seen():
    with PeakMemory() as peak:
        block = b"\x01" * (200 * MB)
        time.sleep(0.05)
        inside = peak.peak_mb
        del block
        after = memory.anonymous_mb()
    assert 195 < inside - peak.start_mb < 230
    assert after - peak.start_mb < 30, "the peak is not merely what is still there"
    assert inside <= peak.peak_mb < inside + 30


@on_linux
def test_pages_of_a_mapped_file_do_not_count(tmp_path):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"\x01" * MB)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        with PeakMemory() as peak:
            assert mapped.find(b"\x02") == -1  # every page is read
            resident = resident_mb()
            time.sleep(0.02)
        assert resident - peak.peak_mb > 90, "the pages were in memory"
    assert peak.peak_mb - peak.start_mb < 30


def resident_mb() -> float:
    """VmRSS: all pages in memory, those of mapped files too."""
    line = next(line for line in memory.PROCESS_STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@on_linux
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_thread_ends_with_the_block(error):
    peak = PeakMemory()
    try:
        with peak:
            assert "PeakMemory" in threads()
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert "PeakMemory" not in threads()
    assert peak.peak_mb >= peak.start_mb > 0


@pytest.mark.parametrize("status", [None, "Name:\tpython\nVmRSS:\t 100 kB\n"], ids=["no /proc", "old kernel"])
def test_where_the_system_does_not_tell_there_is_no_number(tmp_path, monkeypatch, status):
    if status:
        (tmp_path / "status").write_text(status)
    monkeypatch.setattr(memory, "PROCESS_STATUS", tmp_path / "status")
    with PeakMemory() as peak:
        assert "PeakMemory" not in threads()
    assert peak.start_mb is None
    assert peak.peak_mb is None


@on_linux
def test_a_sample_is_cheap():
    fastest = min(timeit.repeat(memory.anonymous_mb, number=10, repeat=20)) / 10
    assert fastest < 0.1 * memory.SAMPLE_INTERVAL


@on_linux
def test_peak_of_the_process_is_in_mib_and_no_less_than_what_it_holds():
    block = b"\x01" * (64 * MB)
    assert memory.anonymous_mb() <= memory.process_peak_memory_mb() < 64 * 1024
    del block

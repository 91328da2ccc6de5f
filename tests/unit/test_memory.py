"""Guest RAM: every address is checked, whoever it comes from."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmm.errors import GuestFault
from avmm.memory import GRANULE, GuestMemory, Region

LOW, HIGH = 0x4000_0000, 0x8000_0000


def two_regions() -> GuestMemory:
    memory = GuestMemory()
    memory.add(Region(HIGH, mmap.mmap(-1, 2 * GRANULE)))
    memory.add(Region(LOW, mmap.mmap(-1, GRANULE)))
    return memory


@given(
    base=st.sampled_from([0, LOW, LOW + GRANULE, HIGH, HIGH + 2 * GRANULE, 1 << 63]),
    offset=st.integers(-16, 16),
    length=st.one_of(st.integers(-2, 40), st.just(GRANULE), st.just(1 << 64)),
)
def test_an_access_is_inside_one_region_or_refused(base: int, offset: int, length: int) -> None:
    memory = two_regions()
    gpa = base + offset
    inside = length >= 0 and any(
        region.base <= gpa and gpa + length <= region.base + region.size for region in memory.regions
    )
    if inside:
        assert len(memory.view(gpa, length)) == length
    else:
        with pytest.raises(GuestFault) as refused:
            memory.view(gpa, length)
        assert refused.value.address == gpa
    memory.close()


def test_writes_are_told_to_the_engine() -> None:
    memory = two_regions()
    told: list[tuple[int, int]] = []
    memory.on_host_write = lambda gpa, length: told.append((gpa, length))
    memory.write(LOW + 8, b"abc")
    assert memory.read(LOW + 7, 5) == b"\0abc\0"
    assert told == [(LOW + 8, 3)]
    memory.close()


@pytest.mark.parametrize("base", [LOW, LOW - GRANULE, LOW + 1])
def test_regions_are_aligned_and_apart(base: int) -> None:
    memory = two_regions()
    with pytest.raises(ValueError, match=r"overlap|multiple"):
        memory.add(Region(base, mmap.mmap(-1, 2 * GRANULE)))
    memory.close()


def mapped(size: int) -> bool:
    """Whether this process maps a piece of memory of just that size."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(last, 16) - int(first, 16) == size:
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_close_unmaps_with_the_last_view() -> None:
    size = GRANULE * 12345
    memory = GuestMemory()
    memory.add(Region(LOW, mmap.mmap(-1, size, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)))
    view = memory.view(LOW, 1)
    memory.close()
    assert mapped(size)
    view.release()
    gc.collect()
    assert not mapped(size)

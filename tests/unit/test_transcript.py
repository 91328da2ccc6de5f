"""Waiting for console output."""

import asyncio
import re
import time
import xml.dom.minidom

import pytest

from avmm.errors import GuestError, GuestGone, GuestPanic, WaitTimeout
from avmm.guest.console import Console
from avmm.guest.panic import PanicWatch
from avmm.guest.transcript import LOOK_BACK, Transcript


async def test_matches_what_has_come_already_and_moves_the_cursor() -> None:
    transcript = Transcript()
    transcript.feed(b"one two one two")
    first = await transcript.expect(rb"two", timeout=0)
    second = await transcript.expect(rb"t(w)o", timeout=0)
    assert (first.start(), second.start(), second[1]) == (4, 12, b"w")
    with pytest.raises(WaitTimeout):
        await transcript.expect(rb"two", timeout=0)


async def test_wakes_on_arrival_however_the_bytes_are_cut() -> None:
    transcript = Transcript()
    waiting = asyncio.create_task(transcript.expect(rb"lo+gin: $", timeout=30))
    for byte in b"\nloooogin: ":
        await asyncio.sleep(0)
        assert not waiting.done()
        transcript.feed(bytes((byte,)))
    assert (await waiting).group() == b"loooogin: "


async def test_failure_pattern_that_comes_first_raises() -> None:
    transcript = Transcript()
    transcript.feed(b"error: no disk\nready\n")
    with pytest.raises(GuestError, match="error: no"):
        await transcript.expect(rb"ready", failure=rb"error: \w+", timeout=0)
    assert (await transcript.expect(rb"error", failure=rb"ready", timeout=0)).start() == 0


async def test_the_guests_end_wakes_every_waiter_with_its_reason() -> None:
    transcript = Transcript()
    waiting = [asyncio.create_task(transcript.expect(rb"never")) for _ in range(3)]
    await asyncio.sleep(0)
    transcript.close(GuestPanic("Attempted to kill init!"))
    for task in waiting:
        with pytest.raises(GuestPanic, match="kill init"):
            await task
    with pytest.raises(GuestPanic):
        await transcript.expect(rb"never")


async def test_output_before_the_end_still_matches_after_it() -> None:
    transcript = Transcript()
    transcript.feed(b"Power down")
    transcript.close(GuestGone("the guest powered off"))
    assert await transcript.expect(rb"Power down")


async def test_timeout_says_what_was_there() -> None:
    transcript = Transcript()
    transcript.feed(b"Welcome\nPassword: ")
    with pytest.raises(WaitTimeout, match="Password:") as caught:
        await transcript.expect(re.compile(rb"login:"), timeout=0.01)
    assert caught.value.tail == b"Welcome\nPassword: "
    assert isinstance(caught.value, TimeoutError)


async def test_cancelling_a_wait_leaves_no_waiter() -> None:
    transcript = Transcript()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.01):
            await transcript.expect(rb"never")
    assert not isinstance(caught.value, WaitTimeout)
    assert not transcript._waiters


async def test_keep_bounds_the_memory_not_the_positions() -> None:
    transcript = Transcript(keep=1000)
    for number in range(5000):
        transcript.feed(b"%07d\n" % number)
    assert len(transcript.data) <= 2008
    assert (await transcript.expect(rb"0004999", timeout=0)).group() == b"0004999"
    assert transcript.cursor == 5000 * 8 - 1


async def test_a_match_may_begin_in_output_searched_before() -> None:
    transcript = Transcript()
    waiting = asyncio.create_task(transcript.expect(rb"BEGIN.*END", timeout=30))
    transcript.feed(b"BEGIN" + b"x" * (LOOK_BACK - 10))
    await asyncio.sleep(0)
    transcript.feed(b"END")
    assert (await waiting).group().endswith(b"xEND")


async def test_several_who_wait_do_not_take_from_each_other() -> None:
    transcript = Transcript()
    waiting = [asyncio.create_task(transcript.expect(each, timeout=30)) for each in (rb"last", rb"first", rb"last")]
    await asyncio.sleep(0)
    transcript.feed(b"first ")
    await asyncio.sleep(0)
    transcript.feed(b"and last. ")
    assert [each.group() for each in await asyncio.gather(*waiting)] == [b"last", b"first", b"last"]
    with pytest.raises(WaitTimeout):  # who begins now begins after what was found
        await transcript.expect(rb"last", timeout=0)


@pytest.mark.parametrize("keep", [None, 1000])
async def test_all_up_to_a_pattern_is_remembered_until_it_is_read(keep: int | None) -> None:
    transcript = Transcript(keep)
    transcript.feed(b"before BEGIN ")
    await transcript.expect(rb"BEGIN ", timeout=0)
    reading = asyncio.create_task(transcript.read_until(rb"<END (\d+)>", timeout=30))
    await asyncio.sleep(0)
    content = b"".join(b"%07d\n" % number for number in range(50_000))
    for at in range(0, len(content), 5000):
        transcript.feed(content[at : at + 5000])
        if at % 40_000 == 0:
            await asyncio.sleep(0)
    for byte in b"<END 7>":
        transcript.feed(bytes((byte,)))
        await asyncio.sleep(0)
    transcript.feed(b"after")
    read, end = await reading
    assert (read, end[1]) == (content, b"7")
    assert await transcript.expect(rb"after", timeout=0)
    transcript.feed(content)
    assert keep is None or len(transcript.data) <= 2 * keep
    with pytest.raises(GuestError, match="more than"):
        await transcript.read_until(rb"never", limit=10)
    with pytest.raises(WaitTimeout):
        await transcript.read_until(rb"never", timeout=0)


async def test_a_wait_is_linear_in_what_is_printed() -> None:
    async def cost(pieces: int) -> float:
        transcript = Transcript()
        waiting = asyncio.create_task(transcript.expect(rb"the end \d+$"))
        piece = b"nothing to see here, the end is not near\n" * 400
        began = time.process_time()
        for _ in range(pieces):
            transcript.feed(piece)
            await asyncio.sleep(0)
        transcript.feed(b"the end 1")
        await waiting
        return time.process_time() - began

    await cost(100)
    # Sixteen times as much costs 16 times as much; were each piece a reason to search everything, 256 times.
    assert await cost(1600) < 64 * min([await cost(100) for _ in range(3)])


@pytest.mark.parametrize(
    "line",
    [
        b"[    1.234567] Kernel panic - not syncing: VFS: no root",
        b"[    1.234567][    T1] Kernel panic - not syncing: VFS: no root",
        b"Kernel panic - not syncing: VFS: no root",
        b"~ # \x1b[6n[    1.234567] Kernel panic - not syncing: VFS: no root",
        b"~ # [    1.234567][    T1] Kernel panic - not syncing: VFS: no root",
        b"." * 100_000 + b"[    1.234567] Kernel panic - not syncing: VFS: no root",
    ],
    ids=["stamp", "stamp and caller", "neither", "after a prompt", "after a prompt, with caller", "after no newline"],
)
def test_panic_is_noticed(line: bytes) -> None:
    dead: list[bool] = []
    watch = PanicWatch(lambda: dead.append(True))
    for byte in line + b"\r\n":
        watch.feed(bytes((byte,)))
    assert watch.reason == "VFS: no root"
    assert not dead
    watch.feed(line.replace(b"Kernel", b"---[ end Kernel") + b" ]---\r\n")
    assert dead


def test_talk_of_a_panic_is_none() -> None:
    watch = PanicWatch(lambda: None)
    watch.feed(b"# echo Kernel panic - not syncing: no\n")
    watch.feed(b"[ 1.0] systemd: saw 'Kernel panic - not syncing: no'\n")
    watch.feed(b"x" * 100_000)
    watch.feed(b"\n")
    assert watch.reason is None


def test_printk_is_taken_out_wherever_it_lands() -> None:
    shown = b"login: pass[   12.345678] eth0: up\r\nphrase: [not] [ 1.5] a\r\n[    0.000000][    T0] Linux\r\n$ ["
    for step in (1, 2, 7, 1000):
        transcript = Transcript()
        plain = transcript.without_printk()
        for at in range(0, len(shown), step):
            transcript.feed(shown[at : at + step])
        transcript.close(GuestGone("gone"))
        assert plain.data == b"login: passphrase: [not] [ 1.5] a\r\n$ ["
    assert Transcript.without_printk(transcript).data == plain.data


async def test_printk_does_not_stand_in_the_way() -> None:
    console = Console(NoKeyboard())
    console.transcript.feed(b"pass[   12.345678] eth0: up\r\nphrase: ")
    await console.expect(rb"passphrase: ", printk=False, timeout=1)
    with pytest.raises(WaitTimeout) as caught:
        await console.expect(rb"passphrase: ", timeout=0.01)
    assert caught.value.pattern == rb"passphrase: "
    assert caught.value.elapsed >= 0.01
    console.transcript.close(GuestGone("the guest powered off"))
    with pytest.raises(GuestGone, match="powered off"):
        await console.expect(rb"more", printk=False)


class NoKeyboard:
    def type(self, data: bytes) -> None: ...

    async def drain(self) -> None: ...


def test_screen() -> None:
    pytest.importorskip("pyte")
    console = Console(NoKeyboard())
    console.transcript.feed(b"\x1b[2J\x1b[Hfirst\r\nse\x1b[31mcond\x1b[0m <&>")
    assert console.screen.text == "first\nsecond <&>"
    console.transcript.feed(b"\x1b[1;1HFIRST\x1b[K")
    assert console.screen.text == "FIRST\nsecond <&>"
    assert console.screen.cursor == (5, 0)
    picture = xml.dom.minidom.parseString(console.screen.svg())
    assert picture.getElementsByTagName("text")[0].toxml().count("FIRST") == 1
    assert [each for each in picture.getElementsByTagName("text") if each.getAttribute("fill") == "#cc0000"]

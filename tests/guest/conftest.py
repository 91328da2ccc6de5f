"""A real guest: Debian's own arm64 kernels with a busybox userland, fetched once into the user's cache."""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import avmm
from avmm.bootloader import cpio
from avmm.debian import Fetched, fetch_debian
from avmm.errors import FetchError
from avmm.snapshot.store import load
from avmm.vm import Booting

#: What the fetched initrd prints when its shell is about to start.
READY = rb"avmm: Debian \S+ ready"


def _mirror() -> str | None:
    """Where the kernels of other releases come from: AVMM_DEBIAN_MIRROR, or the host's apt's first repository."""
    if named := os.environ.get("AVMM_DEBIAN_MIRROR"):
        return named
    if shutil.which("apt-get") is None:
        return None
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    known = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return known[0].rstrip("/") if known else None


def fetch_or_skip(flavour: str, release: str = "bookworm") -> Fetched:
    """A guest to boot. Where there is none the test is skipped, but not in CI."""
    mirror = None if release == "bookworm" else _mirror()  # the host's apt may know one release only
    try:
        return fetch_debian(release, flavour, mirror, progress=lambda text: None)
    except FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"no guest to boot: {error}")


@pytest.fixture(scope="session")
def debian() -> Fetched:
    """Debian's cloud kernel and the busybox initrd."""
    return fetch_or_skip("cloud")


@pytest.fixture(scope="session")
def debian_generic() -> Fetched:
    """The same with Debian's generic kernel."""
    return fetch_or_skip("generic")


@pytest.fixture
def with_init(debian: Fetched, tmp_path: Path) -> Callable[[str], Path]:
    """Makes an initrd whose first program is the given shell script; boot it with ``avmm.init=/test-init``."""

    def make(script: str) -> Path:
        archive = cpio.pack([cpio.file("test-init", b"#!/bin/sh\n" + script.encode(), 0o755)])
        path = tmp_path / "initrd"
        path.write_bytes(cpio.append(debian.initrd.read_bytes(), archive))
        return path

    return make


@pytest.fixture
def life(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """How a test's VMs came to be: ``booted``, or ``restored`` from a snapshot taken when they were ready."""
    if request.param == "booted":
        return
    boot, path = avmm.boot, tmp_path_factory.mktemp("life") / "snapshot"

    def restored(*args: Any, keep_output: int | None = None, **options: Any) -> Booting:
        async def make() -> avmm.VirtualMachine:
            async with boot(*args, keep_output=keep_output, **options) as vm:
                await vm.console.expect(READY, timeout=120)
                await vm.snapshot(path)
            config, origin = load(path)
            # The test looks for what has been shown already.
            console = origin.state.console
            seen = replace(console, transcript=replace(console.transcript, cursor=0))
            origin.state = replace(origin.state, console=seen)
            return avmm.VirtualMachine(config, origin=origin, keep_output=keep_output)

        return Booting(make)

    monkeypatch.setattr(avmm, "boot", restored)


def any_life(test: Any) -> Any:
    """Marks a test that is to pass with VMs of either life."""
    return pytest.mark.parametrize("life", ["booted", "restored"], indirect=True)(pytest.mark.usefixtures("life")(test))


def _held() -> dict[str, set[str]]:
    """What a process holds that a VM must give back: threads, file descriptors, mappings as large as guest RAM."""
    mappings = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, last = line.split()[0].partition("-")
        if int(last, 16) - int(first, 16) >= 64 << 20 and not line.endswith("[heap]"):
            mappings.add(line.split()[0])
    return {
        "threads": {thread.name for thread in threading.enumerate() if thread.name.startswith("avmm")},
        "files": {os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in _open_files()},
        "mappings": mappings,
    }


def _open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")]


@pytest.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    """After each test: no thread, file descriptor, mapping or task more than before."""
    before = _held()
    files = len(_open_files())
    yield
    gc.collect()
    left = {what: now - before[what] for what, now in _held().items()}
    assert not left["threads"], left
    assert not left["mappings"], left
    assert len(_open_files()) <= files, left
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "avmm" in repr(task.get_coro())], others

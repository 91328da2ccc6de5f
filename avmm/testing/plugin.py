"""The pytest plugin: a booted VM as a fixture, forked for each test.

    @pytest.mark.avmm(memory="512M")
    async def test_uname(vm):                       # a copy-on-write twin of a VM that was booted once
        r = await vm.run("uname", "-r")
        assert r.returncode == 0 and r.stdout.startswith(b"6.1")

``vm``: such a twin. ``fresh_vm``: booted for this test. ``vm_factory``: ``await vm_factory(cpus=2)`` boots as many as
a test likes. ``vm_any``: the test runs twice, with a booted VM and with one restored from a snapshot. The
marker's arguments are those of :func:`avmm.boot`, and ``ready``: a pattern on the console that says: it is up.

A VM lives on the event loop it was made on, and the one that is forked lives as long as the session: tests that use
these fixtures run on the session's loop. The plugin sees to that by itself. Nothing has a fixed name, port or number,
so pytest-xdist's workers do not meet.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import sys
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from avmm.vm import VirtualMachine

try:
    import pytest_asyncio

    _fixture = pytest_asyncio.fixture
except ImportError:  # another project's pytest run, which has avmm installed and uses none of this
    pytest_asyncio = None  # type: ignore[assignment] # a module or nothing

    def _fixture(*, loop_scope: str, **options: Any) -> Any:  # type: ignore[misc] # stands in for the real one
        del loop_scope
        return pytest.fixture(**options)


FIXTURES: Final = ("vm", "fresh_vm", "vm_factory", "vm_any")

#: How long a guest may take to come up, in seconds, unless the marker's ``boot_timeout`` says otherwise.
BOOT_TIMEOUT: Final = 120.0

#: Booted VMs kept for forks, for tests that ask for different ones.
_KEPT: Final = 4

_failed = pytest.StashKey[bool]()
_bundles = pytest.StashKey[list[str]]()
_recordings = itertools.count(1)
_alive: list[VirtualMachine] = []  # of the test that runs, for breakpoint()
_frozen = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("avmm", "virtual machines")
    group.addoption("--avmm-engine", metavar="NAME", default="auto", help="the engine VMs run on (default auto)")
    group.addoption("--avmm-kernel", metavar="FILE", help="the guests' kernel (default: what `avmm fetch debian` gets)")
    group.addoption("--avmm-initrd", metavar="FILE", help="the guests' initrd, with --avmm-kernel")
    group.addoption(
        "--avmm-artifacts", metavar="DIR", default="avmm-failures",
        help="where the bundle of a failed test goes (default avmm-failures; empty: nowhere)",
    )  # fmt: skip
    group.addoption(
        "--avmm-attach", action="store_true", help="when a test fails, attach the terminal to its VM's console"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line(
        "markers", "avmm(memory='512M', ...): the VM of this test: arguments of avmm.boot, and ready=, boot_timeout="
    )


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: Any) -> Generator[None, Any, None]:
    """Tests with our fixtures run on the session's loop; before pytest-asyncio looks at them."""
    made = (yield).get_result()
    for item in made if isinstance(made, list) else [made]:
        if (
            isinstance(item, pytest.Function)
            and _uses(item)
            and inspect.iscoroutinefunction(item.obj)
            and _wanted_scope(item) is None
        ):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


def _uses(item: pytest.Item) -> list[str]:
    return [name for name in FIXTURES if name in getattr(item, "fixturenames", ())]


def _wanted_scope(item: pytest.Item) -> str | None:
    marker = item.get_closest_marker("asyncio")
    return None if marker is None else marker.kwargs.get("loop_scope") or marker.kwargs.get("scope")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say clearly what cannot work."""
    used = _uses(item)
    if not used:
        return
    what = f"the fixture {used[0]!r}"
    if pytest_asyncio is None:
        pytest.fail(f"{what} needs pytest-asyncio: pip install 'avmm[pytest]'", pytrace=False)
    if not inspect.iscoroutinefunction(getattr(item, "obj", None)):
        pytest.fail(f"{what} is for `async def` tests: a VM is asked with await", pytrace=False)
    if (scope := _wanted_scope(item)) not in (None, "session"):
        pytest.fail(
            f"{what} lives on the event loop of the session, and this test asks for loop_scope={scope!r}: leave that "
            "out, or write loop_scope='session'",
            pytrace=False,
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Remember failures for the fixtures' ends, and tell where the bundles are."""
    report = (yield).get_result()
    if report.failed and call.when in ("setup", "call"):
        item.stash[_failed] = True
    for line in item.stash.get(_bundles, []) if call.when == "teardown" else ():
        report.sections.append(("avmm", line))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where the bundles of this run are."""
    lines = [
        text
        for reports in terminalreporter.stats.values()
        for report in reports
        for title, text in getattr(report, "sections", ())
        if title == "avmm"
    ]
    if lines:
        terminalreporter.section("avmm")
        for line in dict.fromkeys(lines):
            terminalreporter.line(line)


def pytest_enter_pdb(config: pytest.Config, pdb: Any) -> None:
    """``breakpoint()``: the guests stand still while you look."""
    for vm in _alive:
        _frozen.enter_context(vm.frozen())


def pytest_leave_pdb(config: pytest.Config, pdb: Any) -> None:
    """And go on."""
    _frozen.close()


# Making VMs.


def _options(request: pytest.FixtureRequest, **more: Any) -> dict[str, Any]:
    """What the test asks for: arguments of :func:`avmm.boot`, ``ready`` and ``boot_timeout``; and, where there is a
    network, a recording of it for the bundle."""
    import avmm

    wanted: dict[str, Any] = {"engine": request.config.getoption("--avmm-engine")}
    for marker in reversed(list(request.node.iter_markers("avmm"))):
        if marker.args:
            pytest.fail("@pytest.mark.avmm takes named arguments only", pytrace=False)
        wanted |= marker.kwargs
    wanted |= more
    known = {*inspect.signature(avmm.boot).parameters, "ready", "boot_timeout"}
    if unknown := sorted(set(wanted) - known):
        pytest.fail(f"@pytest.mark.avmm knows no {unknown[0]!r}; it has {', '.join(sorted(known))}", pytrace=False)
    if wanted.get("net", "none") not in ("none", [], ()):
        folder: Path = request.getfixturevalue("tmp_path")
        wanted.setdefault("pcap", folder / f"net-{next(_recordings)}.pcap")
    return wanted


async def _guest(config: pytest.Config, wanted: dict[str, Any]) -> None:
    """Fill in the guest to boot."""
    if "kernel" in wanted:
        return
    kernel, initrd = config.getoption("--avmm-kernel"), config.getoption("--avmm-initrd")
    if kernel:
        wanted |= {"kernel": kernel, "initrd": initrd}
        return
    if initrd:
        pytest.fail("--avmm-initrd goes with --avmm-kernel", pytrace=False)
    from avmm.debian import fetch_debian

    debian = await asyncio.to_thread(fetch_debian, progress=lambda text: None)
    wanted |= {"kernel": debian.kernel, "initrd": wanted.get("initrd", debian.initrd)}


async def _boot(config: pytest.Config, wanted: dict[str, Any]) -> VirtualMachine:
    """A VM whose guest is up."""
    import avmm
    from avmm.debian import ready_pattern

    wanted = dict(wanted)
    await _guest(config, wanted)
    ready, timeout = wanted.pop("ready", None), wanted.pop("boot_timeout", BOOT_TIMEOUT)
    vm = await avmm.boot(**wanted)
    try:
        ready = ready or ready_pattern(vm.config)
        if ready is not None:
            await vm.console.expect(ready, timeout=timeout)
        await vm.wait_ready(timeout=timeout)
    except BaseException:
        await vm.stop()
        raise
    return vm


class _Booted:
    """The session's booted VMs, which stand still, and are forked."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._vms: OrderedDict[str, VirtualMachine] = OrderedDict()
        self._one_at_a_time = False  # the engine has room for one VM: nothing is forked

    async def twin(self, wanted: dict[str, Any]) -> VirtualMachine:
        """A twin of the VM that was booted so, or, where VMs cannot be forked, one booted anew."""
        from avmm.errors import ConfigError

        if self._one_at_a_time:
            return await _boot(self._config, wanted)
        asked, wanted = wanted, dict(wanted)
        pcap = wanted.pop("pcap", None)
        key = repr(sorted({"memory": "512M", "cpus": 1, **wanted}.items()))
        vm = self._vms.get(key)
        if vm is None or vm.outcome is not None:
            vm = self._vms[key] = await _boot(self._config, wanted)
            await vm.pause()
            while len(self._vms) > _KEPT:
                await self._vms.popitem(last=False)[1].stop()
        self._vms.move_to_end(key)
        try:
            twin = await vm.fork(pcap=pcap)
        except ConfigError as error:
            if "one VM" not in str(error):
                raise
            self._one_at_a_time = True
            await self.close()
            return await _boot(self._config, asked)
        await twin.wait_ready(timeout=BOOT_TIMEOUT)
        return twin

    async def restored(self, wanted: dict[str, Any]) -> VirtualMachine:
        """One that goes on from a file that a twin was written to."""
        import avmm

        twin = await self.twin(wanted)
        with tempfile.TemporaryDirectory(prefix="avmm-") as folder:
            try:
                await twin.snapshot(Path(folder) / "vm.snapshot")
            finally:
                await twin.stop()
            restored = await avmm.restore(Path(folder) / "vm.snapshot")
        try:
            await restored.wait_ready(timeout=BOOT_TIMEOUT)
        except BaseException:
            await restored.stop()
            raise
        return restored

    async def close(self) -> None:
        """Stop them all."""
        while self._vms:
            await self._vms.popitem()[1].stop()


@contextlib.asynccontextmanager
async def _in_use(vm: VirtualMachine, request: pytest.FixtureRequest) -> AsyncIterator[VirtualMachine]:
    """``vm`` for as long as the test runs; what there is to say of it when the test has failed."""
    item = request.node
    _alive.append(vm)
    try:
        yield vm
    finally:
        _alive.remove(vm)
        try:
            if item.stash.get(_failed, False):
                await _after_failure(vm, item)
        finally:
            await vm.stop()


async def _after_failure(vm: VirtualMachine, item: pytest.Item) -> None:
    from avmm.testing.bundle import write_bundle

    config = item.config
    if folder := config.getoption("--avmm-artifacts"):
        said = item.stash.setdefault(_bundles, [])
        path = await write_bundle(vm, Path(folder), item.nodeid)
        said.append(f"{item.nodeid}: {path}")
    if config.getoption("--avmm-attach") and vm.outcome is None:
        from avmm.testing.attach import attach

        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend(in_=True)
        try:
            print(f"\n{item.nodeid} has failed; this is its VM's console", file=sys.stderr)
            await attach(vm)
        finally:
            if capture is not None:
                capture.resume()


# The fixtures.


@_fixture(scope="session", loop_scope="session")
async def _avmm_booted(request: pytest.FixtureRequest) -> AsyncIterator[_Booted]:
    booted = _Booted(request.config)
    try:
        yield booted
    finally:
        await booted.close()


@_fixture(loop_scope="session")
async def vm(request: pytest.FixtureRequest, _avmm_booted: _Booted) -> AsyncIterator[VirtualMachine]:
    """A copy-on-write twin of a VM that is booted once in a session."""
    async with _in_use(await _avmm_booted.twin(_options(request)), request) as twin:
        yield twin


@_fixture(loop_scope="session")
async def fresh_vm(request: pytest.FixtureRequest) -> AsyncIterator[VirtualMachine]:
    """A VM booted for this test."""
    async with _in_use(await _boot(request.config, _options(request)), request) as booted:
        yield booted


@_fixture(loop_scope="session", params=["booted", "restored"])
async def vm_any(request: pytest.FixtureRequest, _avmm_booted: _Booted) -> AsyncIterator[VirtualMachine]:
    """The test runs with a VM that was booted, and with one that was restored from a snapshot."""
    wanted = _options(request)
    made = _boot(request.config, wanted) if request.param == "booted" else _avmm_booted.restored(wanted)
    async with _in_use(await made, request) as either:
        yield either


@_fixture(loop_scope="session")
async def vm_factory(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[VirtualMachine]]]:
    """``await vm_factory(...)`` boots a VM: the marker's arguments, and those given. All are stopped with the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(**more: Any) -> VirtualMachine:
            return await stack.enter_async_context(
                _in_use(await _boot(request.config, _options(request, **more)), request)
            )

        yield make

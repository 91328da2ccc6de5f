"""What README shows is what runs, on the stock loop and on uvloop."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from avmm.debian import Fetched
from tests.guest.test_plugin import run as run_pytest

pytestmark = pytest.mark.guest

uvloop.run(asyncio.sleep(0))  # libuv keeps a pipe for signals from its first loop on: no test's leak

README = (Path(__file__).parents[2] / "README.md").read_text()


FIXTURE, PROGRAM = re.findall(r"(?ms)^```python\n(.*?)^```$", README)


def test_the_fixture_example(debian: Fetched, tmp_path: Path) -> None:
    assert "1 passed" in run_pytest(tmp_path, FIXTURE)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_the_program_example(run: Callable[[Coroutine[Any, Any, None]], None], debian: Fetched) -> None:
    names: dict[str, Any] = {}
    exec(compile(PROGRAM, "README.md", "exec"), names)
    run(names["main"]())


def test_its_first_screen_says_how_to_start() -> None:
    first = "\n".join(README.splitlines()[:40])
    for wanted in ("scripts/boot", "scripts/test", "@pytest.mark.avmm(", "async with avmm.boot("):
        assert wanted in first

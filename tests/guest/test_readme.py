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

pytestmark = pytest.mark.guest

uvloop.run(asyncio.sleep(0))  # libuv keeps a pipe for signals from its first loop on: no test's leak

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_the_example(run: Callable[[Coroutine[Any, Any, None]], None], debian: Fetched) -> None:
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", README)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    run(names["test_uname"]())


def test_its_first_screen_says_how_to_start() -> None:
    first = "\n".join(README.splitlines()[:35])
    for wanted in ("scripts/boot", "scripts/test", "async with avmm.boot("):
        assert wanted in first

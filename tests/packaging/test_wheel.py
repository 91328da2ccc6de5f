"""The wheel: what is in it, and that guests run with nothing else installed."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built, installed into a new environment and tried, all by scripts/wheel."""
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [ROOT / "scripts" / "wheel", out], env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode and "CI" not in os.environ and "No matching distribution" in done.stdout:
        pytest.skip("the package index is out of reach")
    assert done.returncode == 0, done.stdout
    for guest in ("hello", "timer_wfi", "ipi_pingpong"):
        assert f"{guest}: fine" in done.stdout
    (home,) = [
        line.split(" at ")[1] for line in done.stdout.splitlines() if line.startswith("avmm ") and " at " in line
    ]
    assert not home.startswith(str(ROOT)), "it was the installed avmm that ran them"
    (built,) = out.iterdir()
    return built


def test_one_wheel_serves_every_python(wheel: Path) -> None:
    name, version, python, abi, platform = wheel.stem.split("-")
    assert (name, python, abi) == ("avmm", "cp311", "abi3")
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert platform.startswith(("linux_", "macosx_"))


def test_it_holds_what_runs_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    missing = {str(path.relative_to(ROOT)) for path in (ROOT / "avmm").rglob("*.py")} - names
    assert not missing
    assert "avmm/py.typed" in names
    suffixes = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert suffixes == {".py", ".typed", ".so", ".elf", ".sha256"}  # the guest's agent and its hash
    assert not [name for name in names if name.startswith(("tests", "bench", "firmware"))]

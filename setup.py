"""The C parts; all else is in pyproject.toml, which has no place for these."""

from pathlib import Path
from runpy import run_path

from setuptools import setup

build = run_path(str(Path(__file__).with_name("avmm") / "hypervisor" / "_build.py"))
setup(
    cffi_modules=build["MODULES"],
    cmdclass={"build_ext": build["BuildExt"]},
    # cffi keeps to the stable ABI: one wheel serves every later Python.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

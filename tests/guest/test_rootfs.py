"""The root file systems other tests stand on."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from tests.guest.conftest import fetch_or_skip
from tests.guest.rootfs import booted, rootfs

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="unpacks Debian packages with dpkg-deb"),
]


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


async def test_packages_run_and_the_image_stays_as_it_was() -> None:
    guest = fetch_or_skip("cloud")
    image = rootfs(["openssl"])
    before = digest(image)
    async with booted(image, guest=guest) as shell:
        assert (await shell.check("openssl version")).startswith("OpenSSL 3.0")
        assert (await shell.check("printf abc | openssl dgst -r -sha1")).startswith("a9993e36")
        assert (await shell.run("echo gone >/root/file; sync; false")).code == 1
        assert await shell.check("stat -fc %T /; ps | wc -l >/dev/null; awk 'BEGIN { print 6*7 }'") == "ext2/ext3\n42\n"
        # More than a wait looks back for, in lines and in one.
        assert await shell.check("seq 30000") == "".join(f"{number}\n" for number in range(1, 30001))
        assert await shell.check("head -c 200000 /dev/zero | tr '\\0' x; echo '5>'") == "x" * 200000 + "5>\n"
        shell.vm.console.write(b"exit\n")
        assert (await shell.vm.wait()).reason == "power-off"
    assert digest(image) == before
    assert rootfs(["openssl"]) == image

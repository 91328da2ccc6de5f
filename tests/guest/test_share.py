"""Shared folders in a real guest."""

from __future__ import annotations

import filecmp
import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import avmm
from avmm.debian import Fetched
from tests.guest.conftest import READY, shell
from tests.guest.rootfs import booted, rootfs

pytestmark = pytest.mark.guest


def make_tree(root: Path, files: int) -> None:
    """Files of all sizes, links, modes and names in nested folders."""
    chance = random.Random(1)
    folders = [root]
    for index in range(files):
        if index % 10 == 0:
            folders.append(chance.choice(folders) / f"folder {index}")
            folders[-1].mkdir(parents=True)
        path = chance.choice(folders) / f"file-{index}é"
        path.write_bytes(chance.randbytes(chance.choice([0, 1, 100, 4096, 5000, 300_000])))
        path.chmod(chance.choice([0o644, 0o600, 0o755]))
        os.utime(path, ns=(0, chance.randrange(10**18)))
    (root / "link").symlink_to("file-0é")
    (root / "broken").symlink_to("/nowhere/at all")


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in two trees: names, types, modes, times, contents."""
    found = []
    names = {str(p.relative_to(one)) for p in one.rglob("*")} | {str(p.relative_to(other)) for p in other.rglob("*")}
    for name in sorted(names):
        a, b = one / name, other / name
        if not (os.path.lexists(a) and os.path.lexists(b)):
            found.append(f"{name} is missing")
            continue
        s, t = a.lstat(), b.lstat()
        if s.st_mode != t.st_mode or (a.is_file() and not a.is_symlink() and int(s.st_mtime) != int(t.st_mtime)):
            found.append(f"{name}: {s.st_mode:o} {s.st_mtime}, {t.st_mode:o} {t.st_mtime}")
        elif a.is_symlink():
            found += [] if os.readlink(a) == os.readlink(b) else [f"{name} points elsewhere"]
        elif a.is_file() and not filecmp.cmp(a, b, shallow=False):
            found.append(f"{name} has other content")
    return found


async def test_a_tree_copied_both_ways(debian: Fetched, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    make_tree(source, 200)
    (source / "large").write_bytes(random.Random(2).randbytes(16 << 20))
    async with avmm.boot(debian.kernel, debian.initrd, shares=[source, f"{target}:out:rw"]) as vm:
        await vm.console.expect(READY, timeout=120)
        # Read ahead by a megabyte at a time, not by the kernel's eighth of one.
        before = vm.shares[0].counters["requests"]
        _, said = await shell(vm, "md5sum /mnt/source/large")
        assert said.split()[0] == hashlib.md5((source / "large").read_bytes()).hexdigest()
        assert vm.shares[0].counters["requests"] - before < 40
        # Through the guest's memory, and from share to share.
        code, said = await shell(vm, "cp -a /mnt/source /tmp/copy && cp -a /tmp/copy /mnt/out/one && sync", 120)
        assert code == 0, said
        code, said = await shell(vm, "cp -a /mnt/source /mnt/out/two && diff -r /mnt/out/one /mnt/out/two", 120)
        assert code == 0, said
        # What the host writes is seen at once, and what the guest writes too.
        (target / "note").write_text("from the host\n")
        code, said = await shell(vm, "cat /mnt/out/note && echo from the guest >/mnt/out/note")
        assert said.strip() == "from the host"
        assert (target / "note").read_text() == "from the guest\n"
        (target / "note").write_text("a longer one from the host\n")
        _, said = await shell(vm, "cat /mnt/out/note")
        assert said.strip() == "a longer one from the host"
        assert set(vm.counters()["guest_errors"].values()) == {0}
    assert differences(source, target / "one") == []
    assert differences(source, target / "two") == []


async def test_read_only_and_no_way_out(debian: Fetched, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("the host's own")
    (folder / "file").write_text("original")
    (folder / "up").symlink_to("../secret")
    (folder / "absolute").symlink_to(tmp_path / "secret")
    (folder / "root").symlink_to("/")
    async with avmm.boot(debian.kernel, debian.initrd, shares=[f"{folder}:it"]) as vm:
        await vm.console.expect(READY, timeout=120)
        for attempt in ("echo new >/mnt/it/file", "touch /mnt/it/new", "rm -f /mnt/it/file", "chmod 777 /mnt/it/file",
                        "mkdir /mnt/it/d", "mv /mnt/it/file /mnt/it/x"):  # fmt: skip
            code, said = await shell(vm, attempt)
            assert code != 0, attempt
            assert "Read-only" in said
        for attempt in (f"cat /mnt/it/root{tmp_path}/secret", "cat /mnt/it/up", "cat /mnt/it/absolute"):
            code, said = await shell(vm, attempt)
            assert code != 0, attempt
            assert "No such file" in said
        # ".." at the top is the guest's own.
        _, said = await shell(vm, "ls /mnt/it/..")
        assert said.split() == ["it"]
    assert (folder / "file").read_text() == "original"


async def test_shares_survive_a_reset(debian: Fetched, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("still here")
    async with avmm.boot(debian.kernel, debian.initrd, shares=[f"{tmp_path}:it"]) as vm:
        await vm.console.expect(READY, timeout=120)
        vm.console.write(b"exec 5</mnt/it/file; reboot -f\n")
        await vm.console.expect(READY, timeout=120)
        _, said = await shell(vm, "cat /mnt/it/file; umount /mnt/it; mount -t virtiofs it /mnt/it; cat /mnt/it/file")
        assert said.count("still here") == 2


async def test_a_twin_goes_on_in_the_folder(debian: Fetched, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("one\ntwo\nthree\n")
    async with avmm.boot(debian.kernel, debian.initrd, shares=[f"{tmp_path}:it:rw"]) as vm:
        await vm.console.expect(READY, timeout=120)
        await shell(vm, "cd /mnt/it/sub; exec 5<file; read line <&5; exec 6>>log; echo both >&6")
        async with vm.fork() as twin:
            _, said = await shell(twin, "read line <&5; pwd; echo twin >&6; cat file log; ls")
            assert said.split() == ["/mnt/it/sub", "one", "two", "three", "both", "twin", "file", "log"]
        _, said = await shell(vm, "echo parent >&6; cat log")
        assert said.split() == ["both", "twin", "parent"]


PROGRAMS = Path(__file__).parent / "programs"


def output(folder: Path, *argv: str) -> str:
    """What a program prints that is run in ``folder`` on the host."""
    return subprocess.run(argv, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="sets owners, as only root may")
async def test_files_behave_as_files_do(tmp_path: Path) -> None:
    """What POSIX promises, random work on one file, stress-ng's file systems stressors, and git; the first two also on
    the host's own file system, which is the witness that they ask for nothing but what is promised."""
    shared, host = tmp_path / "shared", tmp_path / "host"
    for each in (shared, host):
        shutil.copytree(PROGRAMS, each)
        (each / "work").mkdir()
    posix = output(host / "work", sys.executable, "../posix_files.py")
    assert posix.endswith(" 0 broken\n"), posix
    assert output(host, sys.executable, "fsx.py", "f", "1000", "1") == "1000 operations, no difference\n"
    image = rootfs(["git", "python3", "stress-ng"])
    async with booted(image, shares=[f"{shared}:it:rw", f"{shared}:cached:rw:cache=1"]) as guest:
        await guest.check(
            "mkdir -p /mnt/it /mnt/cached; mount -t virtiofs it /mnt/it; mount -t virtiofs cached /mnt/cached"
        )
        said = await guest.check("cd /mnt/it/work && python3 ../posix_files.py", timeout=300)
        assert said == posix
        for seed, folder in ((1, "it"), (2, "cached")):
            said = await guest.check(f"python3 /mnt/it/fsx.py /mnt/{folder}/f{seed} 600 {seed}", timeout=300)
            assert said == "600 operations, no difference\n"
        await guest.check(
            "cd /mnt/it && stress-ng --hdd 1 --hdd-ops 500 --hdd-bytes 2m --dentry 1 --dentry-ops 200 --rename 1 "
            "--rename-ops 300 --seek 1 --seek-ops 300 --seek-size 1m --verify -t 60 2>&1", timeout=300,
        )  # fmt: skip
        said = await guest.check(
            "cd /mnt/it && git init -q repo && cd repo && cp -r /usr/share/perl5 . && git add . && "
            "git -c user.name=n -c user.email=e commit -q -m m && git status --porcelain && git fsck 2>&1 && "
            "echo changed >>perl5/Git.pm && git status --porcelain", timeout=300,
        )  # fmt: skip
        assert said.splitlines()[-1] == " M perl5/Git.pm"
        assert set(guest.vm.counters()["guest_errors"].values()) == {0}
    if shutil.which("git"):
        said = output(shared / "repo", "git", "-c", "safe.directory=*", "status", "--porcelain")
        assert said == " M perl5/Git.pm\n"

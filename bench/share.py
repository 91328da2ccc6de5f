"""A shared folder beside QEMU's two: virtio-9p (`-fsdev local`), and virtio-fs with virtiofsd, a program of its own.

python bench/share.py [-n 3] [--files 500] [--size 64] [--cache 0] [--virtiofsd]

Small files made, looked at and read by the guest's shell (files a second), then large reads and writes of one file in
the host's page cache (MiB a second; the guest's caches are dropped before each). 9p is mounted with its default
cache=none, so that both sides ask the host each time, and keeps no file data in the guest at all, which the direct
reads and writes do not either; the drivers of 9p come from the kernel's package.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from side_by_side import AVMM, QEMU, guest, headline, require_qemu

from avmm.bootloader import cpio, deb, modules
from avmm.debian import Apt, Fetched, cache_directory

_SCRIPT = """#!/bin/sh
mkdir -p /mnt/code
for each in /bench-modules/*; do insmod $each 2>/dev/null; done
grep -q ' /mnt/code ' /proc/mounts || MOUNT
grep -q ' /mnt/code ' /proc/mounts || { echo 'the folder is not mounted'; poweroff -f; }
cd /mnt/code
now() { read up rest </proc/uptime; echo $((${up%.*} * 100 + 1${up#*.} - 100)); }
drop() { sync; echo 3 >/proc/sys/vm/drop_caches; }
failed() { echo 'a copy failed'; poweroff -f; }
report() { echo "RESULT $1 $(( $(now) - $2 ))"; }
text='line
0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789'
text=$text$text$text$text$text$text$text$text$text$text
for turn in 1 2; do
    rm -rf d; mkdir d; cd d; drop
    t=$(now); i=0; while [ $i -lt FILES ]; do echo "$text" >f$i; i=$((i + 1)); done; report create $t
    drop
    t=$(now); i=0; while [ $i -lt FILES ]; do [ -e f$i ]; i=$((i + 1)); done; report stat $t
    drop
    t=$(now); i=0; while [ $i -lt FILES ]; do read line <f$i; i=$((i + 1)); done; report read $t
    cd ..
    drop
    t=$(now); dd if=/dev/zero of=big bs=1M count=SIZE conv=fsync 2>/dev/null || failed; report write-sequential $t
    drop
    t=$(now); dd if=big of=/dev/null bs=1M 2>/dev/null || failed; report read-sequential $t
    drop
    t=$(now); dd if=big of=/dev/null bs=16k 2>/dev/null || failed; report read-16k $t
DIRECT
done
poweroff -f
"""

_DIRECT = """\
    drop
    t=$(now); dd if=/dev/zero of=big bs=1M count=SIZE oflag=direct conv=notrunc 2>/dev/null || failed
    report write-direct $t
    t=$(now); dd if=big of=/dev/null bs=1M iflag=direct 2>/dev/null || failed; report read-direct $t"""

_FIGURES = ("create", "stat", "read", "write-sequential", "read-sequential", "read-16k")
_DIRECT_FIGURES = ("write-direct", "read-direct")  # which virtiofsd refuses

_9P = "mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288 code /mnt/code"
_VIRTIOFS = "mount -t virtiofs code /mnt/code"


def drivers_of_9p(fetched: Fetched) -> Path:
    """An archive with the modules of 9p in the order in which they load, from the package of this kernel; cached."""
    path = cache_directory() / "bench" / f"9p-{fetched.version}.cpio"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source = Apt("bookworm", Path(scratch), lambda text: None)
            package = source.download(source.find(f"linux-image-{fetched.version}"))
            with deb.open_package(package) as kernel:
                root = f"lib/modules/{fetched.version}/"
                paths = [name.removeprefix(root) for name in kernel.names if name.startswith(root) and ".ko" in name]
                tree = modules.ModuleTree(paths, lambda name: kernel.read(root + name))
                found = tree.closure(("9pnet_virtio", "9p"))
        if not found:
            sys.exit(f"the kernel {fetched.version} has no 9p")
        entries = [cpio.directory("bench-modules")]
        entries += [cpio.file(f"bench-modules/{at:02}-{each.name}.ko", each.image) for at, each in enumerate(found)]
        path.write_bytes(cpio.pack(entries))
    return path


def with_script(fetched: Fetched, script: str, *more: bytes) -> Path:
    """The fetched initrd with ``script`` as /bench-init, and other archives."""
    data = cpio.append(fetched.initrd.read_bytes(), cpio.pack([cpio.file("bench-init", script.encode(), 0o755)]))
    for each in more:
        data = cpio.append(data, each)
    handle, name = tempfile.mkstemp(suffix=".initrd")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
    return Path(name)


def measure(argv: list[str], args: argparse.Namespace) -> dict[str, float]:
    """Boot once; the figures of the second turn, the first warms up."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    found = {name: int(ticks) for name, ticks in re.findall(r"RESULT ([\w-]+) (\d+)\r", done.stdout.decode("latin-1"))}
    if found.keys() != set(args.figures):
        sys.exit(f"{argv[0]} ended with {done.returncode}: {done.stdout[-1000:]!r} {done.stderr[-1000:]!r}")
    return {
        name: (args.files if name in ("create", "stat", "read") else args.size) / max(found[name], 1) * 100
        for name in args.figures
    }


@contextlib.contextmanager
def virtiofsd(folder: str) -> Iterator[list[str]]:
    """QEMU's own daemon at work; the options of a QEMU that uses it."""
    program = shutil.which("virtiofsd", path="/usr/libexec:/usr/lib/qemu:" + os.environ["PATH"])
    if program is None:
        sys.exit("there is no virtiofsd here")
    with tempfile.TemporaryDirectory() as scratch:
        socket = f"{scratch}/socket"
        options = [program, f"--socket-path={socket}", "-o", f"source={folder},cache=auto"]
        process = subprocess.Popen(options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while not os.path.exists(socket) and process.poll() is None:
                time.sleep(0.01)
            yield [
                "-object", "memory-backend-memfd,id=m,size=512M,share=on", "-machine", "memory-backend=m",
                "-chardev", f"socket,id=c,path={socket}", "-device", "vhost-user-fs-device,chardev=c,tag=code",
            ]  # fmt: skip
        finally:
            process.terminate()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--size", type=int, default=64, help="MiB")
    parser.add_argument("--cache", type=float, default=0, help="of avmm's share, seconds")
    parser.add_argument("--virtiofsd", action="store_true", help="beside virtiofsd instead of 9p")
    args = parser.parse_args()
    require_qemu()
    fetched = guest("generic")  # the cloud kernel has no 9p
    args.figures = _FIGURES if args.virtiofsd else _FIGURES + _DIRECT_FIGURES
    script = (
        _SCRIPT.replace("DIRECT", "" if args.virtiofsd else _DIRECT)
        .replace("FILES", str(args.files))
        .replace("SIZE", str(args.size))
    )
    ours_initrd = with_script(fetched, script.replace("MOUNT", "true"))
    if args.virtiofsd:
        theirs_initrd = with_script(fetched, script.replace("MOUNT", _VIRTIOFS))
    else:
        theirs_initrd = with_script(fetched, script.replace("MOUNT", _9P), drivers_of_9p(fetched).read_bytes())
    append = "quiet avmm.init=/bench-init"
    peer = "virtiofsd" if args.virtiofsd else "QEMU 9p"
    headline(
        f"shared folder: {args.files} files, {args.size} MiB, cache={args.cache:g}, beside {peer}; {fetched.version}"
    )
    runs = []
    with tempfile.TemporaryDirectory() as ours_folder, tempfile.TemporaryDirectory() as theirs_folder:
        ours = [*AVMM.command(fetched.kernel, ours_initrd, 512, 1, append),
                "--share", f"{ours_folder}:code:rw:cache={args.cache:g}"]  # fmt: skip
        theirs = [
            *QEMU.command(fetched.kernel, theirs_initrd, 512, 1, append),
            "-global",
            "virtio-mmio.force-legacy=false",
        ]
        for _ in range(args.n):
            first = measure(ours, args)
            if args.virtiofsd:
                with virtiofsd(theirs_folder) as options:
                    runs.append((first, measure([*theirs, *options], args)))
            else:
                options = ["-fsdev", f"local,id=f,path={theirs_folder},security_model=none",
                           "-device", "virtio-9p-device,fsdev=f,mount_tag=code"]  # fmt: skip
                runs.append((first, measure([*theirs, *options], args)))
    for name in args.figures:
        a = statistics.median(run[0][name] for run in runs)
        b = statistics.median(run[1][name] for run in runs)
        paired = statistics.median(run[0][name] / run[1][name] for run in runs)
        unit = "files/s" if name in ("create", "stat", "read") else "MiB/s"
        ratios = f"ratio {a / b:.2f}, of pairs {paired:.2f}"
        print(f"{name:16s} avmm {a:9.1f} {unit:7s}  {peer} {b:9.1f} {unit:7s}  {ratios}", flush=True)
    ours_initrd.unlink()
    theirs_initrd.unlink()


if __name__ == "__main__":
    main()

"""vsock between guest and host: round trips of one byte, and megabytes a second each way.

python bench/vsock.py [-n 3] [--size 64]

QEMU's vsock is the host kernel's (vhost-vsock); where that is missing, what is left to compare with is TCP through
QEMU's user-mode network, and ours beside it. The host's end is one thread of this program in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from side_by_side import AVMM, QEMU, guest, headline, require_qemu, with_init

_PEER = Path(__file__).resolve().parents[1] / "tests" / "guest" / "vsock_peer.c"
_SCRIPT = """#!/bin/sh
cat /proc/uptime >/dev/null
for turn in 1 2; do  # the first warms up
    vsock_peer ping {ping} 2000
    vsock_peer sink {sink} {size}
    vsock_peer source {source} {size}
done
echo BENCH-DONE
poweroff -f
"""
_CID = 77
_PORTS = {"ping": 7001, "sink": 7002, "source": 7003}
_FIGURES = {
    "ping p50": (r"ping: p50 (\d+) us", "us"),
    "ping p99": (r"p99 (\d+) us", "us"),
    "to the host": (r"sink: ([\d.]+) MB/s", "MB/s"),
    "to the guest": (r"source: ([\d.]+) MB/s", "MB/s"),
}


def serve(kind: str, listener: socket.socket, size: int) -> None:
    """Do the host's part for whoever connects, in a thread of its own."""

    def work() -> None:
        buffer = memoryview(bytearray(1 << 18))
        while True:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(ConnectionError):
                if kind == "source":
                    for _ in range(size // len(buffer)):
                        peer.sendall(buffer)
                    peer.recv(1)
                    continue
                while count := peer.recv_into(buffer):
                    if kind == "ping":
                        peer.sendall(buffer[:count])

    threading.Thread(target=work, daemon=True).start()


def measure(argv: list[str]) -> dict[str, float]:
    """Boot once; the figures of the second turn."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=600)
    text = done.stdout.decode("latin-1")
    found = {name: re.findall(pattern, text) for name, (pattern, _) in _FIGURES.items()}
    if "BENCH-DONE" not in text or any(len(each) != 2 for each in found.values()):
        sys.exit(f"{argv[0]} ended with {done.returncode}: {text[-1500:]!r} {done.stderr[-1000:]!r}")
    return {name: float(values[-1]) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--size", type=int, default=64, help="MiB each way")
    args = parser.parse_args()
    require_qemu()
    size = args.size << 20
    fetched = guest()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "vsock_peer"
        subprocess.run(["aarch64-linux-gnu-gcc", "-O2", "-static", "-o", program, _PEER], check=True)
        tcp = {}
        for kind, port in _PORTS.items():
            unix = socket.socket(socket.AF_UNIX)
            unix.bind(f"{folder}/{kind}")
            unix.listen()
            serve(kind, unix, size)
            inet = socket.create_server(("127.0.0.1", 0))
            tcp[kind] = f"tcp:{inet.getsockname()[1]}"
            serve(kind, inet, size)
            if os.path.exists("/dev/vhost-vsock"):
                vsock = socket.socket(socket.AF_VSOCK)
                vsock.bind((socket.VMADDR_CID_ANY, port))
                vsock.listen()
                serve(kind, vsock, size)
        over_vsock = with_init(
            fetched.initrd, _SCRIPT.format(size=size, **_PORTS), {"bin/vsock_peer": program.read_bytes()}
        )
        over_tcp = with_init(fetched.initrd, _SCRIPT.format(size=size, **tcp), {"bin/vsock_peer": program.read_bytes()})
        append = "quiet avmm.init=/bench-init"

        def ours(initrd: Path, *options: str) -> list[str]:
            return [*AVMM.command(fetched.kernel, initrd, 512, 1, append)[:-1], options[0], *options[1:]]

        def theirs(initrd: Path, *options: str) -> list[str]:
            command = QEMU.command(fetched.kernel, initrd, 512, 1, append)
            return [*command, "-global", "virtio-mmio.force-legacy=false", *options]

        sockets = [word for kind, port in _PORTS.items() for word in ("--vsock", f"{port}={folder}/{kind}")]
        machines = {
            "avmm vsock": ours(over_vsock, "none", *sockets),
            "avmm TCP": ours(over_tcp, "user"),
            "QEMU TCP": theirs(over_tcp, "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n"),
        }
        if os.path.exists("/dev/vhost-vsock"):
            machines["QEMU vsock"] = theirs(over_vsock, "-device", f"vhost-vsock-device,guest-cid={_CID}")
        headline(f"vsock: {args.size} MiB each way, {fetched.version}")
        if "QEMU vsock" not in machines:
            print("there is no /dev/vhost-vsock here: QEMU has no vsock to compare with")
        runs = [{name: measure(argv) for name, argv in machines.items()} for _ in range(args.n)]
        for figure, (_, unit) in _FIGURES.items():
            medians = {name: statistics.median(run[name][figure] for run in runs) for name in machines}
            shown = "   ".join(f"{name} {value:8.1f} {unit}" for name, value in medians.items())
            print(f"{figure:12s} {shown}", flush=True)


if __name__ == "__main__":
    main()

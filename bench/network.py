"""The user-mode network: iperf3 up and down, connections a second, request latency, beside QEMU's `-netdev user`.

python bench/network.py [-n RUNS] [--seconds 4] [-c CPUS]

The guest is the client; iperf3 and an HTTP server run on this host, on its loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import uvloop
from side_by_side import AVMM, QEMU, guest, headline, require_qemu, running

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.guest.rootfs import APPEND, initrd, rootfs

#: name: unit; of what is counted a second more is better, of what takes time less
FIGURES = {
    "TCP up": "Mbit/s", "TCP down": "Mbit/s", "connections": "1/s", "request p50": "ms", "request p99": "ms",
}  # fmt: skip
PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n%b\r\nhello"


class Server(asyncio.Protocol):
    """The least HTTP that ApacheBench is content with."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if b"eep-" in data:
            self.transport.write(PAGE % b"Connection: keep-alive\r\n")
        else:
            self.transport.write(PAGE % b"")
            self.transport.close()


def serve(port: int) -> None:
    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port, backlog=1024)
        await server.serve_forever()

    uvloop.run(main())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def servers() -> Iterator[tuple[int, int]]:
    """iperf3's and the HTTP server, each with a port of its own."""
    bulk, web = free_port(), free_port()
    iperf = subprocess.Popen(
        ["iperf3", "-s", "-p", str(bulk), "-B", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    http = multiprocessing.get_context("spawn").Process(target=serve, args=(web,), daemon=True)
    http.start()
    try:
        for port in (bulk, web):
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
        yield bulk, web
    finally:
        iperf.kill()
        iperf.wait()
        http.kill()
        http.join()


def measure(argv: list[str], bulk: int, web: int, seconds: int) -> dict[str, float]:
    """Every figure of one machine, booted once."""
    url = f"http://10.0.2.2:{web}/"
    commands = {
        "up": f"iperf3 -c 10.0.2.2 -p {bulk} -t {seconds} -f m",
        "down": f"iperf3 -c 10.0.2.2 -p {bulk} -t {seconds} -f m -R",
        "connect": f"ab -q -n 1000 -c 8 {url}",
        "request": f"ab -q -k -n 2000 -c 1 -e /tmp/percent {url}; cat /tmp/percent",
    }
    script = "".join(f"echo '<'{name}'>'; {command} 2>&1; echo '</'{name}'>'\n" for name, command in commands.items())
    with running(argv, b"rootfs: ready") as process:
        said = process.communicate(script.encode() + b"poweroff -f\n", timeout=300)[0].decode(errors="replace")
    found = dict(re.findall(r"<(\w+)>\r\n(.*?)</\1>\r\n", said, re.DOTALL))
    try:
        up, down = (re.findall(r"([\d.]+) Mbits/sec.*receiver", found[name])[0] for name in ("up", "down"))
        rate = re.findall(r"Requests per second:\s+([\d.]+)", found["connect"])[0]
        times = dict(re.findall(r"^(50|99),([\d.]+)", found["request"], re.MULTILINE))
        values = (up, down, rate, times["50"], times["99"])
    except (KeyError, IndexError):
        sys.exit(f"{argv[0]} has not measured everything: {said[-3000:]}")
    return dict(zip(FIGURES, map(float, values), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=3, help="runs of each")
    parser.add_argument("--seconds", type=int, default=4, help="of each iperf3")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    args = parser.parse_args()
    require_qemu()
    fetched = guest()
    image, ramdisk = rootfs(["iperf3", "apache2-utils"]), initrd(fetched)
    common = (fetched.kernel, ramdisk, 512, args.cpus, APPEND)
    ours = [*AVMM.command(*common), "-d", f"{image},snapshot,format=raw"]
    ours[ours.index("none")] = "user"
    theirs = [
        *QEMU.command(*common), "-global", "virtio-mmio.force-legacy=false",
        "-drive", f"file={image},format=raw,if=none,id=d,snapshot=on", "-device", "virtio-blk-device,drive=d",
        "-netdev", "user,id=n", "-device", "virtio-net-device,netdev=n",
    ]  # fmt: skip
    at = theirs.index("-net")
    theirs[at : at + 2] = []
    headline(f"user-mode network: {fetched.version}, {args.cpus} vCPU")
    with servers() as (bulk, web):
        runs = [
            (measure(ours, bulk, web, args.seconds), measure(theirs, bulk, web, args.seconds)) for _ in range(args.n)
        ]
    for name, unit in FIGURES.items():
        a = statistics.median(run[0][name] for run in runs)
        b = statistics.median(run[1][name] for run in runs)
        print(f"{name:12s} avmm {a:9.2f} {unit:6s}  QEMU TCG {b:9.2f} {unit:6s}  ratio {a / b:.3f}", flush=True)


if __name__ == "__main__":
    main()

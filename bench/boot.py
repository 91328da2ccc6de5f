"""Process start to guest power-off: Debian's kernel, a busybox init that powers off at once.

python bench/boot.py [-n RUNS] [-c CPUS] [--flavour cloud|generic]
"""

from __future__ import annotations

import argparse

from side_by_side import AVMM, QEMU, alternate, guest, headline, require_qemu, timed, with_init

INIT = "#!/bin/sh\necho BOOT-OK\npoweroff -f\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=7, help="counted runs of each")
    parser.add_argument("-c", "--cpus", type=int, default=1)
    parser.add_argument("-m", "--memory", type=int, default=512, help="MiB")
    parser.add_argument("--flavour", default="cloud")
    parser.add_argument("--engine", default="auto", help="avmm's")
    args = parser.parse_args()
    require_qemu()
    fetched = guest(args.flavour)
    initrd = with_init(fetched.initrd, INIT)
    print(f"avmm's engine: {args.engine}")
    headline(f"boot to power-off: {fetched.version} {args.flavour}, {args.memory} MiB, {args.cpus} vCPU")

    def run(machine) -> float:
        argv = machine.command(fetched.kernel, initrd, args.memory, args.cpus, "avmm.init=/bench-init")
        if machine is AVMM:
            argv += ["--engine", args.engine]
        return timed(argv, b"BOOT-OK")

    try:
        alternate(args.n, lambda: run(AVMM), lambda: run(QEMU))
    finally:
        initrd.unlink()


if __name__ == "__main__":
    main()

"""``avmm boot KERNEL [INITRD]``: boot a guest with its console on stdin and stdout."""

from __future__ import annotations

import argparse
import gc
from functools import partial

from avmm.cli.exitcodes import ExitCode
from avmm.cli.parser import Commands, seconds


def add_parser(commands: Commands) -> None:
    """Declare ``boot``."""
    p = commands.add_parser(
        "boot",
        help="boot a kernel with its console on this terminal",
        description="Boot an arm64 Linux kernel. The guest's console is on stdin and stdout; Ctrl-A x quits. "
        "With -- COMMAND at the end, the command runs in the guest with stdin, stdout and stderr, and its exit code is "
        "avmm's.",
        epilog="exit codes: 0 guest power-off, 2 bad usage or image, 3 engine or avmm error, 4 guest panic, "
        "5 guest fault, 124 timeout, 128+N ended by signal N",
    )
    p.add_argument("kernel", metavar="KERNEL", help="Image, Image.gz or EFI zboot image of an arm64 kernel")
    p.add_argument("initrd", metavar="INITRD", nargs="?", help="initial ramdisk")
    p.add_argument("-a", "--append", metavar="ARGS", default="", help="add to the default kernel command line")
    p.add_argument("--cmdline", metavar="ARGS", help="replace the default kernel command line")
    p.add_argument("-m", "--memory", metavar="SIZE", default="512M", help="guest RAM (default 512M)")
    p.add_argument("-c", "--cpus", metavar="N", type=int, default=1, help="number of vCPUs (default 1)")
    p.add_argument(
        "--engine", metavar="NAME", default="auto",
        help="auto, framework, softhv, softhv,interpreter or softhv,turns (default auto)",
    )  # fmt: skip
    p.add_argument("--fault", metavar="SPEC", help="make softhv misbehave, as in unknown=0.1,late-kick=200us")
    p.add_argument(
        "--irqchip",
        metavar="NAME",
        default="avmm",
        help="avmm or hypervisor: whose interrupt controller (default avmm)",
    )
    p.add_argument(
        "-d", "--drive", metavar="PATH[,ro][,snapshot][,format=raw|qcow2]", action="append", default=[], dest="drives",
        help="a disk, /dev/vda and on; ro: read only, snapshot: forget what is written (repeat for more)",
    )  # fmt: skip
    p.add_argument(
        "--net", metavar="user|none|tap=IF|socket=PATH[,restrict][,mac=…][,pcap=FILE]", action="append", dest="nets",
        help="a network (default user: this host is the gateway, no root is needed; repeat for more)",
    )  # fmt: skip
    p.add_argument(
        "-p", "--publish", metavar="HOST:GUEST[/udp]", action="append", default=[],
        help="offer the guest's port GUEST at port HOST of this host's loopback; ADDRESS:HOST:GUEST: elsewhere",
    )  # fmt: skip
    p.add_argument("--pcap", metavar="FILE", help="record the first network's frames in FILE, for tshark or Wireshark")
    p.add_argument(
        "--share", metavar="DIR[:TAG][:rw][:cache=SECONDS]", action="append", default=[], dest="shares",
        help="a folder, /mnt/TAG in the fetched initrd; read-only unless rw (repeat for more)",
    )  # fmt: skip
    p.add_argument(
        "--vsock", metavar="PORT=SOCKET", action="append", default=[],
        help="let the guest reach the unix socket SOCKET as port PORT of CID 2 (repeat for more)",
    )  # fmt: skip
    p.add_argument(
        "--halt-poll", metavar="TIME", default=0, help="a vCPU polls up to so long before it sleeps, as in 200us"
    )
    p.add_argument("--timeout", metavar="SECONDS", type=seconds, help="end with exit code 124 after this long")
    p.add_argument("--no-reboot", action="store_true", help="exit when the guest resets instead of rebooting it")
    p.add_argument("--dump-dtb", metavar="FILE", help="write the device tree to FILE and exit")
    p.add_argument("--dry-run", action="store_true", help="print the resolved configuration as JSON and exit")
    p.add_argument("--timing", action="store_true", help="print a boot timeline and the exits by kind on stderr")
    p.add_argument(
        "--trace", metavar="FILE", help="write a timeline of exits, parks, IRQs and device work for Perfetto"
    )
    p.add_argument("--no-monitor", action="store_true", help="keep this VM out of `avmm top`")
    p.add_argument("-v", "--verbose", action="count", default=0, help="log to stderr (-vv: debug)")
    p.set_defaults(run=run)


def _allow_files() -> None:
    """As many open files as this user may have: each connection of the guest's is a socket of ours."""
    import contextlib
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # macOS allows fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 16 if most == resource.RLIM_INFINITY else most, most))


def run(args: argparse.Namespace) -> int:
    """Boot, or say what would be booted."""
    gc.disable()  # until session.run()
    from avmm.config import VmConfig
    from avmm.errors import ConfigError

    config = VmConfig.resolve(
        args.kernel,
        args.initrd,
        memory=args.memory,
        cpus=args.cpus,
        append=args.append,
        cmdline=args.cmdline,
        engine=args.engine,
        reboot=not args.no_reboot,
        faults=args.fault,
        drives=args.drives,
        net=args.nets or "user",
        publish=args.publish,
        pcap=args.pcap,
        shares=args.shares,
        vsock=args.vsock,
        agent=args.guest_command is not None,
        halt_poll=args.halt_poll,
        irqchip=args.irqchip,
    )
    if args.dry_run:
        import json

        from avmm.describe import describe

        print(json.dumps(describe(config), indent=2))
        return ExitCode.POWER_OFF
    if args.dump_dtb:
        from avmm.describe import device_tree

        try:
            with open(args.dump_dtb, "wb") as file:
                file.write(device_tree(config))
        except OSError as error:
            raise ConfigError(f"cannot write {args.dump_dtb}: {error.strerror}") from error
        return ExitCode.POWER_OFF
    from avmm.cli import attach

    _allow_files()
    if args.verbose or args.trace:
        attach.configure_logging(args.verbose)
    if args.guest_command is not None:
        if not args.guest_command:
            raise ConfigError("which command? avmm boot KERNEL INITRD -- COMMAND")
        from avmm.cli import command

        run = partial(command.run, config, args.guest_command)
    else:
        run = partial(attach.run, config)
    return run(timeout=args.timeout, timing=args.timing, monitor=not args.no_monitor, trace=args.trace)

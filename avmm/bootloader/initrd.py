"""The initrd ``avmm fetch`` makes: busybox, one kernel's virtio drivers and file systems, and a short ``/init``.

``/init`` mounts the usual file systems, loads what ``/etc/modules`` names and then the drivers of the virtio devices
that are there, mounts the folder shared as TAG at ``/mnt/TAG`` for each ``avmm.share=TAG`` on the kernel's command
line, and gives a shell on the console. ``avmm.init=/path`` on the kernel's command line names another
program to run instead of the shell: append a second archive that holds it (:func:`avmm.bootloader.cpio.append`).
"""

from __future__ import annotations

import hashlib
import re

from avmm.bootloader import cpio, modules
from avmm.bootloader.deb import Package
from avmm.errors import ImageError

#: Goes up when :func:`build` changes in a way that the texts and lists below do not show.
_FORMAT = 1

#: Modules that go in where the kernel has them as modules; what they depend on follows.
WANTED = (
    "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon",
    "vsock", "vmw_vsock_virtio_transport", "fuse", "virtiofs", "ext4", "crc32c_generic", "overlay",
)  # fmt: skip

#: Loaded by name at boot; the drivers behind virtio_mmio are found through their devices' aliases.
_AT_BOOT = ("virtio_mmio",)

INIT = """\
#!/bin/busybox sh
# The first process: it never returns, because the kernel panics when it does.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
/bin/busybox --install -s
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mount -t proc proc /proc # the last: the agent takes it for a sign that the rest is there

modprobe -a $(cat /etc/modules) 2>/dev/null
aliases=$(cat /sys/bus/virtio/devices/*/modalias 2>/dev/null)
[ -n "$aliases" ] && modprobe -a $aliases 2>/dev/null

# A console that is a module (hvc0) exists only now.
exec </dev/console >/dev/console 2>&1
hostname avmm
ip link set lo up

# avmm.ip=10.1.0.1/24 gives the first network card an address, avmm.ip=none leaves the cards alone; else: DHCP.
address=dhcp
for word in $(cat /proc/cmdline); do
    case $word in avmm.ip=*) address=${word#avmm.ip=} ;; esac
done
for card in /sys/class/net/*; do
    card=${card##*/}
    case $address:$card in
    *:lo | none:*) ;;
    dhcp:*) ip link set "$card" up && udhcpc -i "$card" -b -t 2 -T 1 -A 10 -S >/dev/null 2>&1 ;;
    *) ip link set "$card" up && ip addr add "$address" dev "$card"; address=none ;;
    esac
done

for word in $(cat /proc/cmdline); do
    tag=${word#avmm.share=}
    [ "$tag" != "$word" ] && mkdir -p "/mnt/$tag" && mount -t virtiofs "$tag" "/mnt/$tag" || continue
    # Read ahead by what one request may hold: the kernel's default is an eighth of it.
    device=$(awk -v at="/mnt/$tag" '$5 == at { print $3 }' /proc/self/mountinfo)
    echo 1024 >"/sys/class/bdi/$device/read_ahead_kb"
done
for word in $(cat /proc/cmdline); do
    case $word in avmm.init=*) exec "${word#avmm.init=}" ;; esac
done
echo "avmm: Debian $(uname -r) ready"
cd /root
setsid cttyhack sh
poweroff -f
"""

_DHCP = """\
#!/bin/sh
# What udhcpc does with a lease.
case $1 in
deconfig) ip addr flush dev "$interface"; ip link set "$interface" up ;;
bound | renew)
    ip addr flush dev "$interface"
    ip addr add "$ip/${mask:-24}" dev "$interface"
    for gateway in $router; do ip route replace default via "$gateway" dev "$interface"; done
    for server in $dns; do echo "nameserver $server"; done >/etc/resolv.conf ;;
esac
"""

_DIRECTORIES = ("bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/sbin")


def recipe() -> str:
    """Changes when this version of avmm would build another initrd from the same packages."""
    made_of = repr((_FORMAT, WANTED, _AT_BOOT, INIT, _DHCP, _DIRECTORIES))
    return hashlib.sha256(made_of.encode()).hexdigest()


def find_kernel(kernel: Package) -> tuple[str, str]:
    """The version (``uname -r``) of the kernel in a ``linux-image`` package, and where in it the kernel lies.

    Raises ImageError when it holds none.
    """
    places = r"boot/vmlinuz-(?P<old>[\w.+~-]+)|usr/lib/modules/(?P<new>[\w.+~-]+)/vmlinuz"
    found = [match for name in kernel.names if (match := re.fullmatch(places, name))]
    if len(found) != 1:
        raise ImageError(f"the kernel package holds {len(found)} kernels, not one")
    return found[0]["old"] or found[0]["new"], found[0][0]


def build(kernel: Package, busybox: Package) -> bytes:
    """The initrd for the kernel of one package, with the busybox of another. The same packages give the same bytes."""
    version, _ = find_kernel(kernel)
    roots = [root for root in ("lib/modules", "usr/lib/modules") if f"{root}/{version}/modules.builtin" in kernel.names]
    if not roots:
        raise ImageError(f"the kernel package holds no modules for {version}")
    root = f"{roots[0]}/{version}/"
    paths = [name.removeprefix(root) for name in kernel.names if name.startswith(root) and ".ko" in name]
    tree = modules.ModuleTree(paths, lambda path: kernel.read(root + path))
    chosen = tree.closure(WANTED)
    home = f"lib/modules/{version}"
    shell = next((name for name in ("bin/busybox", "usr/bin/busybox") if name in busybox.names), None)
    if shell is None:
        raise ImageError("the busybox package holds no bin/busybox")
    entries = [cpio.directory(name, 0o1777 if name == "tmp" else 0o755) for name in _DIRECTORIES]
    entries += [cpio.file(f"{home}/{module.path}", module.image) for module in chosen]
    entries += [
        cpio.file("bin/busybox", busybox.read(shell), 0o755),
        cpio.symlink("bin/sh", "busybox"),
        cpio.file("init", INIT.encode(), 0o755),
        cpio.character_device("dev/console", 5, 1),
        cpio.character_device("dev/null", 1, 3, 0o666),
        cpio.file("etc/modules", "".join(f"{name}\n" for name in _AT_BOOT).encode()),
        cpio.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        cpio.file("etc/group", b"root:x:0:\n"),
        cpio.file("etc/udhcpc/default.script", _DHCP.encode(), 0o755),
        cpio.file(f"{home}/modules.dep", modules.modules_dep(chosen).encode()),
        cpio.file(f"{home}/modules.alias", modules.modules_alias(chosen).encode()),
    ]
    return cpio.pack(entries)


def with_agent(initrd: bytes, agent: bytes, path: str, init: str) -> bytes:
    """``initrd`` and the program ``agent`` as ``path`` in it; a link ``init`` beside it tells it what to start."""
    home = path.rpartition("/")[0]
    archive = cpio.pack([cpio.file(path, agent, 0o755), cpio.symlink(f"{home}/init", init)])
    return cpio.append(initrd, archive)

"""`avmm fetch` against Debian archives made here with Debian's tools: no network is used."""

from __future__ import annotations

import hashlib
import itertools
import json
import lzma
import shutil
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avmm import debian as fetch
from avmm.bootloader import cpio, deb, modules
from avmm.cli import fetch as fetch_command
from avmm.cli.parser import Parser
from avmm.debian import fetch_debian
from avmm.errors import FetchError, ImageError

KERNEL = "6.1.0-9-cloud-arm64"

TOOLS = ("dpkg-deb", "aarch64-linux-gnu-as")
pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {' and '.join(TOOLS)}")


def module(folder: Path, name: str, *declared: str) -> bytes:
    """A module as far as its declarations go: an ELF object with a .modinfo section, by the real assembler."""
    strings = "".join(f'.asciz "{each}"\n' for each in declared)
    target = folder / f"{name}.o"
    source = f'.section .modinfo,"a"\n{strings}'
    subprocess.run(["aarch64-linux-gnu-as", "-o", str(target), "-"], input=source.encode(), check=True)
    return target.read_bytes()


def package(
    pool: Path, name: str, version: str, files: dict[str, bytes], depends: str = "", packing: str = "xz"
) -> Path:
    root = pool / f"{name}-root"
    for path, content in {**files, "usr/share/doc/x": b"x"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "DEBIAN").mkdir()
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: arm64\nMaintainer: A <a@example.org>\nDescription: d\n"
    )
    (root / "DEBIAN" / "control").write_text(control + (f"Depends: {depends}\n" if depends else ""))
    target = pool / f"{name}_{version.replace(':', '%3a')}_arm64.deb"
    command = ["dpkg-deb", f"-Z{packing}", "--root-owner-group", "-b", str(root), str(target)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(root)
    return target


def publish(archive: Path, suite: str, debs: list[Path]) -> None:
    """A suite that offers ``debs``, as an archive has it."""
    stanzas = []
    for path in debs:
        control = subprocess.run(["dpkg-deb", "-f", path], capture_output=True, text=True, check=True).stdout
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        where = f"Filename: {path.relative_to(archive)}\nSize: {len(content)}\nSHA256: {digest}\n"
        stanzas.append(control + where)
    folder = archive / "dists" / suite
    (folder / "main/binary-arm64").mkdir(parents=True, exist_ok=True)
    plain = "\n".join(stanzas).encode()
    packed = lzma.compress(plain)
    (folder / "main/binary-arm64/Packages.xz").write_bytes(packed)
    lines = [
        f" {hashlib.sha256(content).hexdigest()} {len(content)} main/binary-arm64/{name}\n"
        for name, content in (("Packages", plain), ("Packages.xz", packed))
    ]
    head = f"Codename: {suite}\nSuite: {suite}\nComponents: main\nArchitectures: arm64\n"
    head += "Date: Sat, 14 Nov 2026 00:00:00 UTC\n"
    (folder / "Release").write_text(f"{head}SHA256:\n{''.join(lines)}")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with two kernels in bookworm and its updates."""
    archive = tmp_path_factory.mktemp("archive")
    pool = archive / "pool"
    pool.mkdir()
    home = f"lib/modules/{KERNEL}"
    drivers = f"{home}/kernel/drivers"
    objects = tmp_path_factory.mktemp("objects")
    blk = module(objects, "blk", "alias=virtio:d00000002v*", "depends=virtio,virtio_ring", "license=GPL")
    files = {
        f"boot/vmlinuz-{KERNEL}": b"a kernel",
        f"{home}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
        f"{drivers}/virtio/virtio.ko": module(objects, "virtio", "depends="),
        f"{drivers}/virtio/virtio_ring.ko": module(objects, "ring", "depends=virtio"),
        f"{drivers}/virtio/virtio_mmio.ko.xz": lzma.compress(module(objects, "mmio", "depends=virtio,virtio-ring")),
        f"{drivers}/block/virtio_blk.ko": blk,
        f"{drivers}/char/unwanted.ko": b"no ELF file, and nobody asks for it",
    }
    newest = f"linux-image-{KERNEL}"
    debs = [
        package(pool, newest, "6.1.10-1", files),
        package(pool, "linux-image-cloud-arm64", "6.1.10-1", {}, f"{newest} (= 6.1.10-1)"),
        package(pool, "busybox-static", "1:1.35.0-4+b1", {"bin/busybox": b"a busybox"}, packing="gzip"),
    ]
    publish(archive, "bookworm-updates", debs[:2])
    old = package(archive, "linux-image-cloud-arm64", "6.1.9-3", {}, "linux-image-6.1.0-8-cloud-arm64 (= 6.1.9-3)")
    publish(archive, "bookworm", [old, debs[2]])
    return archive


@pytest.fixture
def archive(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the archive that a test may damage, and no Debian key to check it with."""
    monkeypatch.setattr(fetch, "_KEYRING", tmp_path / "no-keyring")
    return shutil.copytree(made, tmp_path / "archive")


def entries(initrd: Path) -> dict[str, cpio.Entry]:
    return {entry.name: entry for entry in cpio.unpack(initrd.read_bytes())}


def check(fetched: fetch.Fetched) -> None:
    """What a whole fetch gives."""
    assert fetched.version == KERNEL
    assert fetched.kernel.read_bytes() == b"a kernel"
    files = entries(fetched.initrd)
    home = f"lib/modules/{KERNEL}"
    assert files["bin/busybox"].data == b"a busybox"
    assert stat.S_IMODE(files["init"].mode) == stat.S_IMODE(files["bin/busybox"].mode) == 0o755
    modules_there = {name.rpartition("/")[2] for name in files if name.endswith(".ko")}
    assert modules_there == {"virtio.ko", "virtio_ring.ko", "virtio_mmio.ko", "virtio_blk.ko"}
    assert files[f"{home}/kernel/drivers/virtio/virtio_mmio.ko"].data[:4] == b"\x7fELF"
    lines = files[f"{home}/modules.dep"].data.decode().splitlines()
    virtio = "kernel/drivers/virtio"
    assert f"{virtio}/virtio_mmio.ko: {virtio}/virtio.ko {virtio}/virtio_ring.ko" in lines
    assert f"{virtio}/virtio.ko:" in lines
    assert files[f"{home}/modules.alias"].data == b"alias virtio:d00000002v* virtio_blk\n"


def test_from_a_mirror(archive: Path, tmp_path: Path) -> None:
    told: list[str] = []
    check(fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache", progress=told.append))
    assert any("warning" in line and archive.as_uri() in line for line in told), "an unsigned mirror is not passed over"


@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt")
def test_from_apt(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_with_apt(archive, tmp_path, monkeypatch)
    check(fetch_debian(cache=tmp_path / "cache"))
    left = {path.name for path in (tmp_path / "cache/debian/bookworm-cloud").iterdir()}
    assert left == {"lock", "index.json", KERNEL}


@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt")
def test_apt_without_the_release_says_what_there_is(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_with_apt(archive, tmp_path, monkeypatch)
    with pytest.raises(
        FetchError, match=r"offers bookworm for arm64, not trixie: choose with --release, or .*--mirror"
    ):
        fetch_debian("trixie", cache=tmp_path / "cache")


def use_with_apt(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the host's apt this archive alone."""
    sources = "".join(
        f"deb [trusted=yes] {archive.as_uri()} {suite} main\n" for suite in ("bookworm", "bookworm-updates")
    )
    (tmp_path / "sources.list").write_text(sources)
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::SourceList "{tmp_path}/sources.list";\nDir::Etc::SourceParts "/dev/null";\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))


def test_the_second_time_nothing_is_asked(archive: Path, tmp_path: Path) -> None:
    first = fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    shutil.rmtree(archive)
    told: list[str] = []
    assert fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache", progress=told.append) == first
    assert told == []
    with pytest.raises(FetchError, match="cannot download"):
        fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache", refresh=True)
    check(first)  # a failed refresh leaves the old one


@pytest.mark.parametrize("name", ["vmlinuz", "initrd"])
def test_a_damaged_cache_is_made_anew(archive: Path, tmp_path: Path, name: str) -> None:
    first = fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    (first.kernel.parent / name).write_bytes(b"damaged")
    check(fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache"))


@pytest.mark.parametrize("index", ["", "{}", "[]", '{"version": 1, "recipe": 2, "sha256": 3}'])
def test_a_damaged_index_is_made_anew(archive: Path, tmp_path: Path, index: str) -> None:
    first = fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    path = first.kernel.parent.parent / "index.json"
    good = json.loads(path.read_text())
    path.write_text(index.replace("2", json.dumps(good["recipe"])))
    check(fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache"))


def test_another_recipe_makes_another_initrd(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    monkeypatch.setattr("avmm.bootloader.initrd.INIT", "changed")
    again = fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    assert again == first
    assert entries(again.initrd)["init"].data == b"changed"


def test_the_same_packages_give_the_same_bytes(archive: Path, tmp_path: Path) -> None:
    one, two = (fetch_debian(mirror=archive.as_uri(), cache=tmp_path / name) for name in ("one", "two"))
    assert one.initrd.read_bytes() == two.initrd.read_bytes()


def test_several_at_once_fetch_once(archive: Path, tmp_path: Path) -> None:
    told: list[str] = []

    def one(_: int) -> fetch.Fetched:
        return fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache", progress=told.append)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(one, range(4)))
    assert len(set(results)) == 1
    assert told.count("building the initrd") == 1
    check(results[0])


def change(path: Path, edit: Callable[[bytes], bytes]) -> None:
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("victim", "edit", "words"),
    [
        ("pool/linux-image-6*.deb", lambda data: data[:-1] + b"!", "checksum"),
        ("pool/linux-image-6*.deb", lambda data: data + b"more", "checksum"),
        ("dists/bookworm-updates/main/*/Packages.xz", lambda data: data + b"more", "checksum"),
        ("dists/bookworm/Release", lambda data: data.replace(b"SHA256", b"SHA1"), "no packages for arm64"),
        (
            "dists/bookworm/Release",
            lambda data: data.replace(b"binary-arm64", b"binary-amd64"),
            "no packages for arm64",
        ),
    ],
)
def test_what_is_not_what_it_should_be(
    archive: Path, tmp_path: Path, victim: str, edit: Callable[[bytes], bytes], words: str
) -> None:
    (path,) = archive.glob(victim)
    change(path, edit)
    with pytest.raises(FetchError, match=words):
        fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache")
    assert not (tmp_path / "cache/debian/bookworm-cloud/index.json").exists()


def test_a_missing_release_names_the_url(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"cannot download {archive.as_uri()}/dists/sid/Release"):
        fetch_debian("sid", mirror=archive.as_uri(), cache=tmp_path / "cache")


def test_a_missing_package_is_named(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="bookworm has no linux-image-arm64 for arm64"):
        fetch_debian(flavour="generic", mirror=archive.as_uri(), cache=tmp_path / "cache")


@pytest.mark.skipif(not (shutil.which("gpg") and shutil.which("gpgv")), reason="needs gpg and gpgv")
def test_a_signature_is_checked(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch", "--quiet", "--passphrase", ""]
    subprocess.run([*gpg, "--quick-gen-key", "archive@example.org", "ed25519", "sign"], check=True, capture_output=True)
    keyring = tmp_path / "keyring.gpg"
    subprocess.run([*gpg, "--output", keyring, "--export"], check=True)
    for suite in ("bookworm", "bookworm-updates"):
        folder = archive / "dists" / suite
        subprocess.run([*gpg, "--clearsign", "--output", folder / "InRelease", folder / "Release"], check=True)
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=True)
    monkeypatch.setattr(fetch, "_KEYRING", keyring)
    told: list[str] = []
    check(fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "cache", progress=told.append))
    assert not any("warning" in line for line in told)

    change(archive / "dists/bookworm/InRelease", lambda data: data.replace(b"Codename", b"Codenome"))
    with pytest.raises(FetchError, match="not signed by Debian's archive keys"):
        fetch_debian(mirror=archive.as_uri(), cache=tmp_path / "other")


def test_without_apt_a_mirror_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match="--mirror URL"):
        fetch_debian(cache=tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        {"flavour": "realtime"},
        {"release": "../../etc"},
        {"mirror": "ftp://example.org"},
        {"mirror": "no URL"},
    ],
)
def test_bad_arguments(call: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(FetchError):
        fetch_debian(**call, cache=tmp_path)  # type: ignore[arg-type]  # the parameters are mixed on purpose


def test_a_cache_one_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FetchError, match="--dir"):
        fetch_debian(cache=tmp_path / "file")


def test_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert fetch.cache_directory() == Path("/somewhere/avmm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    monkeypatch.setenv("HOME", "/home/u")
    assert fetch.cache_directory() == Path("/home/u/.cache/avmm")


def test_the_command_prints_two_paths(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser()
    fetch_command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["fetch", "debian", "--mirror", archive.as_uri(), "--dir", str(tmp_path / "here")])
    assert args.run(args) == 0
    told = capsys.readouterr()
    kernel, initrd = told.out.splitlines()
    assert Path(kernel).read_bytes() == b"a kernel"
    assert Path(initrd).is_relative_to(tmp_path / "here")
    assert "downloading linux-image-6" in told.err
    assert "\x1b" not in told.err, "no escape sequences where there is no terminal"


VERSIONS = ["1.0", "1.0-1", "1.0~rc1", "1:0.1", "1.0+b1", "1.0-1+deb12u1", "6.1.9-3", "6.1.10-1", "1.0a", "1.0.1", "0"]


@pytest.mark.skipif(not shutil.which("dpkg"), reason="needs dpkg")
def test_versions_compare_as_dpkg_says() -> None:
    for a, b in itertools.combinations(VERSIONS, 2):
        older = subprocess.run(["dpkg", "--compare-versions", a, "lt", b]).returncode == 0
        assert (fetch.compare_versions(a, b) < 0) == older, (a, b)
        assert (fetch.compare_versions(b, a) > 0) == older, (a, b)
        assert fetch.compare_versions(a, a) == 0


# --- packages and modules on their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["none", "gzip", "xz"])
def test_packages_of_every_packing(tmp_path: Path, packing: str) -> None:
    path = package(tmp_path, "some", "1", {"a/b": b"content", "c": b""}, packing=packing)
    with deb.open_package(path) as opened:
        assert set(opened.names) == {"a/b", "c", "usr/share/doc/x"}
        assert opened.read("a/b") == b"content"
        with pytest.raises(KeyError):
            opened.read("none")


@pytest.mark.parametrize("cut", [0, 7, 50, 100, 300, 500])
def test_a_damaged_package(tmp_path: Path, cut: int) -> None:
    path = package(tmp_path, "some", "1", {"a": b"content"})
    change(path, lambda data: data[:cut])
    with pytest.raises(ImageError, match=path.name), deb.open_package(path):
        pass


def test_a_module_that_needs_what_is_not_there(tmp_path: Path) -> None:
    image = module(tmp_path, "x", "depends=missing")
    tree = modules.ModuleTree(["kernel/x.ko"], lambda path: image)
    with pytest.raises(ImageError, match="x needs missing"):
        tree.closure(["x"])


def test_modules_that_need_each_other_end(tmp_path: Path) -> None:
    images = {"a.ko": module(tmp_path, "a", "depends=b"), "b.ko": module(tmp_path, "b", "depends=a")}
    with pytest.raises(ImageError):
        modules.ModuleTree(images, images.__getitem__).closure(["a"])


@pytest.mark.parametrize("image", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(20), b"\x7fELF\x02\x01" + b"\xff" * 80])
def test_what_is_no_module(image: bytes) -> None:
    with pytest.raises(ImageError):
        modules.modinfo(image)

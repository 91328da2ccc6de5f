"""A Debian arm64 kernel and an initrd to go with it, in the user's cache: what ``avmm fetch debian`` runs.

Packages come from the host's own apt (which checks signatures), run as whoever asks and with private state, or
from ``--mirror URL`` where there is no apt; checksums are followed from the release file down to the package.

    fetched = fetch_debian(flavour="cloud")    # fast and offline once it is there
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cmp_to_key
from pathlib import Path
from typing import Any, Protocol

from avmm.bootloader import compress, deb, initrd
from avmm.config import VmConfig
from avmm.errors import FetchError, ImageError

#: The meta package that depends on the newest kernel of each flavour.
FLAVOURS = {"cloud": "linux-image-cloud-arm64", "generic": "linux-image-arm64", "16k": "linux-image-arm64-16k"}

_BUSYBOX = "busybox-static"
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_RELEASE_LIMIT = 4 << 20
_INDEX_LIMIT = 512 << 20
_PACKAGE_LIMIT = 1 << 30
_TIMEOUT = 60.0  # seconds without a byte from a mirror

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a fetch gave: two files, and the kernel's version (``uname -r``)."""

    kernel: Path
    initrd: Path
    version: str


def fetch_debian(
    release: str = "bookworm",
    flavour: str = "cloud",
    mirror: str | None = None,
    cache: Path | None = None,
    progress: Progress = lambda message: None,
    refresh: bool = False,
) -> Fetched:
    """A Debian kernel and initrd for arm64, from ``cache`` (default: the user's) or else from Debian.

    ``flavour`` is ``cloud`` (small, starts faster), ``generic`` or ``16k`` (pages; from trixie on). What the
    cache holds is checked against its checksums and taken without asking the network, unless ``refresh``. Safe to
    call from several processes. Raises FetchError.
    """
    if flavour not in FLAVOURS:
        raise FetchError(f"no flavour {flavour!r}: choose one of {', '.join(FLAVOURS)}")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", release):
        raise FetchError(f"not a Debian release: {release!r} (bookworm, trixie, …)")
    home = (cache or cache_directory()) / "debian" / f"{release}-{flavour}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / "lock", progress):
            kept = None if refresh else _kept(home)
            return kept or _fetch(home, release, flavour, mirror, progress)
    except ImageError as error:
        raise FetchError(f"cannot use what was fetched: {error}") from error
    except OSError as error:
        raise FetchError(
            f"{error.filename or home}: {error.strerror or error}; name another folder with --dir"
        ) from error


def cache_directory() -> Path:
    """The user's cache for avmm (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "avmm"


def ready_pattern(config: VmConfig) -> bytes | None:
    """What a guest prints when it is up, if its initrd is one that we have made and runs the shell; else None."""
    ours = config.initrd is not None and config.initrd.absolute().is_relative_to(cache_directory() / "debian")
    return rb"avmm: Debian \S+ ready" if ours and "avmm.init=" not in config.cmdline else None


# --- the cache: an index names the files, their checksums and what they were made with ---------------------------


def _kept(home: Path) -> Fetched | None:
    """What the cache holds, if it is whole and of this recipe."""
    try:
        index = json.loads((home / "index.json").read_bytes())
        if index["recipe"] != initrd.recipe():
            return None
        folder = home / index["version"]
        for name, digest in index["sha256"].items():
            with (folder / name).open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                    return None
        return Fetched(folder / "vmlinuz", folder / "initrd", index["version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fetch(home: Path, release: str, flavour: str, mirror: str | None, progress: Progress) -> Fetched:
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=home) as scratch:
        source: Source
        if mirror is not None:
            source = Mirror(mirror, release, Path(scratch), progress)
        else:
            source = Apt(release, Path(scratch), progress)
        meta = source.find(FLAVOURS[flavour])
        # "linux-image-6.1.0-56-cloud-arm64 (= 6.1.192-2)": the version is the one there is
        name = re.search(r"\blinux-image-([\w.+-]+)", meta.get("Depends", ""))
        if not name:
            raise FetchError(f"{FLAVOURS[flavour]} of {release} names no kernel package")
        image = source.find(name[0])
        # from Linux 7 on the kernel and its modules are packages of their own
        parts = re.findall(rf"\blinux-(?:binary|modules|base)-{re.escape(name[1])}(?= )", image.get("Depends", ""))
        kernel_debs = [source.download(stanza) for stanza in (image, *map(source.find, parts))]
        busybox_deb = source.download(source.find(_BUSYBOX))
        progress("building the initrd")
        with deb.open_package(*kernel_debs) as kernel, deb.open_package(busybox_deb) as busybox:
            version, path = initrd.find_kernel(kernel)
            files = {"vmlinuz": kernel.read(path), "initrd": initrd.build(kernel, busybox)}
    folder = home / version
    folder.mkdir(exist_ok=True)
    for file, content in files.items():
        _write(folder / file, content)
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    index = {"version": version, "recipe": initrd.recipe(), "sha256": sums}
    _write(home / "index.json", json.dumps(index, indent=1).encode())
    return Fetched(folder / "vmlinuz", folder / "initrd", version)


def _write(path: Path, content: bytes) -> None:
    """Put a file in place in one step: whoever has the old one open keeps it."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as stream:
        try:
            stream.write(content)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            os.replace(stream.name, path)
        except BaseException:
            os.unlink(stream.name)
            raise


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another avmm fetch")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# --- where packages come from ------------------------------------------------------------------------------------

Stanza = dict[str, str]


class Source(Protocol):
    """Finds packages of one release for arm64 and downloads them."""

    def find(self, package: str) -> Stanza:
        """The newest version's fields. Raises FetchError when there is none."""

    def download(self, stanza: Stanza) -> Path:
        """The package file, its checksum proved. Raises FetchError."""


class Apt:
    """The host's apt with its own sources and keys, but private lists, cache and (empty) dpkg status."""

    def __init__(self, release: str, scratch: Path, progress: Progress) -> None:
        if not shutil.which("apt-get"):
            raise FetchError("there is no apt-get on this host: name a Debian mirror with --mirror URL")
        self._release = release
        self._scratch = scratch
        self._progress = progress
        for name in ("state/lists/partial", "cache/archives/partial"):
            (scratch / name).mkdir(parents=True, exist_ok=True)
        (scratch / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "",  # as whoever asks: apt's own user could not write here
            "Acquire::Languages": "none",
            "Dir::State": f"{scratch}/state",
            "Dir::State::status": f"{scratch}/status",
            "Dir::Cache": f"{scratch}/cache",
        }
        # hooks of the host's desktop have no business with private lists; only a file can clear a list
        lines = [
            "#clear APT::Update::Post-Invoke;",
            "#clear APT::Update::Post-Invoke-Success;",
            "#clear APT::Architectures;",
        ]
        lines += [f'{key} "{value}";' for key, value in settings.items()]
        self._config = scratch / "apt.conf"
        self._config.write_text("\n".join(lines) + "\n")
        progress("asking apt what there is")
        # A third party's broken repository fails the update; what matters is whether Debian's packages are found.
        self._trouble = self.run("apt-get", "-q", "update", check=False).stderr
        self._index = _Index(release)
        targets = self.run(
            "apt-get", "indextargets", "--format", "$(CODENAME) $(FILENAME)", "Created-By: Packages"
        ).stdout
        self._codenames = set()
        for line in targets.splitlines():
            codename, _, filename = line.partition(" ")
            self._codenames.add(codename)
            if codename in _suites(release):
                self._index.add(self.run("/usr/lib/apt/apt-helper", "cat-file", filename).stdout)

    def find(self, package: str) -> Stanza:
        """See Source."""
        if not self._index:
            names = ", ".join(sorted(name for name in self._codenames if "-" not in name)) or "no release"
            trouble = next((line for line in self._trouble.splitlines() if line.startswith(("E:", "W:"))), "")
            raise FetchError(
                f"this host's apt offers {names} for arm64, not {self._release}: choose with --release, "
                f"or name a Debian mirror with --mirror URL{f' ({trouble})' if trouble else ''}"
            )
        return self._index.find(package)

    def download(self, stanza: Stanza) -> Path:
        """See Source."""
        name, version = stanza["Package"], stanza["Version"]
        self._progress(f"downloading {name} {version} ({int(stanza.get('Size', 0)) / 1e6:.0f} MB)")
        folder = self._scratch / name
        folder.mkdir()
        self.run("apt-get", "-q", "download", f"{name}={version}", cwd=folder)
        return next(folder.glob("*.deb"))

    def run(
        self, program: str, *arguments: str, check: bool = True, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """One of apt's programs, with this configuration. Raises FetchError when it fails, unless not ``check``."""
        command = [program, "-c", str(self._config), *arguments]
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        done = subprocess.run(
            command, check=False, cwd=cwd, env=environment,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if check and done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise FetchError(f"{Path(program).name} {arguments[-1]} failed: {reason}")
        return done


class Mirror:
    """A Debian mirror read without apt: release file → package index → package, each by its SHA-256."""

    def __init__(self, url: str, release: str, scratch: Path, progress: Progress) -> None:
        if not re.match(r"(https?|file)://", url):
            raise FetchError(f"not the URL of a mirror: {url!r} (http://HOST/debian)")
        self._url = url.rstrip("/")
        self._scratch = scratch
        self._progress = progress
        self._index = _Index(release)
        name = "main/binary-arm64/Packages"
        for suite in _suites(release):
            base = f"dists/{suite}"
            text = self._release_file(base, optional=suite != release)
            if text is None:
                continue
            sums = _checksums(text)
            for suffix in (".xz", ".gz", ""):
                if name + suffix in sums:
                    progress(f"reading the packages of {suite}")
                    digest, size = sums[name + suffix]
                    data = self._get(f"{base}/{name}{suffix}", min(size, _INDEX_LIMIT), digest)
                    kind = {".xz": "xz", ".gz": "gzip"}.get(suffix)
                    packages = compress.decompress(kind, data, _INDEX_LIMIT) if kind else data
                    self._index.add(packages.decode("utf-8", "replace"))
                    break
            else:
                raise FetchError(f"{self._url}: {suite} has no packages for arm64")

    def find(self, package: str) -> Stanza:
        """See Source."""
        return self._index.find(package)

    def download(self, stanza: Stanza) -> Path:
        """See Source."""
        try:
            size, digest, filename = int(stanza["Size"]), stanza["SHA256"], stanza["Filename"]
        except (KeyError, ValueError):
            raise FetchError(f"{self._url}: the entry of {stanza['Package']} is incomplete") from None
        if size > _PACKAGE_LIMIT or ".." in filename.split("/"):
            raise FetchError(f"{self._url}: the entry of {stanza['Package']} makes no sense")
        self._progress(f"downloading {stanza['Package']} {stanza['Version']} ({size / 1e6:.0f} MB)")
        path = self._scratch / f"{stanza['Package']}.deb"
        path.write_bytes(self._get(filename, size, digest))
        return path

    def _release_file(self, base: str, optional: bool) -> str | None:
        """The release file's text, its signature proved where this host can."""
        try:
            signed = self._get(f"{base}/InRelease", _RELEASE_LIMIT)
        except FetchError:
            try:
                plain = self._get(f"{base}/Release", _RELEASE_LIMIT)
            except FetchError:
                if optional:
                    return None
                raise
            self._progress(f"warning: {self._url} is not signed: its word is all there is for {base}")
            return plain.decode("utf-8", "replace")
        gpgv = shutil.which("gpgv")
        if gpgv is None or not _KEYRING.exists():
            self._progress(
                f"warning: the signature of {base} is not checked, because gpgv or {_KEYRING.name} is missing: "
                f"you take the word of {self._url} for it"
            )
            return signed.decode("utf-8", "replace")
        (self._scratch / "InRelease").write_bytes(signed)
        command = [gpgv, "--keyring", str(_KEYRING), "--output", "-", str(self._scratch / "InRelease")]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
        if done.returncode:
            raise FetchError(f"{self._url}/{base}/InRelease is not signed by Debian's archive keys")
        return done.stdout.decode("utf-8", "replace")  # what was signed, and nothing around it

    def _get(self, path: str, limit: int, digest: str | None = None) -> bytes:
        """The bytes at ``path`` below the mirror: no more than ``limit``, and with that SHA-256 if one is given."""
        # here, because every command imports this module, and these take long
        import http.client
        import urllib.parse
        import urllib.request

        url = f"{self._url}/{urllib.parse.quote(path)}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer:
                data: bytes = answer.read(limit + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise FetchError(f"cannot download {url}: {reason}") from error
        if digest is not None and hashlib.sha256(data).hexdigest() != digest:
            raise FetchError(f"{url} does not have the checksum it should: try again, or another mirror")
        if len(data) > limit:
            raise FetchError(f"{url} is longer than the {limit} bytes it may have")
        return data


def _suites(release: str) -> tuple[str, ...]:
    return release, f"{release}-updates", f"{release}-security"


def _checksums(text: str) -> dict[str, tuple[str, int]]:
    """The SHA256 section of a release file: name → (checksum, size)."""
    section = re.search(r"^SHA256:[ ]*\n((?:[ ].*\n?)*)", text, re.MULTILINE)
    found = re.findall(r"^ ([0-9a-f]{64})\s+(\d+)\s+(\S+)$", section[1] if section else "", re.MULTILINE)
    return {name: (digest, int(size)) for digest, size, name in found}


class _Index:
    """Package entries of one release, by name: only those a fetch can ask for are kept."""

    def __init__(self, release: str) -> None:
        self._release = release
        self._stanzas: dict[str, list[Stanza]] = {}

    def __bool__(self) -> bool:
        return bool(self._stanzas)

    def add(self, packages: str) -> None:
        for found in re.finditer(
            rf"^Package: (linux-(?:image|binary|modules|base)-.*|{_BUSYBOX})\n(?:.+\n?)*", packages, re.MULTILINE
        ):
            fields = re.findall(r"^([A-Za-z0-9-]+): (.*)$", found[0], re.MULTILINE)
            stanza = dict(fields)
            if "Version" in stanza:
                self._stanzas.setdefault(found[1], []).append(stanza)

    def find(self, package: str) -> Stanza:
        stanzas = self._stanzas.get(package)
        if not stanzas:
            raise FetchError(f"Debian {self._release} has no {package} for arm64: try another --release or --mirror")
        newest = max((stanza["Version"] for stanza in stanzas), key=cmp_to_key(compare_versions))
        return next(stanza for stanza in stanzas if stanza["Version"] == newest)


def compare_versions(a: str, b: str) -> int:
    """Which of two Debian versions is newer: negative, zero or positive (deb-version(7))."""
    epoch_a, rest_a = a.split(":", 1) if ":" in a else ("0", a)
    epoch_b, rest_b = b.split(":", 1) if ":" in b else ("0", b)
    if epoch_a != epoch_b and epoch_a.isdigit() and epoch_b.isdigit():
        return int(epoch_a) - int(epoch_b)
    for part_a, part_b in zip(_upstream_and_revision(rest_a), _upstream_and_revision(rest_b), strict=True):
        key_a, key_b = _version_key(part_a), _version_key(part_b)
        if key_a != key_b:
            return -1 if key_a < key_b else 1
    return 0


def _upstream_and_revision(version: str) -> tuple[str, str]:
    upstream, dash, revision = version.rpartition("-")
    return (upstream, revision) if dash else (version, "")


def _version_key(part: str) -> list[Any]:
    """Turns of text and number. In text ``~`` is before the end, which is before letters, and those before the rest."""
    key: list[Any] = []
    for text, number in re.findall(r"(\D*)(\d*)", part):
        order = [-1 if each == "~" else ord(each) if each.isalpha() else ord(each) + 256 for each in text]
        key += [[*order, 0], int(number or 0)]
    return key

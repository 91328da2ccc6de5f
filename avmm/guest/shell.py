"""Commands through a shell on the serial console: for guests where no agent runs, having no initrd to put it in.

A root shell must be waiting there, with ``base64`` and a ``/tmp`` to write to. One command at a time; its script, input
and outputs travel as base64 between markers, so that neither the terminal nor the kernel's lines can garble them. There
are no streams and no terminals, and copies are of single files.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from avmm.errors import ConfigError, GuestError, HostError
from avmm.guest.console import Console
from avmm.guest.exec import OUTPUT_MAX, CommandFailed, Completed, Word
from avmm.guest.process import Process

_SCRIPT = """\
: >$f.out
cd {cwd} 2>$f.err || exit 127
{env} {command} <$f.in >$f.out 2>$f.err
"""


class ShellExec:
    """See :class:`avmm.guest.exec.Exec`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._turn = asyncio.Lock()

    async def run(
        self, argv: tuple[Word, ...], input: bytes | None, env: Mapping[str, str] | None, cwd: Word
    ) -> Completed:
        """See :class:`Exec`."""
        words = [os.fsdecode(word) for word in argv]
        if not words or any("\0" in word for word in words):
            raise ConfigError("a command has at least one word, and no NUL in it")
        setting = " ".join(f"{name}={shlex.quote(value)}" for name, value in (env or {}).items())
        script = _SCRIPT.format(cwd=shlex.quote(os.fsdecode(cwd)), env=setting, command=shlex.join(words))
        async with self._turn:
            code, stdout, stderr = await self._ask(script.encode(errors="surrogateescape"), input or b"")
        return Completed(tuple(words), code, stdout, stderr)

    async def _ask(self, script: bytes, input: bytes) -> tuple[int, bytes, bytes]:
        mark = os.urandom(8).hex()
        file = f"/tmp/.avmm-{mark}"
        lines = [
            " stty -echo 2>/dev/null; f=" + file,
            *_document("$f.sh", script),
            *_document("$f.in", input),
            # A marker in two pieces, so that an echo of this line is not taken for it.
            f" sh -c 'f={file}; . $f.sh'; c=$?; echo '<'{mark}; base64 $f.out; echo '='{mark}; base64 $f.err; "
            f"echo '>'{mark} $c.; rm -f $f.*; stty echo 2>/dev/null",
        ]
        self._console.write("".join(f"{line}\n" for line in lines).encode())
        transcript = self._console.transcript.without_printk()
        try:
            await transcript.expect(rb"<%b\r?\n" % mark.encode())
            stdout, _ = await transcript.read_until(rb"=%b\r?\n" % mark.encode(), limit=OUTPUT_MAX)
            stderr, ended = await transcript.read_until(rb">%b (\d+)\." % mark.encode(), limit=OUTPUT_MAX)
        except BaseException:
            self._console.write(b"\x03")
            raise
        return _code(int(ended[1])), _decode(stdout), _decode(stderr)

    async def popen(
        self, argv: tuple[Word, ...], env: Mapping[str, str] | None, cwd: Word, pty: bool, size: tuple[int, int]
    ) -> Process:
        """See :class:`Exec`. There is no such thing here. Raises ConfigError."""
        raise ConfigError("streams and terminals need the agent: boot with an initrd and agent=True")

    async def put(self, source: Word | Path, content: bytes | None, target: str, mode: int) -> None:
        """See :class:`Exec`."""
        if content is None:
            path = Path(os.fsdecode(source))
            content, mode = await asyncio.to_thread(_read, path)
            target += path.name if target.endswith("/") else ""
        script = 'mkdir -p "${1%/*}/" && cat >"$1" && chmod "$2" "$1"'
        done = await self.run(("sh", "-c", script, "put", target, f"{mode:o}"), content, None, "/")
        if done.returncode:
            raise CommandFailed(("put", target), done.returncode, b"", done.stderr)

    async def get(self, source: str, target: Path | None) -> bytes:
        """See :class:`Exec`."""
        done = await self.run(("cat", source), None, None, "/")
        if done.returncode:
            raise CommandFailed(("get", source), done.returncode, b"", done.stderr)
        if target is None:
            return done.stdout
        try:
            await asyncio.to_thread(target.write_bytes, done.stdout)
        except OSError as error:
            raise HostError(f"cannot write {target}: {error.strerror}") from error
        return b""


def _read(path: Path) -> tuple[bytes, int]:
    try:
        return path.read_bytes(), path.stat().st_mode & 0o7777
    except IsADirectoryError:
        raise ConfigError("copies of trees need the agent: boot with an initrd and agent=True") from None
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}") from error


def _document(file: str, content: bytes) -> list[str]:
    coded = base64.b64encode(content).decode()
    return [f" base64 -d >{file} <<'.'", *re.findall(".{1,76}", coded), "."]


def _decode(coded: bytes) -> bytes:
    try:
        return base64.b64decode(re.sub(rb"\s", b"", coded), validate=True)
    except binascii.Error as error:
        raise GuestError("the shell on the console answered with what is no base64") from error


def _code(shell: int) -> int:
    """A shell's ``$?`` as a return code: 128+N says that signal N killed the command."""
    return 128 - shell if shell > 128 else shell

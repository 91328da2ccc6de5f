"""An HTTP service that runs each request's shell script in a virtual machine of its own.

    python examples/vm_per_request.py --port 8080
    curl --data-binary 'uname -a; id' http://127.0.0.1:8080/run

One VM is booted and then stands still; each request gets a fork of it, which is gone with the answer. Needs aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

from aiohttp import web

import avmm
from avmm.debian import fetch_debian

#: Scripts at once, and how long one may take, in seconds.
AT_ONCE, LIMIT = 8, 30.0

TEMPLATE = web.AppKey("template", avmm.VirtualMachine)
ROOM = web.AppKey("room", asyncio.Semaphore)


async def template(app: web.Application) -> AsyncIterator[None]:
    """The VM that is forked, for the life of the service."""
    debian = await asyncio.to_thread(fetch_debian)
    async with avmm.boot(debian.kernel, debian.initrd, memory="256M", append="quiet") as vm:
        await vm.console.expect(rb"ready", timeout=120)
        await vm.wait_ready(timeout=60)
        await vm.pause()
        app[TEMPLATE], app[ROOM] = vm, asyncio.Semaphore(AT_ONCE)
        yield


async def run(request: web.Request) -> web.Response:
    """The script in the request's body; its exit code and output as JSON."""
    script = await request.text()
    async with request.app[ROOM], request.app[TEMPLATE].fork() as vm:
        try:
            done = await vm.run("sh", "-c", script, timeout=LIMIT)
        except avmm.WaitTimeout:
            raise web.HTTPRequestTimeout(text=f"the script had not ended after {LIMIT:g} s\n") from None
        except avmm.GuestError as error:
            raise web.HTTPUnprocessableEntity(text=f"{error}\n") from None
    output = {"stdout": done.stdout.decode(errors="replace"), "stderr": done.stderr.decode(errors="replace")}
    return web.json_response({"returncode": done.returncode, **output})


def application() -> web.Application:
    """The service."""
    app = web.Application()
    app.cleanup_ctx.append(template)
    app.router.add_post("/run", run)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    web.run_app(application(), host="127.0.0.1", port=parser.parse_args().port)

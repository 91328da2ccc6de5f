"""vsock: sockets between the guest and this host that need no network. `protocol` is sans-io, `host` joins it to Unix
sockets and asyncio streams."""

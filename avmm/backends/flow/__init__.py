"""A guest's connection, whatever carries it (TCP of the user-mode network, vsock), and what can be at the host's end:
a socket (`splice`), or asyncio streams of this program's own (`streams`)."""

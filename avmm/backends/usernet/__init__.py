"""The user-mode network: guests' frames turned into this host's sockets, with no root and no device."""

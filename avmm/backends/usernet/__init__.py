"""The user-mode network: guests' frames turned into this host's sockets, with no root and no device.

`network.UserNetwork` is what a cable is plugged into; `stack.Stack` the protocols, sans-io; a module for each of them.
"""

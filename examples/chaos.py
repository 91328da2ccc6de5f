"""A chaos test: three nodes on one switch, partitioned and healed at random.

    python examples/chaos.py --rounds 20 --seed 7

Each node finds out whom it reaches, and is in charge if with itself that is a majority. Whatever the switch does: a
node that is alone must know it, two that reach each other must stay in charge, and when the network is whole again
nobody may be left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random

import avmm
from avmm.debian import fetch_debian

#: How a node finds out: how many it reaches, with itself.
LOOK = """
seen=1
for peer in $PEERS; do ping -c 1 -W 1 $peer >/dev/null 2>&1 && seen=$((seen + 1)); done
echo $seen
"""


class Node:
    """One VM of the cluster."""

    def __init__(self, vm: avmm.VirtualMachine, peers: str) -> None:
        self.vm = vm
        self._peers = peers

    async def look(self) -> int:
        """How many nodes it reaches, with itself."""
        return int((await self.vm.check("sh", "-c", LOOK, env={"PEERS": self._peers})).stdout)

    async def reaches(self, count: int) -> None:
        """Return when it reaches so many: neighbours that were lost for a while are found again after a moment."""
        while await self.look() != count:
            pass


async def cluster(stack: contextlib.AsyncExitStack, switch: avmm.Switch) -> list[Node]:
    """Three nodes that all see each other."""
    debian = await asyncio.to_thread(fetch_debian)
    addresses = [f"10.9.0.{number}" for number in (1, 2, 3)]

    async def node(own: str) -> Node:
        append = f"quiet avmm.ip={own}/24"
        vm = await stack.enter_async_context(
            avmm.boot(debian.kernel, debian.initrd, memory="128M", net=switch, append=append)
        )
        await vm.console.expect(rb"ready", timeout=120)
        return Node(vm, " ".join(each for each in addresses if each != own))

    nodes = list(await asyncio.gather(*map(node, addresses)))
    await asyncio.gather(*(each.reaches(3) for each in nodes))
    return nodes


async def chaos(rounds: int, seed: int) -> None:
    """Tear it apart ``rounds`` times. Raises TimeoutError when the cluster does not find out."""
    dice = random.Random(seed)
    switch = avmm.Switch()
    async with contextlib.AsyncExitStack() as stack:
        nodes = await cluster(stack, switch)
        for number in range(rounds):
            alone = dice.choice(nodes)
            others = [each for each in nodes if each is not alone]
            async with asyncio.timeout(60):
                switch.partition(alone.vm, [each.vm for each in others])
                seen = await asyncio.gather(*(each.look() for each in (alone, *others)))
                assert seen == [1, 2, 2], f"two groups may both be in charge: {seen}"
                switch.heal()
                await asyncio.gather(*(each.reaches(3) for each in nodes))
            print(f"round {number + 1}: node {nodes.index(alone) + 1} was alone, knew it, and came back")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    asyncio.run(chaos(options.rounds, options.seed))

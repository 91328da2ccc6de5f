"""Virtual CPUs: the loop that runs one, how it parks, what its exits mean, and PSCI."""

from avmm.vcpu.loop import Event, Outcome, VcpuLoop
from avmm.vcpu.psci import Psci
from avmm.vcpu.sysregs import mpidr

__all__ = ["Event", "Outcome", "Psci", "VcpuLoop", "mpidr"]

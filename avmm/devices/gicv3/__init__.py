"""GICv3: see :mod:`avmm.devices.gicv3.gic`."""

from avmm.devices.gicv3.gic import GicState, Gicv3
from avmm.devices.gicv3.registers import GICD_SIZE, GICR_STRIDE

__all__ = ["GICD_SIZE", "GICR_STRIDE", "GicState", "Gicv3"]

"""virtio devices on virtio-mmio (OASIS Virtual I/O Device 1.2; section numbers in here are of that document)."""

"""Device models: a register file each, and a coroutine where there is work to do."""

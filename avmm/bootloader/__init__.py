"""Getting a guest started: kernel images, the device tree, initrds, and where they all go in memory."""

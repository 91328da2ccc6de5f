"""The host's side of devices. A backend knows no device, a device knows no files."""

"""The guest as a test sees it: its console, its commands."""

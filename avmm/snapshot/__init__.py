"""A machine at one moment: as plain data for a twin in this process, or in a file."""

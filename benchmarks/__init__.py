"""Measurements of this package's speed and memory; each file is a script with a `--help`."""

"""Measured launches, one JSON file per device name."""

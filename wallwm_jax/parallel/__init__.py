"""Devices: meshes, shardings and processes."""

"""Snapshot drivers: where unpacked layers live, and what a container's root file system is stacked from."""

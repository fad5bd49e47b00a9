"""Devices: the mesh, its sharding rules, and pmap."""

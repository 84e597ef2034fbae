"""network/dns/: names of containers, answered by a process of its own inside each container's namespace."""

"""network/: namespaces, links, addresses, ports and firewall rules of sandboxes."""

"""api/: wire to engine and back, nothing else. One room per API; the hijack of a connection is shared."""

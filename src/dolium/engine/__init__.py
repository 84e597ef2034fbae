"""engine/: sandboxes, containers, execs, events, restart, reconcile. The only owner of state."""

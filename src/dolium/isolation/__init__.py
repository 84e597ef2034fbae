"""Isolation: how a sandbox's processes are held. Backends implement one interface; ``shim`` owns local processes."""

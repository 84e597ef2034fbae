"""runtime/: from an OCI bundle to a launch plan, and the OCI command line. Pure: bytes in, bytes out.

The modules on the cold path (everything here but what tests import) may import only sys, posix, json and each other at
run time: a process starts in tens of milliseconds for every import less. ``tests/unit/test_cold_imports.py`` holds it.
"""

"""dolium: a container platform for Linux. One engine, every isolation level, every API.

Rooms import only from the floors below them; ``tests/unit/test_house.py`` holds the order.
"""

__version__ = "0.1.0"

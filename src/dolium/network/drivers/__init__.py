"""network/drivers/: one file per kind of network."""

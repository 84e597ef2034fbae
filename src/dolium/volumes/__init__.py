"""volumes/: folders that outlive containers, under the data folder."""

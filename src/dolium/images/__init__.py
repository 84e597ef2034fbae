"""images: pull, load and import; content-addressed blobs; layers unpacked once and shared. ``store`` is the way in."""

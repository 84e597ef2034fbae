"""api/docker/: the Docker Engine API (1.24 to 1.47) on a unix socket, as the real docker command line uses it."""

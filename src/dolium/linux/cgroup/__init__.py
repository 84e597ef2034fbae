"""linux/cgroup/: where the hierarchies are, and which files hold which limit: one module a version."""

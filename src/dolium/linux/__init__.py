"""linux/: thin typed knowledge of the kernel: system calls, capabilities, mount options, cgroups, seccomp.

Decides nothing about containers. The modules that runtime/ uses on its cold path import nothing at run time.
"""

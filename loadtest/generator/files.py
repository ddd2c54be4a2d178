"""How many files this process may have open: a connection is one."""

import resource

SPARE_FILES = 64


def allow_open_files(n_connections: int) -> None:
    """Raise the soft limit to so many and some more, where the hard one allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n = n_connections + SPARE_FILES
    wanted = n if hard == resource.RLIM_INFINITY else min(n, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

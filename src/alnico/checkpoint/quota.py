"""Reads how many bytes a disk quota still leaves a user (Linux 5.14 and later)."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_QUOTACTL_FD = 443
"""Number of the system call, the same on all processors."""
_GET_QUOTA = 0x800007
_USER, _GROUP = 0, 1
_UNIT = 1024
"""Bytes per unit of a limit."""


class _Quota(ctypes.Structure):
    """``struct if_dqblk``: limits in units of 1 KiB, 0 for none; usage in bytes."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("hard", "soft", "used", "hard_inodes", "soft_inodes", "used_inodes", "time", "inode_time")
    ] + [("valid", ctypes.c_uint32)]  # fmt: skip


def quota_left(folder: Path) -> int | None:
    """Return the bytes that quotas of this user and group leave on a folder's disk; None if none is known."""
    if not sys.platform.startswith("linux"):
        return None
    left = [
        _left(folder, kind, identity) for kind, identity in ((_USER, os.geteuid()), (_GROUP, os.getegid()))
    ]
    return min((size for size in left if size is not None), default=None)


def _left(folder: Path, kind: int, identity: int) -> int | None:
    try:
        call = ctypes.CDLL(None, use_errno=True).syscall
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        return None
    quota = _Quota()
    try:
        failed = call(_QUOTACTL_FD, descriptor, _GET_QUOTA << 8 | kind, identity, ctypes.byref(quota))
    finally:
        os.close(descriptor)
    if failed or not quota.hard:
        return None
    return max(int(quota.hard) * _UNIT - int(quota.used), 0)

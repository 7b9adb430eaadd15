"""The file system that a folder is on, and whether changes there can be watched.

inotify reports only changes made through the same mount. It does not report what another machine
writes to a network share, what the host writes to a folder that it shares with a guest, or what is
written to the layers below an overlay (inotify(7), "Limitations and caveats").
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

MOUNTINFO = Path("/proc/self/mountinfo")  # its format is in proc_pid_mountinfo(5)

NETWORK = frozenset(
    {
        "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "coda", "davfs", "autofs",
        "ceph", "glusterfs", "lustre", "gpfs", "beegfs", "orangefs", "pvfs2", "gfs2", "ocfs2",
    }
)  # fmt: skip
SHARED_BY_HOST = frozenset({"9p", "virtiofs", "vboxsf", "vmhgfs", "prl_fs", "drvfs"})
STACKED = frozenset({"overlay", "overlayfs", "aufs", "unionfs"})
FUSE = frozenset({"fuse", "fuseblk"})


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    fstype: str
    mount_point: str


def mount_of(path: Path, mountinfo: str | None = None) -> Mount | None:
    """The mount that `path` lies on, or would lie on; None without mountinfo (macOS).

    Args:
        mountinfo: the text of /proc/self/mountinfo; read from there if None.
    """
    where = os.path.realpath(path)
    holding = [mount for mount in _mounts(mountinfo) if _holds(mount.mount_point, where)]
    longest = max((len(mount.mount_point) for mount in holding), default=0)
    # Of several mounts on one mount point, the last one covers the others.
    return next((mount for mount in reversed(holding) if len(mount.mount_point) == longest), None)


def mounts_below(path: Path, mountinfo: str | None = None) -> list[Mount]:
    """The mounts inside a folder, such as a share in the inbox."""
    where = os.path.realpath(path)
    return [
        mount
        for mount in _mounts(mountinfo)
        if mount.mount_point != where and _holds(where, mount.mount_point)
    ]


def needs_polling(mount: Mount | None) -> str | None:
    """Why a watch there would miss changes, for the log; None if it would not."""
    if mount is None:
        return None
    where = f"{mount.fstype} at {mount.mount_point}"
    if mount.fstype in NETWORK:
        return f"{where} is a network file system"
    if mount.fstype in SHARED_BY_HOST:
        return f"{where} is shared by this machine's host"
    if mount.fstype in STACKED:
        return f"{where} is an overlay"
    if _is_fuse(mount):
        return f"{where} is a FUSE file system"
    return None


def clock_is_ours(mount: Mount | None) -> bool:
    """Whether this machine's clock sets the times of files there, as far as the mount's type tells."""
    return mount is None or not (mount.fstype in NETWORK or mount.fstype in SHARED_BY_HOST or _is_fuse(mount))


def _is_fuse(mount: Mount) -> bool:
    return mount.fstype in FUSE or mount.fstype.startswith(("fuse.", "fuseblk."))


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts(mountinfo: str | None) -> list[Mount]:
    if mountinfo is None:
        try:
            mountinfo = MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return []
    return [mount for line in mountinfo.split("\n") if (mount := _parsed(line)) is not None]


def _parsed(line: str) -> Mount | None:
    """`36 35 98:0 /root /mount/point options [optional fields] - fstype source super-options`."""
    fields = line.split(" ")
    try:
        return Mount(_unescaped(fields[fields.index("-", 6) + 1]), _unescaped(fields[4]))
    except (ValueError, IndexError):
        return None


def _unescaped(text: str) -> str:
    """Spaces and backslashes are written as octal escapes, such as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)

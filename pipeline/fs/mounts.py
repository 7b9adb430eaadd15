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

from pipeline.fs.files import is_in_bucket

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

    @property
    def why_polled(self) -> str | None:
        """Why a watch there would miss changes, for the log; None if it would not."""
        kind = self._foreign or ("an overlay" if self.fstype in STACKED else None)
        return kind and f"{self.fstype} at {self.mount_point} is {kind}"

    @property
    def clock_is_ours(self) -> bool:
        """Whether this machine's clock sets the times of files there, as far as the type tells."""
        return self._foreign is None

    @property
    def _foreign(self) -> str | None:
        """What kind of file system it is, if another machine or a program serves it."""
        if self.fstype in NETWORK:
            return "a network file system"
        if self.fstype in SHARED_BY_HOST:
            return "shared by this machine's host"
        return "a FUSE file system" if self.fstype.partition(".")[0] in FUSE else None


def mounts_of(path: Path, mountinfo: str | None = None) -> list[Mount]:
    """The mount that `path` lies on, or would lie on, and those inside it.

    There are none for a path in a bucket, and none without mountinfo (macOS).

    Args:
        mountinfo: the text of /proc/self/mountinfo; read from there if None.
    """
    if is_in_bucket(path):
        return []
    if mountinfo is None:
        try:
            mountinfo = MOUNTINFO.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return []
    where = Path(os.path.realpath(path))
    mounts = {  # of several mounts on one mount point, the last one covers the others
        Path(mount.mount_point): mount for mount in map(_parsed, mountinfo.split("\n")) if mount is not None
    }
    holding = [mounts[folder] for folder in (where, *where.parents) if folder in mounts]
    inside = [mount for folder, mount in mounts.items() if where in folder.parents]
    return holding[:1] + inside


def _parsed(line: str) -> Mount | None:
    """`36 35 98:0 /root /mount/point options [optional fields] - fstype source super-options`."""
    fields = line.split(" ")
    try:
        # Spaces and backslashes are written as octal escapes, such as \\040.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        return Mount(fields[fields.index("-", 6) + 1], point)
    except (ValueError, IndexError):
        return None

"""A folder's file system, and whether its events and its clock can be relied on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.fs.mounts import MOUNTINFO, Mount, mounts_of

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 8:1 / /srv/data rw,relatime shared:5 master:2 - xfs /dev/sda1 rw
31 30 0:40 / /srv/data/nas rw,relatime shared:6 - nfs4 nas:/export/music rw,vers=4.2
32 27 0:41 / /srv/my\040music\011\134x rw - cifs //box/my\040share rw
33 27 0:42 / /srv/twice rw - ext4 /dev/sdb1 rw
34 33 0:43 / /srv/twice rw - fuse.sshfs me@there: rw
35 27 0:44 / /srv/none - tmpfs none rw
36 27 0:45 / /srv/odd rw unknown:9 - btrfs - rw
"""


def at(path: str) -> tuple[str, str]:
    mount = mounts_of(Path(path), TABLE)[0]
    return mount.fstype, mount.mount_point


@pytest.mark.parametrize(
    ("path", "fstype", "mount_point"),
    [
        ("/", "ext4", "/"),
        ("/home/me/inbox", "ext4", "/"),
        ("/srv/data", "xfs", "/srv/data"),
        ("/srv/data/inbox", "xfs", "/srv/data"),
        ("/srv/database/inbox", "ext4", "/"),
        ("/srv/data/nas/in/here", "nfs4", "/srv/data/nas"),
        ("/srv/my music\t\\x/in", "cifs", "/srv/my music\t\\x"),
        ("/srv/twice/in", "fuse.sshfs", "/srv/twice"),
        ("/srv/odd/in", "btrfs", "/srv/odd"),
    ],
)
def test_a_path_lies_on_the_longest_mount_point_that_holds_it_and_the_last_of_several(
    path: str, fstype: str, mount_point: str
) -> None:
    assert at(path) == (fstype, mount_point)


def test_a_mount_point_can_hold_blanks() -> None:
    assert mounts_of(Path("/srv/my music\t\\x"), TABLE) == [Mount("cifs", "/srv/my music\t\\x")]


def test_invalid_lines_are_skipped() -> None:
    assert mounts_of(Path("/a"), "nonsense\n\n1 2 3\n1 2 0:1 / / rw -\n") == []
    assert mounts_of(Path("/a"), "nonsense\n1 2 0:1 / / rw - ext4 /dev/x rw\n") == [Mount("ext4", "/")]


def test_file_systems_mounted_within_a_folder_are_found() -> None:
    assert [mount.fstype for mount in mounts_of(Path("/srv/data"), TABLE)] == ["xfs", "nfs4"]
    assert [mount.fstype for mount in mounts_of(Path("/srv/data/nas"), TABLE)] == ["nfs4"]
    assert [mount.fstype for mount in mounts_of(Path("/srv/dat"), TABLE)] == ["ext4"]


def test_a_link_to_a_mounted_folder_lies_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "inbox").symlink_to(tmp_path / "share")
    table = f"1 0 8:1 / / rw - ext4 /dev/x rw\n2 1 0:9 / {tmp_path}/share rw - nfs4 nas:/x rw\n"

    mounts = mounts_of(tmp_path / "inbox" / "not-there-yet", table)
    assert [mount.fstype for mount in mounts] == ["nfs4"]


@pytest.mark.skipif(not MOUNTINFO.exists(), reason="this system has no mountinfo")
def test_this_machines_own_mounts_are_read(tmp_path: Path) -> None:
    proc, mine = mounts_of(Path("/proc/self/fdinfo"))[0], mounts_of(tmp_path)[0]
    assert proc.fstype == "proc"
    assert Path(mine.mount_point) in [Path("/"), *tmp_path.resolve().parents, tmp_path.resolve()]


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "vfat", "exfat", "ntfs3", "apfs"])
def test_local_disks_report_changes(fstype: str) -> None:
    assert Mount(fstype, "/").why_polled is None
    assert Mount(fstype, "/").clock_is_ours


@pytest.mark.parametrize(
    ("fstype", "why"),
    [
        ("nfs", "network"), ("nfs4", "network"), ("cifs", "network"), ("smb3", "network"),
        ("smbfs", "network"), ("ceph", "network"), ("afs", "network"), ("9p", "host"),
        ("virtiofs", "host"), ("vboxsf", "host"),
        ("fuse", "FUSE"), ("fuseblk", "FUSE"), ("fuse.sshfs", "FUSE"), ("fuse.rclone", "FUSE"),
    ],
)  # fmt: skip
def test_file_systems_of_other_machines_are_polled_and_have_another_clock(fstype: str, why: str) -> None:
    mount = Mount(fstype, "/srv/in")
    reason = mount.why_polled
    assert reason is not None
    assert reason.startswith(f"{fstype} at /srv/in is ")
    assert why in reason
    assert not mount.clock_is_ours


def test_an_overlay_is_polled_but_its_clock_is_this_machines() -> None:
    mount = Mount("overlay", "/")
    assert mount.why_polled == "overlay at / is an overlay"
    assert mount.clock_is_ours


def test_fusectl_is_not_a_fuse_file_system() -> None:
    assert Mount("fusectl", "/sys/fs/fuse/connections").why_polled is None


def test_without_mountinfo_events_are_used() -> None:
    assert mounts_of(Path("/in"), "") == []

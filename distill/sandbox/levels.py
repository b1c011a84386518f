"""The ladder of sandboxes: how strong a one this machine can make. Proved by running hostile code in it, never assumed.

`bubblewrap`: name spaces of its own for mounts, processes, network and the rest. The file system is the interpreter,
    its library and nothing else, read-only, without /proc. Beneath them the filter, limits and user of the next level.
`landlock`: no name spaces. The kernel's Landlock lets the same files be read and nothing be written or connected; the
    seccomp filter refuses sockets, processes and signals to others; the program is a user of its own where we may
    choose one.
Below that, nothing runs: `open_sandbox` raises EnvironmentFault and says what to install.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from distill.errors import EnvironmentFault
from distill.sandbox.filter import MACHINES, build_filter

Level = Literal["bubblewrap", "landlock"]
LEVELS: tuple[Level, ...] = get_args(Level)

LANDLOCK_CREATE_RULESET, LANDLOCK_VERSION = 444, 1
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_SETUID, CAP_SYS_ADMIN = 1, 2, 7, 21
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
# Users that nobody is: far beyond those of people, or (where the name space holds 65,536) systemd's dynamic ones.
MANY_USERS, FEW_USERS, NUM_FEW_USERS = 1 << 30, 61_184, 4_335
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "2", "LC_ALL": "C.UTF-8"}
BOOTSTRAP = (
    "import os, marshal\n"
    "os.write(1, b'.')\n"
    "def read(count):\n"
    " data = b''\n"
    " while len(data) < count:\n"
    "  part = os.read(0, count - len(data))\n"
    "  if not part: os._exit(70)\n"
    "  data += part\n"
    " return data\n"
    "names = {'__name__': 'sandbox'}\n"
    "exec(marshal.loads(read(int.from_bytes(read(8), 'little'))), names)\n"
    "names['start']()\n"
)


class Unavailable(Exception):
    """A level that cannot be had here, and why, in a few words."""


@dataclass(frozen=True)
class Cage:
    """All that is the same for every program at one level: the command, and what the launcher is told."""

    level: Level
    command: tuple[str, ...]
    setup: dict[str, Any]
    parent_visible: bool  # does the launcher see our process number as its parent's?


def build_cage(level: Level) -> Cage:
    """Raises Unavailable where something that the level is made of is missing. Whether it holds, a probe must say."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in MACHINES:
        raise Unavailable(f"no seccomp filter for {sys.platform} on {machine}")
    filter = build_filter(machine)
    setup = {"filter": filter.program, "own_pid": filter.own_pid, "landlock_abi": 0, "readable": [], "uid": None}
    privileged = os.geteuid() == 0 and _capable(CAP_SETUID)
    setup |= {"kept_capability": None, "count_tasks": False}
    if level == "bubblewrap":
        return _bubblewrap(setup, privileged=privileged and _capable(CAP_SYS_ADMIN))
    return _landlock(setup, privileged=privileged)


def interpreter() -> str:
    """The Python that a virtual environment stands on: in the sandbox the environment is not there."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def python_command() -> tuple[str, ...]:
    """A Python as with `-I`, but hashes of strings are fixed: the same answer must get the same verdict every time."""
    return (interpreter(), "-P", "-s", "-S", "-B", "-c", BOOTSTRAP)


@cache
def readable_paths() -> tuple[str, ...]:
    """Interpreter, standard library and shared libraries: all that a program may read."""
    base = {"platbase": sys.base_exec_prefix}  # not that of a virtual environment
    paths = [interpreter(), sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars=base), *LIBRARIES]
    if library := sysconfig.get_config_var("LDLIBRARY"):
        paths.append(f"{sysconfig.get_config_var('LIBDIR')}/{library}")
        paths.append(f"{sysconfig.get_config_var('LIBDIR')}/{sysconfig.get_config_var('INSTSONAME')}")
    found = [path for path in dict.fromkeys(paths) if Path(path).exists()]
    return tuple(found)


def new_user(pid: int) -> int:
    """A user for the process `pid` that no other live process of ours has."""
    return MANY_USERS + pid if _mapped_users() > 2 * MANY_USERS else FEW_USERS + pid % NUM_FEW_USERS


def landlock_abi() -> int:
    """The kernel's version of Landlock, 0 where it has none."""
    libc = ctypes.CDLL(None, use_errno=True)
    version: int = libc.syscall(
        ctypes.c_long(LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_VERSION)
    )
    return max(0, version)


def _bubblewrap(setup: dict[str, Any], *, privileged: bool) -> Cage:
    program = shutil.which("bwrap")
    if program is None:
        raise Unavailable("bwrap is not installed (apt-get install bubblewrap)")
    if os.geteuid() == 0 and not privileged:
        raise Unavailable("root without the capabilities to make name spaces or to change the user")
    command = [program, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    if privileged:
        # No user name space: limits on tasks do not bind root, so the launcher becomes a user that is really another.
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
    command += ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
    for folder in sorted({str(folder) for path in (*readable_paths(), os.devnull) for folder in Path(path).parents}):
        if folder != "/":
            command += ["--perms", "0755", "--dir", folder]  # else a copy of a closed folder would be closed here too
    for path in readable_paths():
        if Path(path).is_symlink() and path in LIBRARIES:
            command += ["--symlink", os.readlink(path).removeprefix("/"), path]  # noqa: PTH115
        else:
            command += ["--ro-bind", path, path]
    command += ["--dev-bind", os.devnull, os.devnull, "--remount-ro", "/", "--chdir", "/", "--"]
    return Cage("bubblewrap", (*command, *python_command()), setup | {"new_user": privileged}, parent_visible=False)


def _landlock(setup: dict[str, Any], *, privileged: bool) -> Cage:
    abi = landlock_abi()
    if abi == 0:
        raise Unavailable("the kernel has no Landlock (5.13 or later, with lsm=landlock)")
    if os.geteuid() == 0 and not privileged:
        raise Unavailable("root that may not change its user")
    kept = None
    if privileged and not _reachable_by_others(readable_paths()):
        # Landlock lets it reach what is readable and no more, whatever this would open otherwise.
        kept = next(filter(_capable, (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE)), None)
        if kept is None:
            raise Unavailable(f"other users cannot reach {interpreter()}, and root may not keep the right to")
    setup |= {
        "landlock_abi": abi,
        "readable": [*readable_paths(), os.devnull],
        "new_user": privileged,
        "kept_capability": kept,
        "count_tasks": not privileged,
    }
    return Cage("landlock", python_command(), setup, parent_visible=True)


def _reachable_by_others(paths: Sequence[str]) -> bool:
    folders = {folder for path in paths for folder in Path(path).parents}
    return all(folder.stat().st_mode & 0o1 for folder in folders)


def _capable(capability: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False


def _mapped_users() -> int:
    """Count the users in this process's user name space, from 0 on."""
    for line in Path("/proc/self/uid_map").read_text().splitlines():
        first, _, count = map(int, line.split())
        if first == 0:
            return count
    return 0


def refusal(reasons: dict[Level, str]) -> EnvironmentFault:
    why = "; ".join(f"{level}: {reason}" for level, reason in reasons.items())
    return EnvironmentFault(
        f"no sandbox for untrusted programs ({why}); install bubblewrap, or run on Linux 5.13 or later with Landlock",
        where="sandbox",
    )

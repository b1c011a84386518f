"""The seccomp filter: which system calls a sandboxed program may make. A list of what is allowed; all else is EPERM.

What computing takes is there: memory, reading files, pipes, clocks, signals to itself, threads. What is not there is
refused, and so is what future kernels add: sockets of every kind, new processes and programs, namespaces, mounts,
ptrace and its kin, keys, bpf, perf, userfaultfd, io_uring, shared memory and queues that outlive a process, and every
way to write a file's name. `clone3` says ENOSYS, so that the C library falls back on `clone`, whose flags a filter can
see. A call for another architecture (32-bit numbers, x32) kills the process.

The program is classic BPF, built by hand from seccomp(2) and <linux/filter.h>: one comparison a system call in the
order of the table, then blocks that look at an argument. The process's own number is not known when the filter is
built; `own_pid` says where the launcher writes it in.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

# name: (x86-64, AArch64), from asm/unistd_64.h and asm-generic/unistd.h
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    # files and pipes, for reading; what is written to is refused by the file system
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "open": (2, None),
    "openat": (257, 56),
    "close": (3, 57),
    "close_range": (436, 436),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "lseek": (8, 62),
    "getcwd": (79, 17),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    # memory
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    # signals and time
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    # who am I, and what is here
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getrusage": (98, 165),
    "getrlimit": (97, 163),
    "getpriority": (140, 141),
    "getrandom": (318, 278),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "getcpu": (309, 168),
    # threads, and the end
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "restart_syscall": (219, 128),
    "arch_prctl": (158, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# name: (x86-64, AArch64), the argument looked at, the values of it that pass
LOOKED_AT: dict[str, tuple[tuple[int, int], int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # F_DUPFD ... F_SETFL, F_DUPFD_CLOEXEC: no F_SETOWN, no F_SETSIG
    "ioctl": ((16, 29), 1, (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)),  # TCGETS, TIOCGWINSZ, FIONREAD, FIO(N)CLEX
    "prlimit64": ((302, 261), 0, (0,)),  # its own limits alone
}
OWN_PID: dict[str, tuple[int, int]] = {"kill": (62, 129), "tgkill": (234, 131)}  # signals to itself alone
CLONE, CLONE3 = (56, 220), (435, 435)
CLONE_THREAD = 0x10000
# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET
NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000

MACHINES = {"x86_64": 0, "aarch64": 1}
AUDIT_ARCH = (0xC000003E, 0xC00000B7)
X32_BIT = 0x40000000

LOAD, EQUAL, ANY_BIT, AT_LEAST, RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ/JSET/JGE|K, BPF_RET
NUMBER, ARCH, ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data; both machines are little-endian
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
EPERM, ENOSYS = 1, 38
INSTRUCTION_BYTES = 8


class SeccompFilter(NamedTuple):
    """`program` is an array of struct sock_filter; `own_pid` holds byte offsets where the process's number goes."""

    program: bytes
    own_pid: tuple[int, ...]


def build_filter(machine: str) -> SeccompFilter:
    """The filter for `platform.machine()`. Raises KeyError for a machine whose numbers are not in the table."""
    column = MACHINES[machine]
    lines: list[tuple[int, int, int, int]] = []  # code, jump if true, jump if false, value
    own_pid: list[int] = []

    def add(code: int, value: int, true: int = 0, false: int = 0) -> None:
        lines.append((code, true, false, value))

    add(LOAD, ARCH)
    add(EQUAL, AUDIT_ARCH[column], true=1)
    add(RETURN, KILL)
    add(LOAD, NUMBER)
    if column == 0:
        add(AT_LEAST, X32_BIT, false=1)
        add(RETURN, KILL)
    for numbers in NUMBERS.values():
        number = numbers[column]
        if number is not None:
            add(EQUAL, number, false=1)
            add(RETURN, ALLOW)
    add(EQUAL, CLONE3[column], false=1)
    add(RETURN, ERRNO | ENOSYS)
    add(EQUAL, CLONE[column], false=5)
    add(LOAD, ARGUMENTS)
    add(ANY_BIT, NAMESPACES, true=2)
    add(ANY_BIT, CLONE_THREAD, false=1)
    add(RETURN, ALLOW)
    add(RETURN, ERRNO | EPERM)
    for numbers, argument, values in LOOKED_AT.values():
        add(EQUAL, numbers[column], false=2 + 2 * len(values))
        add(LOAD, ARGUMENTS + 8 * argument)
        for value in values:
            add(EQUAL, value, false=1)
            add(RETURN, ALLOW)
        add(RETURN, ERRNO | EPERM)
    for numbers in OWN_PID.values():
        add(EQUAL, numbers[column], false=4)
        add(LOAD, ARGUMENTS)
        own_pid.append(len(lines) * INSTRUCTION_BYTES + 4)
        add(EQUAL, 0, false=1)
        add(RETURN, ALLOW)
        add(RETURN, ERRNO | EPERM)
    add(RETURN, ERRNO | EPERM)
    return SeccompFilter(b"".join(struct.pack("<HBBI", *line) for line in lines), tuple(own_pid))

"""The launcher runs first in the sandbox: it gives up all that the program shall not have, then becomes the program.

The parent ships this module as compiled code over standard input, behind it one marshalled mapping with all that is to
be done, and behind that the program's own input. The interpreter is fresh and imports nothing of ours: standard library
alone. In order: resource limits, Landlock's rules opened, the user dropped, no new privileges, death with the parent,
Landlock, the seccomp filter; then one byte on standard output, so that the parent can tell a sandbox that failed from a
program that did. There is no second exec: once the filter is up nothing can be started any more, and nothing secret
was ever in this process.
"""

from __future__ import annotations

import builtins
import ctypes
import marshal
import os
import resource
import sys
from types import ModuleType
from typing import Any

READY = b"+"
FAILED = 70  # exit status of a sandbox that could not be made

PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
SIGKILL = 9
SECCOMP = {"x86_64": 317, "aarch64": 277}
CAPSET = {"x86_64": 126, "aarch64": 91}
SECCOMP_SET_MODE_FILTER = 1
LINUX_CAPABILITY_VERSION_3 = 0x20080522
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8  # of struct landlock_path_beneath_attr
NUM_ACCESS_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # by ABI; 16 from the fifth on
STACK_BYTES = 64 << 20

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]  # struct sock_fprog


def main(setup: dict[str, Any]) -> None:
    """Lock this process in, say so, and run `setup["source"]` as `__main__`."""
    try:
        lock_in(setup)
    except BaseException as exc:  # noqa: BLE001  whatever it is, the program must not start
        os.write(2, f"sandbox: {type(exc).__name__}: {exc}\n".encode())
        os._exit(FAILED)
    os.write(1, READY)
    run(setup)


def lock_in(setup: dict[str, Any]) -> None:
    machine = os.uname().machine
    limits = dict(setup["limits"])
    if setup["count_tasks"]:
        limits["NPROC"] += tasks_of_user()
    for name, amount in limits.items():
        limit(getattr(resource, f"RLIMIT_{name}"), amount)
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard == resource.RLIM_INFINITY or hard > STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, STACK_BYTES))
    ruleset = open_ruleset(setup["landlock_abi"], setup["readable"]) if setup["landlock_abi"] else None
    if setup["uid"] is not None:
        drop_user(setup["uid"], setup["kept_capability"], machine)
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if setup["parent"] and os.getppid() != setup["parent"]:
        os._exit(FAILED)
    if ruleset is not None:
        call("syscall", RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
    program = bytearray(setup["filter"])
    for offset in setup["own_pid"]:
        program[offset : offset + 4] = os.getpid().to_bytes(4, "little")
    array = (ctypes.c_char * len(program)).from_buffer(program)
    call(
        "syscall",
        SECCOMP[machine],
        SECCOMP_SET_MODE_FILTER,
        0,
        ctypes.byref(Filter(len(program) // 8, ctypes.addressof(array))),
    )


def limit(what: int, amount: int) -> None:
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        amount = min(amount, hard)
    # Out of processor time, a program is told by SIGXCPU, and killed a second later if it did not listen.
    soft = max(1, amount - 1) if what == resource.RLIMIT_CPU else amount
    resource.setrlimit(what, (soft, amount))


def tasks_of_user() -> int:
    """Threads that this user has: RLIMIT_NPROC counts them all where the user is nobody else's."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


def open_ruleset(abi: int, readable: list[str]) -> int:
    """A Landlock ruleset that handles all that this kernel's ABI knows, and lets `readable` be read."""
    handled = (1 << NUM_ACCESS_RIGHTS.get(abi, 16)) - 1
    attributes = handled.to_bytes(8, "little")
    if abi >= 4:
        attributes += (0b11).to_bytes(8, "little")  # bind and connect, TCP
    if abi >= 6:
        attributes += (0b11).to_bytes(8, "little")  # abstract Unix sockets, signals
    ruleset = call("syscall", CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        access = READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)
        if path == os.devnull:
            access |= WRITE_FILE
        rule = access.to_bytes(8, "little") + descriptor.to_bytes(4, "little")
        call("syscall", ADD_RULE, ruleset, 1, rule, 0)
        os.close(descriptor)
    return ruleset


def drop_user(uid: int, kept_capability: int | None, machine: str) -> None:
    """Become `uid`, for good. What may be kept is the right to walk to an interpreter that lies in a closed folder."""
    if kept_capability is not None:
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if kept_capability is not None:
        word = (1 << kept_capability).to_bytes(4, "little")
        header = LINUX_CAPABILITY_VERSION_3.to_bytes(4, "little") + bytes(4)
        call("syscall", CAPSET[machine], header, word + word + bytes(16))


def call(function: str, number: int, *arguments: Any) -> int:
    ctypes.set_errno(0)
    words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = getattr(libc, function)(ctypes.c_long(number), *words)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{function} {number}: {os.strerror(error)}")
    return result


def run(setup: dict[str, Any]) -> None:
    """The program in a namespace of its own. `exit` and `quit` come from `site`, which is not loaded here."""
    vars(builtins).update(exit=sys.exit, quit=sys.exit)
    for name, code in setup["modules"].items():
        module = ModuleType(name)
        sys.modules[name] = module
        if code is not None:
            exec(code, module.__dict__)
    module = ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program"]
    source = setup["source"]
    exec(compile(source, "program", "exec") if isinstance(source, str) else source, module.__dict__)


def read_exactly(count: int) -> bytes:
    """Read from standard input, without taking a byte of what follows."""
    parts = []
    while count:
        part = os.read(0, min(count, 1 << 16))
        if not part:
            os._exit(FAILED)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def start() -> None:
    """Called by the one line that the interpreter is started with."""
    main(marshal.loads(read_exactly(int.from_bytes(read_exactly(8), "little"))))

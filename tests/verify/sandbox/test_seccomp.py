"""The filters, read as the kernel reads them: by an interpreter of its filter language, for both machines."""

import errno
import pathlib
import re
import struct

import pytest

from magistral_jax.verify.sandbox import syscalls
from magistral_jax.verify.sandbox.seccomp import Profile, assemble

ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALL = {
    machine: syscalls.HARMLESS[machine] | syscalls.FAMILY[machine] | syscalls.CONDITIONAL[machine]
    for machine in syscalls.MACHINES
}
# From the kernel's tables, beside those in the list.
FORBIDDEN = {
    "x86_64": {
        "socket": 41, "connect": 42, "sendmsg": 46, "socketpair": 53, "bind": 49, "shmget": 29, "ptrace": 101,
        "mkdir": 83, "creat": 85, "link": 86, "symlink": 88, "chown": 92, "setsid": 112, "setpgid": 109, "setuid": 105,
        "prctl": 157, "chroot": 161, "mount": 165, "unshare": 272, "setns": 308, "memfd_create": 319, "bpf": 321,
        "execveat": 322, "userfaultfd": 323, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_send_signal": 424,
        "clone3": 435, "openat2": 437, "process_vm_readv": 310, "perf_event_open": 298, "keyctl": 250,
        "rt_sigqueueinfo": 129, "setrlimit": 160, "setpriority": 141, "sched_setaffinity": 203, "mq_open": 240,
        "semget": 64, "msgget": 68, "mknod": 133, "setxattr": 188, "utimensat": 280, "capset": 126, "seccomp": 317,
        "open_by_handle_at": 304, "truncate": 76, "personality": 135, "modify_ldt": 154, "timer_create": 222,
    },
    "aarch64": {
        "socket": 198, "connect": 203, "sendmsg": 211, "socketpair": 199, "bind": 200, "shmget": 194, "ptrace": 117,
        "mkdirat": 34, "linkat": 37, "symlinkat": 36, "fchownat": 54, "setsid": 157, "setpgid": 154, "setuid": 146,
        "prctl": 167, "chroot": 51, "mount": 40, "unshare": 97, "setns": 268, "memfd_create": 279, "bpf": 280,
        "execveat": 281, "userfaultfd": 282, "io_uring_setup": 425, "pidfd_open": 434, "pidfd_send_signal": 424,
        "clone3": 435, "openat2": 437, "process_vm_readv": 270, "perf_event_open": 241, "keyctl": 219,
        "rt_sigqueueinfo": 138, "setrlimit": 164, "setpriority": 140, "sched_setaffinity": 122, "mq_open": 180,
        "semget": 190, "msgget": 186, "mknodat": 33, "setxattr": 5, "utimensat": 88, "capset": 91, "seccomp": 277,
        "open_by_handle_at": 265, "truncate": 45, "personality": 92, "timer_create": 107,
    },
}  # fmt: skip
OWN_PID = 0x5E1F1D00


def decide(code, machine, number, *arguments, arch=None):
    """What the kernel does with a call: "allow", "kill", or an errno."""
    padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("<iIQ6Q", number, arch or ARCH[machine], 0, *(value & (2**64 - 1) for value in padded))
    instructions = list(struct.iter_unpack("<HBBI", code))
    accumulator = at = 0
    while True:
        operation, when_true, when_false, constant = instructions[at]
        at += 1
        match operation:
            case 0x20:
                assert constant % 4 == 0
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:
                accumulator &= constant
            case 0x15:
                at += when_true if accumulator == constant else when_false
            case 0x25:
                at += when_true if accumulator > constant else when_false
            case 0x35:
                at += when_true if accumulator >= constant else when_false
            case 0x06:
                return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(constant, constant & 0xFFFF)
            case _:
                raise AssertionError(f"no instruction {operation:#x}")


@pytest.fixture(params=syscalls.MACHINES)
def machine(request):
    return request.param


@pytest.fixture(params=Profile)
def profile(request):
    return request.param


def test_another_architecture_is_killed(machine, profile):
    code = assemble(profile, machine)
    for arch in (0x40000003, 0x40000028, *(set(ARCH.values()) - {ARCH[machine]})):  # i386, arm
        assert decide(code, machine, ALL[machine]["read"], arch=arch) == "kill"
    assert decide(code, machine, 0x40000000 + ALL[machine]["read"]) == "kill"  # x32


def test_every_call_of_the_list_is_allowed_and_its_neighbours_are_not(machine, profile):
    code = assemble(profile, machine)
    allowed = set(syscalls.HARMLESS[machine].values())
    if profile is Profile.COMPILER:
        allowed |= set(syscalls.FAMILY[machine].values())
    listed = set(ALL[machine].values())
    for number in range(600):
        if number in allowed:
            if number not in (57, 58) or machine != "x86_64":
                assert decide(code, machine, number) == "allow", number
        elif number not in listed:
            assert decide(code, machine, number) == errno.ENOSYS, number


def test_calls_that_reach_beyond_the_program_fail_as_if_the_kernel_lacked_them(machine, profile):
    code = assemble(profile, machine)
    decisions = {name: decide(code, machine, number) for name, number in FORBIDDEN[machine].items()}
    assert decisions == dict.fromkeys(FORBIDDEN[machine], errno.ENOSYS)


def test_threads_but_no_processes(machine):
    clone = ALL[machine]["clone"]
    thread_flags = 0x3D0F00  # what pthread_create passes
    for profile in (Profile.PROGRAM, Profile.GRADER):
        code = assemble(profile, machine)
        assert decide(code, machine, clone, thread_flags) == "allow"
        assert decide(code, machine, clone, 17) == errno.EAGAIN
        assert decide(code, machine, clone, thread_flags | 0x10000000) == errno.EAGAIN  # CLONE_NEWUSER
        if machine == "x86_64":
            assert (
                decide(code, machine, ALL[machine]["fork"])
                == decide(code, machine, ALL[machine]["vfork"])
                == errno.EAGAIN
            )


@pytest.mark.parametrize(
    "flag", [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000, 0x8000, 0x2000]
)
def test_the_compiler_forks_but_makes_no_namespace(machine, flag):
    code = assemble(Profile.COMPILER, machine)
    assert decide(code, machine, ALL[machine]["clone"], 17) == "allow"
    assert decide(code, machine, ALL[machine]["clone"], 17 | flag) == errno.EPERM
    if machine == "x86_64":
        assert decide(code, machine, ALL[machine]["fork"]) == decide(code, machine, ALL[machine]["vfork"]) == "allow"


def test_signals_only_to_itself_and_never_a_kill(machine, profile):
    code = assemble(profile, machine)
    numbers = ALL[machine]
    assert decide(code, machine, numbers["tgkill"], OWN_PID, 7, 6) == "allow"  # abort()
    assert decide(code, machine, numbers["tgkill"], OWN_PID, 7, 9) == errno.EPERM
    assert decide(code, machine, numbers["tgkill"], OWN_PID + 1, 7, 6) == errno.EPERM
    assert decide(code, machine, numbers["kill"], OWN_PID, 6) == errno.EPERM
    assert decide(code, machine, numbers["tkill"], OWN_PID, 6) == errno.EPERM


def test_limits_only_its_own_and_not_the_one_on_cpu_time(machine, profile):
    code = assemble(profile, machine)
    prlimit = ALL[machine]["prlimit64"]
    assert decide(code, machine, prlimit, 0, 3, 1) == "allow"  # RLIMIT_STACK
    assert decide(code, machine, prlimit, 0, 0, 1) == errno.EPERM
    assert decide(code, machine, prlimit, 1234, 3, 1) == errno.EPERM


def test_descriptors_do_not_send_signals_or_type_into_terminals(machine, profile):
    code = assemble(profile, machine)
    numbers = ALL[machine]
    for command in (0, 1, 2, 3, 4, 1030):
        assert decide(code, machine, numbers["fcntl"], 1, command) == "allow"
    for command in (
        8,
        10,
        15,
        1024,
        1026,
        1031,
        1033,
    ):  # SETOWN, SETSIG, SETOWN_EX, SETLEASE, NOTIFY, SETPIPE_SZ, ADD_SEALS
        assert decide(code, machine, numbers["fcntl"], 1, command) == errno.EINVAL
    assert decide(code, machine, numbers["ioctl"], 1, 0x5401) == "allow"
    for request in (0x5412, 0x8901, 0x8902, 0x541C, 0x5452):  # TIOCSTI, FIOSETOWN, SIOCSPGRP, TIOCLINUX, FIOASYNC
        assert decide(code, machine, numbers["ioctl"], 1, request) == errno.ENOTTY


@pytest.mark.parametrize(
    ("flags", "program", "grader"),
    [
        (0o0, "allow", "allow"),
        (0o2000000, "allow", "allow"),  # O_CLOEXEC
        (0o1, "allow", errno.EACCES),
        (0o2, "allow", errno.EACCES),
        (0o1101, "allow", errno.EACCES),  # as open(path, "w")
        (0o1000, errno.EACCES, errno.EACCES),  # truncate, opened to read
        (0o1003, errno.EACCES, errno.EACCES),
        (0o100, "allow", errno.EACCES),
    ],
)
def test_opening_files(machine, flags, program, grader):
    for profile, wanted in ((Profile.PROGRAM, program), (Profile.COMPILER, program), (Profile.GRADER, grader)):
        code = assemble(profile, machine)
        assert decide(code, machine, ALL[machine]["openat"], -100, 0, flags) == wanted
        if machine == "x86_64":
            assert decide(code, machine, ALL[machine]["open"], 0, flags) == wanted


def test_the_grader_keeps_its_socket_and_gets_no_program(machine):
    code = assemble(Profile.GRADER, machine)
    numbers = ALL[machine]
    assert decide(code, machine, numbers["sendto"], 3, 1, 10, 0, 0, 0) == "allow"  # send()
    assert decide(code, machine, numbers["sendto"], 3, 1, 10, 0, 0x1000, 16) == errno.EPERM  # with an address
    assert decide(code, machine, numbers["sendto"], 3, 1, 10, 0, 1 << 32, 16) == errno.EPERM
    assert decide(code, machine, numbers["recvfrom"], 3) == "allow"
    assert decide(code, machine, numbers["execve"]) == errno.ENOSYS
    for profile in (Profile.PROGRAM, Profile.COMPILER):
        code = assemble(profile, machine)
        assert decide(code, machine, numbers["execve"]) == "allow"
        assert (
            decide(code, machine, numbers["sendto"], 3) == decide(code, machine, numbers["recvfrom"], 3) == errno.ENOSYS
        )


def test_filters_keep_to_the_kernels_limits(machine, profile):
    code = assemble(profile, machine)
    assert len(code) // 8 <= 4096
    assert code.count(struct.pack("<I", OWN_PID)) == 1  # the place where `install` puts the pid


def test_a_machine_without_a_list_is_refused():
    with pytest.raises(OSError, match="riscv64"):
        assemble(Profile.PROGRAM, "riscv64")


@pytest.mark.parametrize("machine", syscalls.MACHINES)
def test_numbers_are_those_of_the_kernels_headers(machine):
    """Where there are any: g++ brings its own machine's, and on x86_64 also the generic ones."""
    header = {"x86_64": "x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "asm-generic/unistd.h"}[machine]
    path = pathlib.Path("/usr/include", header)
    ours = ALL[machine] | syscalls.OWN[machine] | FORBIDDEN[machine]
    assert len(set(ours.values())) == len(ours)
    if path.exists():
        text = path.read_text(encoding="ascii")
        known = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\b", text)}
        known |= {"newfstatat": known.get("fstatat", known.get("newfstatat", -1))}
        assert ours == {name: known[name] for name in ours}

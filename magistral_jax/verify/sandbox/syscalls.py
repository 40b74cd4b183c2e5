"""System calls by what a confined process may do with them, with their numbers on x86_64 and aarch64.

A line has entries `name x86_64 aarch64`; `-` where a machine lacks the call. aarch64 has the kernel's generic numbers
(`asm-generic/unistd.h`), x86_64 its own (`asm/unistd_64.h`).
"""

MACHINES = ("x86_64", "aarch64")


def _parse(text: str) -> dict[str, dict[str, int]]:
    """Numbers by machine and name."""
    table: dict[str, dict[str, int]] = {machine: {} for machine in MACHINES}
    for entry in text.replace("\n", ";").split(";"):
        if entry.strip():
            name, *numbers = entry.split()
            for machine, number in zip(MACHINES, numbers, strict=True):
                if number != "-":
                    table[machine][name] = int(number)
    return table


HARMLESS = _parse("""
    read 0 63; pread64 17 67; readv 19 65; preadv 295 69; write 1 64; pwrite64 18 68; writev 20 66; pwritev 296 70
    close 3 57; lseek 8 62; dup 32 23; dup2 33 -; dup3 292 24; pipe 22 -; pipe2 293 59; fsync 74 82; fadvise64 221 223
    stat 4 -; fstat 5 80; lstat 6 -; newfstatat 262 79; statx 332 291; access 21 -; faccessat 269 48; faccessat2 439 439
    readlink 89 -; readlinkat 267 78; getcwd 79 17; chdir 80 49; getdents64 217 61; ftruncate 77 46; umask 95 166
    poll 7 -; ppoll 271 73; select 23 -; pselect6 270 72; eventfd2 290 19
    epoll_create1 291 20; epoll_ctl 233 21; epoll_wait 232 -; epoll_pwait 281 22
    brk 12 214; mmap 9 222; mprotect 10 226; munmap 11 215; mremap 25 216; madvise 28 233; membarrier 324 283
    rt_sigaction 13 134; rt_sigprocmask 14 135; rt_sigreturn 15 139; rt_sigpending 127 136; rt_sigsuspend 130 133
    rt_sigtimedwait 128 137; sigaltstack 131 132; restart_syscall 219 128; pause 34 -
    nanosleep 35 101; clock_nanosleep 230 115; clock_gettime 228 113; clock_getres 229 114; gettimeofday 96 169
    time 201 -; times 100 153; alarm 37 -; getitimer 36 102; setitimer 38 103
    futex 202 98; set_robust_list 273 99; set_tid_address 218 96; rseq 334 293; arch_prctl 158 -; sched_yield 24 124
    sched_getaffinity 204 123; sched_getparam 143 121; sched_getscheduler 145 120; getcpu 309 168
    sched_get_priority_max 146 125; sched_get_priority_min 147 126
    getpid 39 172; gettid 186 178; getppid 110 173; getpgrp 111 -; getuid 102 174; geteuid 107 175; getgid 104 176
    getegid 108 177; getgroups 115 158; getresuid 118 148; getresgid 120 150; getrlimit 97 163; getrusage 98 165
    uname 63 160; sysinfo 99 179; getrandom 318 278; exit 60 93; exit_group 231 94
""")
"""What a program computes, reads and writes with. None reaches another process, the network, or makes a file."""

FAMILY = _parse("""
    fork 57 -; vfork 58 -; wait4 61 260; waitid 247 95
    rename 82 -; renameat 264 38; renameat2 316 276; unlink 87 -; unlinkat 263 35; chmod 90 -; fchmod 91 52
    fchmodat 268 53; fallocate 285 47
""")
"""What a compiler needs beside: it is a family of processes that leave files to one another. Without setsid and
setpgid, so that killing the group kills the family."""

CONDITIONAL = _parse("""
    clone 56 220; execve 59 221; open 2 -; openat 257 56; ioctl 16 29; fcntl 72 25; prlimit64 302 261; tgkill 234 131
    sendto 44 206; recvfrom 45 207; kill 62 129; tkill 200 130
""")
"""Allowed by their arguments, or not in every profile."""

OWN = _parse("""
    seccomp 317 277; landlock_create_ruleset 444 444; landlock_add_rule 445 445; landlock_restrict_self 446 446
    capset 126 91
""")
"""What the confinement itself is made with."""

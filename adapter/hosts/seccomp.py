"""The seccomp profile of a replica: what functions and a restore need, and no more.

    python -m adapter.hosts.seccomp > adapter/hosts/seccomp.json      what a kubelet or `docker run` is given

A list of what is allowed; whatever else there is, or will be, is answered as by a kernel that lacks it
(ENOSYS), so that libraries take their older way. What a container never does is refused (EPERM).
Dumping a process is not allowed here and cannot be: see docs/explanation/container-rights.md.
"""

from __future__ import annotations

import json
import sys
from typing import Any

RESTORE_RIGHT = "CHECKPOINT_RESTORE"
"""All that a dump needs beside no profile, and all that a restore needs under this one."""

_EPERM, _ENOSYS = 1, 38

_FILES = """
    access chdir chmod chown close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64
    fallocate fchdir fchmod fchmodat fchmodat2 fchown fchownat fcntl fdatasync fgetxattr flistxattr flock fremovexattr
    fsetxattr fstat fstatfs fsync ftruncate futimesat getcwd getdents getdents64 getxattr inotify_add_watch
    inotify_init inotify_init1 inotify_rm_watch ioctl lchown lgetxattr link linkat listxattr llistxattr lremovexattr
    lseek lsetxattr lstat memfd_create mkdir mkdirat mknod mknodat newfstatat open openat openat2 pread64 preadv
    preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat readv removexattr rename renameat renameat2
    rmdir sendfile setxattr splice stat statfs statx symlink symlinkat sync sync_file_range syncfs tee truncate
    umask unlink unlinkat utime utimensat utimes write writev
"""

_MEMORY = """
    brk get_mempolicy madvise mbind membarrier mincore mlock mlock2 mlockall mmap mprotect mremap msync munlock
    munlockall munmap pkey_alloc pkey_free pkey_mprotect remap_file_pages set_mempolicy shmat shmctl shmdt shmget
"""

_PROCESSES = """
    alarm arch_prctl capget capset execve execveat exit exit_group fork futex futex_requeue futex_wait futex_waitv
    futex_wake get_robust_list get_thread_area getcpu getegid geteuid getgid getgroups getitimer getpgid getpgrp
    getpid getppid getpriority getresgid getresuid getrlimit getrusage getsid gettid getuid ioprio_get ioprio_set kill
    landlock_add_rule landlock_create_ruleset landlock_restrict_self pause pidfd_open pidfd_send_signal prctl
    prlimit64 restart_syscall rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min sched_getaffinity
    sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr
    sched_setparam sched_setscheduler sched_yield seccomp set_robust_list set_thread_area set_tid_address setfsgid
    setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit setsid
    setuid sigaltstack signalfd signalfd4 tgkill timer_create timer_delete timer_getoverrun timer_gettime
    timer_settime timerfd_create timerfd_gettime timerfd_settime tkill vfork wait4 waitid
"""

_COMMUNICATION = """
    accept accept4 bind connect epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2
    epoll_wait epoll_wait_old eventfd eventfd2 getpeername getsockname getsockopt io_cancel io_destroy io_getevents
    io_pgetevents io_setup io_submit listen mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink
    msgctl msgget msgrcv msgsnd pipe pipe2 poll ppoll pselect6 recvfrom recvmmsg recvmsg select semctl semget semop
    semtimedop sendmmsg sendmsg sendto setsockopt shutdown socketpair
"""

_FACTS = """
    clock_getres clock_gettime clock_nanosleep getrandom gettimeofday nanosleep sysinfo time times uname
"""

_RESTORE = {
    "clone3": "a restored process and its threads get the ids that they had (set_tid)",
    "ptrace": "CRIU steps the process out of its restorer",
}
"""Beyond what a function needs: system calls of the restore, and what for."""

_REFUSED = """
    acct add_key adjtimex bpf chroot clock_adjtime clock_settime delete_module fanotify_init finit_module fsconfig
    fsmount fsopen fspick init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kexec_file_load
    kcmp kexec_load keyctl lookup_dcookie mount mount_setattr move_mount name_to_handle_at open_by_handle_at open_tree
    perf_event_open pidfd_getfd pivot_root process_madvise process_vm_readv process_vm_writev quotactl quotactl_fd reboot request_key
    setdomainname sethostname setns settimeofday swapoff swapon sysfs syslog umount2 unshare userfaultfd vhangup
    vmsplice
"""

_NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET of linux/sched.h."""

_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
"""Of `personality`: Linux, with 2.6's version numbers, and to ask. None turns address randomisation off."""

_AF_VSOCK, _AF_ALG, _AF_MAX = 40, 38, 46


def profile() -> dict[str, Any]:
    """In the form that Docker, Podman and the kubelet read."""
    names = sorted({*_FILES.split(), *_MEMORY.split(), *_PROCESSES.split(), *_COMMUNICATION.split(), *_FACTS.split()})
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": _ENOSYS,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": []},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": []},
        ],
        "syscalls": [
            _allow(names, "what functions and their libraries need"),
            *(_allow([name], f"restore: {why}") for name, why in _RESTORE.items()),
            _allow(
                ["clone"],
                "threads and processes, in no namespace of their own",
                _arg(0, "MASKED_EQ", _NEW_NAMESPACES, 0),
            ),
            *(_allow(["personality"], "as it is", _arg(0, "EQ", value)) for value in _PERSONALITIES),
            *(
                _allow(["socket"], "neither the hypervisor's nor the kernel's cryptography", *case)
                for case in _sockets()
            ),
            {
                "names": sorted(_REFUSED.split()),
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": _EPERM,
                "comment": "refused, with or without the rights for it",
            },
        ],
    }


def _sockets() -> list[tuple[dict[str, Any], ...]]:
    """Each family but the two: a rule cannot say "neither", and the kernel looks at 32 bits of the argument."""
    families = [number for number in range(_AF_MAX) if number not in (_AF_ALG, _AF_VSOCK)]
    return [(_arg(0, "MASKED_EQ", 0xFFFFFFFF, number),) for number in families]


def _allow(names: list[str], comment: str, *args: dict[str, Any]) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": "SCMP_ACT_ALLOW", "comment": comment}
    return {**rule, "args": list(args)} if args else rule


def _arg(index: int, comparison: str, value: int, second: int | None = None) -> dict[str, Any]:
    argument: dict[str, Any] = {"index": index, "value": value, "op": f"SCMP_CMP_{comparison}"}
    return argument if second is None else {**argument, "valueTwo": second}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(profile(), indent=2) + "\n")

"""The profile: a list of what is allowed, written to the file that people use."""

import json
from pathlib import Path

import pytest

from adapter.hosts import seccomp
from adapter.hosts.seccomp import profile

ALLOWED = {name for rule in profile()["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}


def test_the_file_is_what_the_module_writes():
    file = Path(seccomp.__file__).with_name("seccomp.json")
    assert json.loads(file.read_text()) == profile(), (
        "run: python -m adapter.hosts.seccomp > adapter/hosts/seccomp.json"
    )


@pytest.mark.parametrize(
    "name",
    ["io_uring_setup", "io_uring_enter", "io_uring_register", "mount", "setns", "unshare", "bpf", "userfaultfd",
     "perf_event_open", "keyctl", "process_vm_writev", "kcmp", "open_by_handle_at", "init_module", "reboot"],
)  # fmt: skip
def test_it_refuses(name):
    assert name not in ALLOWED
    assert any(name in rule["names"] and rule["errnoRet"] == 1 for rule in profile()["syscalls"] if "errnoRet" in rule)


@pytest.mark.parametrize("name", ["clone3", "ptrace"])
def test_it_allows_what_a_restore_needs(name):
    assert name in ALLOWED


def test_nothing_is_both_allowed_and_refused():
    assert not ALLOWED & set(seccomp._REFUSED.split())

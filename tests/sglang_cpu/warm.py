"""What a process imports before real servers are forked from it, see tests/warm_servers.py."""

from tests.sglang_cpu.launch import prepare

prepare()

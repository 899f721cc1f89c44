"""Process groups of CPUs: torch's gloo, with one thread a group.

The groups that torch makes of "gloo" have two. Each writes the name of the collective that it has finished into one
string of the group, without a lock (`ProcessGroupGloo::runLoop`, in torch 2.11 to 2.14). An all-gather's name,
ALLGATHER_COALESCED, lies on the heap, and when both free the same memory the process dies soon after, by SIGSEGV or
SIGABRT: within seconds where it does nothing but gather, and once in some thousand short runs.

To torch these are groups of another backend: for CPUs alone, and without `monitored_barrier`.
"""

# torch's stubs do not know the options of these groups.
# pyright: reportAttributeAccessIssue=false

import os

import torch.distributed as dist

NAME = "gloo_one_thread"  # what torch.distributed.get_backend says of them


def register() -> str:
    """Have torch know these groups: the name of the backend to ask for; torch's own, if this torch has no options."""
    if not hasattr(dist.ProcessGroupGloo, "_Options"):
        return dist.Backend.GLOO
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _group, extended_api=True, devices=["cpu"])
    return NAME


def _group(asked: "dist.distributed_c10d._DistributedBackendOptions", _: object) -> dist.ProcessGroupGloo:
    """What torch makes of "gloo", with its options, but for the number of threads."""
    options = dist.ProcessGroupGloo._Options()
    interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    options._devices = [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces] or [
        dist.ProcessGroupGloo.create_default_device()
    ]
    options._threads = 1
    options._timeout = asked.timeout
    options.global_ranks_in_group, options.group_name = asked.global_ranks_in_group, asked.group_id
    return dist.ProcessGroupGloo(asked.store, asked.group_rank, asked.group_size, options)

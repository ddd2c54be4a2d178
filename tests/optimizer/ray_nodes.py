"""A Ray cluster of several nodes on this machine, by the cluster that Ray tests itself with.

    python -m tests.optimizer.ray_nodes

It says the address of its head, which has no CPUs. Then it takes lines of JSON on standard input,
and answers each by one: {"add": {"num_cpus": 1}} with the process of the node's raylet, {"kill":
PID} and {"kill": "head"} with null. It ends with its input, and all nodes with it.
"""

import json
import os
import sys
from contextlib import suppress
from typing import Any

import psutil
from ray.cluster_utils import Cluster

N_ATTEMPTS = 4
"""Ray gives a node 30 s to start, which on a machine that does much else is too little."""


def main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # Ray prints
    cluster = Cluster()
    started(cluster, num_cpus=0, include_dashboard=False)
    answers.write(json.dumps(cluster.address) + "\n")
    nodes = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "add" in request:
            node = started(cluster, **request["add"])
            [raylet] = node.all_processes["raylet"]
            answer = raylet.process.pid
            nodes[answer] = node
        elif request["kill"] == "head":
            cluster.head_node.kill_gcs_server(check_alive=False)
        else:
            cluster.remove_node(nodes.pop(request["kill"]), allow_graceful=False)
        answers.write(json.dumps(answer) + "\n")
    cluster.shutdown()


def started(cluster: Cluster, **given: Any) -> Any:
    before = set(psutil.Process().children(recursive=True))
    for attempt in range(1, N_ATTEMPTS + 1):
        try:
            return cluster.add_node(**given)
        except Exception as error:
            if "timed out" not in str(error) or attempt == N_ATTEMPTS:
                raise
            # It must not join the cluster later on.
            for process in set(psutil.Process().children(recursive=True)) - before:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    raise AssertionError


if __name__ == "__main__":
    main()

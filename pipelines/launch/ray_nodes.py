"""A script on each of some nodes of a Ray cluster: the job's entry point there.

    python ray_nodes.py --nodes N --gpus G SCRIPT

Nodes are taken whole, each by one task with all its GPUs, so that they are different ones; the script finds NODE_RANK
and the first one's address, HEAD, in its environment. When the first node's script ends the others' are stopped, and
its exit code is the job's; with 75, which is that of a script that was stopped, all start again. It imports nothing of
potstill: nodes need no more than bash and Ray.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys

import ray
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PLACED_S = 600  # until a cluster that grows has grown
STOPPED_S = 120
STOPPED = 75
MOST_STARTS = 100
POLL_S = 0.5


class Node:
    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def run(self, script: str, rank: int, head: str) -> int:
        environment = os.environ | {"NODE_RANK": str(rank), "HEAD": head}
        self._process = subprocess.Popen(["bash", "-c", script], env=environment, start_new_session=True)
        return self._process.wait()

    def stop(self) -> None:
        process = getattr(self, "_process", None)
        if process is None or process.poll() is not None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(STOPPED_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have it ignored behind `&`
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="of each node")
    parser.add_argument("script")
    arguments = parser.parse_args()
    ray.init(log_to_driver=True)
    share = {"CPU": 1.0} | ({"GPU": float(arguments.gpus)} if arguments.gpus else {})
    group = placement_group([share] * arguments.nodes, strategy="STRICT_SPREAD")
    if not group.wait(PLACED_S):
        sys.stderr.write(f"potstill: the cluster has not {arguments.nodes} nodes with {share} each\n")
        return 3
    told: list[int] = []  # `ray job stop` sends SIGTERM, and SIGKILL three seconds later: the nodes hear the first
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    for _ in range(MOST_STARTS):
        code = run_once(group, arguments.nodes, arguments.gpus, arguments.script, told)
        if code != STOPPED or told:
            break
    return code


def run_once(group: PlacementGroup, num_nodes: int, gpus: int, script: str, told: list[int]) -> int:
    """Whichever fails first ends all; the first node's end is that of all, and so is a signal in `told`."""
    # Two calls at a time: one runs the script, another may stop it.
    actor = ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=2)(Node)
    nodes = []
    for rank in range(num_nodes):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        nodes.append(actor.options(scheduling_strategy=place).remote())
    head = ray.get(nodes[0].address.remote())
    runs = [node.run.remote(script, rank, head) for rank, node in enumerate(nodes)]
    left, code = list(runs), 0
    while runs[0] in left and code == 0 and not told:
        done, left = ray.wait(left, timeout=POLL_S)
        code = max(ray.get(done), default=0)
    ray.get([node.stop.remote() for node in nodes])
    code = code if runs[0] in left and not told else ray.get(runs[0])
    for node in nodes:
        ray.kill(node)
    return code


if __name__ == "__main__":
    sys.exit(main())

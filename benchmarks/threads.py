"""Speed of one thread per peer: forward and backward of 4 ResNet-32, batch 128, in a loop on all cores or a pool.

    OMP_NUM_THREADS=2 python benchmarks/threads.py [--pairs 5]     # a minute on 2 cores

Wall time, both alternately, the median of the pairs' ratios. The loop's convolutions use all cores; each thread of the
pool runs one peer at a time on one core. codistill would offer threads for a ratio of 1.2 or more.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from codistill.losses import cross_entropy
from codistill.peers.networks import NetworkPeers


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    peers = NetworkPeers("resnet32", 4, 100).to(memory_format=torch.channels_last)
    x, y = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.randint(100, (128,))

    def forward_backward(member: torch.nn.Module) -> None:
        cross_entropy(member(x)[1].unsqueeze(0), y).sum().backward()

    def loop() -> None:
        torch.set_num_threads(cores)
        for member in peers.members:
            forward_backward(member)

    def pool() -> None:
        with ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            list(threads.map(forward_backward, peers.members))

    ratios = []
    for pair in range(options.pairs + 1):
        spent = []
        for run in (loop, pool):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        if pair:
            ratios.append(spent[0] / spent[1])
    print(f"one thread per peer over the loop on {cores} cores: {statistics.median(ratios):.2f} ({ratios})")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Command lines that start several processes."""

import socket
import sys


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


def torchrun(processes: int, *words: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that starts so many processes on this machine."""
    port = f"--master-port={free_port()}"
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", port, *options, *words]

"""A disk that fills up while a checkpoint is written."""

import errno
import json

import pytest
import torch

from codistill.config.config import Config
from codistill.reproduce.grid import _EpochCounter
from codistill.runs.checkpoint import write_checkpoint
from codistill.utils.errors import MachineError
from codistill.utils.files import write_atomically


@pytest.mark.parametrize("room", [0, 10, 70_000, 200_000])
def test_a_full_disk_is_recognized_behind_torchs_own_error(room, tmp_path):
    class Full:
        def __init__(self, stream):
            self.stream, self.left = stream, room

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.stream.write(data)

        def flush(self):
            self.stream.flush()

    state = {"peers": {str(i): torch.randn(64, 256) for i in range(6)}}
    with pytest.raises(MachineError, match="No space left on device; no existing file was changed"):
        write_atomically(tmp_path / "last.pt", lambda stream: write_checkpoint(state, Full(stream)))
    assert list(tmp_path.iterdir()) == []


def test_epochs_are_counted_from_what_is_new(tmp_path):
    config, path = Config("independent", "resnet8", "digits", out=str(tmp_path)), tmp_path / "metrics.jsonl"
    counter = _EpochCounter()
    assert counter.count(config) == 0
    line = json.dumps({"epoch": 0}) + "\n"
    for text, expected in ((line, 1), (line * 3 + "{", 3), (line * 2, 2)):
        path.write_text(text)
        assert counter.count(config) == expected

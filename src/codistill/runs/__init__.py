"""What one run leaves on disk."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.runs.checkpoint import errors_of_checkpoint as errors_of_checkpoint
    from codistill.runs.checkpoint import load_run_checkpoint as load_run_checkpoint
    from codistill.runs.checkpoint import restore_rng as restore_rng
    from codistill.runs.checkpoint import rng_state as rng_state
    from codistill.runs.record_files import check_record as check_record
    from codistill.runs.record_files import read_epoch_lines as read_epoch_lines
    from codistill.runs.record_files import read_record as read_record
    from codistill.runs.record_files import write_record as write_record
    from codistill.runs.records import CheckpointState as CheckpointState
    from codistill.runs.records import DataInfo as DataInfo
    from codistill.runs.records import Details as Details
    from codistill.runs.records import Environment as Environment
    from codistill.runs.records import EpochLine as EpochLine
    from codistill.runs.records import Figures as Figures
    from codistill.runs.records import GridInfo as GridInfo
    from codistill.runs.records import RunResult as RunResult
    from codistill.runs.records import StudentMetadata as StudentMetadata
    from codistill.runs.records import TableFile as TableFile
    from codistill.runs.run_folder import RunFolder as RunFolder
    from codistill.runs.run_folder import open_run as open_run
    from codistill.runs.trackers import Tracker as Tracker
    from codistill.runs.trackers import find_tracker as find_tracker
    from codistill.runs.trained_images import has_trained_hashes as has_trained_hashes
    from codistill.runs.trained_images import read_trained_hashes as read_trained_hashes
    from codistill.runs.trained_images import write_trained_hashes as write_trained_hashes

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpoint": "errors_of_checkpoint load_run_checkpoint restore_rng rng_state",
        "record_files": "check_record read_epoch_lines read_record write_record",
        "records": (
            "CheckpointState DataInfo Details Environment EpochLine Figures GridInfo RunResult StudentMetadata "
            "TableFile"
        ),
        "run_folder": "RunFolder open_run",
        "trackers": "Tracker find_tracker",
        "trained_images": "has_trained_hashes read_trained_hashes write_trained_hashes",
    },
)

"""Helpers that import nothing else of codistill: errors, files, devices, signals, safe loading."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.utils.allow_import import ImportPolicy as ImportPolicy
    from codistill.utils.allow_import import check_imports as check_imports
    from codistill.utils.allow_import import check_method_import as check_method_import
    from codistill.utils.allow_import import command_line as command_line
    from codistill.utils.allow_import import current_network_name as current_network_name
    from codistill.utils.allow_import import current_policy as current_policy
    from codistill.utils.allow_import import import_object as import_object
    from codistill.utils.allow_import import is_user_code as is_user_code
    from codistill.utils.allow_import import use_policy as use_policy
    from codistill.utils.cpu_memory import keep_freed_memory as keep_freed_memory
    from codistill.utils.cpu_memory import physical_memory as physical_memory
    from codistill.utils.cpu_memory import release_kept_memory as release_kept_memory
    from codistill.utils.device import DTYPES as DTYPES
    from codistill.utils.device import accumulation_dtype as accumulation_dtype
    from codistill.utils.device import allocated_bytes as allocated_bytes
    from codistill.utils.device import peak_megabytes as peak_megabytes
    from codistill.utils.device import pick_device as pick_device
    from codistill.utils.device import reset_peak_memory as reset_peak_memory
    from codistill.utils.device import synchronize as synchronize
    from codistill.utils.environ import environment_number as environment_number
    from codistill.utils.environ import leave_safe_import_path as leave_safe_import_path
    from codistill.utils.environ import safe_import_path as safe_import_path
    from codistill.utils.errors import DecodingError as DecodingError
    from codistill.utils.errors import InputError as InputError
    from codistill.utils.errors import MachineError as MachineError
    from codistill.utils.errors import OtherRankFailedError as OtherRankFailedError
    from codistill.utils.errors import Stopped as Stopped
    from codistill.utils.errors import StoppedEarly as StoppedEarly
    from codistill.utils.errors import UnreadableError as UnreadableError
    from codistill.utils.errors import describe_unexpected as describe_unexpected
    from codistill.utils.errors import explain_failure as explain_failure
    from codistill.utils.errors import first_line as first_line
    from codistill.utils.errors import on_one_line as on_one_line
    from codistill.utils.errors import out_of_memory as out_of_memory
    from codistill.utils.errors import suggest as suggest
    from codistill.utils.files import DISK_FULL as DISK_FULL
    from codistill.utils.files import LockedError as LockedError
    from codistill.utils.files import check_regular as check_regular
    from codistill.utils.files import finite_or_null as finite_or_null
    from codistill.utils.files import is_same_file as is_same_file
    from codistill.utils.files import lock as lock
    from codistill.utils.files import read_file as read_file
    from codistill.utils.files import read_json as read_json
    from codistill.utils.files import write_atomically as write_atomically
    from codistill.utils.files import write_json as write_json
    from codistill.utils.files import write_text as write_text
    from codistill.utils.parameters import count_parameters as count_parameters
    from codistill.utils.progress import end_displays as end_displays
    from codistill.utils.progress import set_progress_display as set_progress_display
    from codistill.utils.progress import track as track
    from codistill.utils.safe_load import check_npz_sizes as check_npz_sizes
    from codistill.utils.safe_load import find_outside_links as find_outside_links
    from codistill.utils.safe_load import load_tensors as load_tensors
    from codistill.utils.shares import share_out as share_out
    from codistill.utils.signals import SignalReceived as SignalReceived
    from codistill.utils.signals import catch_signals as catch_signals
    from codistill.utils.signals import ignore_interrupt as ignore_interrupt
    from codistill.utils.signals import pending_signal as pending_signal
    from codistill.utils.signals import raise_on_signals as raise_on_signals
    from codistill.utils.tables import Rows as Rows
    from codistill.utils.tables import comma_separated as comma_separated
    from codistill.utils.tables import escape_csv as escape_csv
    from codistill.utils.tables import escape_json as escape_json
    from codistill.utils.tables import escape_markdown as escape_markdown
    from codistill.utils.tables import latex as latex
    from codistill.utils.tables import looks_numeric as looks_numeric
    from codistill.utils.tables import markdown as markdown
    from codistill.utils.tables import markdown_page as markdown_page

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "allow_import": (
            "ImportPolicy check_imports check_method_import command_line current_network_name current_policy "
            "import_object is_user_code use_policy"
        ),
        "cpu_memory": "keep_freed_memory physical_memory release_kept_memory",
        "device": (
            "DTYPES accumulation_dtype allocated_bytes peak_megabytes pick_device reset_peak_memory synchronize"
        ),
        "environ": "environment_number leave_safe_import_path safe_import_path",
        "errors": (
            "DecodingError InputError MachineError OtherRankFailedError Stopped StoppedEarly UnreadableError "
            "describe_unexpected explain_failure first_line on_one_line out_of_memory suggest"
        ),
        "files": (
            "DISK_FULL LockedError check_regular finite_or_null is_same_file lock read_file read_json write_atomically "
            "write_json write_text"
        ),
        "parameters": "count_parameters",
        "progress": "end_displays set_progress_display track",
        "safe_load": "check_npz_sizes find_outside_links load_tensors",
        "shares": "share_out",
        "signals": "SignalReceived catch_signals ignore_interrupt pending_signal raise_on_signals",
        "tables": (
            "Rows comma_separated escape_csv escape_json escape_markdown latex looks_numeric markdown markdown_page"
        ),
    },
)

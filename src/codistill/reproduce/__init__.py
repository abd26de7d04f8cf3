"""Grids of runs, and the tables made of them."""

from typing import TYPE_CHECKING

from codistill.utils.lazy import lazy_names

if TYPE_CHECKING:
    from codistill.reproduce.command_line import format_command as format_command
    from codistill.reproduce.comparison import add_earlier_rows as add_earlier_rows
    from codistill.reproduce.comparison import check_comparison_folder as check_comparison_folder
    from codistill.reproduce.comparison import check_options as check_options
    from codistill.reproduce.comparison import comparison_folder as comparison_folder
    from codistill.reproduce.comparison import comparison_title as comparison_title
    from codistill.reproduce.comparison import describe_comparison as describe_comparison
    from codistill.reproduce.comparison import plan_comparison as plan_comparison
    from codistill.reproduce.comparison import write_comparison as write_comparison
    from codistill.reproduce.gain_plot import draw_gains as draw_gains
    from codistill.reproduce.grid import list_failures as list_failures
    from codistill.reproduce.grid import run_grid as run_grid
    from codistill.reproduce.plan import Plan as Plan
    from codistill.reproduce.plan import make_plan as make_plan
    from codistill.reproduce.published_tables import load_published_tables as load_published_tables
    from codistill.reproduce.recipes import TABLES as TABLES
    from codistill.reproduce.recipes.demo import METHODS as METHODS
    from codistill.reproduce.recipes.demo import demo as demo
    from codistill.reproduce.report.page import write_report as write_report
    from codistill.reproduce.statistics import comparison_rows as comparison_rows
    from codistill.reproduce.statistics import differences_to_baselines as differences_to_baselines
    from codistill.reproduce.statistics import summarize_comparison as summarize_comparison
    from codistill.reproduce.table_figures import make_figures as make_figures
    from codistill.reproduce.table_folder import check_machine as check_machine
    from codistill.reproduce.table_folder import make_executor as make_executor
    from codistill.reproduce.table_folder import prepare_table_folder as prepare_table_folder
    from codistill.reproduce.table_folder import raise_failures as raise_failures
    from codistill.reproduce.table_folder import read_whole_plan as read_whole_plan
    from codistill.reproduce.table_folder import write_table as write_table
    from codistill.reproduce.table_rows import make_table_rows as make_table_rows
    from codistill.reproduce.table_rows import summarize_table as summarize_table
    from codistill.reproduce.table_rows import table_notes as table_notes

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "command_line": "format_command",
        "comparison": (
            "add_earlier_rows check_comparison_folder check_options comparison_folder comparison_title "
            "describe_comparison plan_comparison write_comparison"
        ),
        "gain_plot": "draw_gains",
        "grid": "list_failures run_grid",
        "plan": "Plan make_plan",
        "published_tables": "load_published_tables",
        "recipes": "TABLES",
        "recipes.demo": "METHODS demo",
        "report.page": "write_report",
        "statistics": "comparison_rows differences_to_baselines summarize_comparison",
        "table_figures": "make_figures",
        "table_folder": ("check_machine make_executor prepare_table_folder raise_failures read_whole_plan write_table"),
        "table_rows": "make_table_rows summarize_table table_notes",
    },
)

"""Notebook 01: what this machine has, and what of it must be fixed."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "summarize_environment": "checks",  # this machine beside what is tested
    "check_environment": "checks",  # stops with every problem in one message
    "MUST_FIX": "checks",  # statuses that stop the series, the first to fix first
    "PACKAGES": "versions",  # the series' packages
    "EnvironmentCheckError": "versions",  # something must be fixed before the series can run
    "same_version": "versions",  # equal but for the local part, as in 2.11.0+cu130
    "plot_pipeline": "picture",  # the series in one picture
    "check_imports": "versions",  # stops where an older package is still in memory
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)

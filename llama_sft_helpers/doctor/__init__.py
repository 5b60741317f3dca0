"""What broke, why, and what to do next: ``%load_ext llama_sft_helpers`` shows it under a traceback."""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "explain": "explanation",  # cause and fix of an exception, or None
    "Explanation": "explanation",  # both, with a link; printed and shown
    "TABLE": "table",  # the known failures
    "Failure": "table",  # one of them
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)

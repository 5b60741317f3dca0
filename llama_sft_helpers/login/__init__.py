"""Notebook 02: is there a token, whose is it, and does it open the model?

No text made here holds a token: at most its last four characters are shown. Tokens:
https://huggingface.co/docs/hub/security-tokens; gated models: https://huggingface.co/docs/hub/models-gated.
"""

from llama_sft_helpers.core.contents import load_on_demand

CONTENTS = {
    "find_token": "tokens",  # the token that the client would use, and where it lies
    "FoundToken": "tokens",  # both; its representation hides the token
    "summarize_token_sources": "tokens",  # every place that a token may lie in
    "mask": "tokens",  # a token's last four characters at most
    "check_access": "access",  # does a token open a model, and if not, why
    "classify_answer": "access",  # the same from an answer's status and headers
    "HUB_SECONDS": "access",  # how long the hub may take to answer
    "AccessError": "access",  # why a model does not open, and what to do
    "summarize_reasons": "access",  # with the page to open and what to do there
    "login_widget": "widget",  # a password field that never blocks
    "use_token": "widget",  # the one call of notebooks 03 to 09
}
__all__ = list(CONTENTS)
__getattr__, __dir__ = load_on_demand(__name__, CONTENTS)

"""What each kernel and program that the tests start does first: `tests/conftest.py` puts this on its path."""

import gc

# Importing PyTorch and the libraries around it makes a million objects that stay. Looking through them again
# and again for garbage takes a fifth of that time, and these processes end before garbage matters.
gc.disable()

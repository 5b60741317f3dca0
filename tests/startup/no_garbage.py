"""Imported first by kernels and programs that tests start: they do not look for garbage.

Importing PyTorch and the libraries around it makes a million objects that stay. Looking through them again
and again takes a fifth of that time, and these processes end before garbage matters. At its end Python would
look once more, for over a second; objects that are frozen it passes over.
"""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)

"""What each kernel and program that the tests start does first: `tests/conftest.py` puts this on its path."""

import no_garbage  # noqa: F401

"""The one exception that means: the user can mend this; and what helps to word it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave us.

    The message says what was wrong, what was expected and what to do. Command lines print it without a
    traceback and exit with code 2.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say of a name that is not among `names`: '; the nearest is num_epochs', or '' if none is near."""
    found = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; the nearest {'are' if found[1:] else 'is'} {', '.join(found)}" if found else ""


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED", "Out of memory allocating"  # XLA's: the second of what was dispatched before


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory of this machine or of a device is used up."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY))
        or (isinstance(error, ImportError) and "failed to map segment" in str(error))  # of a library's file
    )

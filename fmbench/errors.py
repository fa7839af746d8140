"""The one exception that means: the user can mend this."""


class UserError(Exception):
    """A mistake in what the user gave us.

    The message says what was wrong, what was expected and what to do. Command lines print it without a
    traceback and exit with code 2.
    """

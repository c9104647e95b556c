"""The one exception for what a user can mend."""


class InputError(ValueError):
    """Something a user gave is wrong: a file, a column, a row, a config key.

    The message names the place and ends with the one thing to change. The command line prints it
    without a traceback and exits with code 2.
    """

"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Something that the user gave is wrong: a file, a value, a name.

    The message names the thing and the remedy, in one or two sentences. The tools print it without a traceback and
    leave with exit code 2; library users catch it as a ValueError.
    """

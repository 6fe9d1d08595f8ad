"""The error that the command line turns into one line and exit code 2."""


class UserError(Exception):
    """Something the person at the command line can put right; the message names it."""

"""The exceptions that stand for a mistake of the user: bad input, bad arguments, a full disk."""


class UserError(ValueError):
    """A mistake the user can mend.

    The message is one line that names the file, field or argument and what was expected. The command line prints
    it without a traceback and exits with code 2; as a library it is an ordinary ``ValueError``.
    """


class SharedError(UserError):
    """A mistake that all of several processes know of: the first one tells the user, the others only end."""

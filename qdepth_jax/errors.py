"""The one exception that a command shows as a plain message."""


class UserError(ValueError):
    """Input, configuration or environment is wrong. The message names the actual value and the fix.

    Commands print the message to stderr and exit with code 2; nothing has been overwritten by then.
    """

"""The one exception the command line turns into a message and exit code 1."""


class UserError(ValueError):
    """Bad input or an environment the user can mend; the text names what was expected, what came and the remedy."""

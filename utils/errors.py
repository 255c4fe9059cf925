"""The one exception a user's mistake raises; command lines turn it into one sentence and exit code 2."""


class UserError(ValueError):
    """Input that cannot be used: the message says what was got, what is expected and what to do, in one sentence."""

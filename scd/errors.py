"""The one exception type this project raises for mistakes a user can fix."""


class ScdError(Exception):
    """A wrong option, file or environment, told in one line: what, where, and what to do."""

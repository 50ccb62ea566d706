"""The one exception that scripts show as a single line instead of a traceback."""


class UserError(ValueError):
    """Bad input from outside: a config value, a path, a prompt, a data file.

    The message names the field, the value got and the value wanted.
    """

"""The two kinds of failure a user can cause and mend.

Everything else that goes wrong is a defect of the toolkit and keeps its traceback in the run's log.
"""


class ConfigurationError(ValueError):
    """Wrong arguments or configuration, found before any work starts (exit code 2).

    The message is one line: what was found, what was expected, the remedy.
    """


class Terminated(BaseException):
    """The process was asked to end (SIGTERM), as Ctrl-C asks with KeyboardInterrupt; no failure of what it met."""


class DataError(RuntimeError):
    """Something is wrong with the files of one class (exit code 1; other classes go on).

    The message is one line that names the file.
    """

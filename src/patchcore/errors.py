"""The two kinds of failure a user can cause and mend.

Everything else that goes wrong is a defect of the toolkit and keeps its traceback in the run's log.
"""


class ConfigurationError(ValueError):
    """Wrong arguments or configuration, found before any work starts (exit code 2).

    The message is one line: what was found, what was expected, the remedy.
    """


class Terminated(BaseException):
    """The process was asked to end (SIGTERM), as Ctrl-C asks with KeyboardInterrupt; no failure of what it met."""


class ProcessLost(BaseException):
    """One of several processes that train together has failed by itself, so that the others cannot go on (exit code 1).

    No failure of one class: the next one would wait for a process that is gone.

    Args:
        message: One line.
        is_elsewhere: Another process than this one has failed, and says why.
    """

    def __init__(self, message: str, is_elsewhere: bool) -> None:
        super().__init__(message)
        self.is_elsewhere = is_elsewhere


class DataError(RuntimeError):
    """Something is wrong with the files of one class (exit code 1; other classes go on).

    The message is one line that names the file.
    """

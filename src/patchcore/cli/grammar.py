"""The chained command grammar, and one-line errors with exit codes.

    command [options] ARGUMENT step [options] ARGUMENTS step ...

As in the original, every step returns one value. More forgiving than plain click: the options of the command
and of each step may stand before or after its arguments.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from patchcore.configs import near_matches
from patchcore.errors import ConfigurationError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class OneLineErrors(click.Command):
    """A command whose errors are one line, with exit code 2 for what the user can mend."""

    def main(self, *args: Any, **extra: Any) -> Any:  # click's own signature
        return run_with_exit_code(lambda: super(OneLineErrors, self).main(*args, **{**extra, "standalone_mode": False}))


def run_with_exit_code(call: Callable[[], Any]) -> None:
    """Run a command and leave the process with its exit code; `call` returns None or an exit code."""
    try:
        code = call()
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted")
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        _complain(error.format_message())
        code = EXIT_USAGE
    except ConfigurationError as error:
        _complain(str(error))
        code = EXIT_USAGE
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code or 0)


def _complain(message: str) -> None:
    """Print one line, whatever the message holds."""
    line = " ".join(message.split())
    print(f"error: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


class ChainedCommand(OneLineErrors, click.Group):
    """A command followed by steps; `required_steps` must each be there once.

    Args:
        required_steps: For each step that is needed, the alternative names of it.
    """

    def __init__(self, *args: Any, required_steps: Sequence[str] = (), **extra: Any) -> None:
        super().__init__(*args, **{**extra, "chain": True, "subcommand_metavar": "STEP [OPTIONS] ARGS ..."})
        self.required_steps = tuple(required_steps)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own, rest = _options_first(self, args)
        ordered = list(own)
        typed: list[str] = []
        wants_help = any(a in ("--help", "-h") for a in args)
        while rest:
            name = rest[0]
            step = self.commands.get(name)
            if step is None:
                expected = near_matches(name, self.commands)
                raise click.UsageError(f"found {name!r} where a step was expected ({expected})")
            if name in typed:
                raise click.UsageError(f"step {name!r} was given twice, expected once")
            typed.append(name)
            step_args, rest = _options_first(step, rest[1:])
            ordered += [name, *step_args]
        missing = [name for name in self.required_steps if name not in typed]
        if missing and args and not wants_help:
            raise click.UsageError(f"step {missing[0]} is missing, expected {', '.join(self.required_steps)}")
        return super().parse_args(ctx, ordered)


def _options_first(command: click.Command, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off the arguments of one command and put its options before them.

    Args:
        command: The command that the arguments begin with.
        args: What was typed after its name.

    Returns:
        The command's own options and arguments, reordered; what is left, beginning with the next step.
    """
    takes_value: dict[str, bool] = {"--help": False}
    num_arguments = 0
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            takes_value |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], not parameter.is_flag)
        else:
            num_arguments += parameter.nargs
    options: list[str] = []
    arguments: list[str] = []
    position = 0
    while position < len(args):
        token = args[position]
        is_option = token.startswith("-") and len(token) > 1
        if not is_option and len(arguments) == num_arguments:
            break
        width = 2 if is_option and "=" not in token and takes_value.get(token, False) else 1
        (options if is_option else arguments).extend(args[position : position + width])
        position += width
    return [*options, *arguments], list(args[position:])


def quiet_libraries() -> None:
    """Keep third-party chatter, which no user can act on, away from the terminal."""
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

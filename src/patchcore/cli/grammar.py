"""The chained command grammar, and one-line errors with exit codes.

    command [options] ARGUMENT step [options] ARGUMENTS step ...

As in the original, every step returns one value. More forgiving than plain click: the options of the command
and of each step may stand before or after its arguments.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from patchcore.configs import near_matches
from patchcore.errors import ConfigurationError

HELP = "--help"
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class OneLineErrors(click.Command):
    """A command whose errors are one line, with exit code 2 for what the user can mend."""

    def main(self, *args: Any, **extra: Any) -> Any:  # click's own signature
        return run_with_exit_code(lambda: super(OneLineErrors, self).main(*args, **{**extra, "standalone_mode": False}))


def run_with_exit_code(call: Callable[[], Any]) -> None:
    """Run a command and leave the process with its exit code; `call` returns None or an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths are printed byte for byte, whatever their encoding
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
    except BrokenPipeError:  # the reader of a help text has gone, as in `... | head`
        _discard_output()
        code = EXIT_FAILED
    except OSError as error:  # a full disk, a folder that vanished; within a class this is that class's failure
        _complain(f"{error.filename or 'a file'} could not be read or written ({error.strerror or error})")
        code = EXIT_FAILED
    sys.exit(code or 0)


def announce(line: str) -> None:
    """Print a line for the user; a reader that has gone, as in `... | head`, does not stop the work."""
    try:
        click.echo(line)
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
        if HELP in args:
            self._show_help(ctx, args[: args.index(HELP)])
        if not args:
            raise click.UsageError(f"no arguments, expected {self._expected()}: {HELP} explains them")
        if args[0] in self.commands:
            raise click.UsageError(f"found the step {args[0]!r} first, expected {self._expected()}")
        own, rest = self._split(self, args)
        ordered = list(own)
        typed: list[str] = []
        while rest:
            name = rest[0]
            step = self.commands.get(name)
            if step is None:
                expected = near_matches(name, self.commands)
                raise click.UsageError(f"found {name!r} where a step was expected ({expected})")
            if name in typed:
                raise click.UsageError(f"step {name!r} was given twice, expected once")
            typed.append(name)
            step_args, rest = self._split(step, rest[1:])
            ordered += [name, *step_args]
        missing = [name for name in self.required_steps if name not in typed]
        if missing:
            raise click.UsageError(f"step {missing[0]} is missing, expected {self._expected()}")
        return super().parse_args(ctx, ordered)

    def _show_help(self, ctx: click.Context, before: Sequence[str]) -> None:
        """Print the help of the last step typed before --help, or of the whole command, and leave."""
        steps = [self.commands[token] for token in before if token in self.commands]
        context = click.Context(steps[-1], ctx, info_name=steps[-1].name) if steps else ctx
        click.echo(context.get_help())
        ctx.exit()

    def _expected(self) -> str:
        arguments = [p.human_readable_name for p in self.params if isinstance(p, click.Argument)]
        return f"{' '.join(arguments)}, then the steps {', '.join(self.required_steps)}"

    def _split(self, command: click.Command, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """Split off what belongs to one command, its options first; what is left begins with the next step."""
        try:
            own, rest = _options_first(command, args)
        except click.NoSuchOption as error:
            name = error.option_name
            homes = [c.name for c in (self, *self.commands.values()) if name in _options(c)]
            hint = f"it belongs to {homes[0]}" if homes else near_matches(name, _options(command))
            raise click.UsageError(f"{command.name} has no option {name!r}: {hint}") from error
        return own, rest


def _options(command: click.Command) -> dict[str, bool]:
    """Return the options of a command and whether each is followed by a value."""
    takes_value = {HELP: False}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            takes_value |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], not parameter.is_flag)
    return takes_value


def _options_first(command: click.Command, args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split off the arguments of one command and put its options before them.

    Args:
        command: The command that the arguments begin with.
        args: What was typed after its name.

    Returns:
        The command's own options and arguments, reordered; what is left, beginning with the next step.

    Raises:
        click.NoSuchOption: The command does not have an option.
        click.BadOptionUsage: The last option lacks its value.
    """
    takes_value = _options(command)
    num_arguments = sum(p.nargs for p in command.params if isinstance(p, click.Argument))
    options: list[str] = []
    arguments: list[str] = []
    position = 0
    while position < len(args):
        token = args[position]
        if token.startswith("-") and len(token) > 1:
            width = _width(token, takes_value)
            if position + width > len(args):
                raise click.BadOptionUsage(token, f"option {token!r} of {command.name} needs a value")
            options += args[position : position + width]
        elif len(arguments) < num_arguments:
            width = 1
            arguments.append(token)
        else:
            break
        position += width
    return [*options, *arguments], list(args[position:])


def _width(option: str, takes_value: Mapping[str, bool]) -> int:
    """Return how many tokens an option takes up: 2 where its value follows it."""
    if option in takes_value:
        return 2 if takes_value[option] else 1
    name = option.partition("=")[0]
    attached = not option.startswith("--") and takes_value.get(option[:2], False)  # as in -p0.1
    if name in takes_value or attached:
        return 1
    raise click.NoSuchOption(name)


def quiet_libraries() -> None:
    """Keep third-party chatter, which no user can act on, away from the terminal."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    logging.getLogger("timm").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

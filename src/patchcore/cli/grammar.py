"""The chained command grammar, and one-line errors with exit codes.

    command [options] ARGUMENT step [options] ARGUMENTS step ...

As in the original, every step returns one value. More forgiving than plain click:

- The options of the command and of each step may stand before or after its arguments.
- An option that the present step does not have goes to the part of the command that has it, if it is typed and the
  only one, so that a shell script can append "$@" behind its last step. The present step wins for its own options.
- Of an option with one value the token typed last counts, wherever it was typed; of a repeatable option, all that is
  typed behind one part, which replaces what was typed of it behind an earlier one. So what a user appends wins.
- A command may name options of which two different values are an error instead.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from patchcore.configs import near_matches
from patchcore.errors import ConfigurationError, ProcessLost, Terminated
from patchcore.runtime import sigterm_as_exception
from patchcore.torchrun import is_follower, leave_to_first, require_one_process

HELP = "--help"
RULE = (
    "Options may stand before or after the arguments. One that the present step does not have goes to the step that "
    "has it, so that it may also be typed behind the last step; there it replaces what was typed of it before."
)
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class OneLineErrors(click.Command):
    """A command whose errors are one line, with exit code 2 for what the user can mend.

    Attributes:
        under_torchrun: Whether it may be started by torchrun, in several processes.
    """

    under_torchrun = False

    def main(self, *args: Any, **extra: Any) -> Any:  # click's own signature
        return run_with_exit_code(lambda: self._run_alone_or_together(*args, **extra))

    def _run_alone_or_together(self, *args: Any, **extra: Any) -> Any:
        if not self.under_torchrun:
            require_one_process(str(self.name))
        return super().main(*args, **{**extra, "standalone_mode": False})


def run_with_exit_code(call: Callable[[], Any]) -> None:
    """Run a command and leave the process with its exit code; `call` returns None or an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths are printed byte for byte, whatever their encoding
    try:
        with sigterm_as_exception():
            code = call()
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say_as_the_first("interrupted")
        code = EXIT_INTERRUPTED
    except Terminated:
        _say_as_the_first("terminated")
        code = EXIT_TERMINATED
    except click.ClickException as error:
        leave_to_first()
        _complain(error.format_message())
        code = EXIT_USAGE
    except ConfigurationError as error:
        leave_to_first()
        _complain(str(error))
        code = EXIT_USAGE
    except ProcessLost as error:
        if error.is_elsewhere:
            leave_to_first()
        _complain(str(error))
        code = EXIT_FAILED
    except BrokenPipeError:  # the reader of a help text has gone, as in `... | head`
        _discard_output()
        code = EXIT_FAILED
    except OSError as error:  # a full disk, a folder that vanished; within a class this is that class's failure
        _complain(f"{error.filename or 'a file'} could not be read or written ({error.strerror or error})")
        code = EXIT_FAILED
    sys.exit(code or 0)


def announce(line: str) -> None:
    """Print a line for the user; neither a reader that has gone nor a terminal without ± stops the work."""
    try:
        click.echo(line)
    except UnicodeEncodeError:
        click.echo(line.encode("ascii", "backslashreplace").decode())
    except BrokenPipeError:
        _discard_output()


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_as_the_first(message: str) -> None:
    """Print what all processes of torchrun meet at once."""
    if not is_follower():
        _complain(message)


def _complain(message: str) -> None:
    """Print one line, whatever the message holds."""
    line = " ".join(message.split())
    print(f"error: {line}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)


@dataclass(frozen=True)
class _TypedOption:
    """An option as it was typed.

    Attributes:
        tokens: The option and its value, if that is a token of its own.
        present: Name of the part behind which it was typed.
        homes: Names of the parts that it may belong to; the present one alone where that has it.
    """

    tokens: list[str]
    present: str
    homes: list[str]

    @property
    def name(self) -> str:
        return self.tokens[0].partition("=")[0]

    @property
    def value(self) -> str:
        return self.tokens[1] if len(self.tokens) > 1 else self.tokens[0].partition("=")[2]


class ShortenedStep(click.Command):
    """A step whose first argument is left out exactly when one of its options is typed; it is "" then.

    Args:
        shortened_by: The option that takes the argument's place.
    """

    def __init__(self, *args: Any, shortened_by: str, **extra: Any) -> None:
        super().__init__(*args, **extra)
        self.shortened_by = shortened_by

    def given_arguments(self, typed: Sequence[str]) -> list[str]:
        """Return the arguments that are there before any is read from what was typed."""
        return [""] if any(token.partition("=")[0] == self.shortened_by for token in typed) else []


class ChainedCommand(OneLineErrors, click.Group):
    """A command followed by steps; `required_steps` must each be there once.

    The command and its steps are called parts below.

    Args:
        required_steps: Names of the steps that are needed; a tuple of names where one of several is.
        once: Options of which no two different values may be typed, wherever they stand.
        under_torchrun: Whether the command may be started by torchrun, in several processes.
    """

    def __init__(
        self,
        *args: Any,
        required_steps: Sequence[str | tuple[str, ...]] = (),
        once: Sequence[str] = (),
        under_torchrun: bool = False,
        **extra: Any,
    ) -> None:
        fixed = {"chain": True, "subcommand_metavar": "STEP [OPTIONS] ARGS ...", "epilog": RULE}
        super().__init__(*args, **{**extra, **fixed})
        self.required_steps = [(step,) if isinstance(step, str) else step for step in required_steps]
        self.once = tuple(once)
        self.under_torchrun = under_torchrun

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if HELP in args:
            self._show_help(ctx, args[: args.index(HELP)])
        if not args:
            raise click.UsageError(f"no arguments, expected {self._expected()}: {HELP} explains them")
        if args[0] in self.commands:
            raise click.UsageError(f"found the step {args[0]!r} first, expected {self._expected()}")
        arguments, options = self._read(args)
        for names in self.required_steps:
            typed = [name for name in names if name in arguments]
            if not typed:
                raise click.UsageError(f"step {' or '.join(names)} is missing, expected {self._expected()}")
            if len(typed) > 1:
                raise click.UsageError(
                    f"found the steps {' and '.join(typed)}, expected one of them: leave the others out"
                )
        self._require_one_value(options)
        return super().parse_args(ctx, self._options_first(arguments, options))

    def _show_help(self, ctx: click.Context, before: Sequence[str]) -> None:
        """Print the help of the last step typed before --help, or of the whole command, and leave."""
        steps = [self.commands[token] for token in before if token in self.commands]
        context = click.Context(steps[-1], ctx, info_name=steps[-1].name) if steps else ctx
        click.echo(context.get_help())
        ctx.exit()

    def _require_one_value(self, options: Sequence[_TypedOption]) -> None:
        for name in self.once:
            values = [option.value for option in options if option.name == name]
            other = next((value for value in values if value != values[0]), None)
            if other is not None:
                raise click.UsageError(f"{name} is {values[0]!r} and then {other!r}: type it once")

    def _expected(self) -> str:
        arguments = [p.human_readable_name for p in self.params if isinstance(p, click.Argument)]
        steps = [" or ".join(names) for names in self.required_steps]
        return f"{' '.join(arguments)}, then the steps {', '.join(steps)}"

    def _parts(self) -> dict[str, click.Command]:
        """Return the command and its steps by name."""
        return {str(self.name): self, **self.commands}

    def _read(self, args: Sequence[str]) -> tuple[dict[str, list[str]], list[_TypedOption]]:
        """Tell arguments, options and names of steps apart.

        Args:
            args: Everything typed after the command's name.

        Returns:
            The arguments of each part that was typed, and the options; both in the order typed.

        Raises:
            click.UsageError: An option that no part has, a word that is no step, or a step for the second time.
        """
        parts = self._parts()
        present = str(self.name)
        arguments: dict[str, list[str]] = {present: []}
        options: list[_TypedOption] = []
        position = 0
        while position < len(args):
            token = args[position]
            width = 1
            if token.startswith("-") and len(token) > 1:
                options.append(self._read_option(args[position:], present))
                width = len(options[-1].tokens)
            elif len(arguments[present]) < _num_arguments(parts[present]):
                arguments[present].append(token)
            else:
                present = self._read_step(token, arguments)
                step = parts[present]
                arguments[present] = step.given_arguments(args) if isinstance(step, ShortenedStep) else []
            position += width
        return arguments, options

    def _read_step(self, name: str, typed: Mapping[str, list[str]]) -> str:
        if name not in self.commands:
            raise click.UsageError(f"found {name!r} where a step was expected ({near_matches(name, self.commands)})")
        if name in typed:
            raise click.UsageError(f"step {name!r} was given twice, expected once")
        return name

    def _read_option(self, args: Sequence[str], present: str) -> _TypedOption:
        """Read the option that `args` begins with, and its value if that is the next token."""
        token = args[0]
        name = token.partition("=")[0]
        options = {part: _options(command) for part, command in self._parts().items()}
        homes = _homes(token, present, options)
        if not homes:
            known = {option for of_part in options.values() for option in of_part}
            raise click.UsageError(f"{present} has no option {name!r}: {near_matches(name, known)}")
        widths = {2 if options[home].get(token, False) else 1 for home in homes}
        if len(widths) > 1:
            raise _misplaced(name, present, homes)
        width = widths.pop()
        if width > len(args):
            raise click.BadOptionUsage(token, f"option {token!r} of {homes[0]} needs a value")
        return _TypedOption(list(args[:width]), present, homes)

    def _options_first(self, arguments: Mapping[str, list[str]], options: Sequence[_TypedOption]) -> list[str]:
        """Return the command line as plain click wants it: each option in its part, before the part's arguments."""
        own: dict[str, list[str]] = {part: [] for part in arguments}
        placed = [(option, _home(option, arguments)) for option in options]
        last_place = {(home, self._repeatable(option, home)): option.present for option, home in placed}
        for option, home in placed:
            name = self._repeatable(option, home)
            if name is None or last_place[home, name] == option.present:
                own[home] += option.tokens
        ordered: list[str] = []
        for part, values in arguments.items():
            ordered += [*([part] if part in self.commands else []), *own[part], *values]
        return ordered

    def _repeatable(self, option: _TypedOption, home: str) -> str | None:
        """Return the name of the parameter that an option sets, if it may be typed several times."""
        token = option.tokens[0]
        for parameter in self._parts()[home].params:
            names = [*parameter.opts, *parameter.secondary_opts]
            spelled = token.partition("=")[0] in names or (not token.startswith("--") and token[:2] in names)
            if isinstance(parameter, click.Option) and parameter.multiple and spelled:
                return parameter.name
        return None


def _num_arguments(command: click.Command) -> int:
    return sum(p.nargs for p in command.params if isinstance(p, click.Argument))


def _options(command: click.Command) -> dict[str, bool]:
    """Return the options of a command and whether each is followed by a value."""
    takes_value = {HELP: False}
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            takes_value |= dict.fromkeys([*parameter.opts, *parameter.secondary_opts], not parameter.is_flag)
    return takes_value


def _homes(token: str, present: str, options: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """Return the parts that an option may belong to: the present one alone where that has it.

    Args:
        token: What was typed, such as `--resize`, `--resize=256` or `-p0.1`.
        present: Name of the part behind which it was typed.
        options: For each part, its options and whether each is followed by a value.
    """
    name = token.partition("=")[0]
    spelled_out = [part for part, own in options.items() if name in own]
    attached = [part for part, own in options.items() if not token.startswith("--") and own.get(token[:2], False)]
    for homes in (spelled_out, attached):  # -pa is an option of that name before it is -p with the value a
        if present in homes:
            return [present]
        if homes:
            return homes
    return []


def _home(option: _TypedOption, typed: Iterable[str]) -> str:
    """Return the one typed part that an option belongs to."""
    homes = [part for part in option.homes if part in typed]
    if len(homes) != 1:
        raise _misplaced(option.tokens[0], option.present, option.homes)
    return homes[0]


def _misplaced(token: str, present: str, homes: Sequence[str]) -> click.UsageError:
    remedy = "type it behind the step that is meant" if len(homes) > 1 else "which is not typed"
    name = token.partition("=")[0]
    return click.UsageError(f"{present} has no option {name!r}: it belongs to {' and '.join(homes)}, {remedy}")


def quiet_libraries() -> None:
    """Keep third-party chatter, which no user can act on, away from the terminal."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    logging.getLogger("timm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of oddities in files that it reads all the same
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its own name for it: it sets its logger when imported

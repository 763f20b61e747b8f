"""An argument parser whose errors are one line, which names the nearest flag or choice, and checks ranges together."""

import argparse
import difflib
import math
from collections.abc import Callable, Sequence

from ..errors import fail


def choice(*options: str, aliases: dict[str, str] | None = None) -> Callable[[str], str]:
    """An argparse type: one of `options` (or an alias of one), and an error that names the nearest."""

    def parse(text: str) -> str:
        value = (aliases or {}).get(text, text)
        if value not in options:
            nearest = difflib.get_close_matches(
                text.lower(), [o.lower() for o in options], n=1, cutoff=0.4
            )
            hint = next((f"; did you mean {o!r}?" for o in options if [o.lower()] == nearest), "")
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(options)}{hint}")
        return value

    parse.metavar = "{" + ",".join(options) + "}"
    return parse


def number(
    kind: type, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: an int or a finite float in a range, which `Parser.range_problems` checks."""

    def parse(text: str) -> float:
        value = kind(text)
        if value != value:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number")
        return value

    def problem(value: float) -> str | None:
        if at_least <= value and above < value < below:
            return None
        if below < math.inf:
            return f"must be at least {at_least} and below {below}"
        if at_least == 0:
            return "must not be negative" if value < 0 else "must be finite"
        if at_least > -math.inf:
            return f"must be at least {at_least}"
        return "must be positive" if above == 0 else "must be finite"

    parse.__name__ = kind.__name__  # argparse's own message: invalid int value
    parse.problem = problem
    return parse


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which names the flag nearest to a mistyped one."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def format_usage(self) -> str:
        required = " ".join(f"{a.option_strings[0]} ..." if a.option_strings else a.metavar or a.dest
                            for a in self._actions if a.required)  # fmt: skip
        return f"usage: {self.prog} {required} [options]\n"

    def format_help(self) -> str:
        _, _, described = super().format_help().partition("\n\n")
        return f"{self.format_usage()}\n{described}"

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            nearest = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            self.error(
                f"unknown argument {unknown[0]}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )
        return parsed

    def given(self, args: Sequence[str] | None = None) -> set[str]:
        """Names of the arguments that stand on the command line, whatever their value."""
        bare = argparse.Namespace(**{action.dest: _NotGiven for action in self._actions})
        parsed, _ = self.parse_known_args(args, bare)
        return {name for name, value in vars(parsed).items() if value is not _NotGiven}

    def range_problems(self, args: argparse.Namespace) -> list[str]:
        """A line for each number that lies outside the range of its flag."""
        problems = []
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if (
                hasattr(action.type, "problem")
                and value is not None
                and (problem := action.type.problem(value))
            ):
                problems.append(f"--{action.dest} {problem}, got {value}")
        return problems

    def error(self, message: str):
        fail([message])


class _NotGiven:
    pass


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows choices, and defaults but where they say nothing (flags, None)."""

    def _get_default_metavar_for_optional(self, action):
        return getattr(action.type, "metavar", None) or super()._get_default_metavar_for_optional(
            action
        )

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"

"""An argument parser with one-line errors that name the nearest flag or choice."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence

from ..system.errors import fail, one_line_errors


def choice(*options: str) -> Callable[[str], str]:
    """An argparse type: one of `options`."""

    def parse(text: str) -> str:
        if text in options:
            return text
        lower = {option.lower(): option for option in options}
        nearest = difflib.get_close_matches(text.lower(), lower, n=1, cutoff=0.4)
        hint = f"; did you mean {lower[nearest[0]]!r}?" if nearest else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(options)}{hint}")

    return parse


def number(
    kind: type, *, at_least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> Callable[[str], float]:
    """An argparse type: an int or a finite float in a range."""
    limits = {"at least": at_least, "above": above, "below": below}
    bounds = " and ".join(f"{word} {x}" for word, x in limits.items() if math.isfinite(x))

    def parse(text: str) -> float:
        value = kind(text)
        if not (at_least <= value and above < value < below):
            raise argparse.ArgumentTypeError(f"must be {bounds or 'finite'}, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse then says: invalid int value
    return parse


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors that name the nearest flag.

    Flags may have dashes in place of underscores, as torch.distributed.launch writes them. A value
    without a type may be a path: a ~ at its start is the home folder, as in a shell.
    """

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.register("type", None, os.path.expanduser)

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """The arguments, and `given`: the names of those on the command line."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._unknown(unknown[0]))
        flags = {word.partition("=")[0] for word in self.words}
        actions = [action for flag, action in self._option_string_actions.items() if flag in flags]
        parsed.given = {action.dest for action in actions}
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        words = [self._with_underscores(word) for word in (sys.argv[1:] if args is None else args)]
        for word in words:  # the libraries write files with names in UTF-8 alone
            if word.encode(errors="ignore").decode() != word:
                self.error(f"{word} is not UTF-8: set PYTHONUTF8=1, or use another name")
        self.words = words
        return super().parse_known_args(words, namespace)

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        nearest = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        return f"unknown argument {word}" + (f"; did you mean {nearest[0]}?" if nearest else "")

    def _with_underscores(self, word: str) -> str:
        flag, equals, value = word.partition("=")
        known = flag[:2] + flag[2:].replace("-", "_")
        return known + equals + value if known in self._option_string_actions else word

    def print_help(self, file=None) -> None:
        with one_line_errors():
            super().print_help(file)

    def error(self, message: str):
        if message.startswith("the following arguments are required"):
            flags = (word for word in self.words if word.startswith("--"))
            known = self._option_string_actions
            misspelt = [flag for flag in flags if flag.partition("=")[0] not in known]
            message = self._unknown(misspelt[0]) if misspelt else message
        fail([message])


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the default of a flag, unless it is None or False, or stands in the help."""

    def _get_help_string(self, action):
        if action.required:
            return f"{action.help} (required)"
        default = action.default
        quiet = default in (None, argparse.SUPPRESS) or default is False  # 0 is shown
        quiet = quiet or "default: " in action.help
        return action.help if quiet else f"{action.help} (default: %(default)s)"

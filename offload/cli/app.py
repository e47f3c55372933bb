"""What every command shares: the settings of this run, the classes of commands and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import click

from offload.errors import CleanupError

_SENTENCE = 120  # characters


@dataclass(kw_only=True)
class Settings:
    """The global options. Filled while the command line is parsed."""

    config_path: Path | None = None
    json: bool = False
    debug: bool = False
    quiet: bool = False
    unclean: CleanupError | None = None  # what an earlier process left and could not be taken back


def settings_of(ctx: click.Context) -> Settings:
    """The settings of this run."""
    return ctx.ensure_object(Settings)


_ONE_VALUE = "Print one JSON object or array, and nothing else, on stdout."


def _json_option(what: str = _ONE_VALUE) -> click.Option:
    def remember(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        if value:
            settings_of(ctx).json = True

    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=remember,
        help=what,
    )


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


class Command(click.Command):
    """A command with `--json` and examples in its help. `json_help`: where it prints more than one
    value."""

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str] = (),
        json_help: str = _ONE_VALUE,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.params.append(_json_option(json_help))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are typed."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)

    def get_short_help_str(self, limit: int = 45) -> str:  # noqa: ARG002
        """The whole first sentence: the terminal wraps it."""
        return super().get_short_help_str(_SENTENCE)


class Group(click.Group):
    """A noun: a group of commands with `--json` before or behind the verb."""

    command_class = Command

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.params.append(_json_option())

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, as they are typed."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


class DefaultGroup(Group):
    """A group in which a first word that is no verb belongs to the verb `create`."""

    default_verb: ClassVar[str] = "create"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the verb in where it was left out."""
        at = next((i for i, word in enumerate(args) if word != "--json"), None)
        if (
            at is not None
            and args[at] not in self.commands
            and args[at] not in ctx.help_option_names
        ):
            args = [*args[:at], self.default_verb, *args[at:]]
        return super().parse_args(ctx, args)


@dataclass(frozen=True, slots=True)
class Lazy:
    """A command that is imported when it is used: `place` is "module:attribute"."""

    place: str
    help: str


class LazyGroup(Group):
    """The top group. Its help and its completion come from a table, without importing anything."""

    def __init__(self, *args: Any, table: dict[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """The names, in the order of the table."""
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of this name."""
        entry = self.table.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.place.partition(":")
        found: click.Command = getattr(import_module(module), attribute)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """From the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in self.table.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        """From the table, and the group's own options."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [
            CompletionItem(name, help=entry.help)
            for name, entry in self.table.items()
            if name.startswith(incomplete)
        ]

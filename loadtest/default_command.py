"""A group of commands of which one needn't be named."""

from typing import Any

from typer.core import TyperGroup

DEFAULT = "run"


class DefaultCommand(TyperGroup):
    """`group ARGUMENT` is `group run ARGUMENT`, unless ARGUMENT is the name of a command."""

    runs_alone = False
    """Whether `group` without arguments is `group run`, too, instead of help."""

    # Typer keeps the class of `ctx` private.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and self.runs_alone:
            args = [DEFAULT]
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

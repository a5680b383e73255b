"""Entry point: parse, run the verb, turn every failure into one line and an exit code."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
import warnings
from importlib import import_module
from types import FrameType
from typing import NoReturn

import click

import rt
from rt.cli.streams import abandon, check_written, open_streams, say
from rt.errors import RtError, nearest, printable

_VERBS = ("build", "run", "inspect", "verify", "bench", "doctor")
_OUT_OF_MEMORY, _INTERRUPTED = 5, 130


class _Verbs(click.Group):
    """Imports the file of a verb only when that verb is used, or when help lists them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        if cmd_name not in _VERBS:
            raise click.UsageError(
                f"there is no verb {cmd_name!r}{nearest(cmd_name, _VERBS)}; use one of {', '.join(_VERBS)}"
            )
        command: click.Command = import_module(f"rt.cli.{cmd_name}").command
        return command


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        # Both --batch-size and --batch_size, as users of diffusers' scripts type it.
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
@click.version_option(rt.__version__, prog_name="rt")
@click.option("-v", "--verbose", is_flag=True, help="Say what is done, and show tracebacks.")
@click.pass_context
def cli(ctx: click.Context, verbose: bool) -> None:
    """Compile latent-diffusion models and run them, sampling loop and all.

    \b
    rt build MODEL -o DIR      checkpoint to bundle
    rt run DIR --prompt TEXT   bundle to picture
    """
    logging.getLogger("rt").addHandler(_AboveTheBar())
    logging.getLogger("rt").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it says of a picture, it also raises
    if not (verbose or sys.warnoptions):
        warnings.simplefilter("ignore")  # Python's, for programmers
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


class _AboveTheBar(logging.Handler):
    """One line a record on stderr, which does not run into a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(printable(f"{record.levelname.lower()}: {record.getMessage()}"), file=sys.stderr)
        except OSError:
            abandon(sys.stderr)


def main() -> NoReturn:
    """Run the command line.

    Exit codes: 0 done, 1 failure, 2 usage, 3 bundle damaged or incompatible, 4 package or device missing,
    5 out of memory, 130 interrupted.
    """
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, _interrupt)
    sys.unraisablehook = _interrupt_again
    open_streams()
    try:
        code = cli.main(prog_name="rt", standalone_mode=False)
        check_written()
        sys.exit(code)
    except BrokenPipeError:  # as click does within a command
        abandon(sys.stdout)
        sys.exit(1)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except RtError as error:
        _fail(str(error), error.exit_code, error)
    except MemoryError as error:
        _fail("out of memory; build a smaller size or batch, or with --fp16 or --bf16", _OUT_OF_MEMORY, error)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", _INTERRUPTED)
    except OSError as error:  # of the system, not of rt: a full disk, a folder that went away
        if isinstance(error.__context__, KeyboardInterrupt):  # click says it on stderr, which is full
            _fail("interrupted", _INTERRUPTED)
        where = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{where}{error.strerror or error}", 1, error)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Let `kill` clean up as Ctrl-C does."""
    raise KeyboardInterrupt


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a destructor, and tracing runs thousands: a lost Ctrl-C comes back at once."""
    if unraisable.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int, error: BaseException | None = None) -> NoReturn:
    if error is not None and logging.getLogger("rt").isEnabledFor(logging.INFO):
        say(*"".join(traceback.format_exception(error)).splitlines())
    say(f"error: {message}")
    try:
        sys.stdout.flush()
    except OSError:
        abandon(sys.stdout)
    sys.exit(code)

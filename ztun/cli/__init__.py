"""The commands. `main` is the console entry: it turns every error into one line and an exit code.

0: done. 1: failed. 2: wrong usage or configuration. Imports are made inside the commands, so that `ztun status` does
not pay for what only `ztun up` needs.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from ztun.cli.streams import flush_stdout, forget_stdout
from ztun.errors import ConfigError, ZtunError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` (sys.argv[1:] by default). Returns the exit code; raises nothing."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        from ztun.cli.commands import application

        code = application(args=arguments, prog_name="ztun", standalone_mode=False)
        flush_stdout()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        forget_stdout()  # the reader (`| head`) had enough
        return 1
    except KeyboardInterrupt:
        return fail("interrupted", 1)
    except SystemExit as error:  # rich ends so when the reader of its output goes away
        return error.code if isinstance(error.code, int) else 0
    except BaseException as error:
        if _is_full(error):
            forget_stdout()  # what was not printed would fail once more at exit
        if _is_debug(arguments):
            import traceback

            traceback.print_exc()
        return fail(*_explain(error))


def fail(message: str, code: int) -> int:
    """Print the one line of an error (several lines are several errors). Returns `code`."""
    for line in message.splitlines() or [""]:
        print(f"ztun: {line}", file=sys.stderr, flush=True)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, ConfigError):
        return str(error), 2
    if isinstance(error, ZtunError):
        return str(error), 1
    if _is_full(error):
        return "cannot print: no space left on device", 1
    # typer carries click's exceptions under a name that differs between its versions; this method tells them.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _explain_usage(error), 2
    return f"unexpected {type(error).__name__}: {error}; run it with --log-level debug to see where".replace(
        "\n", " "
    ), 1


def _is_full(error: BaseException) -> bool:
    """Whether what we print to has no room: files that we open ourselves have a name."""
    return isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None


def _explain_usage(error: BaseException) -> str:
    message = str(error.format_message()).strip().rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "ztun"
    return f"{message}; see `{command} --help`".replace("\n", " ")


def _is_debug(arguments: Sequence[str]) -> bool:
    level = os.environ.get("ZTUN_LOG__LEVEL", "")
    for index, argument in enumerate(arguments):
        if argument == "--log-level":
            level = "".join(arguments[index + 1 : index + 2])
        elif argument.startswith("--log-level="):
            level = argument.partition("=")[2]
    return level.lower() == "debug"

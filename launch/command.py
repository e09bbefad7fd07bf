"""What every launcher shares: a compilation cache, one-line errors, exit codes.

A launcher ends with ``command.run(main)``. Errors a user can act on (bad input, a missing file, a full disk)
are printed as one line and end the process with code 1; ``--debug`` shows the traceback instead.
"""

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Of Ctrl-C while a launcher is still importing: no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _say_interrupted

DEBUG = flags.DEFINE_bool("debug", False, "Show the full traceback of an error.")

END_SECONDS = 5.0  # given to threads and processes to end by themselves after a time-out

# What bad input, bad files and a bad environment raise. Anything else is a fault of ours: its traceback is wanted.
USER_ERRORS = (ValueError, OSError, KeyError, AttributeError, TypeError, MemoryError, ImportError)


def cache_compilations() -> None:
    """Turns on JAX's persistent compilation cache, unless the environment already chose one."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mednext_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(default))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


# What an operating system says in one word, with its remedy: errno -> text after the path.
_PATH_ERRORS = {
    errno.ENOENT: "there is no such file or folder; check the path",
    errno.ENOTDIR: "part of this path is a file where a folder is needed; give another path, or move the file away",
    errno.EEXIST: "is a file where a folder is needed; give another path, or move the file away",
    errno.EISDIR: "is a folder where a file is needed; give the path of a file",
    errno.EACCES: "permission denied; give a path you may read and write, or change its permissions",
    errno.EPERM: "permission denied; give a path you may read and write, or change its permissions",
    errno.EROFS: "lies on a file system that cannot be written; give another path",
    errno.ENOSPC: "the disk is full; make room or give another path",
    errno.EFBIG: "more was to be written than is allowed to one file here; raise the limit or give another path",
    errno.EDQUOT: "your share of this disk is used up; make room or give another path",
    errno.ENAMETOOLONG: "is too long a name; give a shorter path",
}


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether JAX found too little memory on the device; JAX itself is not imported here."""
    return type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)


def one_line(error: BaseException) -> str:
    """The error as one line without control characters."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
        return _PATH_ERRORS[errno.ENOSPC]
    if isinstance(error, OSError) and error.errno in _PATH_ERRORS and error.filename:
        return f"{_asked_for(error.filename)}: {_PATH_ERRORS[error.errno]}"
    if ran_out_of_memory(error):
        found = re.search(r"allocating (\d+) bytes", str(error))
        wanted = f" ({int(found[1]) / 2**30:.3g} GiB were wanted at once)" if found else ""
        return (
            f"out of device memory{wanted}; take a smaller patch, batch or method, or let the backward pass compute "
            "more again (config.model.remat=block)"
        )
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    # ml_collections reads a config file when its first field is asked for.
    if absent := re.search(r"Failed loading config file.*No such file or directory: '(.*?)'", text, re.DOTALL):
        text = f"--config={absent[1]}: no such file; the configs are configs/*.py, some with :VARIANT after the name"
    return " ".join(text.split()) or type(error).__name__


def _asked_for(filename: Any) -> str:
    """The path that was to be written, if this is the temporary name of a file or directory on its way there."""
    name = re.sub(r"/\.([^/]+)\.\d+\.tmp$", r"/\1", os.fsdecode(filename))
    return re.sub(r"/\.([^/]+)\.(new|old)-\d+(/.*)?$", r"/\1", name).replace("/.unfinished/", "/")


def with_underscores(argv: Sequence[str]) -> list[str]:
    """``--check-only`` as ``--check_only``: people type dashes, absl knows flags by their Python names."""
    result = list(argv)
    for i, argument in enumerate(argv):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            result[i] = f"--{name.replace('-', '_')}{equals}{value}"
    return result


def _end_without_those_who_hang() -> None:
    """At its end Python waits for readers, and one that waits for a dead disk may never return."""

    def end() -> None:
        time.sleep(END_SECONDS)
        sys.stdout.flush()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def refuse_existing(output: str) -> None:
    """Raises FileExistsError if something is at ``output``: what an earlier command made is not replaced unasked."""
    path = Path(output)
    if path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(f"--output={output} exists already; move it away or give another place")


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Reads the command line; what is wrong with it is told in one line, exit code 1."""
    try:
        return flags.FLAGS(list(argv))
    except Exception as error:  # a config is a program, which can raise anything
        if any(argument == "--debug" for argument in argv):
            raise
        print(f"error: {' '.join(_told(error).split())}", file=sys.stderr)
        sys.exit(1)


def _told(error: Exception) -> str:
    """What is wrong with the command line, in our words where those of absl and ml_collections name no remedy."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, AttributeError):  # ml_collections, of a field that is not there
        cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
        name, _, rest = one_line(cause).partition(" Did you mean ")
        meant = f", did you mean {rest.split()[0]}?" if rest else ";"
        return f"the config has no field {name.rstrip('?')}{meant} configs/default.py lists them"
    if absent := re.match(r"flag --(\w+)=None: Flag --\1 must have a value other than None", text):
        help_text, _, _ = flags.FLAGS[absent[1]].help.partition(";\n")  # absl adds a line to that of a repeated flag
        return f"no --{absent[1]}: {help_text}"
    if wrong := re.match(r"flag --(\w+)=(.*?): \('(.*)', '.*'\)$", text):  # absl shows its error's arguments
        return f"--{wrong[1]}={wrong[2]}: {wrong[3]}"
    if "Traceback" in text:  # an error inside a config file: its last line says what
        return f"{text.splitlines()[0]} {text.splitlines()[-1]}"
    return text


def run(main: Callable[[Any], int | None], parse: Callable[[Sequence[str]], Any] = parse_flags) -> None:
    """Parses flags, calls ``main(what parse returned)`` and ends the process with its value (``None`` means 0).

    Args:
      parse: for commands with sub-commands; what it returns is no list then.
    """
    cache_compilations()
    logging.set_verbosity(logging.ERROR)  # libraries report every backend they try and every file they open

    def guarded(argv: Any) -> None:
        if isinstance(argv, list) and len(argv) > 1:
            print(f"error: unexpected argument {argv[1]!r}; flags are written --name=value", file=sys.stderr)
            sys.exit(1)
        try:
            sys.exit(main(argv) or 0)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except Exception as error:
            if isinstance(error, TimeoutError):
                _end_without_those_who_hang()
            if DEBUG.value or not (isinstance(error, USER_ERRORS) or ran_out_of_memory(error)):
                raise
            print(f"error: {one_line(error)}", file=sys.stderr)
            sys.exit(1)

    try:
        app.run(guarded, argv=with_underscores(sys.argv), flags_parser=parse)
    except SystemExit as end:  # absl calls being asked for help an error
        asked = {"--help", "-h", "--helpshort", "--helpfull"} & set(sys.argv)
        sys.exit(0 if asked and end.code == 1 else end.code)

"""Builds the C kernel with the system's compiler, once, into a folder of the user's own.

Nothing is built at import, and no compiler is required: `load` raises `BuildError`, with the
reason, wherever it does not work out. The file is keyed by processor, compiler, options and source,
so that a home shared by several machines, or another version, builds one of its own. It is written
whole under another name first, so processes that build at once do not disturb each other.

The folder is used only if nobody else can write to it or read from it: whoever can put a library
there runs code in this process. Without such a folder the library is built into a temporary one,
which this process alone uses and deletes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_quantize.c")

# No option that changes a result: see the head of the source.
_OPTIONS = (
    *("-x", "c", "-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"),
)

_LONGEST_BUILD = 60
"""Seconds after which a compiler is given up."""


class BuildError(Exception):
    """There is no C kernel here. Never reaches a user: torch's operations run instead."""


def load() -> tuple[ctypes.CDLL, str]:
    """The library, and how it was made, for people to read.

    Raises:
        BuildError: There is no compiler or no source, or building or loading it failed.
    """
    compiler = find_compiler()
    options = [*_OPTIONS, *_processor_options()]
    try:
        source = _SOURCE.read_bytes()
    except OSError as error:
        msg = f"{_SOURCE} cannot be read ({error})"
        raise BuildError(msg) from error
    key = "\0".join([*compiler, *options, platform.machine(), _processor()]).encode()
    name = f"fake_quantize-{hashlib.sha256(key + source).hexdigest()[:32]}.so"
    folder = private_folder(_cache())
    if folder is None:
        return _load_without_cache(compiler, options, source)
    file = folder / name
    if not _is_private(file):
        _build(compiler, options, source, file)
    return _loaded(file), f"built with {compiler[0]}, kept in {folder}"


def find_compiler() -> list[str]:
    """The command that runs the system's C compiler, or the one that Python was built with.

    Raises:
        BuildError: There is none, or this system is not one that the kernel is made for.
    """
    is_made_for = sys.platform == "linux" or (sys.platform, platform.machine()) == (
        "darwin",
        "arm64",
    )
    if not is_made_for:
        msg = f"the C kernel is made for Linux and for macOS on arm64, not for {sys.platform} "
        msg += f"on {platform.machine()}"
        raise BuildError(msg)
    for command in (["cc"], shlex.split(sysconfig.get_config_var("CC") or "")):
        program = shutil.which(command[0]) if command else None
        if program is not None:
            return [program, *command[1:]]
    msg = "no C compiler (cc) was found"
    raise BuildError(msg)


def private_folder(folder: Path) -> Path | None:
    """`folder`, made if it is not there; None if others can read it or put a file into it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            return None
        for parent in folder.resolve().parents:
            status = parent.stat()
            # Whoever may rename a folder on the way may put another one in its place.
            is_sticky = bool(status.st_mode & stat.S_ISVTX)
            if status.st_uid not in {0, os.getuid()}:
                return None
            if status.st_mode & stat.S_IWOTH and not is_sticky:
                return None
    except OSError:
        return None
    return folder


def _cache() -> Path:
    """Where programs of this user keep what can be made again, by the XDG specification."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    base = Path(root) if Path(root).is_absolute() else Path("~/.cache").expanduser()
    return base / "anyprec" / "kernels"


def _is_private(file: Path) -> bool:
    """Whether a file or folder is there, is this user's, and is closed to everybody else."""
    try:
        status = file.lstat()
    except FileNotFoundError:
        return False
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.getuid() and not status.st_mode & 0o077


def _processor() -> str:
    """What tells this processor from others that run the same programs, as far as is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = ("vendor_id", "model", "model name", "stepping", "flags", "cpu", "Features", "CPU part")
    described = {}
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() in told:
            described[field.strip()] = value.strip()
    return repr(sorted(described.items()))


def _processor_options() -> list[str]:
    """Options for the instructions of this very processor, where it is known which it is."""
    if not _processor():
        return []
    return ["-march=native" if platform.machine() in {"x86_64", "AMD64"} else "-mcpu=native"]


def _load_without_cache(
    compiler: list[str], options: list[str], source: bytes
) -> tuple[ctypes.CDLL, str]:
    try:
        with tempfile.TemporaryDirectory(prefix="anyprec-") as temporary:
            file = Path(temporary) / "fake_quantize.so"
            _build(compiler, options, source, file)
            # Once loaded, the file may go.
            return _loaded(file), f"built with {compiler[0]} for this process alone"
    except OSError as error:
        msg = f"there is no folder to build in ({error})"
        raise BuildError(msg) from error


def _build(compiler: list[str], options: list[str], source: bytes, file: Path) -> None:
    """Compile `source` to `file`, which is there as a whole or not at all."""
    try:
        handle, name = tempfile.mkstemp(dir=file.parent, prefix="building-")
        os.close(handle)
        temporary = Path(name)
        try:
            command = [*compiler, *options, "-o", name, "-", "-lm"]
            done = subprocess.run(  # noqa: S603 (the system's compiler, on our own source)
                command, input=source, capture_output=True, timeout=_LONGEST_BUILD, check=False
            )
            if done.returncode != 0:
                message = done.stderr.decode(errors="replace").strip()
                msg = f"{compiler[0]} failed (status {done.returncode}): {message[:500]}"
                raise BuildError(msg)
            temporary.chmod(0o700)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, subprocess.SubprocessError) as error:
        msg = f"the C kernel could not be built with {compiler[0]} ({error})"
        raise BuildError(msg) from error


def _loaded(file: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        msg = f"the C kernel was built, but cannot be loaded ({error})"
        raise BuildError(msg) from error

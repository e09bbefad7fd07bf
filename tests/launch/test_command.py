"""What every launcher tells of an error: one line with the path and the remedy."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mednext_jax.train import devices

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "launch"))
import command  # noqa: E402
import processes  # noqa: E402


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOENT, "no such file or folder; check the path"),
        (errno.EACCES, "permission denied; give a path you may read and write"),
        (errno.EROFS, "cannot be written; give another path"),
        (errno.ENOSPC, "the disk is full; make room"),
        (errno.ENOTDIR, "a file where a folder is needed; give another path"),
        (errno.EEXIST, "a file where a folder is needed; give another path"),
        (errno.EISDIR, "a folder where a file is needed"),
    ],
)
def test_errors_of_the_system_name_the_path_and_the_remedy(number, remedy):
    line = command.one_line(OSError(number, os.strerror(number), "/data/out"))
    assert line.startswith("/data/out: ") and remedy in line and "Errno" not in line


def test_temporary_names_are_told_as_the_path_that_was_asked_for():
    for name in ("/out/.model.json.4711.tmp", "/out/.model.json.new-4711", "/out/.model.json.old-4711/inside.json"):
        assert command.one_line(OSError(errno.EROFS, "", name)).startswith("/out/model.json: lies on")


def test_memory_of_the_device_that_ran_out_is_told_with_a_remedy():
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes.\n at ...")
    assert command.ran_out_of_memory(error)
    assert command.one_line(error).startswith("out of device memory (2 GiB were wanted at once); take a smaller patch")
    assert not command.ran_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a fault of ours"))


def test_our_own_errors_stay_as_they_are():
    assert command.one_line(FileExistsError("runs/a: is no model\n directory")) == "runs/a: is no model directory"
    assert command.one_line(KeyError("peak_lr")) == "peak_lr"
    assert command.one_line(MemoryError()) == "MemoryError"


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_below_a_file_is_such_an_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError) as error:
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
    assert "a file where a folder is needed" in command.one_line(error.value)


@pytest.mark.parametrize("error", [
    SystemError("in a config"), RecursionError("in a config"), IndexError("in a config"), AssertionError("in a config"),
    ValueError("Traceback of a config file:\n  File x\nNameError: in a config"), KeyboardInterrupt,
], ids=repr)  # fmt: skip
def test_whatever_a_config_raises_is_one_line(error, monkeypatch, capsys):
    def read(argv):
        raise error

    monkeypatch.setattr(command.flags, "FLAGS", read)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else SystemExit) as end:
        command.parse_flags(["train.py", "--config=x.py"])
    if error is not KeyboardInterrupt:
        assert end.value.code == 1
        shown = capsys.readouterr().err
        assert shown.startswith("error: ") and shown.endswith("in a config\n") and shown.count("\n") == 1


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("error, told", [
    (jax.errors.JaxRuntimeError("INTERNAL: Barrier failed: UNAVAILABLE: Task 1 heartbeat timeout"), False),
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), False),
    (caused_by(TimeoutError("Timed out while waiting for async_commit_complete barrier."), jax.errors.JaxRuntimeError(
        "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout")), False),
    (TimeoutError("Timed out while waiting for a disk"), True),
    (ValueError("a fault of ours"), True), (OSError(errno.ENOSPC, "no room"), True), (None, True),
], ids=repr)  # fmt: skip
def test_traceback_of_a_thread_is_dropped_only_where_another_process_was_lost(error, told):
    exc_info = (type(error), error, None) if error else None
    record = logging.LogRecord("absl", logging.ERROR, "async_checkpointer.py", 264, "failed", (), exc_info)
    assert processes._is_news(record) is told


@pytest.mark.parametrize("arguments, told", [
    (("launch/train.py", "--config=configs/pefft.py", "--dry_run"), "error: --config=configs/pefft.py: no such file; "),
    (("launch/train.py", "--config=configs/peft.py", "--config.peft.metod=lora"),
     'error: the config has no field \'metod\', did you mean "method"? configs/default.py lists them'),
    (("launch/train.py", "--config=configs/peft.py", "--config.xyz=1"),
     "error: the config has no field 'xyz'; configs/default.py lists them"),
    (("launch/predict.py", "--model=a", "--input=b"), "error: no --output: Folder for the label maps."),
    (("launch/evaluate.py", "--references=a", "--output=b"), "error: no --predictions: DIR or NAME=DIR; repeat it to"),
    (("launch/predict.py", "--flips=maybe"), "error: --flips=maybe: Non-boolean argument to boolean flag\n"),
    (("launch/train.py", "--config=configs/study.py:demo", "--workdir=x"),
     "error: the config has no field 'augment': it is none for launch/train.py"),
], ids=str)  # fmt: skip
def test_a_wrong_command_line_is_told_in_our_words(arguments, told):
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(told) and done.stderr.count("\n") == 1


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for free in ("empty", "new"):
        command.refuse_existing(str(tmp_path / free))
    for taken in ("folder", "file", "link"):
        with pytest.raises(FileExistsError, match=f"{taken} exists already"):
            command.refuse_existing(str(tmp_path / taken))


def test_a_full_disk_without_a_name_is_told_with_its_remedy():
    assert "the disk is full; make room" in command.one_line(OSError(errno.ENOSPC, "No space left on device"))


def test_a_number_of_processes_without_the_first_ones_address_is_refused():
    for given in ((2, -1), (0, 0), (2, 1)):
        with pytest.raises(ValueError, match="need --coordinator=HOST:PORT"):
            devices.join_processes("", *given)


def test_compiled_programs_are_kept_unless_the_environment_says_where(tmp_path):
    script = (
        "import command\n"
        "def main(_):\n"
        "  import jax\n"
        "  print(jax.config.jax_compilation_cache_dir)\n"
        "command.run(main)"
    )
    own = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    for more, folder in (({}, tmp_path / "mednext_jax/xla"), ({"JAX_COMPILATION_CACHE_DIR": "/x"}, "/x")):
        environment = {**own, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "launch"), **more}
        told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert told.stdout == f"{folder}\n"

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]

WITH_A_WORKER_THAT_STOPS = """
import os, signal, sys
sys.path.insert(0, "launch")

def work(item):
    if item == "hangs":
        print(os.getpid(), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)

if __name__ == "__main__":
    import command
    from data_pipeline import parallel

    parallel.ITEM_SECONDS = 4.0
    command.run(lambda _: parallel.run(work, ["well", "hangs", "well too"], workers=2, title="preprocess"))
"""


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0]


def test_worker_that_hangs_ends_in_a_time_out_and_is_killed(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(WITH_A_WORKER_THAT_STOPS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, cwd=ROOT, capture_output=True, text=True,
                          timeout=90)  # fmt: skip
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: preprocess: no case was done within 4 s; check the disk"), done  # fmt: skip
    assert "Traceback" not in done.stderr
    for _ in range(100):
        if not alive(int(done.stdout)):
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {done.stdout} is still there")

"Paths, and a way to run the command line as a user would, in a process of its own."
import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# the same examples in every run, whichever files are collected
with contextlib.suppress(ImportError):
    from hypothesis import settings

    settings.register_profile("course", deadline=None, max_examples=60, derandomize=True)
    settings.load_profile("course")

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SMALL = [
    "--config", "quickstart", "--report", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.limit_train_batches", "4",
    "--trainer.limit_val_batches", "2", "--model.embed_dim", "16", "--model.depth", "1",
    "--model.num_heads", "2", "--model.dropout", "0.1", "--data.augment", "true",
    "--trainer.precision", "32-true",
]
MAIN = "from vit_course.cli import main; main()"


class CommandLine:
    "Runs `vit-course` in a folder of its own."

    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, *args, code: str = MAIN) -> subprocess.Popen:
        # one thread: on few cores a second costs more than it brings, and the sums stay the same
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-u", "-c", code, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        if os.name == "posix":
            # started from a script in the background, a process would not hear SIGINT
            pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, cwd=self.folder, env=environment, **pipes)

    def __call__(self, *args, code: str | None = None, fails: bool = False) -> str:
        process = self.start(*args, **({"code": code} if code else {}))
        output = process.communicate(timeout=300)[0]
        assert (process.returncode != 0) == fails, output
        return output


@pytest.fixture
def command_line(tmp_path):
    return CommandLine(tmp_path)


def transformers():
    "Hugging Face's library, where it works with the torch that is here; else a skip."
    library = pytest.importorskip("transformers")
    if not library.utils.is_torch_available():
        pytest.skip(f"transformers {library.__version__} asks for a newer torch")
    return library


@pytest.fixture(scope="session")
def browser():
    "Chromium, driven by Playwright; a clear skip where there is none."
    if BROWSER is None:
        pytest.skip("no Chromium here: apt install chromium, to look at every page in it")
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()

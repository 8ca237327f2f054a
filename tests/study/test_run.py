"""Running a study: what is skipped, resumed, listed and refused. The cells run a stub instead of ``sanm fit``."""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from sanm_lightning.study import run
from sanm_lightning.study.cells import cells_of
from sanm_lightning.study.launch import Launch, last_line
from sanm_lightning.study.progress import Progressed
from sanm_lightning.study.record import Record
from sanm_lightning.study.schema import read_study
from sanm_lightning.study.state import State, is_locked, read_state, write_state
from tests.study.conftest import OPEN_LOGS

pytestmark = OPEN_LOGS
DEBUG = ("--out", "out", "--executor", "debug")


def calls(folder: str) -> list[list[str]]:
    """The commands that were run in a cell of the study in ``out``."""
    path = Path("out", folder, "calls.txt")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def submitit():
    return pytest.importorskip("submitit")


@pytest.mark.usefixtures("stubbed", "submitit")
class TestStudy:
    def test_runs_each_cell_once_and_skips_finished_cells(self, write, typed):
        study = write(seeds=[1])
        status, said = typed("study", study, *DEBUG)
        assert status == 0
        assert "4 finished" in said and said.endswith("next: sanm table out\n")
        folders = [path.parent for path in Path("out").rglob("calls.txt")]
        assert len(folders) == 4
        status, said = typed("study", study, *DEBUG)
        assert status == 0 and "starts" not in said
        assert all(len((folder / "calls.txt").read_text().splitlines()) == 1 for folder in folders)

    def test_a_failed_cell_does_not_stop_the_others_and_is_listed_with_its_reason(self, write, typed):
        study = write(method_options={"elr": {"model.kind": "fails"}}, seeds=[1])
        status, said = typed("study", study, *DEBUG)
        assert status == 1
        assert "2 failed, 2 finished" in said
        assert "failed: out/elr/base/cifar10/sym50/seed1: expected more memory, got none; buy some" in said
        assert read_state(Path("out/cross_entropy/sanm/cifar10/sym50/seed1")) == State("finished", attempts=1)

    def test_a_failed_cell_is_tried_again_from_its_checkpoint(self, write, typed):
        study = write(method_options={"elr": {"model.kind": "fails once"}}, seeds=[1], sanm=["base"])
        assert typed("study", study, *DEBUG)[0] == 1
        status, said = typed("study", study, *DEBUG)
        assert status == 0 and "resumes: elr/base/cifar10/sym50/seed1" in said
        first, second = calls("elr/base/cifar10/sym50/seed1")
        assert "--ckpt_path" not in first
        assert second == [*first, "--ckpt_path", "last"]

    def test_a_cell_waits_for_its_pretraining_and_is_not_run_if_that_fails(self, write, typed):
        keys = {"methods": ["c2d"], "sanm": ["base"], "seeds": [1], "pretraining": {"c2d": "simclr"}}
        study = write(**keys, method_options={"simclr": {"model.kind": "fails once"}})
        status, said = typed("study", study, *DEBUG, "--jobs", "2")
        assert status == 1
        assert "failed: out/c2d/base/cifar10/sym50/seed1: simclr/base/cifar10/none/seed1 did not finish" in said
        assert calls("c2d/base/cifar10/sym50/seed1") == []
        status, said = typed("study", study, *DEBUG, "--jobs", "2")
        assert status == 0
        (words,) = calls("c2d/base/cifar10/sym50/seed1")
        assert Path(words[words.index("--model.pretrained") + 1]).is_file()

    def test_cells_that_are_added_are_run_and_those_that_are_removed_are_kept(self, write, typed):
        typed("study", write(methods=["elr"], seeds=[1]), *DEBUG)
        status, said = typed("study", write(methods=["elr"], seeds=[2]), *DEBUG)
        assert status == 0 and said.count("starts") == 2
        assert [(cell.sanm, cell.seed) for cell in Record("out").read()[2]] == [
            ("base", 2),
            ("sanm", 2),
            ("base", 1),
            ("sanm", 1),
        ]

    def test_a_dry_run_prints_commands_and_cost_and_writes_nothing(self, write, typed):
        status, said = typed("study", write(methods=["cross_entropy"]), "--out", "out", "--dry-run")
        assert status == 0
        assert not Path("out").exists()
        lines = said.splitlines()
        assert lines[0] == "cross_entropy/base/cifar10/sym50/seed1: not run, 1.5e+05 forward passes"
        assert lines[1].startswith(
            "  sanm fit --config configs/method/cross_entropy.yaml --config configs/data/cifar10.yaml"
        )
        assert lines[4] == "cross_entropy/sanm/cifar10/sym50/seed1: not run, 3e+05 forward passes"
        assert lines[-1] == "4 cells, 9e+05 forward passes of one image"


@pytest.mark.usefixtures("stubbed", "submitit")
class TestRefused:
    def test_a_study_that_changed_after_its_cells_were_run(self, write, typed):
        typed("study", write(methods=["elr"], seeds=[1]), *DEBUG)
        before = Path("out/cells.json").read_text()
        changed = r"base/cifar10/sym50/seed1 was run, got other settings \(trainer.max_epochs 4 instead of 3\); choose another"
        with pytest.raises(ValueError, match=changed):
            typed("study", write(options={"trainer.max_epochs": 4}), *DEBUG)
        assert Path("out/cells.json").read_text() == before
        assert len(calls("elr/base/cifar10/sym50/seed1")) == 1

    def test_but_a_study_may_change_before_its_cells_are_run(self, write):
        record = Record("out")
        before, now = (cells_of(read_study(write(options={"trainer.max_epochs": epochs}))) for epochs in (3, 4))
        record.write("own", None, before)
        assert record.with_earlier("own", now) == now

    def test_the_folder_of_another_study(self, write, typed, tmp_path):
        Record("out").write("own", None, [])
        other = Path(write()).rename(tmp_path / "other.yaml")
        with pytest.raises(
            ValueError, match="expected the folder of the study 'other', got that of 'own' in 'out'; choose"
        ):
            typed("study", str(other), *DEBUG)

    def test_a_folder_below_a_file(self, write, typed):
        Path("notes.txt").touch()
        with pytest.raises(
            NotADirectoryError, match=r"expected a folder for the run in 'notes\.txt/own', got the file"
        ):
            typed("study", write(), "--executor", "local", "--out", "notes.txt/own")

    def test_a_folder_with_other_contents(self, write, typed):
        Path("out").mkdir()
        Path("out/thesis.txt").touch()
        with pytest.raises(
            FileExistsError, match="expected a new folder or that of a study, got 'out' with other contents"
        ):
            typed("study", write(), *DEBUG)
        assert [path.name for path in Path("out").iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(("name", "value"), [("slurm_partion", "gpu"), ("timeout_min", "0.5")])
    def test_unknown_parameters_of_submitit(self, write, typed, name, value):
        sentence = rf"expected parameters of submitit under --slurm, got {name} \([^\n]+\); see the documentation"
        with pytest.raises(ValueError, match=sentence):
            typed("study", write(), *DEBUG, f"--slurm.{name}", value)
        assert not Path("out/cells.json").exists()

    def test_slurm_where_there_is_none(self, write, typed, monkeypatch):
        monkeypatch.setenv("PATH", "")
        with pytest.raises(ValueError, match=r"expected the executor slurm, got .* use --executor local"):
            typed("study", write(), "--out", "out", "--executor", "slurm")

    def test_a_table_of_published_values_that_does_not_exist(self, write, typed):
        with pytest.raises(ValueError, match="expected a table of published values, got 'table1'; choose one of"):
            typed("study", write(published="table1"), *DEBUG)

    def test_no_jobs(self, write, typed):
        with pytest.raises(
            ValueError, match="expected 1 or more jobs and threads, got 0 and None; choose larger numbers"
        ):
            typed("study", write(), *DEBUG, "--jobs", "0")


def test_an_environment_without_submitit(write, typed, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r"expected submitit for a study, got .*; install the extra 'study'"):
        typed("study", write(), "--out", "out")
    assert not Path("out").exists()


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def interrupt(request):
    """What this process does on SIGINT; a shell lets its background processes ignore it."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("stubbed", "submitit", "interrupt")
def test_ctrl_c_ends_running_cells_and_the_next_study_resumes_them(write, monkeypatch):
    """With submitit's local executor, two cells at once."""
    study = read_study(
        write(methods=["elr"], sanm=["base"], options={"trainer.max_epochs": 3, "model.kind": "sleeps once"})
    )
    cells, record, console = cells_of(study), Record("out"), Console(quiet=True)
    record.write(study.name, None, cells)
    folders = [record.folder(cell) for cell in cells]
    stop = time.monotonic() + 60

    def pause(seconds: float) -> None:
        os.sched_yield()
        if all((folder / "checkpoints" / "last.ckpt").exists() for folder in folders):
            raise KeyboardInterrupt
        assert time.monotonic() < stop

    executor = run.submitit_executor("local", Path("out/jobs"), {})
    with monkeypatch.context() as patch:
        patch.setitem(run.WAIT, "local", 0.05)
        patch.setattr(run, "_pause", pause)
        with pytest.raises(KeyboardInterrupt):
            run.run_cells(record, cells, executor, "local", 2, console)
    assert not any(map(is_locked, folders)), "a cell still runs"
    assert {record.state(cell).state for cell in cells} == {"interrupted"}
    states = run.run_cells(record, cells, executor, "local", 2, console)
    assert set(states.values()) == {State("finished", attempts=2)}
    for folder in folders:
        first, second = [json.loads(line) for line in (folder / "calls.txt").read_text().splitlines()]
        assert second == [*first, "--ckpt_path", "last"]


def test_a_cell_that_another_study_starts_meanwhile_is_awaited(write):
    """The other study takes the lock between the submission of the job and its start."""
    keys = {"methods": ["c2d"], "sanm": ["base"], "seeds": [1], "pretraining": {"c2d": "simclr"}}
    cells = cells_of(read_study(write(**keys)))
    record, locks = Record("out"), []
    record.write("own", None, cells)

    class Job:
        def __init__(self, call: Launch) -> None:
            folder = Path(call.folder)
            if not locks:
                folder.mkdir(parents=True)
                locks.append((folder / "lock").open("a"))
                fcntl.flock(locks[0], fcntl.LOCK_EX)
                write_state(folder, State("running", attempts=1))
                assert call() == "running"
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_state(folder, State("finished", attempts=1))

        def done(self) -> bool:
            return True

    class Executor:
        submit = staticmethod(Job)

    queue = run._Queue(record, cells, Executor(), "local", 1, Console(quiet=True), 1)
    for _ in range(3):
        assert queue.step()
    assert queue.states[cells[0].folder].state == "running" and not queue.jobs
    write_state(record.folder(cells[0]), State("finished", attempts=1))
    locks[0].close()
    while queue.step():
        pass
    assert [state.state for state in queue.states.values()] == ["finished", "finished"]


class TestLaunch:
    def launch(self, folder: Path, *command: str) -> Launch:
        return Launch((sys.executable,), str(folder), command, str(Path.cwd()), {"WORD": "said"})

    def test_runs_in_its_environment_and_writes_log_and_state(self, tmp_path):
        folder = tmp_path / "run"
        assert self.launch(folder, "-c", "import os; print(os.environ['WORD'])")() == "finished"
        assert (folder / "log.txt").read_text() == "said\n"
        assert read_state(folder) == State("finished", attempts=1)

    def test_a_killed_process_is_interrupted_not_failed(self, tmp_path):
        assert self.launch(tmp_path, "-c", "import os; os.kill(os.getpid(), 9)")() == "interrupted"
        assert read_state(tmp_path) == State("interrupted", "killed by signal 9", 1)

    def test_a_cell_that_another_process_runs_is_left_alone(self, tmp_path):
        with (tmp_path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert self.launch(tmp_path, "-c", "print(1)")() == "running"
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        assert self.launch(tmp_path, "-c", "print(1)")() == "finished"

    def test_the_process_inherits_the_lock(self, tmp_path):
        """So that a cell whose starting process was killed stays locked while its own process runs."""
        look = "import os; print([os.path.realpath(f'/proc/self/fd/{name}') for name in os.listdir('/proc/self/fd')])"
        assert self.launch(tmp_path, "-c", look)() == "finished"
        assert repr(str(tmp_path / "lock")) in (tmp_path / "log.txt").read_text()

    def test_a_state_of_a_dead_process_is_interrupted(self, tmp_path):
        write_state(tmp_path, State("running", attempts=2))
        assert read_state(tmp_path) == State("interrupted", "the process was killed", 2)

    @pytest.mark.parametrize(
        ("log", "reason"),
        [
            (
                "Seed set to 1\nsanm: expected a, got b; do c\n(SANM_TRACEBACK=1 shows where)\n",
                "expected a, got b; do c",
            ),
            ("Traceback (most recent call last):\n  File\n\x1b[31mMemoryError: full\x1b[0m\n\n", "MemoryError: full"),
            ("", "no output"),
        ],
    )
    def test_the_reason_is_the_last_line_of_the_error(self, tmp_path, log, reason):
        (tmp_path / "log.txt").write_text(log)
        assert last_line(tmp_path / "log.txt") == reason


def test_the_time_left_is_that_of_like_cells(write):
    cells, record = (
        cells_of(read_study(write(methods=["elr"]))),
        Record("out"),
    )  # base and sanm, two seeds, three epochs each
    states = {cell.folder: State() for cell in cells}
    assert Progressed.of(record, cells, states, 1).left == ""
    for cell, epochs, seconds in ((cells[0], 3, 30.0), (cells[2], 1, 40.0)):
        record.folder(cell).mkdir(parents=True)
        (record.folder(cell) / "results.json").write_text(json.dumps({"epochs": epochs, "seconds": seconds}))
    states |= {cells[0].folder: State("finished"), cells[2].folder: State("running")}
    seen = Progressed.of(record, cells, states, 2)
    assert (seen.done, seen.total) == (3 * 10 + 40, 2 * 3 * 10 + 2 * 3 * 40)
    assert seen.left == "left 0:01:55"  # (30 + 200) s of work by two
    assert seen.text(1) == "1 of 4 finished, 1 running"

"""Tests of a run without a GPU: time limits, processes that die, records that survive, and a dry run of every stage."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import records
import run
import stages
from processes import Stage

pytestmark = [
    pytest.mark.own_backend,
    pytest.mark.filterwarnings("ignore:os.fork"),  # of JAX, where other tests of the process have imported it
]
HERE = Path(__file__).parent


def python(text):
    return [sys.executable, "-c", text]


def is_alive(number):
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_until(condition):
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def small_run(tmp_path):
    def make(seconds=60):
        return run.Run(tmp_path / "out", tmp_path / "work", tmp_path / "bundle", seconds)

    return make


def ends_of(folder):
    return {x["stage"]: x for x in records.read(folder / "records.jsonl") if x["kind"] == "stage"}


SLEEPS = "import os; child = os.spawnlp(os.P_NOWAIT, 'sleep', 'sleep', '60'); print(child, flush=True); os.wait()"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stage_over_its_limit_is_ended_with_its_children_and_the_next_one_runs(small_run, tmp_path):
    one = small_run()
    begun = time.monotonic()
    failed = one.all([[Stage("slow", "", python(SLEEPS), 2)], [Stage("next", "", python("print('here')"), 20)]])
    assert time.monotonic() - begun < 50  # and not the sleep
    ends = ends_of(tmp_path / "out")
    assert (failed, ends["slow"]["state"], ends["next"]["state"]) == (1, "cut at its limit", "passed")
    assert not is_alive(int(ends["slow"]["tail"][0]))
    assert "| slow | cut at its limit |" in (tmp_path / "out" / "summary.md").read_text()


def test_a_stage_that_fails_says_how_and_what_tools_say_is_kept(small_run, tmp_path):
    says = python("import sys; print('========= ERROR SUMMARY: 3 errors'); print('other'); sys.exit(9)")
    memcheck = Stage("memcheck", "bounds", says, 20, keeps=stages.FOUND.search)
    missing = Stage("missing", "", ["no-such-program-anywhere"], 20)
    assert small_run().all([[memcheck, missing]]) == 2
    ends = ends_of(tmp_path / "out")
    assert ends["memcheck"]["state"] == "failed (9)"
    assert ends["memcheck"]["kept"] == ["========= ERROR SUMMARY: 3 errors"]
    assert ends["memcheck"]["tail"][-1] == "other"
    assert ends["missing"]["state"] == "cannot start"
    assert "[memcheck] other" in (tmp_path / "out" / "log.txt").read_text()


def test_no_stage_begins_when_the_time_is_over(small_run, tmp_path):
    assert small_run(seconds=10).all([[Stage("late", "", python("print('begun')"), 60)]]) == 1
    assert ends_of(tmp_path / "out")["late"]["state"] == "no time was left"
    assert "begun" not in (tmp_path / "out" / "log.txt").read_text()


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
import run
from processes import Stage
out = Path({out!r})
stage = "import os, time; from records import record; record('fact', name='found', value=os.getpid()); time.sleep(60)"
run.Run(out, out / "work", out, 100).all([[Stage("killed", "", [sys.executable, "-c", stage], 90)]])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends the stage of a run that was killed")
def test_what_was_found_survives_when_the_run_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", DRIVER.format(here=str(HERE), out=str(tmp_path))])
    try:
        assert wait_until(lambda: len(records.read(tmp_path / "records.jsonl")) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    begin, found = records.read(tmp_path / "records.jsonl")
    assert (begin["kind"], begin["stage"]) == ("begin", "killed")
    assert (found["stage"], found["name"]) == ("killed", "found")
    assert "[killed] $ " in (tmp_path / "log.txt").read_text()
    assert wait_until(lambda: not is_alive(found["value"]))


def test_half_a_line_is_not_read(tmp_path):
    file = tmp_path / "records.jsonl"
    records.append(file, "fact", "facts", name="python")
    with file.open("a") as stream:
        stream.write('{"kind": "fa')
    assert [x["name"] for x in records.read(file)] == ["python"]


STEPS = """
import os, sys
sys.path.insert(0, {here!r})
import turns
from records import record
from turns import Step

def raises(error):
    raise error

steps = [
    Step("call", {{"call": "lost"}}, lambda: raises(RuntimeError("an illegal memory access was encountered"))),
    Step("call", {{"call": "ends"}}, lambda: os._exit(5)),
    Step("call", {{"call": "wrong"}}, lambda: raises(ValueError("a shape"))),
    Step("call", {{"call": "right"}}, lambda: record("call", call="right", ok=True, said=os.getpid())),
    Step("call", {{"call": "last"}}, lambda: os.kill(os.getpid(), 9)),
]
sys.exit(turns.main(lambda: steps))
"""


def run_script(tmp_path, text, *options):
    script, file = tmp_path / "steps.py", tmp_path / "records.jsonl"
    script.write_text(text.format(here=str(HERE)))
    own = {**os.environ, "GPU_RECORDS": str(file), "GPU_STAGE": "smoke"}
    done = subprocess.run([sys.executable, str(script), *options], env=own, capture_output=True, text=True)
    return done, records.read(file)


def test_a_process_that_dies_or_loses_its_context_is_one_line_and_the_next_step_is_done(tmp_path):
    done, found = run_script(tmp_path, STEPS)
    assert done.returncode == 3, done.stderr
    assert [(x["call"], x["ok"]) for x in found] == [
        *(("lost", False), ("ends", False), ("wrong", False), ("right", True), ("last", False)),
    ]
    assert "illegal memory access" in found[0]["said"]
    assert found[1]["said"] == "the process ended with 5"
    assert found[4]["said"] == "the process ended with -9"


def test_a_process_that_comes_to_no_step_is_not_started_again(tmp_path):
    done, found = run_script(tmp_path, "import sys; sys.path.insert(0, {here!r})\nimport turns\nturns.main(sys.exit)\n")
    assert (done.returncode, found) == (0, [])
    broken = "import sys; sys.path.insert(0, {here!r})\nimport turns\nsys.exit(turns.main(lambda: 1 / 0))\n"
    done, found = run_script(tmp_path, broken)
    assert (done.returncode, [x["kind"] for x in found]) == (1, ["died"])


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("cudaErrorIllegalAddress: an illegal memory access was encountered", True),
        ("CUDA error: unspecified launch failure", True),
        ("OutOfMemoryError: CUDA out of memory", False),
        ("relative error 0.1", False),
    ],
)
def test_which_errors_take_the_context(text, lost):
    assert records.context_is_lost(text) is lost


TESTS = """
def test_first():
    raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")

def test_second():
    pass

def test_third():
    assert 1 == 2, "it differs"
"""


def test_the_suite_goes_on_after_a_lost_context(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    outer = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_XDIST")}  # of this run's workers
    own = {**outer, "PYTHONPATH": paths, "GPU_RECORDS": str(tmp_path / "records.jsonl"), "GPU_STAGE": "forward"}
    if importlib.util.find_spec("pytest_timeout") is None:  # starting other processes takes the most time here
        own |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
    command = stages._pytest(1, "test_some.py", "-c", "pytest.ini")
    subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, timeout=100)
    found = records.read(tmp_path / "records.jsonl")
    lost = [x["test"] for x in found if x["kind"] == "lost context"]
    rest = {x["test"].partition("::")[2]: x["outcome"] for x in found if x["kind"] == "test"}
    (first,) = [x["said"] for x in found if x["kind"] == "test" and x["test"].endswith("test_first")]
    assert "crashed" in first  # the process must have ended; later tests did not just happen to pass
    assert lost == ["test_some.py::test_first"]
    assert (rest["test_second"], rest["test_third"]) == ("passed", "failed")


def test_the_calls_of_the_readme_name_stages_that_there_are():
    plan = stages.groups(stages.Settings())
    names = [stage.name for group in plan for stage in group]
    assert len(names) == len(set(names))
    text = (HERE / "README.md").read_text()
    given = re.findall(r"--stages ([\w,-]+)", text)
    assert len(given) == 2
    for each in given:
        assert [x.name for group in run.chosen(plan, each) for x in group] == each.split(",")
    assert all(f"`{name}`" in text for name in names)
    with pytest.raises(SystemExit, match="--stages has 'warm'; accepted: facts, compile"):
        run.chosen(plan, "facts,warm")


@pytest.mark.slow
def test_every_stage_starts_and_ends_without_a_gpu(tmp_path):
    command = [sys.executable, str(HERE / "run.py"), "--dry", "--jobs", "2", "--seconds", "900"]
    command += ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--bundle", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    plan = stages.groups(stages.Settings())
    states = {name: x["state"] for name, x in ends_of(tmp_path).items()}
    assert states == {stage.name: "passed" for group in plan for stage in group}, done.stdout[-3000:]
    kinds = {x["kind"] for x in records.read(tmp_path / "records.jsonl")}
    assert {"fact", "compiled", "call", "probe", "long sum", "streams", "time", "calls", "test", "peer"} <= kinds

"""The launch scripts: the commands they give, how they go on after a preemption, and what they refuse."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

PROJECT = Path(__file__).parents[1]
QUEUED = ("--name=run", "--topology=v5p:2x2x2", "--project=p", "--zone=z", "--poll=0", "--backoff=0")
GKE = ("--name=run", "--cluster=pod", "--topology=v5p:4x8x8", "--slices=2", "--project=p", "--zone=z", "--poll=0")
AWKWARD = ["--config.model.latent_shape=(12, 12)", """--note='it's "so"' $HOME"""]

# Answers as gcloud, xpk and kubectl do, and writes down what it was asked. A worker is a home directory, in which the
# commands that are sent by ssh really run.
STAND_IN = """#!{python} -IS
import json, os, shutil, subprocess, sys
from pathlib import Path
world = Path(os.environ["WORLD"])
tool, words = Path(sys.argv[0]).name, sys.argv[1:]
with open(world / "calls.jsonl", "a") as calls:
    calls.write(json.dumps([tool, *words]) + "\\n")
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
state, verb = world / "state", words[3] if words[:3] == ["compute", "tpus", "queued-resources"] else words[1]
workers = [world / name for name in ("worker-0", "worker-1")]
if verb == "describe":
    if not state.exists():
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    print(state.read_text())
    if state.read_text() == "PROVISIONING":
        state.write_text("ACTIVE")
elif verb == "create" and tool == "gcloud":
    state.write_text("PROVISIONING")
    for worker in workers:
        (worker / "wallwm_jax.venv/bin").mkdir(parents=True)
        (worker / "wallwm_jax.venv/bin/python").symlink_to(sys.executable)
        (worker / "wallwm_jax.venv/.installed-tpu").write_text(os.environ["INSTALLED"])
elif verb == "delete" and tool == "gcloud":
    state.unlink()
    for worker in workers:
        shutil.rmtree(worker)
elif verb == "scp":
    for worker in workers:
        shutil.copy(words[4], worker)
elif verb == "ssh":
    if state.read_text() != "ACTIVE":
        sys.exit("ERROR: no route to host")
    chosen = workers if flags["worker"] == "all" else [workers[int(flags["worker"])]]
    codes = []
    for worker in chosen:
        there = os.environ | {{"HOME": str(worker), "HOST": worker.name}}
        codes.append(subprocess.call(["bash", "-c", flags["command"]], cwd=worker, env=there))
    sys.exit(max(codes))
elif tool == "kubectl" and verb == "jobset":
    print((world / "conditions").read_text())
"""

# Stands for a training command: tells how it was started, and ends as the world says.
COMMAND = """
import json, os, sys, time
from pathlib import Path
world = Path(os.environ["WORLD"])
seen = world / (os.environ["HOST"] + ".jsonl")
attempt = len(seen.read_text().splitlines()) if seen.exists() else 0
with open(seen, "a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "flags": os.environ["LIBTPU_INIT_ARGS"]}) + "\\n")
print("this is attempt", attempt)
while (world / "hold").exists():
    time.sleep(0.05)
ending = json.loads((world / "endings").read_text())[attempt]
if ending == 143:  # the machines are taken away while somebody looks on
    while (world / "calls.jsonl").read_text().count("worker.sh follow") <= attempt:
        time.sleep(0.05)
    time.sleep(0.5)
    (world / "state").write_text("SUSPENDED")
sys.exit(ending)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A git checkout with the scripts as they are now."""
    root = tmp_path_factory.mktemp("checkout")
    shutil.copytree(PROJECT / "launch", root / "launch")
    for name in ("setup.py", "pyproject.toml", ".gitignore"):
        shutil.copy(PROJECT / name, root)
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "--message=a")):
        subprocess.run(["git", *words], cwd=root, check=True)
    return root


@pytest.fixture
def launch(checkout):
    """Calls a launch script."""

    def call(script, *arguments, **kwargs):
        command = ["bash", f"launch/{script}.sh", *arguments]
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300, **kwargs)

    return call


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder that stands for the cloud, with stand-ins for its tools first on PATH."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("gcloud", "xpk", "kubectl"):
        (tools / tool).write_text(STAND_IN.format(python=sys.executable))
    (tools / "hostname").write_text("#!/bin/sh\necho $HOST\n")
    for tool in tools.iterdir():
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "command.py").write_text(COMMAND)
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WORLD", str(tmp_path))
    monkeypatch.setenv("PYTHON", sys.executable)  # whatever version it is
    packages = b"".join((PROJECT / name).read_bytes() for name in ("setup.py", "pyproject.toml"))
    monkeypatch.setenv("INSTALLED", subprocess.check_output("cksum", input=packages).decode())
    return tmp_path


def calls(world):
    file = world / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def verbs(world):
    """What was asked of the queue, in order; looking at states left out."""
    asked = [call[4] if call[4] != "ssh" else call[-1].split("worker.sh ")[-1].split()[0] for call in calls(world)]
    return [verb for verb in asked if verb not in ("describe", "state")]


def wait_for(world, verb, times):
    deadline = time.monotonic() + 300
    while verbs(world).count(verb) < times:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def started(world, worker=0):
    """How the command was started on a worker, each time."""
    return [json.loads(line) for line in (world / f"worker-{worker}.jsonl").read_text().splitlines()]


def endings(world, *codes):
    (world / "endings").write_text(json.dumps(codes))


def training(world, *flags):
    return ("--", "python", str(world / "command.py"), *flags)


def test_help_shows_every_flag_and_every_action(launch):
    for script in ("local", "tpu_queued", "gke_xpk"):
        text = launch(script, "--help").stdout
        source = (PROJECT / f"launch/{script}.sh").read_text()
        declared = source.split("declare -A FLAG=(")[1].split(")\nsource")[0]
        for word in declared.split():
            if word.startswith("["):
                assert f"--{word[1 : word.index(']')]}" in text
        assert all(f"\n  {action} " in text for action in ("create", "install", "run", "logs", "delete", "up"))


def test_a_preempted_run_gets_new_slices_and_goes_on(launch, world):
    endings(world, 143, 0)
    done = launch("tpu_queued", "up", *QUEUED, "--capacity=spot", *training(world, "--overwrite", *AWKWARD))
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "install", "start", "follow"]
    assert verbs(world) == [*once, "delete", *once, "end", "delete"]
    assert "the slices were taken away: run is SUSPENDED" in done.stderr
    assert "exit code 143; restart 1 of 10 in 0 s" in done.stderr
    assert "[worker-0] this is attempt 0" in done.stdout and "[worker-0] this is attempt 1" in done.stdout
    for worker in (0, 1):
        first, second = (start["argv"] for start in started(world, worker))
        assert first == ["--overwrite", *AWKWARD]
        assert second == [*AWKWARD, "--resume"]


def test_a_failure_is_tried_again_on_the_same_slices_but_bad_input_is_not(launch, world):
    endings(world, 1, 2, 0)
    done = launch("tpu_queued", "up", *QUEUED, *training(world))
    assert done.returncode == 2
    run = ["scp", "install", "start", "follow", "end"]
    assert verbs(world) == ["create", *run, *run]
    assert "worker-1 ended with exit code 1" in done.stderr
    assert "run still stands and is paid for" in done.stderr


@pytest.mark.fault
def test_a_run_outlives_its_launcher_and_is_found_again(launch, checkout, world):
    endings(world, 0)
    (world / "hold").touch()
    up = ["bash", "launch/tpu_queued.sh", "up", *QUEUED, *training(world)]
    launcher = subprocess.Popen(
        up,
        cwd=checkout,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where the tests run in the background
    )
    wait_for(world, "follow", times=1)
    os.killpg(launcher.pid, signal.SIGINT)
    assert "a run that has started goes on" in launcher.communicate(timeout=300)[1]
    assert launcher.returncode == 130
    again = subprocess.Popen(up, cwd=checkout, stderr=subprocess.PIPE, text=True)
    wait_for(world, "follow", times=2)
    (world / "hold").unlink()
    assert "run runs a command already; following that one" in again.communicate(timeout=300)[1]
    assert again.returncode == 0
    assert len(started(world)) == len(started(world, worker=1)) == 1
    assert verbs(world).count("create") == verbs(world).count("start") == 1


def test_the_dry_run_prints_what_is_then_run(launch, world):
    arguments = ("up", *QUEUED, "--capacity=spot", "--create-flag=--internal-ips", "--run-flag=--tunnel-through-iap")
    dry = launch("tpu_queued", *arguments, "--dry-run", *training(world, *AWKWARD))
    assert dry.returncode == 0, dry.stderr
    assert calls(world) == []
    printed = [shlex.split(line) for line in dry.stdout.splitlines()]
    endings(world, 0)
    assert launch("tpu_queued", *arguments, *training(world, *AWKWARD)).returncode == 0
    done = calls(world)
    assert [line for line in printed if line[0] == "gcloud"][:2] == done[:2]
    for line in printed:
        assert line in done or line[0] in ("git", "mkdir")
    asked = {call[4]: " ".join(call[5:]) for call in done}
    assert asked["create"] == (
        "run --project=p --zone=z --accelerator-type=v5p-16 --runtime-version=v2-alpha-tpuv5 --node-id=run "
        "--spot --internal-ips --quiet"
    )
    assert asked["scp"].endswith(" run: --project=p --zone=z --node=all --worker=all --tunnel-through-iap")
    assert asked["delete"] == "run --project=p --zone=z --force --quiet"


def test_several_slices_are_several_nodes(launch, world):
    several = launch("tpu_queued", "create", *QUEUED, "--slices=4", "--dry-run").stdout
    assert "--accelerator-type=v5p-16" in several and "--node-count=4" in several and "--node-id" not in several


@pytest.mark.parametrize(
    ("topology", "accelerator"),
    [
        ("v5e:16x16", "v5litepod-256"),
        ("v6e:4x8", "v6e-32"),
        ("v5p:2x2x1", "v5p-8"),
        ("v5p:4x4x8", "v5p-256"),
        ("v5p:4x8x8", "v5p-512"),
        ("v5p:8x8x8", "v5p-1024"),
        ("v5p:12x16x24", "v5p-9216"),
    ],
)
def test_a_topology_names_its_accelerator_type(launch, topology, accelerator):
    dry = launch("tpu_queued", "create", "--name=a", f"--topology={topology}", "--project=p", "--zone=z", "--dry-run")
    assert f"--accelerator-type={accelerator} " in dry.stdout, dry.stderr


@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        ("tpu_queued", {"topology": "v5p-256"}, "is not a slice; write generation and extents, such as v5p:4x4x8"),
        ("tpu_queued", {"topology": "v5p:8x8x4"}, "does not exist; v5p has 2x2x1, 2x2x2, 2x2x4, 2x4x4 and rising"),
        ("tpu_queued", {"topology": "v5p:04x4x4"}, "is not a slice"),
        ("tpu_queued", {"topology": "v5p:4x4"}, "a v5p slice has 3 extents"),
        ("tpu_queued", {"topology": "v6e:16x32"}, "does not exist; v6e has 1x1, 2x2"),
        ("tpu_queued", {"topology": "v5p:4x4x16"}, "queued resources give 256 chips as v5p:4x8x8"),
        ("tpu_queued", {"topology": "tpu7x:4x4x4"}, "tpu7x slices exist only on Kubernetes; launch with gke_xpk.sh"),
        ("tpu_queued", {"project": ""}, "--project is missing; give --project=... (your Google Cloud project"),
        ("tpu_queued", {"zone": ""}, "--zone is missing; give --zone=..."),
        ("tpu_queued", {"name": "Run_1"}, "--name='Run_1' is not possible; give small letters, digits and dashes"),
        ("tpu_queued", {"capacity": "cheap"}, "--capacity='cheap' is not possible; give on-demand, spot or reserved"),
        ("tpu_queued", {"restarts": "3"}, "unknown argument '--restarts=3'"),
        ("tpu_queued", {"dry-run": "no"}, "--dry-run takes no value"),
        ("tpu_queued", {"ref": "nowhere"}, "--ref='nowhere' is not a commit of"),
        ("gke_xpk", {"cluster": ""}, "--cluster is missing"),
        ("gke_xpk", {"capacity": "reserved"}, "give on-demand, spot or reserved:RESERVATION"),
        ("local", {"processes": "0"}, "--processes='0' is not possible; give a number above 0"),
    ],
)
def test_what_cannot_be_launched_is_refused_before_anything_is_asked(launch, world, script, changes, message):
    usual = {"tpu_queued": QUEUED, "gke_xpk": GKE, "local": ("--name=a",)}[script]
    given = dict(flag[2:].split("=", 1) for flag in usual) | changes
    flags = [f"--{name}={value}" for name, value in given.items()]
    refused = launch(script, "install" if "ref" in changes else "up", *flags, "--", "true")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and message in refused.stderr and refused.stderr.count("\n") == 1
    assert calls(world) == []


def test_missing_tools_and_commands_are_named(launch, tmp_path):
    for tool in ("bash", "dirname", "awk", "cat"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    bare = {"PATH": str(tmp_path)}
    assert "gcloud is not installed; get it from https://" in launch("tpu_queued", "logs", *QUEUED, env=bare).stderr
    assert "nothing to run; put the command after --" in launch("tpu_queued", "run", *QUEUED).stderr
    assert "the first argument is create, install, run," in launch("tpu_queued", "--name=a").stderr


def test_a_cluster_starts_the_run_again_by_itself(launch, checkout, world):
    (world / "conditions").write_text("StartupPolicyCompleted Completed")
    done = launch("gke_xpk", "up", *GKE, "--capacity=reserved:r1", "--", "python", "-m", "train", *AWKWARD)
    assert done.returncode == 0, done.stderr
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True)[:12]
    asked = calls(world)
    where, slices = "--cluster=pod --project=p --zone=z", "--tpu-type=v5p-4x8x8 --num-slices=2"
    image, archive, command = f"gcr.io/p/wallwm_jax:{commit}", asked[2][3], asked[3].pop()
    assert [" ".join(words) for words in asked[:4]] == [
        "gcloud container clusters list --project=p --filter=name=pod --format=value(name)",
        f"xpk cluster create {where} {slices} --reservation=r1",
        f"gcloud builds submit {archive} --tag={image} --project=p --timeout=3600",
        f"xpk workload create --workload=run {where} {slices} --docker-image={image} "
        "--max-restarts=50 --restart-on-exit-codes=1,3-126",
    ]
    assert [words[:2] for words in asked[4:]] == [["kubectl", "logs"], ["kubectl", "get"]]
    words = shlex.split(command.removeprefix("--command="))
    assert words[:2] == ["exec", "env"] and words[2].startswith("LIBTPU_INIT_ARGS=--")
    assert words[3:] == ["python", "-m", "train", *AWKWARD, "--resume"]
    packed = subprocess.check_output(["tar", "-tzf", archive], text=True).splitlines()
    assert {"Dockerfile", "setup.py", "launch/worker.sh"} <= set(packed)


def test_a_run_that_a_cluster_gives_up_fails(launch, world):
    (world / "conditions").write_text("Failed")
    failed = launch("gke_xpk", "run", *GKE, "--", "true")
    assert failed.returncode == 1 and "run failed for good" in failed.stderr
    refused = launch("gke_xpk", "run", *GKE, "--", "python", "--overwrite")
    assert "--overwrite would delete the run at every restart" in refused.stderr


@pytest.mark.tpu
def test_libtpu_knows_every_flag():
    shell = f"source {PROJECT}/launch/xla_flags.sh; for chip in v5e v5p v6e tpu7x; do xla_flags $chip 2; done"
    flags = subprocess.check_output(["bash", "-c", shell], text=True).split()
    assert len(set(flags)) >= 3

    def ask(flags):
        program = "from wallwm_jax.parallel.aot import topology_devices; print(len(topology_devices('v5p:2x2x2')))"
        environment = os.environ | {"LIBTPU_INIT_ARGS": " ".join(flags), "PYTHONPATH": os.pathsep.join([*sys.path])}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)

    known = ask(flags)
    assert known.stdout == "8\n", known.stderr
    assert "Unknown command line flag 'xla_nonsense'" in ask([*flags, "--xla_nonsense=1"]).stderr


@pytest.mark.tpu
def test_the_flags_let_weights_and_gradients_travel_beside_products():
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from wallwm_jax.parallel.aot import statistics, topology_devices
    from wallwm_jax.parallel.mesh import make_mesh

    mesh = make_mesh({"slice": 1, "data": 2, "fsdp": 4, "context": 1, "tensor": 1}, topology_devices("v5p:2x2x2"))

    def loss(weights, rows):
        def layer(rows, weight):
            return jax.nn.gelu(rows @ weight[0]) @ weight[1], None

        return jnp.sum(jax.lax.scan(layer, rows, weights)[0])

    def array(*spec, shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    weights = array(None, "fsdp", shape=(8, 4096, 16384)), array(None, None, "fsdp", shape=(8, 16384, 4096))
    outputs = jax.tree.map(lambda weight: weight.sharding, weights)
    lowered = jax.jit(jax.grad(loss), out_shardings=outputs).lower(weights, array(("data", "fsdp"), shape=(8192, 4096)))
    shell = f"source {PROJECT}/launch/xla_flags.sh; xla_flags v5p 1"
    flags = subprocess.check_output(["bash", "-c", shell], text=True).split()
    options = dict(flag.removeprefix("--").split("=") for flag in flags)
    without, found = (statistics(lowered.compile(compiler_options=chosen)).traffic for chosen in ({}, options))
    kinds = ["reduce-scatter"] if Version(version("libtpu")) < Version("0.0.50") else ["reduce-scatter", "all-gather"]
    for kind in kinds:
        assert without[kind, 4].sparse == 0 and without[kind, 4].exposed > 0.9 * without[kind, 4].received
        assert found[kind, 4].sparse == sum(found[kind, 4].overlapped.values()) > 0.8 * found[kind, 4].count


@pytest.fixture
def local(launch, checkout):
    """Runs a program as local processes, with restarts."""

    here = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(PROJECT)}

    def run(name, *arguments):
        try:
            return launch("local", "up", f"--name={name}", "--backoff=0", *arguments, env=os.environ | here)
        finally:
            launch("local", "delete", f"--name={name}")
            assert not (checkout / f"runs/local/{name}").exists()

    return run


JOINS = """
import jax
from jax.experimental.multihost_utils import process_allgather
from wallwm_jax.parallel.distributed import initialize
host = initialize()
print("devices", jax.device_count(), "of", host.count, process_allgather(jax.numpy.full(1, host.index)).sum())
"""


def test_local_processes_form_one_run_of_all_their_devices(local, tmp_path):
    (tmp_path / "program.py").write_text(JOINS)
    done = local("test-devices", "--processes=2", "--devices=3", "--", "python", str(tmp_path / "program.py"))
    assert done.returncode == 0, done.stdout
    assert {"[0] devices 6 of 2 1", "[1] devices 6 of 2 1"} < set(done.stdout.splitlines())


FAILS_ONCE = """
import os, signal, sys, time
print(sys.argv[1:], flush=True)
if "--resume" not in sys.argv:
    if os.environ["JAX_PROCESS_ID"] == "1":
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.signal(signal.SIGTERM, lambda *_: (print("told to stop", flush=True), sys.exit(143)))
    time.sleep(60)
"""


@pytest.mark.fault
def test_when_a_local_process_is_killed_all_stop_and_go_on(local, tmp_path):
    (tmp_path / "program.py").write_text(FAILS_ONCE)
    done = local("test-killed", "--", sys.executable, str(tmp_path / "program.py"), "--overwrite", "a 'b' $c")
    assert done.returncode == 0, done.stderr
    assert "process 1 of test-killed ended with exit code 137; stopping the others" in done.stderr
    assert "exit code 137; restart 1 of 5 in 0 s" in done.stderr and "setsid" not in done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "[0] [\"a 'b' $c\", '--resume']",
        "[0] ['--overwrite', \"a 'b' $c\"]",
        "[0] told to stop",
        "[1] [\"a 'b' $c\", '--resume']",
        "[1] ['--overwrite', \"a 'b' $c\"]",
    ]


@pytest.mark.fault
def test_what_does_not_stop_is_killed_and_a_limit_ends_it(local, tmp_path):
    (tmp_path / "program.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('up', flush=True)\n"
        "time.sleep(60) if os.environ['JAX_PROCESS_ID'] == '0' else sys.exit(9)\n"
    )
    flags = ("--grace=1", "--max-restarts=1", "--processes=2")
    done = local("test-limit", *flags, "--", sys.executable, str(tmp_path / "program.py"))
    assert done.returncode == 9
    assert done.stdout.splitlines().count("[1] up") == 2
    assert "exit code 9, and 1 restarts in a row did not help" in done.stderr

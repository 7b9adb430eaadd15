"""The systemd unit, the cron line, the files for Ray and the image, as those read them who use them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from pipeline.cli.commands import cli
from pipeline.config import Config
from pipeline.executors.ray_environment import QUIET
from pipeline.service.health import WATCHDOG_S

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "deploy" / "variations.service"
CRON = ROOT / "deploy" / "variations.cron"
CHECKOUT = "/srv/variations"  # in both files


def settings() -> dict[str, list[str]]:
    """The unit's settings; one may be given several times."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return found


def cron_line() -> re.Match[str]:
    """The one line that is neither comment nor variable: five time fields, the user, the command."""
    lines = [line for line in CRON.read_text().splitlines() if line and not re.match(r"#|\w+=", line)]
    [line] = lines
    match = re.fullmatch(r"(?P<when>(?:[\d*/,-]+ +){5})(?P<user>[a-z]\S*) +(?P<command>.+)", line)
    assert match, line
    return match


def cron_variables() -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w+)=(.*)$", CRON.read_text()))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with an interpreter where the unit expects it."""
    folder = tmp_path / "variations"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (folder / "state").mkdir()
    (folder / "README.md").write_text("")
    return folder


# -- systemd ---------------------------------------------------------------------------------------


@pytest.fixture
def systemd_analyze() -> str:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    return tool


def verify(tool: str, unit: Path) -> tuple[int, str]:
    ended = subprocess.run([tool, "verify", str(unit)], capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout + ended.stderr


def test_systemd_finds_nothing_wrong_with_the_unit(
    systemd_analyze: str, checkout: Path, tmp_path: Path
) -> None:
    """With the checkout's real folder, since `verify` checks that the program exists."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(CHECKOUT, str(checkout)))
    assert verify(systemd_analyze, copy) == (0, "")


def test_the_verification_finds_errors(systemd_analyze: str, checkout: Path, tmp_path: Path) -> None:
    text = UNIT.read_text().replace(CHECKOUT, str(checkout))
    misspelt, elsewhere = tmp_path / "misspelt.service", tmp_path / "elsewhere.service"
    misspelt.write_text(text.replace("WatchdogSec=", "WatchdogSeconds="))
    elsewhere.write_text(text.replace("/bin/python", "/bin/no-python"))
    assert "WatchdogSeconds" in verify(systemd_analyze, misspelt)[1]
    assert "no-python" in verify(systemd_analyze, elsewhere)[1]


def test_a_worker_that_ran_out_of_memory_ends_alone_and_one_line_allows_a_gpu() -> None:
    """By default systemd ends the service. `ProtectClock` has a list of devices, which closes all others."""
    assert settings()["OOMPolicy"] == ["continue"]
    assert settings()["PrivateDevices"] == ["yes"]
    assert not settings().keys() & {"DevicePolicy", "DeviceAllow", "ProtectClock"}


def test_health_takes_an_instance_for_hung_when_the_watchdog_does() -> None:
    assert settings()["WatchdogSec"] == [f"{WATCHDOG_S / 60:.0f}min"]


def test_what_systemd_starts_is_the_program(checkout: Path) -> None:
    """The unit's command is run in a checkout, with --help so that it ends."""
    [command] = settings()["ExecStart"]
    [folder] = settings()["WorkingDirectory"]
    assert folder == CHECKOUT
    executable, script, verb = shlex.split(command)
    assert executable == f"{CHECKOUT}/.venv/bin/python"  # absolute, as systemd wants it
    assert (ROOT / script).is_file()
    ended = subprocess.run(
        [sys.executable, script, verb, "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ended.returncode == 0, ended.stderr


def test_all_folders_that_the_program_writes_to_are_writable() -> None:
    unit = settings()
    writable = [Path(path) for line in unit["ReadWritePaths"] for path in line.split()]
    assert unit["ProtectSystem"] == ["strict"]
    variables = dict(pair.split("=", 1) for line in unit["Environment"] for pair in line.split())
    places = [Path(CHECKOUT) / name for name in ("inbox", "outbox", "state")]
    places += [Path(variables["HF_HOME"]), Path(variables["NUMBA_CACHE_DIR"])]
    for place in places:
        assert any(place.is_relative_to(folder) for folder in writable), place
    closed = [Path(path.lstrip("-")) for line in unit["ReadOnlyPaths"] for path in line.split()]
    for folder in closed:
        assert not any(place.is_relative_to(folder) for place in places), folder


def test_the_service_restarts_while_another_instance_runs() -> None:
    """cron's `once` may hold the lock when the daemon starts: only exit code 2 prevents a restart."""
    unit = settings()
    assert unit["Restart"] == ["on-failure"]
    assert unit["RestartPreventExitStatus"] == ["2"]


def test_cron_and_the_daemon_use_the_same_weights() -> None:
    variables = dict(pair.split("=", 1) for line in settings()["Environment"] for pair in line.split())
    for name in ("HF_HOME", "NUMBA_CACHE_DIR"):
        assert cron_variables()[name] == variables[name]


# -- cron ------------------------------------------------------------------------------------------


def test_the_cron_line_runs_every_quarter_of_an_hour_as_the_service_s_user() -> None:
    line = cron_line()
    assert line["when"].split() == ["*/15", "*", "*", "*", "*"]
    assert [line["user"]] == settings()["User"]
    assert "%" not in line["command"]  # a line break to cron
    assert CRON.read_text().endswith("\n")  # or the last line is not read
    assert cron_variables()["SHELL"] == "/bin/sh"


def run_cron_command(checkout: Path, *, exit_code: int) -> subprocess.CompletedProcess[str]:
    """The line's command as cron runs it, with a program that prints its arguments."""
    (checkout / "run_pipeline.py").write_text(
        "import sys\nprint('ran', *sys.argv[1:])\nprint('to stderr', file=sys.stderr)\n"
        f"sys.exit({exit_code})\n"
    )
    command = cron_line()["command"].replace(CHECKOUT, str(checkout))
    return subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("exit_code", [0, 3])
def test_a_run_that_is_done_or_finds_another_instance_succeeds_without_output(
    checkout: Path, exit_code: int
) -> None:
    ended = run_cron_command(checkout, exit_code=exit_code)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert sorted((checkout / "state" / "cron.log").read_text().splitlines()) == ["ran once", "to stderr"]


@pytest.mark.parametrize("exit_code", [1, 2, 4, 130, 143])
def test_any_other_end_is_a_failure_for_cron(checkout: Path, exit_code: int) -> None:
    assert run_cron_command(checkout, exit_code=exit_code).returncode != 0


def test_a_missing_checkout_is_a_failure_for_cron(checkout: Path) -> None:
    shutil.rmtree(checkout / "state")
    assert run_cron_command(checkout, exit_code=0).returncode != 0
    shutil.rmtree(checkout)
    command = cron_line()["command"].replace(CHECKOUT, str(checkout))
    assert subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=False).returncode != 0


def test_the_log_of_earlier_runs_is_kept(checkout: Path) -> None:
    for _ in range(2):
        run_cron_command(checkout, exit_code=0)
    assert (checkout / "state" / "cron.log").read_text().count("ran once") == 2


# -- Ray -------------------------------------------------------------------------------------------

RAY = ROOT / "deploy" / "ray"
PIN = re.compile(r"^ray==(.+)$", re.MULTILINE)


def test_the_cluster_file_is_what_ray_accepts() -> None:
    package = find_spec("ray")
    if package is None or package.origin is None:
        pytest.skip("ray is not installed: requirements-ray.txt")
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((Path(package.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((RAY / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "head_node": "g6.xlarge"}, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_the_files_for_ray_use_the_program_as_it_is() -> None:
    cluster, manifest = (
        yaml.safe_load((RAY / name).read_text()) for name in ("cluster.yaml", "kuberay.yaml")
    )
    [pinned] = PIN.findall((ROOT / "requirements-ray.txt").read_text())
    assert manifest["spec"]["rayVersion"] == pinned
    for name in re.findall(r"-r (\S+)", " ".join(cluster["setup_commands"])):
        assert (ROOT / name).is_file()
    for file in ("cluster.yaml", "kuberay.yaml"):
        [section] = re.findall(r"executor: (\{.*?\})", (RAY / file).read_text())
        Config.model_validate({"device": "cuda", "executor": yaml.safe_load(section)})


def test_the_machines_for_ray_have_a_gpu_and_report_nothing() -> None:
    manifest = yaml.safe_load((RAY / "kuberay.yaml").read_text())
    groups = [manifest["spec"]["headGroupSpec"], *manifest["spec"]["workerGroupSpecs"]]
    containers = [one for group in groups for one in group["template"]["spec"]["containers"]]
    assert containers[1]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for container in containers:
        assert {one["name"]: one["value"] for one in container["env"]}.items() >= {
            name: QUIET[name] for name in ("RAY_USAGE_STATS_ENABLED", "RAY_USAGE_STATS_REPORT_URL")
        }.items()
    head = " ".join(yaml.safe_load((RAY / "cluster.yaml").read_text())["head_start_ray_commands"])
    assert (
        f"RAY_USAGE_STATS_ENABLED=0 RAY_USAGE_STATS_REPORT_URL={QUIET['RAY_USAGE_STATS_REPORT_URL']}" in head
    )


# -- Docker ----------------------------------------------------------------------------------------

DOCKERFILE = ROOT / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile in their order: each one's word and the rest of it."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"(?m)^#.*\n", "", DOCKERFILE.read_text()))
    return [(word, rest) for line in text.splitlines() if line for word, _, rest in [line.partition(" ")]]


def test_everything_that_the_image_copies_is_in_the_repository() -> None:
    copied = {source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]}
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in known.splitlines()}
    assert {"pipeline", "config", "pyproject.toml"} <= copied <= top


@pytest.mark.parametrize(
    ("models", "code", "installed"),
    [
        ("cpu", 0, ["-r /src/requirements-cpu.txt"]),
        ("cuda", 0, ["-r /src/requirements-core.txt -r /src/requirements-models.txt"]),
        ("none", 0, []),
        ("gpu", 2, []),
    ],
)
def test_the_image_installs_the_models_that_were_asked_for(
    tmp_path: Path, models: str, code: int, installed: list[str]
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift 4\necho "$@"\n')  # without -m pip install --no-cache-dir
    python.chmod(0o755)
    first, second = [rest for word, rest in instructions() if word == "RUN" and "pip" in rest]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MODELS": models, "EXTRAS": "s3,ray"}
    ran = subprocess.run(["sh", "-c", first], env=env, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout.splitlines()) == (code, installed)
    for name in re.findall(r"/src/(\S+)", ran.stdout):
        assert (ROOT / name).exists()
    ran = subprocess.run(["sh", "-c", second], env=env, capture_output=True, text=True, check=False)
    assert ran.stdout == "/src[s3,ray]\n"


def test_the_image_says_whether_it_is_well_by_a_verb_of_the_program() -> None:
    [check] = [rest for word, rest in instructions() if word == "HEALTHCHECK"]
    program, verb = json.loads(check[check.index("[") :])
    assert [json.dumps([program])] == [rest for word, rest in instructions() if word == "ENTRYPOINT"]
    assert verb in {
        command.name or command.callback.__name__ for command in cli.registered_commands if command.callback
    }


def test_the_extras_of_the_image_are_those_of_the_package() -> None:
    [default] = [rest.partition("=")[2] for word, rest in instructions() if rest.startswith("EXTRAS=")]
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    assert set(default.split(",")) <= known["optional-dependencies"].keys()

"""Run transformers' own tests of the models that it ships on the models of this package.

Usage: `run_transformers_suite.py --suite CHECKOUT`, where CHECKOUT is a clone of transformers of the version that is
installed: the folder that holds `tests`. Where the version is not released, `PYTHONPATH=CHECKOUT/src` takes the library
from the clone, too. It needs pytest, pytest-timeout, parameterized and what else the suite imports.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import transformers


REPOSITORY = Path(__file__).resolve().parents[3]
TESTERS = REPOSITORY / "tests" / "transformers_suite"
FAMILIES = {"causal": "decoder_only.py", "seq2seq": "encoder_decoder.py", "llama": "llama_backed.py"}
# What a test says that cannot fetch a file of the Hub.
NETWORK = re.compile(r"offline mode|couldn't connect|LocalEntryNotFound|OfflineMode|ConnectError|Can't load .* for '")


@dataclass
class Tally:
    """What became of the tests of one model."""

    name: str
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    without_network: list[str] = field(default_factory=list)
    skipped: Counter = field(default_factory=Counter)

    @classmethod
    def read(cls, name: str, report: Path) -> "Tally":
        """Count a JUnit report. A test whose subtests fail counts once."""
        tally = cls(name)
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            test = case.get("name")
            problem = case.find("failure") if case.find("failure") is not None else case.find("error")
            skip = case.find("skipped")
            if problem is not None:
                tally.add_failure(test, f"{problem.get('message')}\n{problem.text}")
            elif skip is not None:
                tally.skipped[_reason(skip.get("message", ""))] += 1
            else:
                tally.passed += 1
        return tally

    def add_failure(self, test: str, problem: str):
        if NETWORK.search(problem):
            self.without_network.append(test)
        else:
            self.failed[test] = problem.splitlines()[0]

    def __str__(self) -> str:
        line = f"{self.name}: {self.passed} passed, {len(self.failed)} failed, {self.skipped.total()} skipped"
        return line + (f", {len(self.without_network)} need the network" if self.without_network else "")


def _reason(message: str) -> str:
    """Make reasons alike that name a test or a class."""
    message = re.sub(r"\w+::test_pipeline_\w+ is skipped: ", "", message)
    message = re.sub(r"<class '[\w.]+'>|`?[\w-]*(StableMoE|Olmoe)\w*`?", "the class", message)
    message = re.sub(
        r"`[\w-]+` is not in `self.pipeline_model_mapping`.*", "a pipeline that the model is not for", message
    )
    message = re.sub(r"[Tt]est requires .*", "needs hardware or a library that is not here", message)
    return message.splitlines()[0][:150] if message else "no reason given"


def run(name: str, tests: list[str], arguments: argparse.Namespace, checkpoints: Path | None) -> Tally:
    """Run tests, given as to pytest, in a process of their own, as the suite's own configuration says."""
    suite = arguments.suite
    paths = [str(suite), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["RUN_SLOW"] = "1" if arguments.slow else "0"
    if arguments.sharded:
        environment["STABLEMOE_SUITE_SHARDED"] = "1"
    if checkpoints is not None:
        environment["TRANSFORMERS_TINY_MODEL_PATH"] = str(checkpoints)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *tests, "-p", "no:cacheprovider"]
        command += ["-c", str(suite / "pyproject.toml"), "--rootdir", str(suite)]
        command += ["-o", "log_cli=0", "-q", "--tb=short", f"--timeout={arguments.timeout}", f"--junitxml={report}"]
        command += ["-k", arguments.k] if arguments.k else []
        output = subprocess.run(command, cwd=suite, env=environment, text=True, capture_output=True, check=False)
        if not report.exists():
            raise SystemExit(f"error: pytest stopped before the tests of {name}:\n{output.stdout}{output.stderr}")
        return Tally.read(name, report)


def describe(tally: Tally):
    """Print how many tests passed, failed and were skipped, and why."""
    print(tally)
    for test, problem in tally.failed.items():
        print(f"  failed: {test}: {problem}")
    for test in tally.without_network:
        print(f"  needs the network: {test}")
    for reason, count in tally.skipped.most_common():
        print(f"  {count:4} skipped: {reason}")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--suite", type=Path, required=True, help="a clone of transformers, which holds `tests`")
    parser.add_argument("--family", choices=FAMILIES, help="default: all")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="default: both")
    parser.add_argument(
        "--beside", action="append", default=[], metavar="MODEL", help="a model of transformers: olmoe, llama"
    )
    parser.add_argument("-k", help="only tests that match, as pytest's -k")
    parser.add_argument("--slow", action="store_true", help="the suite's slow tests, too")
    parser.add_argument("--sharded", action="store_true", help="FSDP2 and expert parallelism on two processes, too")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a test may take")
    arguments = parser.parse_args()
    arguments.suite = arguments.suite.resolve()
    if not (arguments.suite / "tests" / "causal_lm_tester.py").exists():
        parser.error(f"`--suite` {arguments.suite} holds no tests/causal_lm_tester.py: pass a clone of transformers.")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    sys.path.insert(0, str(TESTERS))
    from tiny_checkpoints import write_tiny_checkpoints

    print(f"transformers {transformers.__version__} from {Path(transformers.__file__).parent}")
    tallies = []
    for family in [arguments.family] if arguments.family else FAMILIES:
        for stage in [arguments.stage] if arguments.stage else (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                write_tiny_checkpoints(Path(folder), stage)
                # Tests outside the suite do not find its conftest.py by themselves.
                tests = [f"{TESTERS / FAMILIES[family]}::Stage{stage}Test"]
                tests += ["-p", "conftest", "--confcutdir", str(TESTERS)]
                tallies.append(run(f"{family}, stage {stage}", tests, arguments, Path(folder)))
            describe(tallies[-1])
    for model in arguments.beside:
        tallies.append(run(model, [str(arguments.suite / "tests" / "models" / model)], arguments, None))
        describe(tallies[-1])
    print("\n".join(["", *map(str, tallies)]))
    return int(any(tally.failed for tally in tallies))


if __name__ == "__main__":
    raise SystemExit(main())

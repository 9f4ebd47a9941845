"""Compares every op of PyTorch's own test table with JAX or an engine: ``python tests/benchmarks/op_coverage.py``.

``--target jax`` goes through `to_jax_function`; ``native``, ``inductor`` and ``eager`` make a step of 12 ops at a time,
which ``native`` compiles without optimizations. ``--derivatives`` compares gradient, vmap and jvp, too (JAX only). Ops
run in a worker process. One that crashes or hangs does not end the run: its ops run alone, and it is listed as ``raw``.
``--json FILE`` keeps the verdicts so far, ``--markdown FILE`` writes the section of the target in the documentation's
table. `op_comparison` says what the verdicts mean.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import select
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

STAGES = ("value", "gradient", "vmap", "jvp")
VERDICTS = ("right", "refused", "wrong", "raw", "not comparable")
Results = dict[str, dict[str, list[str]]]
"""By op and stage: the verdict, and the reason."""


def work(options: argparse.Namespace) -> None:
    """Reads names of ops, a list in JSON on each line, and prints the verdicts on each as a line of JSON."""
    import torch
    from op_comparison import compare_entry, compare_together, entries_by_name

    if options.target == "native":
        from popart_func.engines.native.cpu import compile as cpu_compile

        cpu_compile.FLAGS = tuple("-O0" if flag == "-O2" else flag for flag in cpu_compile.FLAGS)

    torch.set_num_threads(1)
    entries = entries_by_name()
    print(json.dumps(list(entries)), flush=True)
    stages = STAGES if options.derivatives else STAGES[:1]
    for line in sys.stdin:
        asked = [entries[name] for name in json.loads(line)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.target == "jax":
                compare = lambda entry: compare_entry(entry, "jax", most=options.samples, stages=stages)  # noqa: E731
                verdicts = {entry.formatted_name: compare(entry) for entry in asked}
            else:
                together = compare_together(asked, options.target, most=options.samples)
                verdicts = {name: {"value": verdict} for name, verdict in together.items()}
        print("\n" + json.dumps(verdicts), flush=True)


class Worker:
    """A process that compares ops; it is started again where it has died."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.command = [sys.executable, __file__, "--worker", "--target", options.target]
        self.command += ["--samples", str(options.samples), *(["--derivatives"] if options.derivatives else [])]
        self.stages = STAGES if options.derivatives else STAGES[:1]
        self.process: Any = None

    def start(self) -> list[str]:
        """Starts the process; returns the names of all ops."""
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )  # no buffer, since `select` sees only what has not been read into one
        return json.loads(self.process.stdout.readline())

    def compare(self, names: list[str], seconds: float) -> Results:
        """The verdicts on ops; where the process dies of several, each is compared alone."""
        if self.process is None:
            self.start()
        self.process.stdin.write(f"{json.dumps(names)}\n".encode())
        reason = f"takes longer than {seconds:g} s"
        while select.select([self.process.stdout], [], [], seconds * len(names))[0]:
            line = self.process.stdout.readline()
            if not line:
                reason = f"the process dies of {self._cause()}"
                break
            if line.startswith(b"{"):
                return json.loads(line)
        self.close()
        if len(names) > 1:
            return {name: verdicts for one in names for name, verdicts in self.compare([one], seconds).items()}
        return {names[0]: {stage: ["raw", reason] for stage in self.stages}}

    def _cause(self) -> str:
        code = self.process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


def run(options: argparse.Namespace) -> Results:
    """The verdicts on every op, or on those named."""
    worker = Worker(options)
    try:
        every = worker.start()
        wanted = options.ops or every
        names = [name for name in every if name in wanted or name.split(".")[-1] in wanted]
        results: Results = {}
        size = 1 if options.target == "jax" else 12
        for start in range(0, len(names), size):
            new = worker.compare(names[start : start + size], options.timeout)
            results |= new
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
            if options.verbose:
                print(*_news(new, f"{len(results)}/{len(names)}"), sep="", end="", flush=True)
    finally:
        worker.close()
    return results


def _news(results: Results, progress: str) -> list[str]:
    """A line for each verdict that is not right."""
    return [
        f"[{progress}] {name}, {stage}: {verdict}: {reason}\n"
        for name, found in results.items()
        for stage, (verdict, reason) in found.items()
        if verdict in ("wrong", "raw", "refused")
    ]


def counts(results: Results, stage: str) -> collections.Counter[str]:
    """How many ops have each verdict."""
    return collections.Counter(found[stage][0] for found in results.values() if stage in found)


def names_of(results: Results, stage: str, verdict: str) -> dict[str, str]:
    """The ops with a verdict, and the reasons."""
    return {name: found[stage][1] for name, found in results.items() if found.get(stage, [""])[0] == verdict}


def table(results: Results) -> list[str]:
    """A row for each stage: how many ops are comparable, and how many have each verdict."""
    lines = ["| | comparable | right | refused by name | wrong | raw error |", "|---|---|---|---|---|---|"]
    for stage in STAGES:
        found = counts(results, stage)
        total = found.total() - found["not comparable"]
        if total:
            shares = f"{found['right']} ({100 * found['right'] / total:.1f} %)"
            lines.append(f"| {stage} | {total} | {shares} | {found['refused']} | {found['wrong']} | {found['raw']} |")
    return lines


def section(target: str, results: Results) -> str:
    """The target's part of the documentation."""
    lines = [f"## {target}", "", *table(results), ""]
    for stage in STAGES:
        for verdict in VERDICTS[1:4]:
            names = names_of(results, stage, verdict)
            if stage != "value":
                names = {name: why for name, why in names.items() if results[name]["value"][0] != verdict}
            if names:
                lines += [f"{stage}, {verdict}: {', '.join(f'`{name}`' for name in sorted(names))}.", ""]
    reasons: dict[str, list[str]] = {}
    for name, reason in names_of(results, "value", "not comparable").items():
        reasons.setdefault(reason.split(":")[0], []).append(name)
    lines.append("Not comparable:")
    lines += [f"- {why}: {', '.join(f'`{name}`' for name in sorted(names))}." for why, names in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


TITLE = """# Which ops of PyTorch are right in JAX and on the engines

Written by `python tests/benchmarks/op_coverage.py --target jax --derivatives --markdown docs/op_coverage.md` (and
`--target native`): the float32 entries of PyTorch's own table, `op_db`, against eager PyTorch. *Right*: all samples
agree. *Refused by name*: an error that names the op and the line. *Not comparable*: PyTorch itself gives no one answer.
"""


def write_markdown(path: Path, target: str, results: Results) -> None:
    """Replaces the target's section in a file, or adds it."""
    before = path.read_text() if path.exists() else TITLE
    head, *sections = re.split(r"(?m)^(?=## )", before)
    kept = {text.split("\n")[0].removeprefix("## "): text.rstrip() + "\n" for text in sections}
    kept[target] = section(target, results)
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([head.rstrip() + "\n", *kept.values()]))


def main() -> None:
    """Runs the comparison, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("jax", "native", "inductor", "eager"), default="jax")
    parser.add_argument("--ops", nargs="*", help="names of ops; all without it")
    parser.add_argument("--samples", type=int, default=4, help="how many samples of each op at most")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one op")
    parser.add_argument("--derivatives", action="store_true", help="gradient, vmap and jvp, too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--verbose", action="store_true", help="print each op that is not right as it is found")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    results = run(options)
    if options.markdown:
        write_markdown(options.markdown, options.target, results)
    print(section(options.target, results))


if __name__ == "__main__":
    main()

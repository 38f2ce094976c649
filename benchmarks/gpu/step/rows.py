"""What was measured on a GPU: a row per provider and case, as CSV and back."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu.step.providers import COMPILED, CUB, PROVIDERS, PYTORCH, TRITON, YARDSTICK
from drive.experiments.bench.workload import Case

WRONG = "WRONG MASKS"
NOT_YET = "not measured"
NAN = math.nan
Cases = dict[Case, "dict[str, Row]"]


@dataclass(frozen=True)
class Row:
    """One provider on one case: seconds over `runs` runs, or in `note` why there are none."""

    case: Case
    provider: str
    entries: int
    tensors: int
    runs: int = 0
    seconds: float = NAN  # median
    fastest: float = NAN
    slowest: float = NAN
    host: float = NAN  # median of the seconds until the call came back
    memory: float = NAN  # peak beyond the inputs, in bytes an entry
    checked: str = ""  # how masks and weights were found to be right
    note: str = ""

    @property
    def gigabytes(self) -> float:
        """The least that must be moved: two operands read, one written, by a step masks as well."""
        masks = 0 if self.provider == YARDSTICK else 1 + self.case.old_masks
        return NAN if self.provider == CUB else self.entries * (3 * self.case.dtype.itemsize + masks) / 1e9


def by_case(rows: list[Row]) -> Cases:
    """Every provider's row in every case, an empty one where it has not been measured."""
    cases: Cases = {}
    for row in rows:
        if row.case not in cases:
            empty = Row(row.case, "", row.entries, row.tensors, note=NOT_YET)
            cases[row.case] = {p.name: replace(empty, provider=p.name) for p in PROVIDERS}
        cases[row.case][row.provider] = row
    return cases


def ours(found: dict[str, Row]) -> Row:
    """The compiled version, or the Triton one where there is no other."""
    return found[TRITON] if found[COMPILED].note else found[COMPILED]


def best_of_pytorch(found: dict[str, Row]) -> Row | None:
    """The fastest way to the same masks without this package."""
    timed = [found[name] for name in PYTORCH if found[name].runs]
    return min(timed, key=lambda row: row.seconds, default=None)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


CSV_COLUMNS = """size entries tensors dtype sparsity old_masks scores provider runs median_ms min_ms max_ms
    host_us gb_per_s ratio_to_mul extra_bytes_an_entry checked note"""


def as_csv(rows: list[Row], facts: dict[str, str]) -> str:
    """A line per provider and case, with what traces it to its machine."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*CSV_COLUMNS.split(), *facts])
    mul = {row.case: row.seconds for row in rows if row.provider == YARDSTICK}
    for row in rows:
        case = row.case
        line = [case.size, row.entries, row.tensors, name_of(case.dtype), case.sparsity, case.old_masks]
        line += [case.scores, row.provider, row.runs]
        line += [number(seconds * 1e3, ".5g") for seconds in (row.seconds, row.fastest, row.slowest)]
        line += [number(row.host * 1e6, ".5g"), number(row.gigabytes / row.seconds, ".5g")]
        line += [number(row.seconds / mul.get(case, NAN), ".4g")]
        writer.writerow([*line, number(row.memory, ".4g"), row.checked, row.note, *facts.values()])
    return file.getvalue()


def from_csv(text: str, facts: dict[str, str]) -> list[Row]:
    """The rows of `as_csv`, if they are of the same device, versions and commit; else none."""
    lines = list(csv.DictReader(io.StringIO(text)))
    same = {name: value for name, value in facts.items() if name != "date"}
    if any(line.get(name) != value for line in lines for name, value in same.items()):
        return []
    return [_row(line) for line in lines]


def _row(line: dict[str, str]) -> Row:
    def value(name: str, unit: float = 1.0) -> float:
        return float(line[name]) * unit if line[name] else NAN

    case = Case(
        line["size"], getattr(torch, line["dtype"]), float(line["sparsity"]), line["old_masks"] == "True",
        line["scores"],
    )  # fmt: skip
    return Row(
        case, line["provider"], int(line["entries"]), int(line["tensors"]), int(line["runs"]),
        seconds=value("median_ms", 1e-3), fastest=value("min_ms", 1e-3), slowest=value("max_ms", 1e-3),
        host=value("host_us", 1e-6), memory=value("extra_bytes_an_entry"), checked=line["checked"],
        note=line["note"],
    )  # fmt: skip

"""What the GPU benchmark has measured so far, as JSON and as a Markdown table."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_place import Place
from gpu_rows import KEPT, Row

GIB = 2**30
TRACE = "trace.json.gz"
"""Name of a trace in the folder of models and sets."""
HEADS = (
    "row", "a step is", "seconds (fastest-slowest, steps)", "tokens/s", "TFLOP needed", "MFU", "of measured peak",
    "executed", "peak GiB", "plan GiB", "waits for data",
)  # fmt: skip
COUNTED = """
MFU: the operations that the model needs in a step, over its median time and the device's published dense bf16 peak;
beside it the same over the peak that was measured here, and the published one with what checkpointing repeats counted
too ("executed"). A linear layer of N weights needs 2 N operations a token forward, 4 N with a backward pass where it is
frozen, and 6 N where it trains (adapters, the vision tower). Attention needs 4 L^2 E a layer and sample forward, half
of it where it is causal, three times that with a backward pass. The reference of DPO and every evaluation of sampling
are forward passes. An autoencoder is counted by torch's own formulas. gpu.json has the parts of every row.

A step of a training row is one micro-batch, as `videoalign fit` takes it with the shipped recipe on one device; the
last one takes the optimizer's step too. plan GiB is what `videoalign plan` expects of such a step, which counts no
fragmentation and no kernel's own memory; peak GiB is torch's largest sum of allocated memory. Waiting is the time from
the end of a step to the arrival of the next batch on the device.
"""


class Record:
    """Results by row, written to a folder whenever something is added.

    Args:
        out: Folder of `gpu.json` and `gpu.md`; what is there is gone on with.
        rows: All rows, in the order of the table.
        place: Where models and sets are.

    Attributes:
        machine: The machine, if it is known.
        results: What was measured, by the row's name.
        plans: What `videoalign plan` expects, by its arguments; None where it failed.
    """

    def __init__(self, out: Path, rows: Sequence[Row], place: Place) -> None:
        self.out, self.rows, self.place, self.log = out, rows, place, out / "gpu.log"
        file = out / "gpu.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        self.machine: dict[str, Any] | None = found.get("machine")
        self.results: dict[str, dict[str, Any]] = found.get("rows", {})
        self.plans: dict[str, dict[str, Any] | None] = found.get("plans", {})

    def done(self, row: Row) -> bool:
        """Whether a row need not run again: it was measured, or ran out of memory."""
        return self.measured(row.name) or bool(self.results.get(row.name, {}).get("out_of_memory"))

    def measured(self, name: str) -> bool:
        """Whether a row has times.

        Args:
            name: Name of the row.
        """
        return "seconds" in self.results.get(name, {})

    def add(self, row: Row, result: dict[str, Any]) -> None:
        """Keep what a row gave, times or an error.

        Args:
            row: The row.
            result: What its function gave.
        """
        self.results[row.name] = {"title": row.title, **result}
        if (trace := self.place.folder / TRACE).exists():
            shutil.move(trace, self.out / f"{row.name}_{TRACE}")
        self.save()

    def add_machine(self, result: dict[str, Any]) -> None:
        """Keep what the machine is; an error is kept in the log alone.

        Args:
            result: What :func:`.gpu_machine.machine` gave.
        """
        self.machine = result if "error" not in result else None
        self.save()

    def plan(self, words: Sequence[str]) -> dict[str, Any] | None:
        """What `videoalign plan` expects with some arguments; None where it is not known.

        Args:
            words: The arguments.
        """
        return self.plans.get(self._key(words))

    def add_plan(self, words: Sequence[str], file: Path | None) -> None:
        """Keep what `videoalign plan` wrote.

        Args:
            words: Its arguments.
            file: What it wrote; None where it failed.
        """
        if file is None:
            self.plans[self._key(words)] = None
        else:
            steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
            file.unlink()
            self.plans[self._key(words)] = {
                kind: {"peak_gib": step["peak"]["one GPU"] / GIB, "flops": step["flops"]}
                for kind, step in steps.items()
            }
        self.save()

    def _key(self, words: Sequence[str]) -> str:
        return " ".join(words).replace(f"{self.place.folder}/", "")

    def planned_gib(self, row: Row) -> float | None:
        """Memory that `videoalign plan` expects of a row's step, in GiB.

        Args:
            row: The row.
        """
        words = row.plan(self.place.folder, self.place.toy)
        found = words and self.plan(words)
        again = KEPT not in row.given.get("options", ())
        return found["checkpointing" if again else "no checkpointing"]["peak_gib"] if found else None

    # --- files ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write both files, each in one go."""
        whole = {"machine": self.machine, "rows": self.results, "plans": self.plans}
        self._write("gpu.json", json.dumps(whole, indent=1) + "\n")
        self._write("gpu.md", self.table())

    def _write(self, name: str, text: str) -> None:
        part = self.out / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.out / name)

    def table(self) -> str:
        """All rows that were measured, or failed, as a Markdown table with what is counted below it."""
        machine = self.machine or {}
        lines = ["# Steps of the shipped recipes on one device", ""]
        if machine:
            packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
            peaks = f"bf16 matrix products of {machine['matmul']} at {machine['measured_peak'] / 1e12:.1f} TFLOP/s"
            published = f", published {machine['published_peak'] / 1e12:.0f}" if machine["published_peak"] else ""
            lines += [f"{machine['device']}; {packages}; {peaks}{published}. Random weights.", ""]
        lines += [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
        for row in self.rows:
            if row.name in self.results:
                lines.append(f"| {' | '.join(self.cells(row))} |")
        return "\n".join(lines) + "\n" + COUNTED

    def cells(self, row: Row) -> list[str]:
        """Cells of a row of the table.

        Args:
            row: A row that was measured, or failed.
        """
        found, planned = self.results[row.name], self.planned_gib(row)
        name, plan = f"{row.title} (`{row.name}`)", _number(planned, ".1f")
        if "error" in found:
            what = "out of memory" if found.get("out_of_memory") else found["error"][:200].replace("|", "/")
            return [name, what, *[""] * 6, _number(found.get("peak_gib"), ".1f"), plan, ""]
        seconds, flops = found["seconds"], found["flops"]
        speed = {kind: flops[kind] / seconds for kind in ("needed", "executed")}
        peaks = self.machine or {}
        published, measured = peaks.get("published_peak"), peaks.get("measured_peak")
        return [
            name,
            found["what"],
            f"{seconds:.3f} ({found['fastest']:.3f}-{found['slowest']:.3f}, {found['steps']})",
            f"{found['tokens'] / seconds:,.0f} {found['token']}",
            f"{flops['needed'] / 1e12:,.3g}",
            _number(published and speed["needed"] / published, ".1%"),
            _number(measured and speed["needed"] / measured, ".1%"),
            _number(published and speed["executed"] / published, ".1%"),
            _number(found["peak_gib"], ".1f"),
            plan,
            _number(found.get("wait_share"), ".1%"),
        ]

    def line(self, name: str) -> str:
        """One line about a row, for the terminal.

        Args:
            name: Name of the row.
        """
        row = next(one for one in self.rows if one.name == name)
        cells = self.cells(row)[1:]
        told = [f"{head} {cell}" for head, cell in zip(HEADS[1:], cells) if cell]
        return "; ".join(told) + f"; all of it took {self.results[name].get('took', 0):.0f} s"


def _number(value: float | None, form: str) -> str:
    """A number as text; nothing where there is none."""
    return "n/a" if value is None else format(value, form)

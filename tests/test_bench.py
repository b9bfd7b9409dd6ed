"""`videoalign bench`: its numbers, what it prints and saves, and two processes."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench_kit import (
    BATCH,
    COLUMNS,
    DIMENSIONS,
    GENAI,
    RATED,
    SEED,
    STD,
    VALUES,
    VGRB,
    VOTES,
    Run,
    bench,
    exact,
    four_way,
    lines,
    rated,
    samples,
    walk,
    write,
)
from forked import started
from helpers import flags
from videoalign.commands.benchmarking import report
from videoalign.datamodules.benchmark import Benchmark
from videoalign.models.benchmark_protocols import PROTOCOLS
from videoalign.models.processor import processor_of
from videoalign.models.reward_statistics import Statistics

# --- numbers --------------------------------------------------------------------------------------


def scales(overall: str) -> list[float]:
    """Factors of the dimensions' margins in the overall margin."""
    return [1 / s if overall in ("sum", d) else 0.0 for d, s in zip(DIMENSIONS, STD)]


def margins_by_hand(kit: Path, rewards: dict[str, list[float]], overall: str) -> list[tuple[dict, dict[str, float]]]:
    """Rows of the table, each with its margins by column."""
    result = []
    for row in Benchmark(kit / "world").rows:
        each = [a - b for a, b in zip(rewards[row["key_A"]], rewards[row["key_B"]])]
        total = sum(m * s for m, s in zip(each, scales(overall)))
        result.append((row, dict(zip(COLUMNS, (*each, total)))))
    return result


RUNS = {
    "own sampling": ((), "sum"),
    "videogen-rewardbench": (VGRB, "sum"),
    "genai-bench": (GENAI, "TA"),
    "genai-bench, sum": ((*GENAI, "--overall", "sum"), "sum"),
    "overall MQ": (("--overall", "MQ"), "MQ"),
}


@pytest.mark.parametrize("name", RUNS)
def test_accuracies_are_those_of_the_rewards(name, kit, finished):
    options, overall = RUNS[name]
    done = finished(*options)
    assert done.result["overall"] == overall and done.result["videos"] == RATED
    assert done.result["protocol"] == (options[1] if "--benchmark" in options else None)
    pairs = margins_by_hand(kit, done.rewards, overall)
    for column in COLUMNS:
        known = [(VALUES[row[column]], m[column]) for row, m in pairs if row[column] in VALUES]
        labels, margins = zip(*known)
        decided = [label * margin > 0 for label, margin in known if label]
        row = done.result["accuracies"][column]
        assert row["without_ties"] == pytest.approx(np.mean(decided))
        assert row["with_ties"] == pytest.approx(exact(labels, margins))
        assert row["official"] == pytest.approx(walk(labels, margins))
        assert row["floor"] == pytest.approx(labels.count(0) / len(labels))
        assert (row["pairs"], row["decided"]) == (len(labels), len(decided))


def test_what_overall_adds_up_is_said(finished):
    """Rewards without statistics are raw, and weigh the dimensions as they come; another judge has none at all."""
    result = finished().result
    for statistics, words in (
        (result["statistics"], "the sum of the normalised dimensions"),
        (asdict(Statistics()), "the sum of the raw rewards, because the model has no statistics"),
        (None, "the sum of the ratings"),
    ):
        assert f"overall is {words}" in report({**result, "statistics": statistics})


@pytest.mark.parametrize("name", ["own sampling", "genai-bench"])
def test_sources_are_measured_on_the_pairs_they_take_part_in(name, kit, finished):
    options, overall = RUNS[name]
    done = finished(*options)
    pairs = margins_by_hand(kit, done.rewards, overall)
    assert set(done.result["sources"]) == {f"maker-{i}" for i in range(4)}
    for source, columns in done.result["sources"].items():
        own = [(row, m) for row, m in pairs if source in (row["A_model"], row["B_model"])]
        for column in COLUMNS:
            right = [VALUES[row[column]] * m[column] > 0 for row, m in own if VALUES.get(row[column])]
            assert columns.get(column, {"decided": 0})["decided"] == len(right)
            if right:
                assert columns[column]["without_ties"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize(("options", "overall"), [((), "TA"), (("--overall", "sum"), "sum")])
def test_four_ways_are_measured_on_the_votes(options, overall, kit, finished, tmp_path, capsys):
    done = finished(*GENAI)
    shutil.copytree(done.out / "world", tmp_path / "world")
    assert bench(kit, tmp_path, *GENAI, "--ways", 4, *options) == 0
    found = Run(tmp_path, capsys.readouterr().out)
    pairs = margins_by_hand(kit, done.rewards, overall)
    votes = [row["vote_type"] for row, _ in pairs]
    totals = {key: sum(r * s for r, s in zip(row, scales(overall))) for key, row in done.rewards.items()}
    levels = [(totals[row["key_A"]] + totals[row["key_B"]]) / 2 for row, _ in pairs]
    four = found.result["four_way"]
    assert four["accuracy"] == pytest.approx(four_way(votes, [m["Overall"] for _, m in pairs], levels))
    assert four["shares"] == {vote: pytest.approx(votes.count(vote) / len(votes)) for vote in sorted(set(votes))}
    assert four["commonest"] == max(four["shares"].values()) and four["pairs"] == len(votes)
    assert f"four-way (left, right, both good, both bad): {four['accuracy']:.3f}" in found.text
    assert "four_way" not in done.result
    assert "four-way" not in done.text


def judged(folder: Path, done: Run, vote: Callable[[list[float], list[float]], str]) -> Path:
    """The rated videos again, every pair with the vote that its rewards ask for."""
    rows = rated(RATED, SEED)
    for row in rows:
        row["vote_type"] = vote(done.rewards[row["key_A"]], done.rewards[row["key_B"]])
        row["Overall"] = VOTES[row["vote_type"]]
    return write(folder, samples((5, 9, 12, 7, 16, 10, 14)), rows)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_model_is_right_or_wrong_about_every_pair(share, kit, finished, tmp_path, capsys):
    """The labels follow the model's own TA, or are its opposite.

    Then every pair is right, one less by the official metric, which says why; or every pair is wrong.
    """
    sides = ["leftvote", "rightvote"] if share else ["rightvote", "leftvote"]
    judged(tmp_path / "judged", finished(*GENAI), lambda a, b: sides[a[2] < b[2]])
    assert bench(kit, tmp_path / "out", *GENAI, data=tmp_path / "judged") == 0
    text, row = capsys.readouterr().out, Run(tmp_path / "out", "", "judged").result["accuracies"]["Overall"]
    assert row["without_ties"] == row["with_ties"] == row["held_out"] == share and row["floor"] == 0.0
    assert row["official"] == pytest.approx(20 / 21 if share else 0.0)
    assert ("Overall: the official metric differs by -4.762: it never tries to call no pair a tie" in text) == bool(
        share
    )
    assert ("official metric differs" in text) == bool(share)


def test_both_good_is_told_from_both_bad_by_the_mean_of_the_two(kit, finished, tmp_path):
    means = [(a[2] + b[2]) / 2 for a, b in itertools.combinations(finished(*GENAI).rewards.values(), 2)]
    middle = sum(sorted(means)[10:12]) / 2
    vote = ["bothbad_vote", "tievote"]
    judged(tmp_path / "judged", finished(*GENAI), lambda a, b: vote[(a[2] + b[2]) / 2 > middle])
    assert bench(kit, tmp_path / "out", *GENAI, "--ways", 4, data=tmp_path / "judged") == 0
    four = Run(tmp_path / "out", "", "judged").result["four_way"]
    assert four["accuracy"] == 1.0 and four["shares"] == {"bothbad_vote": 11 / 21, "tievote": 10 / 21}


def test_four_ways_need_the_votes(kit, tmp_path, capsys):
    rows = [{k: v for k, v in row.items() if k != "vote_type"} for row in rated(2)]
    write(tmp_path / "voteless", samples((5, 7)), rows)
    assert bench(kit, tmp_path / "out", *GENAI, "--ways", 4, data=tmp_path / "voteless") == 2
    assert "voteless has no column vote_type" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "grid"),
    [((), [8, 40, 64]), (VGRB, [4, 40, 64]), (GENAI, [4, 24, 40])],
    ids=["own", "videogen-rewardbench", "genai-bench"],
)
def test_frames_are_sampled_as_the_protocol_says(options, grid, kit, forwards, tmp_path):
    """The video has 4 s at 4 fps, 512 x 320 pixels; a patch has 2 frames of 8 x 8 pixels, sides are multiples of 16."""
    videos = samples((16, 16), 320, 512, fps=4)
    videos[1] = replace(videos[1], content=videos[0].content, record=videos[0].record)
    write(tmp_path / "large", videos, rated(2))
    assert bench(kit, tmp_path / "out", *options, data=tmp_path / "large") == 0
    assert forwards == [[grid, grid]]
    result = Run(tmp_path / "out", "", "large").result
    want = PROTOCOLS[options[1]].sampling if options else processor_of(kit / "model").sampling
    assert result["sampling"] == want.to_dict()


@pytest.mark.parametrize(
    ("name", "height", "width"),
    [("videogen-rewardbench", 32, 32), ("videogen-rewardbench", 720, 1280), ("genai-bench", 320, 512)],
)
def test_no_frame_exceeds_the_pixel_budget(name, height, width):
    sampling = PROTOCOLS[name].sampling
    h, w = sampling.size(height, width, 28)
    assert h * w <= sampling.max_pixels


# --- what is printed and saved --------------------------------------------------------------------


def printed(text: str, name: str) -> list[str]:
    """Cells of the printed line that begins with a name."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"{name} "))
    return line.removeprefix(name).split()


@pytest.mark.parametrize(
    ("options", "title"),
    [
        (VGRB, "VideoGen-RewardBench: 21 pairs of 7 videos, 2 fps, at most 200704 pixels (448 x 448)"),
        (GENAI, "GenAI-Bench (video): 21 pairs of 7 videos, 2 fps, at most 65536 pixels (256 x 256)"),
    ],
)
def test_published_rows_stand_beside_the_measured_one(options, title, finished):
    done, protocol = finished(*options), PROTOCOLS[options[1]]
    assert title in done.text
    overall = "TA" if protocol.overall == "TA" else "the sum of the normalised dimensions"
    assert f"overall is {overall}" in done.text
    rows = [done.result["accuracies"][column] for column in protocol.columns]

    def per_cent(*keys: Callable[[dict], float] | None) -> list[str]:
        return [f"{100 * key(row):.2f}" if key else "-" for row in rows for key in keys]

    assert printed(done.text, "measured") == per_cent(lambda r: r["without_ties"], lambda r: r["with_ties"])
    for end, name in (min, "  95 % from"), (max, "  95 % to"):
        ends = [f"{100 * end(row[kind]):.2f}" for row in rows for kind in ("interval", "interval_with_ties")]
        assert printed(done.text, name) == ends
    assert printed(done.text, "  by the official metric") == per_cent(
        lambda r: r["without_ties"], lambda r: r["official"]
    )
    assert printed(done.text, "  held-out threshold") == per_cent(None, lambda r: r["held_out"])
    assert printed(done.text, "always a tie") == per_cent(None, lambda r: r["floor"])
    assert printed(done.text, "  pairs") == [str(n) for row in rows for n in (row["decided"], row["pairs"])]
    for method in protocol.published["Overall"]:
        want = [f"{value:.2f}" for column in protocol.columns for value in protocol.published[column][method]]
        assert printed(done.text, method) == want
    for row in rows:
        assert row["interval"][0] <= row["without_ties"] <= row["interval"][1]
        assert row["interval_with_ties"][0] <= row["with_ties"] <= row["interval_with_ties"][1]


@pytest.mark.parametrize("options", [VGRB, GENAI], ids=lambda options: options[1])
def test_sources_are_printed(options, finished):
    done = finished(*options)
    for source, columns in done.result["sources"].items():
        cells = printed(done.text, source)
        assert [float(cell) for cell in cells[::2]] == [round(columns[c]["without_ties"], 3) for c in COLUMNS]
        assert cells[1::2] == [str(columns[c]["decided"]) for c in COLUMNS]


@pytest.mark.parametrize(
    ("official", "best", "shift"),
    [(0.65, 0.6, "+5.00"), (0.5, 0.6, "-10.00"), (0.6, 0.6, None), pytest.param(0.612537, 0.612575, "-0.0")],
)
def test_the_reason_stands_below_where_the_metrics_differ(official, best, shift, finished):
    result = finished(*GENAI).result
    result["accuracies"]["Overall"] |= {"official": official, "with_ties": best}
    text = report(result)
    assert printed(text, "measured")[1] == f"{100 * best:.2f}"
    assert printed(text, "  by the official metric")[1] == f"{100 * official:.2f}"
    reasons = [line for line in text.splitlines() if "the official metric differs" in line]
    assert len(reasons) == (shift is not None)
    if reasons:
        assert reasons[0].startswith(f"Overall: the official metric differs by {shift}")


def test_numbers_pictures_and_events_are_saved(finished):
    done = finished(*GENAI)
    assert set(done.result["accuracies"]) == set(COLUMNS)
    assert done.result["statistics"]["std"] == list(STD)
    with Image.open(done.out / "world.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(10**6)) > 10
    events = EventAccumulator(str(done.out / "world"), size_guidance={"tensors": 0}).Reload()
    assert events.Tags()["images"] == ["bench/world"]
    (text,) = events.Tensors("bench/world/text_summary")
    shown = [line.strip() for line in text.tensor_proto.string_val[0].decode().splitlines() if line.strip()]
    assert "GenAI-Bench (video)" in shown[0]
    assert all(line in done.text for line in shown)


def test_two_sets_are_measured_in_one_run(kit, finished, tmp_path, capsys):
    write(tmp_path / "second", samples((6, 11, 13), 48), rated(3, VQ="same", MQ="A", TA="B", Overall="same"))
    assert bench(kit, tmp_path / "out", *VGRB, "--data", tmp_path / "second") == 0
    text = capsys.readouterr().out
    assert text.count("VideoGen-RewardBench:") == 2
    assert "21 pairs of 7 videos" in text
    assert "3 pairs of 3 videos" in text
    first, second = Run(tmp_path / "out", ""), Run(tmp_path / "out", "", "second")
    assert first.result == finished(*VGRB).result
    assert second.result["benchmark"] == "second"
    assert len(second.rewards) == 3
    row = second.result["accuracies"]["Overall"]  # ties only: undefined, not wrong, and valid JSON
    assert row["without_ties"] is None
    assert row["interval"] == [None, None]
    assert row["with_ties"] == 1.0


@pytest.mark.parametrize("options", [VGRB, GENAI], ids=lambda options: options[1])
def test_a_set_without_overall_labels_is_no_public_benchmark(options, kit, forwards, tmp_path, capsys):
    write(tmp_path / "mine", samples((5, 7)), rated(2, VQ="A", MQ="A", TA="A", Overall=""))
    assert bench(kit, tmp_path / "out", *options, data=tmp_path / "mine") == 2
    title = PROTOCOLS[options[1]].title
    assert f"mine has no label in Overall, so it is not {title}" in capsys.readouterr().err
    assert not forwards
    assert not (tmp_path / "out").exists()


def test_a_set_without_any_label_is_refused(kit, tmp_path, capsys):
    write(tmp_path / "mine", samples((5, 7)), rated(2, VQ="invalid", MQ="", TA="", Overall=""))
    assert bench(kit, tmp_path / "out", data=tmp_path / "mine") == 2
    assert "mine" in capsys.readouterr().err


def test_results_are_not_written_into_the_set(kit, tmp_path, capsys):
    shutil.copytree(kit / "world", tmp_path / "world")
    before = sorted(path.name for path in (tmp_path / "world").iterdir())
    assert bench(kit, tmp_path, data=tmp_path / "world") == 2
    assert "world is not a folder of rewards" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == before


def test_results_are_not_written_beside_the_shards_either(kit, tmp_path, capsys):
    shutil.copytree(kit / "world", tmp_path / "world")
    before = sorted(path.name for path in (tmp_path / "world").iterdir())
    for out in ("world", "world/results"):
        assert bench(kit, tmp_path / out, data=tmp_path / "world") == 2
        assert "lies in the set" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "world").iterdir()) == before


# --- two processes --------------------------------------------------------------------------------


def two_processes(kit: Path, out: Path, *options: object, data: Path | str = "world") -> subprocess.CompletedProcess:
    """The installed command, with two gloo processes."""
    given = flags(model=kit / "model", data=kit / data, out=out, device="cpu", workers=0, batch_size=BATCH, devices=2)
    return started(Path(sys.executable).with_name("videoalign"), "bench", *given, *options)


@pytest.mark.slow
def test_processes_share_the_videos_and_agree_with_one(kit, finished, forwards, tmp_path):
    """Two processes score one set and go on with another that one process left; one goes on with what two left."""
    whole, out = lines(finished().out / "world"), tmp_path / "out"
    shutil.copytree(kit / "world", tmp_path / "begun")
    shutil.copytree(finished().out / "world", out / "begun")
    begun = out / "begun" / "rewards.0.jsonl"
    begun.write_text("".join(f"{line}\n" for line in begun.read_text().splitlines()[:BATCH]))
    done = two_processes(kit, out, "--data", tmp_path / "begun")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("7 pairs of") == 0
    assert done.stdout.count("21 pairs of 7 videos") == 2  # one process prints, for both sets
    shares = [(out / "world" / f"rewards.{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert sorted(len(share) for share in shares) == [3, 4]  # batches of 2, 2, 2 and 1 in turn
    for name in ("world", "begun"):
        assert lines(out / name) == whole  # each video once, and to the last digit
        assert Run(out, "", name).result == {**finished().result, "benchmark": name}
    for rank in range(2):
        file = out / "world" / f"rewards.{rank}.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:BATCH]))
    assert bench(kit, out) == 0
    assert sum(map(len, forwards)) == RATED - 2 * BATCH
    assert lines(out / "world") == whole
    assert Run(out, "").result == finished().result


@pytest.mark.slow
def test_a_process_may_have_nothing_left_to_score(kit, finished, tmp_path):
    """This happens after an interruption, and with fewer batches than processes."""
    shutil.copytree(finished().out / "world", tmp_path / "world")
    file = tmp_path / "world" / "rewards.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    done = two_processes(kit, tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
    assert lines(tmp_path / "world") == lines(finished().out / "world")
    assert Run(tmp_path, "").result == finished().result


@pytest.mark.slow
def test_a_mistake_met_by_one_of_two_processes_is_one_message(kit, tmp_path):
    videos = samples((5, 9, 12, 7, 16, 10, 14, 8))
    order = sorted(videos[:RATED], key=lambda v: -v.record["num_frames"] * v.record["width"])
    order[BATCH].content = order[BATCH].content[:300]  # of the second process's first batch
    write(tmp_path / "world", videos, rated(RATED, SEED))
    done = two_processes(kit, tmp_path / "out", data=tmp_path / "world")
    assert done.stderr.count("cannot be scored") == 1 and done.stderr.count("videoalign: error:") == 1
    assert "Traceback" not in done.stderr
    assert done.returncode == 2

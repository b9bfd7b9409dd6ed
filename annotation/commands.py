"""`videoalign annotate`: its commands and their options.

Nothing heavy is imported here, so that `--help` is quick: each command imports what it needs when it runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..commands.parsing import STAGES, Commands, command, count, group, needs_extra

EXTRA = ("fastapi", "krippendorff", "pydantic", "sqlalchemy", "starlette", "uvicorn")
"""Libraries that only `pip install 'videoalign[annotate]'` installs."""
VOTES = "all votes are stored; the same command goes on"
"""What is left when the server is stopped."""
ROUND = ("per_prompt", "validation", "benchmark", "seed", "protocol", "references", "select", "model", "device")
ROUND += ("mask", "masks", "images")
"""Options of a new round; absent from the namespace where they are not given, so that the defaults are `begin`'s."""


def register(commands: Commands) -> None:
    """Add `annotate` and its commands.

    Args:
        commands: What ``add_subparsers`` of the command line's parser returned.
    """
    text = "collect preferences: pairs to rate, a page to rate them on, agreement, export"
    people = group(commands, "annotate", text)
    _add_serve(people)
    _add_begin(people)
    _add_import_label_studio(people)
    _add_people(people)
    _add_simulate(people)
    _add_results(people)


# --- options ----------------------------------------------------------------------------------------------------------


def _add_serve(people: Commands) -> None:
    add = _round_options(
        command(people, "serve", _serve, "serve the page to rate on; begins the round if --db is new", VOTES)
    )
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen at; with the default only this machine can open the page",
    )
    add(
        "--refuse-fast",
        action="store_true",
        default=False,
        help="refuse votes that come before one full play of all videos on the screen; without it they are counted in "
        "the overview and marked in the export",
    )
    add("--port", type=count(1, 65535), default=8000, help="port to listen at")
    add(
        "--allow-host",
        nargs="+",
        default=[],
        metavar="NAME",
        help="further names under which people open the page, such as that of a proxy before it; besides them only "
        "127.0.0.1, localhost, [::1] and --host are served",
    )
    add(
        "--guideline",
        help="YAML file with a guideline that replaces the paper's: a list of parts, each with title, question, "
        "points, good and bad",
    )


def _add_begin(people: Commands) -> None:
    _round_options(command(people, "begin", _begin, "choose the pairs to rate, and write them to a new file of votes"))


def _round_options(parser: argparse.ArgumentParser) -> Callable:
    """Add the options of a new round to a command; returns its method to add more."""
    parser.argument_default = argparse.SUPPRESS
    add = parser.add_argument
    add("--videos", required=True, help="folder of a videos set with several sources for each prompt")
    add("--db", required=True, help="file of votes (SQLite)")
    add(
        "--per-prompt",
        type=count(1),
        help="number of pairs (default 3), single videos or rankings (default all) that are rated of each prompt",
    )
    add("--validation", type=float, help="share of the prompts that is held out for validation (default 0.1)")
    add("--benchmark", type=float, help="share of the prompts that is held out for a benchmark (default 0.1)")
    add("--seed", type=count(0), help="seed of the choice of pairs (default 0)")
    add(
        "--protocol",
        help="YAML file with rules that differ from the paper's, such as kind (pairs, single or ranking), votes per "
        "pair, overall, scores, repeats. Training rounds, repetitions, undo and flags work in every kind; of single "
        "videos, reviewers see only those that were flagged",
    )
    add(
        "--references",
        help="CSV file with pairs whose right labels are known, for a training round before the work; columns key_A, "
        "key_B, VQ, MQ, TA; scores of single videos stand beside key_A alone and are right within 1, rankings such as "
        "B>A=C beside key_A to key_F",
    )
    add(
        "--mask",
        nargs="+",
        metavar="SOURCE=X,Y,W,H",
        help="boxes that hide watermarks, in pixels or in shares of the picture; '*' stands for all sources, because a "
        "box that only one source has tells that source as its watermark does. They are burned into the videos that "
        "people see and that are exported",
    )
    add("--masks", help="CSV file of such boxes, with columns source, x, y, w, h")
    add(
        "--images",
        help="CSV file with the images that videos were made of (image-to-video), to be shown beside the prompt; "
        "columns image (a path, from the CSV file's folder) and prompt or key (default: the images that the set holds)",
    )
    add(
        "--select",
        choices=("random", "uncertain"),
        help="which pairs are rated first: random ones, or those about which --model is least certain (default random)",
    )
    add("--model", nargs="+", help="folders of one or two reward models for --select uncertain")
    add("--device", choices=("auto", "cpu", "gpu"), help="device on which the reward models compute (default auto)")
    return add


def _add_import_label_studio(people: Commands) -> None:
    text = "read pairwise ratings that were collected in Label Studio into a new file of votes"
    add = command(people, "import-label-studio", _import_label_studio, text).add_argument
    add("file", help="export of the Label Studio project, as JSON")
    add("--videos", required=True, help="folder of the videos set that was rated")
    add("--db", required=True, help="file of votes (SQLite) to make")
    add(
        "--reviewer",
        nargs="*",
        default=[],
        help="people, as the export calls them, whose votes are final where others differ",
    )
    add(
        "--names",
        choices=("both", "paths", "keys", "files"),
        default="both",
        help="how the export names videos: by paths of the set's records, by its keys, or by file names in whatever "
        "folder; 'both' reads paths and keys, and refuses names that could be either",
    )
    add("--protocol", help="YAML file with rules that differ from the paper's")
    add("--validation", type=float, default=0.1, help="share of the prompts that is held out for validation")
    add("--benchmark", type=float, default=0.1, help="share of the prompts that is held out for a benchmark")
    add("--seed", type=count(0), default=0, help="seed of the choice of the held-out prompts")


def _add_people(people: Commands) -> None:
    invited = command(people, "invite", _invite, "add a person to the round, and print the person's secret link")
    invited.add_argument(
        "name", help="name of the person, which the overview shows; nobody else in the round may have it"
    )
    invited.add_argument(
        "--role",
        choices=("annotator", "reviewer"),
        default="annotator",
        help="annotators vote; reviewers decide where votes differ",
    )
    invited.add_argument("--url", default="http://127.0.0.1:8000", help="address at which the page is served")
    revoked = command(people, "revoke", _revoke, "make a person's link worthless; the person's votes stay")
    revoked.add_argument("name", help="name under which the person was invited")
    for parser in (invited, revoked):
        parser.add_argument("--db", required=True, help="file of votes (SQLite)")


def _add_simulate(people: Commands) -> None:
    text = "measure in the miniature world what it is worth to rate uncertain pairs first"
    add = command(people, "simulate", _simulate, text, STAGES).add_argument
    add("--out", default="runs/simulation", help="folder of results; finished stages in it are not repeated")
    add("--seeds", type=count(1), default=3, help="number of seeds that are averaged")
    text = "let simulated people rate a round of the miniature world, to try a protocol before people come"
    add = command(people, "rehearse", _rehearse, text, VOTES).add_argument
    add("--videos", required=True, help="folder of the miniature world's videos set that is rated")
    add("--db", required=True, help="file of votes (SQLite) of a round that has begun")
    add("--people", type=count(1), default=3, help="number of simulated people, beside a simulated reviewer")
    add("--seed", type=count(0), default=0, help="seed of what they see and say")


def _add_results(people: Commands) -> None:
    status = command(people, "status", _status, "print progress, agreement and people as JSON")
    export = command(people, "export", _export, "write the decided pairs as shards, with a data card")
    for parser in (status, export):
        parser.add_argument("--db", required=True, help="file of votes (SQLite)")
    export.add_argument("--videos", required=True, help="folder of the videos set that was rated")
    export.add_argument("--out", required=True, help="folder to make")
    export.add_argument(
        "--pairs-margin",
        type=float,
        help="in a round of single videos, make pairs of videos of one prompt; mean scores that differ by this at most "
        "are a tie. Without it the export holds videos with scores.csv",
    )
    export.add_argument(
        "--spreadsheet-safe",
        action="store_true",
        help="let an apostrophe precede what spreadsheets would take for a formula in all tables, not in decided.csv "
        "alone; this package reads such tables back as they were, other programs see the apostrophe",
    )
    export.add_argument("--names", action="store_true", help="call people by their names; else they are numbers")


# --- what the commands do ---------------------------------------------------------------------------------------------


_needs_extra = needs_extra("annotate", "annotate", EXTRA)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The options of a new round that were given."""
    return {name: getattr(options, name) for name in ROUND if name in options}


@_needs_extra
def _serve(o: argparse.Namespace) -> None:
    from .serving import serve

    serve(o.videos, o.db, o.host, o.port, getattr(o, "guideline", None), o.allow_host, o.refuse_fast, **_given(o))


@_needs_extra
def _begin(o: argparse.Namespace) -> None:
    from .beginning import begin

    begin(o.videos, o.db, **_given(o))


@_needs_extra
def _import_label_studio(o: argparse.Namespace) -> None:
    from .beginning import read_protocol, watchable
    from .label_studio import import_label_studio
    from .vote_file import check_new

    check_new(o.db)
    videos, protocol, shares = watchable(o.videos), read_protocol(o.protocol), (o.validation, o.benchmark)
    counts = import_label_studio(o.file, videos, o.db, shares, o.seed, protocol, tuple(o.reviewer), o.names)
    print(f"{counts['pairs']} pairs, {counts['votes']} votes of {counts['people']} people: {o.db}")
    if skipped := counts.get("skipped"):
        print(f"left out: {skipped} annotations that were skipped or cancelled")
    if repeated := counts.get("repeated"):
        print(f"left out: {repeated} copies of annotations that the export holds more than once")


@_needs_extra
def _invite(o: argparse.Namespace) -> None:
    from .store import Store

    print(f"{o.url.rstrip('/')}/a/{Store(o.db).invite(o.name, o.role)}")


@_needs_extra
def _revoke(o: argparse.Namespace) -> None:
    from .store import Store

    Store(o.db).revoke(o.name)
    print(f"the link of {o.name} opens nothing any more; what was rated stays")


@_needs_extra
def _simulate(o: argparse.Namespace) -> None:
    from .simulate import simulate

    simulate(o.out, o.seeds)


@_needs_extra
def _rehearse(o: argparse.Namespace) -> None:
    from ..datamodules.shards import ShardSet
    from .rehearsal import rehearse
    from .store import Store

    found = rehearse(Store(o.db), ShardSet(o.videos, "videos"), o.people, o.seed)
    print(", ".join(f"{number} {name}" for name, number in found.items()))


@_needs_extra
def _status(o: argparse.Namespace) -> None:
    from .overview import overview
    from .store import Store

    found = overview(Store(o.db).round())
    found = json.loads(json.dumps(found), parse_constant=lambda name: None)  # JSON has no NaN
    print(json.dumps(found, indent=1, ensure_ascii=False))


@_needs_extra
def _export(o: argparse.Namespace) -> None:
    from ..datamodules.shards import ShardSet
    from .export import export
    from .store import Store

    store = Store(o.db)
    card = export(store, ShardSet(o.videos, "videos"), o.out, o.names, o.pairs_margin, o.spreadsheet_safe)
    what = "videos" if store.protocol.kind == "single" and o.pairs_margin is None else "pairs"
    print("\n".join(f"{Path(o.out) / split}: {count} {what}" for split, count in card["exported"].items()))
    print(f"{Path(o.out) / 'card.md'}: agreement, labels, protocol")

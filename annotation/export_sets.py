"""The sets of an export: rated pairs to train on, a benchmark with ``pairs.csv``, and scored videos."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datamodules.benchmark import PAIRS
from ..datamodules.ratings import COLUMNS
from ..datamodules.sample_images import SampleImage, read_image
from ..datamodules.set_index import shape_by_side
from ..datamodules.shards import ShardWriter
from ..datamodules.spreadsheets import exact
from ..models.dimensions import DIMENSIONS
from .protocol import Vote
from .rated_pairs import RatedPair, ScoredVideo
from .shown import Shown, mask_rows

SCORES, MASKS = "scores.csv", "masks.csv"


@dataclass(frozen=True)
class SetWriter:
    """Writes the sets of one export.

    Attributes:
        shown: The videos as people saw them.
        called: What each person is called, by name.
        cell: Writes a text as a cell of a table.
    """

    shown: Shown
    called: Mapping[str, str]
    cell: Callable[[str], str] = exact

    def write_pairs(self, out: Path, pairs: Sequence[RatedPair]) -> None:
        """Write a set of pairs; each pair's JSON holds its votes."""
        with ShardWriter(out, "pairs") as writer:
            for pair in pairs:
                both = [self.shown.contents[key] for key in pair.keys]
                media = {side: content.read("mp4") for side, content in zip("ab", both)}
                writer.write(pair.key, media, self._record(pair), self._image(pair.keys[0]))
            self._write_masks(writer)

    def write_benchmark(self, out: Path, pairs: Sequence[RatedPair]) -> None:
        """Write a set of videos, each once, and ``pairs.csv``."""
        with ShardWriter(out, "videos") as writer:
            self._write_videos(writer, dict.fromkeys(key for pair in pairs for key in pair.keys))
            writer.write_table(PAIRS, [*self._benchmark_rows(pairs)], self.cell)
            self._write_masks(writer)

    def write_scored(self, out: Path, videos: Sequence[ScoredVideo]) -> None:
        """Write a set of videos and ``scores.csv``."""
        with ShardWriter(out, "videos") as writer:
            self._write_videos(writer, [video.row.key_a for video in videos])
            writer.write_table(SCORES, [*self.score_rows(videos)], self.cell)
            self._write_masks(writer)

    def score_rows(self, videos: Sequence[ScoredVideo]) -> Iterator[dict[str, Any]]:
        """Rows of ``scores.csv``: raters, and the mean and standard deviation of each column."""
        for video in videos:
            row = video.row
            texts = {"split": row.split, "key": row.key_a, "prompt": row.prompt, "source": row.source_a}
            yield texts | self.image_cell(row.key_a) | video.cells()

    def image_cell(self, key: str) -> dict[str, str]:
        """The column ``image`` with the name of the image that a video was made of, in a round that has images."""
        path = self.shown.images.get(key)
        return {"image": path.name if path else ""} if self.shown.images else {}

    def _write_videos(self, writer: ShardWriter, keys: Any) -> None:
        for key in keys:
            content = self.shown.contents[key]
            record = content.record | self._image_entry(key)
            writer.write(key, {"": content.read("mp4")}, record, self._image(key))

    def _image(self, key: str) -> SampleImage | None:
        """The image that a video was made of, as the page showed it."""
        path = self.shown.images.get(key)
        return read_image(path, str(path)) if path else None

    def _image_entry(self, key: str) -> dict[str, Any]:
        """What the record of a sample says of its image."""
        image = self._image(key)
        return {"image": image.entry(image.name)} if image else {}

    def _write_masks(self, writer: ShardWriter) -> None:
        """Add the table of the boxes that hide watermarks, where there are any."""
        if self.shown.masks:
            writer.write_table(MASKS, mask_rows(self.shown.masks), self.cell)

    def _record(self, pair: RatedPair) -> dict[str, Any]:
        """The JSON of a pair."""
        record: dict[str, Any] = {
            "prompt": pair.prompt,
            "labels": dict(pair.labels),
            "sources": dict(zip("AB", pair.sources)),
            "keys": dict(zip("AB", pair.keys)),
            "votes": [vote_record(vote, self.called) for vote in pair.votes],
            **self._image_entry(pair.keys[0]),
        }
        shape = shape_by_side(*(self.shown.contents[key].record for key in pair.keys))
        record |= {name: sides for name, sides in shape.items() if None not in sides.values()}
        if pair.scores and all(len(row) == len(DIMENSIONS) for row in pair.scores.values()):
            record["scores"] = pair.scores
        return record

    def _benchmark_rows(self, pairs: Sequence[RatedPair]) -> Iterator[dict[str, str]]:
        """Rows of ``pairs.csv``."""
        for pair in pairs:
            yield {
                "key_A": pair.keys[0],
                "key_B": pair.keys[1],
                "prompt": pair.prompt,
                "A_model": pair.sources[0],
                "B_model": pair.sources[1],
                **self.image_cell(pair.keys[0]),
                **{column: pair.labels.get(column, "") for column in COLUMNS},
            }


def vote_record(vote: Vote, called: Mapping[str, str]) -> dict[str, Any]:
    """A vote as the JSON of a pair holds it.

    Args:
        vote: The vote.
        called: What each person is called, by name.
    """
    watched = {} if vote.watched is None else {"watched": round(vote.watched, 2), "fast": vote.is_fast}
    return {
        "annotator": called[vote.annotator],
        "choices": vote.choices,
        "scores": vote.scores,
        "flags": list(vote.flags),
        "review": vote.review,
        "seconds": round(vote.seconds, 2),
        **watched,
    }

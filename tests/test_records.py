"""Whether a sample has a clean partner is stored with it, and known without opening a picture."""

import os
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from clear.data.records import GROUP, INCOMING, Sample, ShardWriter, read_samples, write_samples
from clear.errors import ClearError

CLEAN_ONE = Sample("a", "scenes", "sft", b"clean", "")
COPY = replace(CLEAN_ONE, id="b", degraded=b"dark", corruption="dark", severity="high")
UNCHANGED = replace(COPY, id="c", degraded=b"clean")
ALONE = replace(COPY, id="d", image=b"fog", degraded=b"fog", corruption="ward", severity=INCOMING, paired=False)
SAMPLES = CLEAN_ONE, COPY, UNCHANGED, ALONE


def test_samples_are_read_back_as_they_were(tmp_path):
    write_samples(tmp_path, SAMPLES)
    assert tuple(read_samples(tmp_path)) == SAMPLES


def test_a_writer_holds_no_more_than_a_row_group(tmp_path):
    """What was added is on the disk but for the last group, in the shard as a whole."""
    picture, writer = os.urandom(2000), ShardWriter(tmp_path / "set")
    for n in range(3 * GROUP + 1):
        writer.add(replace(COPY, id=f"s{n}", image=picture, degraded=os.urandom(2000)))
    written = (tmp_path / "set.partial" / "00000.parquet").stat().st_size
    assert written >= 3 * GROUP * 2000
    writer.close()
    with pq.ParquetFile(tmp_path / "set" / "00000.parquet") as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [GROUP] * 3 + [1]
    assert sum(1 for _ in read_samples(tmp_path / "set")) == writer.count == 3 * GROUP + 1


def test_a_missing_partner_is_known_without_opening_pictures(tmp_path, monkeypatch):
    """A degradation that left its picture as it was, byte for byte, has a partner all the same."""
    write_samples(tmp_path, SAMPLES)
    read, asked = pq.ParquetFile.iter_batches, []
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, **how: (asked.extend(how["columns"]), read(self, **how))[1]
    )
    assert [sample.paired for sample in read_samples(tmp_path, ["id", "paired"])] == [True, True, True, False]
    assert asked == ["id", "paired"]


def test_a_shard_of_an_earlier_version_is_named_with_a_remedy(tmp_path):
    write_samples(tmp_path, SAMPLES)
    file = tmp_path / "00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["paired"]), file)
    with pytest.raises(
        ClearError, match=r"00000.parquet: column 'paired' is missing; .*\. Run the stage that makes it"
    ):
        next(read_samples(tmp_path))

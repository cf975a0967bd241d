"""The file of predictions: its metrics, the same bytes again, and rows and files that are refused."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clear.bench import predictions
from clear.errors import ClearError
from tests.helpers.predictions import ROW, frame_of


def test_metrics_count_every_row_once():
    changes = [{"sample": f"s{n % 4}", "correct": n % 3 > 0, "restored": n % 2 == 0} for n in range(12)]
    changes[3] |= {"prediction": "", "correct": False}
    clean = [change | {"corruption": "clean", "severity": "clean", "psnr_degraded": math.inf} for change in changes]
    clean = [change | {"psnr_restored": 27.0, "ssim_restored": 0.9} for change in clean]
    changes = [change | {"psnr_restored": 22.0 if change["restored"] else None} for change in changes]
    found = predictions.metrics(frame_of(*changes, *clean), resamples=50)
    assert found["accuracy"] == {"clean": pytest.approx(8 / 12), "high": pytest.approx(8 / 12)}
    assert found["questions"] == {"clean": 12, "high": 12} and found["no_answer"] == 2
    assert found["call_rate"] == {"clean": 0.5, "high": 0.5}
    assert found["psnr"] == {
        "clean": {"degraded": None, "restored": 27.0},
        "high": {"degraded": 18.0, "restored": 22.0},
    }
    assert found["robustness"] == {"absolute": pytest.approx(8 / 12), "relative": pytest.approx(1)}
    assert found["average"] is None, "two levels are missing, so there is no average"
    assert found["interval"]["high"][0] <= found["accuracy"]["high"] <= found["interval"]["high"][1]
    assert set(found["corruption"]) == {"clean", "jpeg"} and found["task"]["reading"]["high"] == pytest.approx(8 / 12)
    with pytest.raises(ClearError, match="Severity high has predictions for one image only"):
        predictions.metrics(frame_of({}, {}))


def test_predictions_survive_the_file(tmp_path):
    path, rows = tmp_path / "deep/base.parquet", [ROW, ROW | {"question": "q1", "restored_png": b"png"}]
    assert predictions.write(path, rows) == 2
    frame = predictions.read(path)
    assert list(frame.columns) == predictions.SCHEMA.names
    assert frame.restored_png.tolist() == [None, b"png"] and frame.psnr_restored.isna().all()
    before = path.read_bytes()
    predictions.write(path, rows)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severity": "hard"}, "row 0 .* severity that is not one of clean, low, mid, high"),
        ({"severity": "clean"}, "row 0 .* clean in only one of"),
        ({"prediction": ""}, "row 0 .* no prediction and is marked correct"),
        ({"answer": None}, "column 'answer' holds a null"),
        ({"question": "q1"}, "row 1 .* repeats the key"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path, change, message):
    path = tmp_path / "grpo.parquet"
    predictions.write(path, [ROW | change, ROW | {"question": "q1"}])
    with pytest.raises(ClearError, match=rf"grpo\.parquet: {message}.*dvc repro evaluate@grpo"):
        predictions.read(path)


def test_files_that_are_not_predictions_are_refused(tmp_path):
    path = tmp_path / "sft.parquet"
    with pytest.raises(ClearError, match=r"sft\.parquet is not here; run `dvc repro evaluate@sft`"):
        predictions.read(path)
    path.write_bytes(b"PAR1 but not really")
    with pytest.raises(ClearError, match="not a readable Parquet file"):
        predictions.read(path)
    table = pa.Table.from_pylist([ROW], predictions.SCHEMA)
    pq.write_table(table.drop_columns(["restored"]), path)
    with pytest.raises(ClearError, match=r"sft\.parquet: column 'restored' is missing"):
        predictions.read(path)
    pq.write_table(table.set_column(12, "tokens", pa.array(["7"])), path)
    with pytest.raises(ClearError, match="column 'tokens' is string, expected int64"):
        predictions.read(path)
    predictions.write(path, [])
    with pytest.raises(ClearError, match="no predictions in this file"):
        predictions.read(path)
    with pytest.raises(ClearError, match="row 0 has missing or unknown columns: tokens"):
        predictions.write(path, [{key: value for key, value in ROW.items() if key != "tokens"}])

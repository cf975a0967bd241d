"""Predictions of one model, as rows of its file."""

import pandas as pd

ROW = {
    "sample": "s0",
    "corruption": "jpeg",
    "severity": "high",
    "question": "q0",
    "task": "reading",
    "pair": "",
    "text": "which letter ?",
    "answer": "k",
    "prediction": "k",
    "output": "<answer>k</answer>",
    "restored": False,
    "correct": True,
    "tokens": 7,
    "psnr_degraded": 18.0,
    "ssim_degraded": 0.5,
    "psnr_restored": None,
    "ssim_restored": None,
    "restored_png": None,
}


def frame_of(*changes: dict) -> pd.DataFrame:
    return pd.DataFrame([ROW | {"question": f"q{number}"} | change for number, change in enumerate(changes)])

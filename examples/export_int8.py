"""Compress, export to ONNX, and let onnxruntime quantise what came out to int8: the two savings multiply."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

import rankfold as rf
from rankfold.digits import calibration, held_out, trained


class Scans(CalibrationDataReader):  # type: ignore[misc]
    """The unlabelled scans, as onnxruntime's calibration asks for them."""

    def __init__(self, name: str) -> None:
        self.batches: Iterator[dict[str, np.ndarray]] = iter({name: batch.numpy()} for batch in calibration())

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def decisions(file: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return np.concatenate([session.run(None, {given.name: x.numpy()})[0].argmax(1) for x, _ in held_out()])


model, images = trained(), calibration()
out = rf.compress(model, images, budget=rf.Budget(params=0.5), families=[rf.WhitenedSVD()], selector=rf.Lagrangian())

with tempfile.TemporaryDirectory() as folder:
    whole, small, ready, int8 = (Path(folder) / f"{name}.onnx" for name in ("whole", "small", "ready", "int8"))
    rf.export(model, whole, images[0])
    done = rf.export(out.model, small, images[0])
    quant_pre_process(str(small), str(ready))
    quantize_static(str(ready), str(int8), Scans(done.inputs[0]), quant_format=QuantFormat.QDQ, per_channel=True)
    expected = decisions(whole)
    for file in (whole, small, int8):
        same = (decisions(file) == expected).mean()
        print(
            f"{file.stem:<6}{file.stat().st_size:>9,} bytes  same decision on {same:.1%} of {len(expected)} new scans"
        )

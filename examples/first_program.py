"""The whole road: compress, compare, save, load."""

import rankfold as rf
from rankfold.digits import calibration, held_out, make_model, trained

model = trained()  # any trained nn.Module; this one reads handwritten digits
images = calibration()  # a list of batches of inputs, without labels

out = rf.compress(model, images, budget=rf.Budget(params=0.5, macs=0.5))
print(out.report)  # what came and what it cost; out.report.table() is every layer; `model` is untouched

seen = rf.compare(model, out.model, held_out())  # data with labels, so top-1 is shown too
print(f"same decision on {seen.agreement:.1%} of {seen.samples} new scans; top-1 before and after: {seen.top1}")

rf.save(out, "small")  # plan.json, model.safetensors, report.json, checksums.json
again = rf.load("small", factory=make_model)  # a plain nn.Module
print("reloaded:", type(again).__name__)

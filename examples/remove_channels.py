"""Channels go, the network keeps its structure, and each decision that changes is shown."""

import rankfold as rf
from rankfold.digits import calibration, held_out, trained

model, images = trained(), calibration()
for group in rf.find_channels(model, rf.find_sites(model, images[0])):
    print(group)  # what must go together, and who reads it

out = rf.compress(model, images, budget=rf.Budget(macs=0.6), families=[rf.Interpolative()])
for decision in out.plan.channels:
    print(f"{decision.group}: {len(decision.kept)} of {decision.units} stay")
assert [type(module) for module in out.model.modules()] == [type(module) for module in model.modules()]

seen = rf.agreement(model, out.model, held_out())
print(f"same decision on {seen.agreement:.1%} of {seen.examples} new scans; on corrupted ones: {seen.corrupted}")
for change in seen.changes:
    print(change)

"""The same road in stages, with a person's hand on the plan in between."""

import json
from pathlib import Path

import rankfold as rf
from rankfold.digits import calibration, held_out, trained

model, images = trained(), calibration()

# 1. What is there?
sites = rf.find_sites(model, images[0])
print(f"{len(sites)} layers can be compressed, {len(sites.skips)} are left alone")

# 2. What do the layers see, and what would each rank cost there?
families = [rf.WhitenedSVD()]
stats = rf.collect(model, images, sites=sites, statistics=rf.needed(families), positions=32)
curves = rf.measure(model, stats, sites=sites, families=families)

# 3. A plan, as a file. It also says that layers are to be repaired when it is carried out.
plan = rf.make_plan(curves, budget=rf.Budget(params=0.5), selector=rf.Lagrangian(), repair=rf.Lockstep())
file = Path("plan.json")
file.write_text(plan.to_json(), encoding="utf-8")

# 4. An editor's work: one layer stays dense after all, another gets four ranks more.
edited = json.loads(file.read_text(encoding="utf-8"))
for decision in edited["decisions"]:
    if decision["site"] == "blocks.0.conv1":
        decision.update(method=None, rank=None, why="left dense by hand")
    elif decision["site"] == "blocks.2.conv2":
        decision.update(rank=decision["rank"] + 4, why="four ranks more, by hand")
file.write_text(json.dumps(edited), encoding="utf-8")

# 5. Read it back, look at what it costs, carry it out.
changed = rf.Plan.load(file)
for name, each in (("as planned", plan), ("edited", changed)):
    cost = rf.plan_cost(sites, each)
    small = rf.apply(model, each, images, stats=stats)  # the repair reads the images again
    seen = rf.compare(model, small, held_out())
    print(f"{name:<11} {cost.params:>7,} params  {cost.macs:>9,} MACs  same decision on {seen.agreement:.1%}")

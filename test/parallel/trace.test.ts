import { afterAll, expect, test } from "vitest";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { scheduleOf } from "../../src/parallel/schedule.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { constantSchedule } from "../../src/train/schedule.ts";
import { StepTrace } from "../../src/train/trace.ts";
import { Trainer } from "../../src/train/trainer.ts";
import { testAdapters } from "../support/adapters.ts";
import { startLayout } from "../../src/cli/bench/layouts.ts";
import { SIZES, SMALL, smallBatches } from "../support/layouts.ts";

const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

test("a step is drawn on the clocks of its ranks", async () => {
  const layout = parseLayout("tp=2,pp=2");
  const mesh = MeshModel.on(Array<Device>(worldOf(layout)).fill(device), layout, SMALL);
  mesh.initialise(5);
  const trainer = new Trainer(mesh, {
    ...SIZES, accumulate: 3, schedule: constantSchedule({ peak: 1e-3, warmup: 0 }), betas: [0.9, 0.95],
    eps: 1e-8, weight_decay: 0, clip: 1, mtp_depths: 1, mtp_scale: 0.3, aux_coeff: 0, bias_rate: 0,
  });
  const batches = smallBatches(3, false);
  const plain = await trainer.step(batches);
  const trace = await trainer.trace(() => trainer.step(batches));
  expect(Number.isFinite(plain.loss)).toBe(true);
  const schedule = scheduleOf(layout, 3);
  for (let rank = 0; rank < 4; rank++) {
    const own = trace.events.filter((event) => event.rank === rank);
    // Nothing at the same time as something else of the rank, and the passes in the order of the schedule.
    own.forEach((event, i) => expect(event.start).toBeGreaterThanOrEqual(i > 0 ? own[i - 1]!.end : 0));
    const passes = own.map(({ pass }) => pass).filter((pass, i, all) =>
      /forward|backward/.test(pass) && pass !== all[i - 1]);
    expect(passes.filter((pass, i) => passes.indexOf(pass) === i)).toEqual(
      schedule.ranks[Math.floor(rank / 2)]!.map(({ kind, micro }) => `${kind} ${micro}`));
    const { compute, communication, idle } = trace.times[rank]!;
    expect(compute).toBeGreaterThan(0);
    expect(communication).toBeGreaterThan(0);
    expect(compute + communication + idle).toBeCloseTo(trace.length, 6);
  }
  // The last stage cannot begin before the first has sent.
  const first = (of: number) => trace.events.find(({ rank, kind }) => rank === of && kind === "compute")!;
  expect(first(2).start).toBeGreaterThan(first(0).end);
  const { traceEvents } = JSON.parse(trace.chromeTrace(mesh)) as {
    traceEvents: { tid: number; cat?: string; args?: { name: string } }[];
  };
  expect(new Set(traceEvents.map(({ cat }) => cat))).toEqual(
    new Set([undefined, "pass", "compute", "communication", "wait"]));
  expect(traceEvents.find(({ tid }) => tid === 3)!.args!.name).toBe("rank 3 (tp 1, cp 0, dp 0, pp 1)");
  trainer.dispose();
  mesh.dispose();
});

test("under overlap two passes go hand in hand, around each exchange the other one", async () => {
  const before = device.pool.liveBytes;
  const run = startLayout(device, "dp=2,ep=2,overlap=on", 6);
  const trace = await run.trainer.trace(() => run.trainer.step(smallBatches(6, false)));
  const pieces = trace.events.filter(({ rank, pass }) => rank === 1 && pass !== "" && pass !== "update");
  const passes = pieces.map(({ pass }) => pass).filter((pass, i, all) => pass !== all[i - 1]);
  // One pass of warm-up, two pairs, one left.
  expect(passes[0]).toBe("forward 0");
  expect(passes.at(-1)).toBe("backward 2");
  const at = (pass: string) => [passes.indexOf(pass), passes.lastIndexOf(pass)] as const;
  for (const [forward, backward] of [["forward 1", "backward 0"], ["forward 2", "backward 1"]] as const) {
    const [from, to] = [Math.min(at(forward)[0], at(backward)[0]), Math.max(at(forward)[1], at(backward)[1])];
    const pair = passes.slice(from, to + 1);
    expect(new Set(pair)).toEqual(new Set([forward, backward]));
    // Three layers of experts in every pass: on either side of each exchange is the other pass.
    expect(pair.length).toBeGreaterThan(4 * 3);
  }
  run.dispose();
  expect(device.pool.liveBytes).toBe(before);
});

test("communication begins when its last rank is ready, and what is sent when its sender is", () => {
  const trace = new StepTrace(3);
  const compute = (rank: number, ms: number) =>
    trace.add({ ranks: [rank], what: "work", kind: "compute", pass: "" }, ms);
  compute(0, 5);
  compute(1, 2);
  trace.add({ ranks: [0, 1], what: "tp", kind: "communication", pass: "" }, 1);
  trace.add({ ranks: [1, 2], what: "pp", kind: "communication", pass: "" }, 3);
  compute(2, 1);
  trace.add(null, 100);
  expect(trace.events.map(({ rank, start, end }) => [rank, start, end])).toEqual(
    [[0, 0, 5], [1, 0, 2], [0, 5, 6], [1, 5, 6], [1, 6, 9], [2, 6, 9], [2, 9, 10]]);
  expect(trace.times[2]).toEqual({ rank: 2, compute: 1, communication: 3, idle: 6 });
});

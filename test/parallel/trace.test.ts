import { afterAll, expect, test } from "vitest";
import type { BufferView } from "../../src/gpu/gpu.ts";
import type { Lane } from "../../src/gpu/lane.ts";
import { parseLayout, worldOf } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { scheduleOf } from "../../src/parallel/schedule.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { constantSchedule } from "../../src/train/schedule.ts";
import { StepTrace, sumCollectives } from "../../src/train/trace.ts";
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
    traceEvents: { tid: number; name: string; cat?: string; args?: Record<string, string | number> }[];
  };
  const isTimed = device.gpuDevice.features.has("timestamp-query");
  expect(new Set(traceEvents.map(({ cat }) => cat))).toEqual(
    new Set([undefined, "pass", "compute", "communication", "wait", ...isTimed ? ["kernel"] : []]));
  expect(traceEvents.find(({ tid }) => tid === 3)!.args!["name"]).toBe("rank 3 (tp 1, cp 0, dp 0, pp 1)");
  // The log is what was recorded, with times; the trace shows the same bytes.
  const { collectives } = trace;
  expect(collectives).toMatchObject(trainer.collectives);
  for (const { clock, milliseconds } of collectives) {
    expect(clock).toBe(isTimed ? "gpu" : "host");
    expect(milliseconds).toBeGreaterThan(0);
  }
  const all = sumCollectives(collectives);
  expect(all.map(({ kind, group }) => `${kind} ${group}`)).toEqual(expect.arrayContaining(
    ["reduce_scatter tp", "all_gather tp", "send pp"]));
  const drawn = traceEvents.filter(({ args }) => args?.["group"] !== undefined);
  expect(drawn.reduce((bytes, { args }) => bytes + (args!["bytes_sent"] as number), 0)).toBe(
    all.reduce((total, { bytes }) => total + bytes, 0));
  const own = collectives.flatMap(({ ranks, sent }) => sent[ranks.indexOf(3)] ?? 0);
  expect(own.reduce((a, b) => a + b, 0)).toBe(drawn.filter(({ tid }) => tid === 3).reduce(
    (bytes, { args }) => bytes + (args!["bytes_sent"] as number), 0));
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
  const { traceEvents } = JSON.parse(trace.chromeTrace(run.mesh)) as {
    traceEvents: { name: string; tid: number; cat?: string; ts: number; dur: number }[];
  };
  const drawn = traceEvents.filter(({ tid, cat, name }) => tid === 1 && cat === "pass" && name !== "update");
  expect(drawn.map(({ name }) => name)).toEqual(passes);
  drawn.forEach(({ ts }, i) => {
    if (i > 0) expect(ts).toBeGreaterThanOrEqual(drawn[i - 1]!.ts + drawn[i - 1]!.dur - 1e-6);
  });
  run.dispose();
  expect(device.pool.liveBytes).toBe(before);
});

test("communication begins when its last rank is ready, and what is sent when its sender is", async () => {
  const trace = new StepTrace(3);
  const take = trace.reporter();
  const stretch = (lane: Lane | null, milliseconds: number, sent: number[] | null = null) => take({
    lane, milliseconds, clock: "gpu", kernels: [], traffic: lane && sent && {
      kind: lane.what === "pp" ? "send" : "all_reduce", group: lane.what, algorithm: "direct",
      ranks: lane.ranks, sent, backward: false,
    },
  });
  const compute = (rank: number, ms: number) =>
    stretch({ ranks: [rank], what: "work", kind: "compute", pass: "" }, ms);
  await compute(0, 5);
  await compute(1, 2);
  const tp = { ranks: [0, 1], what: "tp", kind: "communication", pass: "update" } as const;
  await stretch(tp, 1, [8, 8]);
  await stretch(tp, 0.5); // its commands may run in pieces
  await stretch({ ranks: [1, 2], what: "pp", kind: "communication", pass: "" }, 3, [4, 0]);
  await compute(2, 1);
  await stretch(null, 100);
  expect(trace.events.map(({ rank, start, end }) => [rank, start, end])).toEqual([
    [0, 0, 5], [1, 0, 2], [0, 5, 6], [1, 5, 6], [0, 6, 6.5], [1, 6, 6.5], [1, 6.5, 9.5], [2, 6.5, 9.5],
    [2, 9.5, 10.5],
  ]);
  expect(trace.times[2]).toEqual({ rank: 2, compute: 1, communication: 3, idle: 6.5 });
  expect(trace.collectives).toEqual([
    {
      kind: "all_reduce", group: "tp", algorithm: "direct", ranks: [0, 1], pass: "update", backward: false,
      sent: [8, 8], bytes: 16, room: null, milliseconds: 1.5, clock: "gpu",
    },
    {
      kind: "send", group: "pp", algorithm: "direct", ranks: [1, 2], pass: "", backward: false, sent: [4, 0],
      bytes: 4, room: null, milliseconds: 3, clock: "gpu",
    },
  ]);
});

test("devices that take part tell of a collective together, and each of its own counts", async () => {
  const trace = new StepTrace(2);
  const view = (rank: number) => ({ rank }) as unknown as BufferView & { rank: number };
  const counts = [view(0), view(1)];
  let rows = 1;
  const take = counts.map((own, rank) =>
    trace.reporter((other) => other === own, () => Promise.resolve(Uint32Array.of(rows + rank).buffer)));
  const lane = { ranks: [0, 1], what: "ep", kind: "communication", pass: "forward 0" } as const;
  const traffic = {
    kind: "all_to_all", group: "ep", algorithm: "direct", ranks: [0, 1], sent: [40, 40], backward: false,
    counted: { counts, sent: (values: readonly ArrayLike<number>[]) => values.map((of) => 4 * of[0]!) },
  };
  const run = async (rank: number, clock: "gpu" | "host") => {
    await take[rank]!({ lane, traffic, milliseconds: 2, clock, kernels: [] });
    await take[rank]!({ lane: null, traffic: null, milliseconds: 1, clock: "gpu", kernels: [] });
  };
  // The first device is a replay ahead.
  await run(0, "gpu");
  rows = 5;
  await run(0, "gpu");
  rows = 1;
  await run(1, "host");
  rows = 5;
  await run(1, "gpu");
  expect(trace.collectives.map(({ sent, room, milliseconds, clock }) => [sent, room, milliseconds, clock]))
    .toEqual([[[4, 8], 80, 4, "host"], [[20, 24], 80, 4, "gpu"]]);
});

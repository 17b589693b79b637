import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, describe, expect, test, vi } from "vitest";
import { provider } from "#gpu";
import { Tape } from "../../src/autograd/tape.ts";
import type { AdapterHandle } from "../../src/gpu/adapters.ts";
import { AdapterError, GpuError, RankLostError } from "../../src/gpu/errors.ts";
import type { Graph } from "../../src/gpu/stream.ts";
import { openCheckpoint, saveCheckpoint } from "../../src/io/checkpoint_files.ts";
import { localFileLayer } from "../../src/io/files.node.ts";
import {
  type Algorithm, ALGORITHMS, copyToGroup, exchangeInGroup, forEachGroup, gatherFromGroup, type Group,
  reduceScatterInGroup, scatterToGroup, sendToStage, sumOverGroup,
} from "../../src/ops/collectives.ts";
import { accumulate, add, scale } from "../../src/ops/elementwise.ts";
import { planExchange, returnRows, sendRows } from "../../src/ops/exchange.ts";
import { ring_attention } from "../../src/ops/ring_attention.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import { MeshModel } from "../../src/parallel/model.ts";
import { openRankDevices } from "../../src/parallel/rank_devices.ts";
import type { Device } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf, perRank, Sharded } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { onDevice } from "../../src/tensor/transfer.ts";
import { checkpointFiles, restoreRun, savedRun } from "../../src/train/checkpoint.ts";
import { makeRecipe } from "../../src/train/recipe.ts";
import { TrainingRun } from "../../src/train/run.ts";
import { captureOn } from "../../src/tensor/step_graph.ts";
import { withFolder } from "../cli/krait.ts";
import { Draw, type HostTensor } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { SMALL, smallBatches, trainSmall, worstOf } from "../support/layouts.ts";

/** What devices do together does not depend on the adapter; one is enough. */
type Adapters = [AdapterHandle, ...AdapterHandle[]];
const [adapter] = await testAdapters() as Adapters;
/** Its devices can be lost in earnest. */
const [real] = await testAdapters("own") as Adapters;
const [shared] = await openRankDevices(1, "shared", adapter) as [Device];
const four = await openRankDevices(4, "devices", adapter);
afterAll(() => [shared, ...four].forEach((device) => device.destroy()));

const elements = (host: HostTensor) =>
  host.dtype === "f32" ? Float32Array.from(host.data)
  : host.dtype === "i32" ? Int32Array.from(host.data) : Uint32Array.from(host.data);
const on = (devices: readonly Device[], hosts: readonly HostTensor[]) => new Sharded(
  hosts.map((host, rank) => devices[rank]!.tensor(elements(host), host.shape)));
const bitsOf = async (tensors: readonly Tensor[]) => Promise.all(tensors.map(async (tensor) =>
  Buffer.from((await tensor.device.readBytes(tensor)).slice(0)).toString("hex")));
const group = (size: number, algorithm: Algorithm): Group =>
  ({ name: "tp", members: [Array.from({ length: size }, (_, i) => i)], algorithm });

/** Values of every rank, and what a group makes of them. */
interface Case {
  readonly shapes: readonly (readonly number[])[];
  /** Whole numbers below so many. */
  readonly whole?: Readonly<Record<number, number>>;
  run(group: Group, ...xs: Tensor[]): Tensor;
}

const CASES: Readonly<Record<string, Case>> = {
  "the sum, used differently": {
    shapes: [[3, 5]],
    run: (g, x) => scale(copyToGroup(sumOverGroup(x, g), g), perRank(g.members[0]!.map((rank) => rank + 2))),
  },
  "slices of positions": { shapes: [[2, 8, 3]], run: (g, x) => scatterToGroup(copyToGroup(x, g), g, 1) },
  "gathered rows, used differently": { shapes: [[3, 4]], run: (g, x) => gatherFromGroup(x, g, 0, true) },
  "gathered columns, used alike": { shapes: [[3, 4]], run: (g, x) => gatherFromGroup(x, g, 1, false) },
  "slices of the sum, rows": { shapes: [[8, 16]], run: (g, x) => reduceScatterInGroup(x, g, 0) },
  "slices of the sum, columns": { shapes: [[3, 12]], run: (g, x) => reduceScatterInGroup(x, g, 1) },
  "columns for positions": {
    shapes: [[2, 4, 12]],
    run: (g, x) => exchangeInGroup(scale(exchangeInGroup(x, g, "columns"), 3), g, "positions"),
  },
  "the next stage": {
    shapes: [[2, 3]],
    run: (_g, x) => sendToStage(x, localsOf(x).map(({ device }) => device).reverse(), 0),
  },
  "ring attention with documents": {
    shapes: [[1, 8, 4, 8], [1, 8, 2, 8], [1, 8, 2, 8], [1, 8]], whole: { 3: 2 },
    run: (g, ...xs) => forEachGroup(xs, g, (call, [q, k, v, numbers]) =>
      ring_attention({ ...call, scale: 0.3, seq_idx: numbers! }, ...q!, ...k!, ...v!)),
  },
  "rows of experts, there and back": {
    shapes: [[6, 8]],
    run: (g, x) => {
      const blocks = g.members[0]!.length;
      const offsets = new Sharded(localsOf(x).map(({ device }, rank) => device.tensor(
        Uint32Array.from({ length: blocks + 1 }, (_, i) => Math.min(6, i * (1 + rank % 2))), [blocks + 1])));
      const exchange = planExchange(
        offsets, g, { groups: blocks, blocks, copies: 1, rows: 6 * blocks, sends: 6 });
      return returnRows(scale(sendRows(x, exchange), 2), exchange);
    },
  },
};

/** The result of every rank and the gradient of all that it had, as bits. */
function outcome(
  devices: readonly Device[], { shapes, whole = {}, run }: Case, algorithm: Algorithm,
): Promise<string[]> {
  const r = new Draw(3);
  const xs = shapes.map((shape, i) => on(devices, devices.map(() =>
    whole[i] ? r.integers(shape, 0, whole[i]) : r.normal(shape))));
  const leaves = xs.filter(({ dtype }) => dtype === "f32").flatMap(localsOf);
  for (const leaf of leaves) leaf.requiresGrad = true;
  const tape = new Tape();
  const y = tape.run(() => run(group(devices.length, algorithm), ...xs));
  const seeds = localsOf(y).map(({ device, shape }) => device.tensor(elements(r.normal(shape)), shape));
  const gradients = tape.backward(localsOf(y), seeds);
  return bitsOf([...localsOf(y), ...leaves.map(({ key }) => gradients.get(key)!)]);
}

describe("collectives on devices give the bits of those on one", () => {
  for (const [name, sample] of Object.entries(CASES)) {
    test(name, async () => {
      for (const ranks of [2, 4]) {
        const expected = await outcome(Array<Device>(ranks).fill(shared), sample, "direct");
        for (const algorithm of ALGORITHMS) {
          const found = await outcome(four.slice(0, ranks), sample, algorithm);
          expect(found, `${ranks} ranks, ${algorithm}`).toEqual(expected);
        }
        // Two ranks to a device, which are no neighbours.
        const two = Array.from({ length: ranks }, (_, rank) => four[rank % 2]!);
        expect(await outcome(two, sample, "ring"), `${ranks} ranks on two`).toEqual(expected);
      }
    });
  }

  test("neighbours alone speak to each other in a ring", () => {
    const spoken = new Set<string>();
    const spies = four.map(({ stream }, from) => vi.spyOn(stream, "send").mockImplementation(
      (_buffer, _offset, _size, parcels) => {
        for (const { to } of parcels) {
          spoken.add(`${from} ${four.findIndex((other) => other.stream === to)}`);
        }
      }));
    const receipts = four.map(({ stream }) => vi.spyOn(stream, "receive").mockImplementation(() => {}));
    const said = (algorithm: Algorithm, run: (x: Tensor, g: Group) => Tensor) => {
      spoken.clear();
      scope(() => void run(on(four, four.map(() => new Draw(1).normal([4, 4]))), group(4, algorithm)));
      return [...spoken].sort();
    };
    const sum = sumOverGroup;
    const gather = (x: Tensor, g: Group) => gatherFromGroup(x, g, 0, false);
    expect(said("ring", sum)).toEqual(["0 1", "1 0", "1 2", "2 1", "2 3", "3 2"]);
    expect(said("ring", gather)).toEqual(["0 1", "1 2", "2 3", "3 0"]);
    for (const run of [sum, gather]) expect(said("direct", run)).toHaveLength(12);
    for (const spy of [...spies, ...receipts]) spy.mockRestore();
  });
});

/** All that a device has ever made. */
const made = (devices: readonly Device[]) => devices.map(({ pool, stream, stagingCreated }) =>
  [pool.created, stream.blocksCreated, stream.stagingCreated, stagingCreated]);

describe("a captured step", () => {
  test("is replayed on all devices, and makes nothing new", async () => {
    for (const algorithm of ALGORITHMS) {
      const totals: string[][] = [];
      for (const devices of [Array<Device>(4).fill(shared), four]) {
        const r = new Draw(8);
        const x = on(devices, devices.map(() => r.normal([300])));
        const before = devices.map(({ pool }) => pool.liveBytes);
        const step = captureOn([...new Set(devices)], () => scope(() => {
          // More sums of one size than leave at the same time.
          for (let i = 0; i < 7; i++) accumulate(x, scale(sumOverGroup(x, group(4, algorithm)), 0.1));
        }));
        step.replay();
        await bitsOf(localsOf(x));
        const after = made(devices);
        step.replay();
        step.replay();
        totals.push(await bitsOf(localsOf(x)));
        expect(made(devices)).toEqual(after);
        step.dispose();
        expect(devices.map(({ pool }) => pool.liveBytes)).toEqual(before);
      }
      expect(totals[1]).toEqual(totals[0]);
    }
  });

  test("waits for others where it needs them, not where they were asked", async () => {
    const devices = four.slice(0, 2);
    const [a, b] = devices as [Device, Device];
    const live = devices.map(({ pool }) => pool.liveBytes);
    const results: string[][] = [];
    for (const on of [[shared, shared], devices]) {
      const [first, second] = on as [Device, Device];
      const r = new Draw(5);
      const x = scope(() => new Sharded(
        on.map((device) => device.tensor(elements(r.normal([6, 8])), [6, 8]))));
      const w = second.tensor(elements(r.normal([6, 8])), [6, 8]);
      const total = second.zeros([12, 8]);
      const exchange = scope(() => planExchange(
        new Sharded(on.map((device) => device.tensor(Uint32Array.of(0, 2, 6), [3]))), group(2, "direct"),
        { groups: 2, blocks: 2, copies: 1, rows: 12, sends: 6 }));
      let graph: Graph | null = null;
      const step = () => {
        graph = second.capture(() => scope(() => {
          const rows = localsOf(sendRows(x, exchange))[1]!;
          const other = scale(w, 3);
          accumulate(total, scale(rows, 2));
          accumulate(w, other);
        })).graph;
      };
      const outer = first === second ? (step(), null) : first.capture(step).graph;
      for (let replay = 0; replay < 2; replay++) {
        if (outer) first.replay(outer);
        second.replay(graph!);
      }
      results.push(await bitsOf([total, w]));
      const commands = graph!.commands.map((command) =>
        command.kind === "dispatch" ? command.pipeline.label.split("/")[1]!.split(" ")[0]! : command.kind);
      if (outer) expect(commands.slice(0, 6)).toEqual(["note", "send", "unary", "receive", "rows", "unary"]);
      if (outer) first.stream.disposeGraph(outer);
      second.stream.disposeGraph(graph!);
      const { offsets, splits, from, back, missing } = exchange;
      for (const tensor of [x, w, total, offsets, splits, from, back, missing]) tensor.dispose();
    }
    expect(results[1]).toEqual(results[0]);
    expect([a, b].map(({ pool }) => pool.liveBytes)).toEqual(live);
  });

  test("cannot hold half of a transfer", () => {
    const [a, b] = four as [Device, Device];
    const x = a.zeros([4]);
    expect(() => a.capture(() => scope(() => void onDevice(x, b)))).toThrow(
      /can be captured on both of them only/);
    expect(() => scope(() => add(x, b.zeros([4])))).toThrow(/lies on another device/);
  });
});

/** One layer of each kind and a prediction head, whose table the last stage holds too. */
const MINI = { ...SMALL, num_hidden_layers: 3, hybrid_override_pattern: "M*E" };
const batches = smallBatches(4, false);

describe("training", () => {
  const train = (devices: Device | readonly Device[], layout: string, after?: (step: number) => void) =>
    trainSmall(devices, layout, batches, { config: MINI, steps: 3, clip: 1, ...(after && { after }) });

  for (const [layout, world] of [["tp=2,dp=2", 4], ["pp=2", 2], ["dp=2,ep=2,overlap=on", 2]] as const) {
    const one = train(shared, layout);

    test(`${layout} on devices gives the bits of a shared one`, async () => {
      const devices = four.slice(0, world);
      const live = devices.map(({ pool }) => pool.liveBytes);
      const counts: number[][][] = [];
      const found = await train(devices, layout, () => counts.push(made(devices)));
      const expected = await one;
      expect(found.steps).toEqual(expected.steps);
      expect(worstOf(found.gradients, expected.gradients).error).toBe(0);
      expect(worstOf(found.parameters, expected.parameters).error).toBe(0);
      // Gradients were read back after the first step.
      expect(counts[2]).toEqual(counts[1]);
      expect(counts[1]!.map((row) => row.slice(0, 3))).toEqual(counts[0]!.map((row) => row.slice(0, 3)));
      expect(devices.map(({ pool }) => pool.liveBytes)).toEqual(live);
    });
  }

  test("on two adapters at once agrees to rounding", async () => {
    const found = await provider.listAdapters();
    if (found.length < 2) {
      console.warn(`NOT TESTED: ranks on two adapters, since ${found[0]?.info.id} is the only one here.`);
      return;
    }
    if (adapter.info.id !== found[0]!.info.id) return; // both run where the first is tested
    const devices = await openRankDevices(2, "adapters");
    const [a, b] = devices as [Device, Device];
    expect(a.info.id).not.toBe(b.info.id);
    for (const [layout, ranks] of [["tp=2,dp=2", [a, b, a, b]], ["pp=2", [a, b]]] as const) {
      const expected = await train(shared, layout);
      const both = await train(ranks, layout);
      both.steps.forEach(({ loss, grad_norm }, i) => {
        expect(loss / expected.steps[i]!.loss).toBeCloseTo(1, 5);
        expect(grad_norm / expected.steps[i]!.grad_norm).toBeCloseTo(1, 5);
      });
      const { name, error } = worstOf(both.gradients, expected.gradients);
      expect(error, name).toBeLessThan(1e-5);
    }
    devices.forEach((device) => device.destroy());
  });
});

/** Rejects with the time limit, whatever the work is up to. */
const soon = <T>(work: Promise<T>) => Promise.race([
  work, sleep(5000).then(() => Promise.reject<T>(new Error("It still waits after 5 s."))),
]);

describe("a rank is lost", () => {
  const sum = (devices: readonly Device[]) => {
    const x = on(devices, devices.map((_, i) => new Draw(i).normal([1000])));
    let y: Tensor = x;
    for (let i = 0; i < 30; i++) y = sumOverGroup(scale(y, 0.3), group(devices.length, "ring"));
    return y;
  };

  for (const [how, lose, message] of [
    ["closed by its owner", (device: Device) => device.destroy(), /device was lost \(destroyed\): ./],
    ["reset by the driver", (device: Device) => device.gpuDevice.destroy(), /device was lost \(\w+\): ./],
    ["refused by the driver", (device: Device) => {
      device.gpuDevice.createBuffer({ size: 16, usage: 0x01 | 0x02 | 0x80 });
    }, /BufferUsage/],
  ] as const) {
    test(`${how}: all others fail with its name, and nobody waits`, async () => {
      const devices = await openRankDevices(4, "devices", real);
      const y = localsOf(sum(devices));
      const reads = [0, 1, 3].map((rank) => y[rank]!.read());
      const results = Promise.allSettled(reads);
      lose(devices[2]!);
      for (const result of await soon(results)) {
        expect(result.status).toBe("rejected");
        const { reason } = result as PromiseRejectedResult;
        expect(reason).toBeInstanceOf(RankLostError);
        expect(reason).toMatchObject({ rank: 2, adapter: adapter.info.id });
        expect((reason as Error).message).toMatch(/^Rank 2 on \w+ was lost( while .* waited for .*)?: ./);
        expect((reason as Error).message).toMatch(message);
      }
      for (const device of devices) {
        await soon(device.stream.idle());
        expect(device.failure).toBeInstanceOf(device.rank === 2 && how.startsWith("refused")
          ? GpuError : RankLostError);
        expect(() => device.zeros([1])).toThrow(device.failure!);
        device.destroy();
      }
    });
  }

  test("and where it was lost is said", async () => {
    const devices = await openRankDevices(3, "devices", real);
    const [a, b, c] = devices as [Device, Device, Device];
    scope(() => onDevice(onDevice(a.zeros([4]), b), c));
    for (const { stream } of devices) stream.flush();
    b.destroy();
    expect(c.failure!.message).toMatch(/^Rank 1 on \w+ was lost while rank 2 waited for 16 bytes from it: ./);
    expect(a.failure).toBe(c.failure);

    const [d, e] = await openRankDevices(2, "devices", real) as [Device, Device];
    scope(() => onDevice(d.zeros([8]), e));
    e.stream.flush();
    e.destroy();
    expect(d.failure!.message).toMatch(/^Rank 1 on \w+ was lost while it waited for 32 bytes from rank 0: ./);
    for (const device of [a, c, d]) device.destroy();
  });
});

describe("devices of ranks", () => {
  test("one for all, or one each", async () => {
    const [a, b] = await openRankDevices(2, "shared", adapter);
    expect(a).toBe(b);
    a!.destroy();
    expect(new Set(four).size).toBe(4);
    expect(four.map(({ rank }) => rank)).toEqual([0, 1, 2, 3]);
  });

  test("are refused in one sentence", async () => {
    await expect(openRankDevices(0, "devices", adapter)).rejects.toThrow(/are 1 or more, found 0/);
    await expect(openRankDevices(2, "adapters", adapter)).rejects.toThrow(
      /use all of them, but "\w+" was asked for by name/);
    const listing = vi.spyOn(provider, "listAdapters").mockResolvedValue([adapter]);
    await expect(openRankDevices(2, "adapters")).rejects.toThrow(
      new RegExp(`need two adapters or more, found: ${adapter.info.id}`));
    listing.mockRestore();
  });

  test("an adapter that disappears takes nothing with it", async () => {
    let left = 2;
    const gone = { info: adapter.info, request: async () => {
      if (left-- === 0) throw new AdapterError("The driver no longer offers the adapter.");
      return adapter.request();
    } };
    await expect(openRankDevices(3, "devices", gone)).rejects.toThrow(/no longer offers/);
    const [next] = await openRankDevices(1, "devices", adapter);
    expect(await next!.tensor([5], [1]).item()).toBe(5);
    next!.destroy();
  });
});

/** Last, since it costs all four devices. */
describe("a rank is lost", () => {
  test("in the middle of a training step: the last checkpoint goes on elsewhere", () => withFolder(
    async (folder) => {
      const tokens = Int32Array.from(new Draw(5).integers([600], 0, MINI.vocab_size).data);
      const corpus = { tokens, starts: Int32Array.from([0, 300]), bytes: 600, scored: 598, eosId: 2 };
      const recipe = makeRecipe({ steps: 8, batch: 1, seqlen: 32, accumulate: 2, warmup: 1 });
      const start = (devices: readonly Device[]) => {
        const mesh = MeshModel.on(devices, parseLayout("pp=2"), MINI);
        mesh.initialise(recipe.seed);
        return new TrainingRun(mesh, recipe, corpus, corpus);
      };
      const end = (run: TrainingRun) => {
        run.dispose();
        run.mesh.dispose();
      };
      const layer = localFileLayer();
      const first = start(four.slice(0, 2));
      for (let i = 0; i < 2; i++) await first.step();
      const files = checkpointFiles(first, {}, savedRun(first, recipe));
      await saveCheckpoint(layer, join(folder, "run"), first.trainer.steps, files);
      const third = first.step();
      four[1]!.gpuDevice.destroy();
      await expect(soon(third)).rejects.toThrow(/^Rank 1 on \w+ was lost in training step 2.*: ./);
      await expect(soon(first.step())).rejects.toThrow(/^Rank 1 on \w+ was lost in training step 2/);
      await expect(soon(first.evaluate())).rejects.toThrow(/^Rank 1 on \w+ was lost/);
      end(first);

      const whole = start([shared, shared]);
      for (let i = 0; i < 2; i++) await whole.step();
      const later = start([shared, shared]);
      const saved = await restoreRun(later, (await openCheckpoint(layer, join(folder, "run")))!);
      expect(saved.steps).toBe(2);
      for (let i = 0; i < 2; i++) expect((await later.step()).loss).toBe((await whole.step()).loss);
      end(whole);
      end(later);
    }));
});

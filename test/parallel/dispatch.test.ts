import { afterAll, describe, expect, test } from "vitest";
import { Tape } from "../../src/autograd/tape.ts";
import type { Parameter } from "../../src/models/checkpoint_names.ts";
import { preset } from "../../src/models/presets.ts";
import { Block, runBlocks } from "../../src/nn/block.ts";
import type { ForwardContext, Overflow, Routing } from "../../src/nn/context.ts";
import { type Dispatched, dispatch, expertGroup } from "../../src/nn/dispatch.ts";
import { type DispatcherKind, DISPATCHERS, type Division, SOLO } from "../../src/nn/division.ts";
import { MoE, type MoESizes } from "../../src/nn/moe.ts";
import { MOE_TRAINING, type MoETraining } from "../../src/nn/moe_training.ts";
import { parseRecompute } from "../../src/nn/recompute.ts";
import { Weights } from "../../src/nn/weights.ts";
import { type Communication, communicationObservers, type CountedRows } from "../../src/ops/collectives.ts";
import { moe_permute } from "../../src/ops/moe.ts";
import { shardOf } from "../../src/parallel/shards.ts";
import { openDevice } from "../../src/tensor/device.ts";
import { ExpertOverflow } from "../../src/tensor/errors.ts";
import { scope, unscoped } from "../../src/tensor/scope.ts";
import { localsOf, shardedOf } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { stateEntries } from "../../src/train/optimizer_state.ts";
import { Draw } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { smallBatches, startLayout, trainSmall, worstOf } from "../support/layouts.ts";

/** The kernels are tested one by one on every adapter; one of them is enough for how they work together. */
const device = await openDevice({ adapter: (await testAdapters())[0]! });
afterAll(() => device.destroy());

type Grid = readonly [ep: number, etp: number];
const GRIDS: readonly Grid[] = [[2, 1], [2, 2], [4, 2], [1, 2], [4, 1]];

/** Ranks of one expert grid, etp fastest. */
function division([ep, etp]: Grid, dispatcher: DispatcherKind, more: Partial<Division> = {}): Division {
  const range = (n: number) => Array.from({ length: n }, (_, i) => i);
  const group = (name: string, members: number[][]) => ({ name, members, algorithm: "direct" as const });
  return {
    ...SOLO, dispatcher, ...more,
    ep: group("ep", range(etp).map((t) => range(ep).map((e) => e * etp + t))),
    etp: group("etp", range(ep).map((e) => range(etp).map((t) => e * etp + t))),
  };
}

const T = 5;
const sizes: MoESizes = {
  hidden: 12, n_routed_experts: 8, num_experts_per_tok: 3, moe_intermediate_size: 8, moe_latent_size: null,
  shared_size: 8, n_group: 1, topk_group: 1, group_best: 2, scoring_func: "sigmoid", router_choice: "score",
  norm_topk_prob: true, routed_scaling_factor: 1.5, bias: false,
};
const latent: MoESizes = { ...sizes, moe_latent_size: 4 };

type Values = Record<string, { shape: number[]; data: Float32Array }>;

function weightsFor(
  { hidden: D, n_routed_experts: E, ...rest }: MoESizes, bias?: (e: number) => number,
): Values {
  const { moe_intermediate_size: F, moe_latent_size, shared_size } = rest;
  const X = moe_latent_size ?? D;
  const shapes: Record<string, number[]> = {
    "norm.weight": [D], "gate.weight": [E, D], "experts.up_proj": [E, F, X], "experts.down_proj": [E, X, F],
    "shared_experts.up_proj.weight": [shared_size, D], "shared_experts.down_proj.weight": [D, shared_size],
    ...moe_latent_size && { "fc1_latent_proj.weight": [X, D], "fc2_latent_proj.weight": [D, X] },
  };
  const r = new Draw(3);
  const values: Values = {};
  for (const [name, shape] of Object.entries(shapes)) {
    values[name] = { shape, data: Float32Array.from(r.normal(shape, 0.4).data) };
  }
  const data = Float32Array.from({ length: E }, (_, e) => bias?.(e) ?? 0);
  return { ...values, "gate.e_score_correction_bias": { shape: [E], data } };
}

const expertShard = (name: string, shape: readonly number[], [ep, etp]: Grid) => {
  const parameter: Parameter = {
    name, shape, kind: "expert", part: "backbone", layer: 0, trainable: true, optional: false,
  };
  return shardOf(parameter, preset("tiny"), { tp: 1, ep, etp });
};

interface Outcome {
  readonly y: Float32Array;
  readonly gradients: Record<string, Float32Array>;
  /** Of the routed experts on every rank. */
  readonly pieces: Record<string, Float32Array[]>;
  readonly overflow: number[];
  readonly index: Uint32Array;
}

/**
 * A layer's results and gradients over the tokens of `ranks` ranks, put together.
 * @param grid over which experts are cut; of [1, 1] every rank of the division has all of them
 */
async function run(
  shape: MoESizes, values: Values, ranks: number, grid: Grid, how: Division,
  { again = false, moe: options }: { again?: boolean; moe?: Partial<MoETraining> } = {},
): Promise<Outcome> {
  const n = how.ep.members.flat().length;
  const r = new Draw(11);
  const [D, tokens] = [shape.hidden, (ranks / n) * T];
  const x = Float32Array.from(r.normal([ranks * T, D]).data);
  const dy = Float32Array.from(r.normal([ranks * T, D]).data);
  const parts = (data: Float32Array) => shardedOf(Array.from({ length: n }, (_, rank) =>
    device.tensor(data.slice(rank * tokens * D, (rank + 1) * tokens * D), [1, tokens, D])));
  const before = device.pool.liveBytes;
  const names = Object.keys(values);
  const leaves = unscoped(() => scope(() => [...names.map((name) => {
    const { shape: whole, data } = values[name]!;
    const copy = () => device.tensor(data, whole);
    if (!name.startsWith("experts.")) return shardedOf(Array.from({ length: n }, copy));
    const shard = expertShard(name, whole, grid);
    return shardedOf(Array.from({ length: n }, (_, rank) =>
      device.tensor(shard.slice(data, shard.rankOf(rank)), shard.shape)));
  }), parts(x)]));
  leaves.forEach((leaf, i) => (leaf.requiresGrad = !names[i]?.endsWith("bias")));
  const input = leaves.at(-1)!;
  const weights = new Weights(new Map(names.map((name, i) => [name, leaves[i]!])));
  const moe = new MoE(
    { ...shape, moe_intermediate_size: shape.moe_intermediate_size / grid[1] }, weights, how);
  const block = new Block(D, 1e-5, moe, weights);
  const tape = new Tape();
  const { y, gradients, routing, overflow } = scope(() => {
    const context: ForwardContext & { routing: Routing[]; overflow: Overflow[] } =
      {
        seq_idx: null, step: null, routing: [], overflow: [],
        recompute: parseRecompute(again ? "full" : "off"),
        moe: options ? { ...MOE_TRAINING, ...options } : null,
      };
    const out = tape.run(() => runBlocks([block], input, context));
    const { routing: chosen, overflow: missing } = context;
    const seeds = localsOf(parts(dy));
    const gradient_of = tape.backward(localsOf(out), [...seeds]);
    return {
      y: out, gradients: gradient_of, routing: chosen, overflow: missing.map((one) => one.missing),
    };
  });
  const read = async (tensors: readonly Tensor[]) =>
    Promise.all(tensors.map(async (tensor) => await tensor.read() as Float32Array));
  const joined = (list: readonly Float32Array[]) => Float32Array.from(list.flatMap((one) => [...one]));
  const found: Outcome = {
    y: joined(await read(localsOf(y))), gradients: {}, pieces: {},
    overflow: (await read(overflow.flatMap(localsOf))).map(([value]) => value!),
    index: Uint32Array.from(joined(await read(localsOf(routing[0]!.index)))),
  };
  for (const [i, leaf] of leaves.entries()) {
    if (!leaf.requiresGrad) continue;
    const name = names[i] ?? "x";
    const list = await read(localsOf(leaf).map(({ key }) => gradients.get(key)!));
    if (name === "x") found.gradients[name] = joined(list);
    else if (name.startsWith("experts.") && grid[0] * grid[1] > 1) {
      found.pieces[name] = list;
      found.gradients[name] = expertShard(name, values[name]!.shape, grid).join(list);
    } else found.gradients[name] = list.reduce((sum, one) => sum.map((value, j) => value + one[j]!));
  }
  for (const tensor of [y, ...gradients.values(), ...leaves, ...overflow]) tensor.release();
  for (const { logits, weight, index } of routing) for (const each of [logits, weight, index]) each.release();
  // Observers may keep counts.
  if (communicationObservers.size === 0) expect(device.pool.liveBytes).toBe(before);
  return found;
}

function relative(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [error, norm] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error += (found[i]! - expected[i]!) ** 2;
    norm += expected[i]! ** 2;
  }
  return Math.sqrt(error / Math.max(norm, 1e-24));
}

const norm = (values: ArrayLike<number>) => Math.hypot(...Array.from(values));

function expectSame(found: Outcome, expected: Outcome): void {
  expect(relative(found.y, expected.y)).toBeLessThan(1e-6);
  expect(Object.keys(found.gradients)).toEqual(Object.keys(expected.gradients));
  for (const [name, gradient] of Object.entries(expected.gradients)) {
    expect(relative(found.gradients[name]!, gradient), name).toBeLessThan(1e-5);
  }
}

/** The same tokens on one rank. */
const alone = (shape: MoESizes, values: Values, ranks: number) => run(shape, values, ranks, [1, 1], SOLO);

describe.each(DISPATCHERS)("%s", (kind) => {
  describe.each([["full width", sizes], ["latent width", latent]] as const)("%s", (_, shape) => {
    const values = weightsFor(shape);
    test.each(GRIDS)("ep=%i, etp=%i equal one rank", async (...grid) => {
      const ranks = grid[0] * grid[1];
      const expected = await alone(shape, values, ranks);
      const found = await run(shape, values, ranks, grid, division(grid, kind));
      expectSame(found, expected);
      for (const name of ["experts.up_proj", "experts.down_proj"]) {
        const ratio = norm(found.gradients[name]!) / norm(expected.gradients[name]!);
        expect(Math.abs(ratio - 1), name).toBeLessThan(1e-5);
      }
    });
  });

  test("experts and ranks without a token: their gradients are exactly zero", async () => {
    // The first three experts get everything; of four ranks with two experts the last two get nothing.
    const values = weightsFor(sizes, (e) => (e < 3 ? 50 : 0));
    const grid = [4, 1] as const;
    const found = await run(sizes, values, 4, grid, division(grid, kind));
    expectSame(found, await alone(sizes, values, 4));
    for (const pieces of Object.values(found.pieces)) {
      expect(pieces.map((piece) => piece.some((value) => value !== 0))).toEqual([true, true, false, false]);
      expect(pieces[1]!.slice(pieces[1]!.length / 2).every((value) => value === 0)).toBe(true);
    }
  });

  test.each([[4, 1], [2, 2]] as const)("everything to one expert, ep=%i, etp=%i", async (...grid) => {
    const one = { ...sizes, num_experts_per_tok: 1, norm_topk_prob: false };
    const values = weightsFor(one, (e) => (e === 5 ? 50 : 0));
    const found = await run(one, values, 4, grid, division(grid, kind));
    expectSame(found, await alone(one, values, 4));
    expect(found.overflow).toEqual([]);
  });

  test.each([[4, 1], [2, 2]] as const)("too small a budget is noticed, ep=%i, etp=%i", async (...grid) => {
    const values = weightsFor(sizes, (e) => (e < 2 ? 50 : 0));
    const expected = await alone(sizes, values, 4);
    const enough = await run(sizes, values, 4, grid, division(grid, kind, { expert_budget: 3.9 }));
    expectSame(enough, expected);
    expect(enough.overflow.every((missing) => missing === 0)).toBe(true);
    const short = await run(sizes, values, 4, grid, division(grid, kind, { expert_budget: 1.1 }));
    const rows = Math.ceil(1.1 * 3 * T * grid[1]);
    const missing = found(expected, grid).map((count) => Math.max(0, count - rows));
    expect(missing[0]).toBeGreaterThan(0);
    // flex misses tokens first, and then not their rows.
    if (kind !== "flex") return expect(short.overflow).toEqual(missing);
    const either = [0, 1, 2, 3].map((rank) => short.overflow.some((count, i) => i % 4 === rank && count > 0));
    expect(either).toEqual(missing.map((count) => count > 0));
  });

  test("runs again in the backward pass to the same bits", async () => {
    const values = weightsFor(latent);
    const how = division([2, 2], kind, { expert_budget: 3 });
    const once = await run(latent, values, 4, [2, 2], how);
    expect(await run(latent, values, 4, [2, 2], how, { again: true })).toEqual(once);
    expect(await run(latent, values, 4, [2, 2], how)).toEqual(once);
  });
});

describe("what a training run asks of experts", () => {
  const values = weightsFor(latent);
  test.each(DISPATCHERS)("%s: weights before the down projection", async (kind) => {
    const weighed = await run(
      latent, values, 4, [2, 2], division([2, 2], kind), { moe: { weighing: "activation" } });
    expectSame(weighed, await alone(latent, values, 4));
  });

  const limits: readonly (readonly [string, Partial<MoETraining>])[] = [
    ["a capacity", { capacity_factor: 0.8 }],
    ["a capacity that is filled up", { capacity_factor: 0.8, pad_to_capacity: true, weighing: "activation" }],
    ["whole blocks of rows", { align: 4 }],
    ["all of it", { capacity_factor: 0.9, drop_policy: "position", align: 2 }],
  ];
  /** The tokens of every rank by themselves: a capacity is one of them. */
  const members = [[0], [1], [2], [3]];
  const each: Division = { ...SOLO, ep: { ...SOLO.ep, members }, etp: { ...SOLO.etp, members } };
  describe.each(limits)("%s", (_, moe) => {
    test.each([[4, 1], [2, 2], [1, 4]] as const)("ep=%i, etp=%i", async (...grid) => {
      const expected = await run(latent, values, 4, [1, 1], each, { moe });
      for (const kind of DISPATCHERS) {
        expectSame(await run(latent, values, 4, grid, division(grid, kind), { moe }), expected);
      }
      if (moe.capacity_factor !== undefined) {
        expect(relative(expected.y, (await alone(latent, values, 4)).y)).toBeGreaterThan(1e-2);
      }
    });
  });

});

/** Rows that the experts of every rank get. */
function found({ index }: Outcome, [ep, etp]: Grid): number[] {
  const own = sizes.n_routed_experts / ep;
  return Array.from({ length: ep * etp }, (_, rank) =>
    index.filter((e) => Math.floor(e / own) === Math.floor(rank / etp)).length);
}

/** A dispatch of given choices: x of a token is its number, its weight for expert e that plus e / 10. */
function send<R>(
  index: readonly number[][][], E: number, how: Division, look: (sent: Dispatched) => R,
): R {
  return scope(() => {
    let token = 0;
    const ranks = index.map((tokens) => {
      const topk = tokens[0]!.length;
      const numbers = tokens.map(() => ++token);
      return {
        x: device.tensor(Float32Array.from(numbers), [tokens.length, 1]),
        weight: device.tensor(
          Float32Array.from(tokens.flatMap((experts, t) => experts.map((e) => numbers[t]! + e / 10))),
          [tokens.length, topk]),
        index: device.tensor(Uint32Array.from(tokens.flat()), [tokens.length, topk], "u32"),
      };
    });
    const of = (key: "x" | "weight" | "index") => shardedOf(ranks.map((rank) => rank[key]));
    return look(dispatch({ x: of("x"), weight: of("weight"), index: of("index"), E, limit: null }, how));
  });
}

async function readAll(tensor: Tensor): Promise<number[][]> {
  const values = await Promise.all(localsOf(tensor).map(async (local) => Array.from(await local.read())));
  tensor.release();
  return values;
}

/** Rows in expert order, whatever a dispatcher leaves to the experts. */
const rowsOf = ({ x, permute, offsets, spare }: Dispatched) =>
  permute ? moe_permute(x, { ...permute, offsets, spare }, permute.topk) : x;

const onesLike = (x: Tensor) => shardedOf(localsOf(x).map(({ shape, size }) =>
  device.tensor(new Float32Array(size).fill(1), shape)));

const EXAMPLE = [[[0, 2], [1, 2]], [[0, 3], [2, 3]]];

describe("the tables of an exchange", () => {
  test("are those of the worked example", async () => {
    const { x, offsets, splits } = send(EXAMPLE, 4, division([2, 1], "alltoall"),
      ({ x: rows, offsets: ends, exchanges }) => ({ x: rows, offsets: ends, splits: exchanges[0]!.splits }));
    // Tokens a0, a1, b0, b1 are 1 to 4; behind them there is room for more.
    expect(await readAll(x)).toEqual([[1, 3, 2, 0, 0, 0, 0, 0], [1, 2, 4, 3, 4, 0, 0, 0]]);
    expect(await readAll(offsets)).toEqual([[0, 2, 3], [0, 3, 5]]);
    // Own rows for both ranks, then rows from both.
    expect(await readAll(splits)).toEqual([[2, 2, 2, 1], [1, 3, 2, 3]]);
  });

  test.each(DISPATCHERS)("%s brings every row and its weight to its expert", async (kind) => {
    const r = new Draw(29);
    const index = Array.from({ length: 4 }, () => Array.from({ length: T }, () => {
      const first = Math.floor(r.next() * 6);
      return [first, first + 1 + Math.floor(r.next() * (7 - first))];
    }));
    const { rows, offsets, probs } = send(index, 8, division([2, 2], kind), (sent) => ({
      rows: rowsOf(sent), offsets: sent.offsets, probs: sent.weigh(onesLike(rowsOf(sent))),
    }));
    const [xs, ends, weights] = [await readAll(rows), await readAll(offsets), await readAll(probs)];
    // All-to-all sorts by expert, then etp, then ep of the sender; the others by its number.
    const order = kind === "alltoall" ? [0, 2, 1, 3] : [0, 1, 2, 3];
    for (let rank = 0; rank < 4; rank++) {
      const expected: { token: number; e: number }[] = [];
      const starts = [0];
      for (let e = Math.floor(rank / 2) * 4; e < Math.floor(rank / 2) * 4 + 4; e++) {
        for (const sender of order) {
          index[sender]!.forEach((experts, t) => {
            if (experts.includes(e)) expected.push({ token: sender * T + t + 1, e });
          });
        }
        starts.push(expected.length);
      }
      const n = expected.length;
      expect(ends[rank]).toEqual(starts);
      expect(xs[rank]!.slice(0, n)).toEqual(expected.map(({ token }) => token));
      expect(xs[rank]!.slice(n).every((value) => value === 0)).toBe(true);
      expect(weights[rank]!.slice(0, n)).toEqual(expected.map(({ token, e }) => Math.fround(token + e / 10)));
    }
  });

  test.each(GRIDS)("what is sent arrives, ep=%i, etp=%i", async (...grid) => {
    const [ep, etp] = grid;
    const r = new Draw(31);
    const index = Array.from({ length: ep * etp }, () => Array.from({ length: T }, () =>
      [Math.floor(8 * r.next() ** 2)]));
    const splits = send(index, 8, division(grid, "alltoall"), ({ exchanges }) =>
      exchanges.map((exchange) => ({ blocks: exchange.blocks, splits: exchange.splits })));
    for (const { blocks, splits: each } of splits) {
      const all = await readAll(each);
      const sum = (from: number, to?: number) =>
        all.flatMap((own) => own.slice(from, to)).reduce((a, b) => a + b);
      expect(sum(blocks)).toBe(sum(0, blocks) * (blocks > 1 ? 1 : etp));
    }
  });
});

interface Traffic {
  readonly kind: string;
  readonly most: number;
  readonly bytes: number;
}

/** Exact bytes of the exchanges that `body` makes. */
async function trafficOf(body: () => Promise<unknown>): Promise<Traffic[]> {
  const seen: (Communication & { counted: CountedRows })[] = [];
  const observer = (communication: Communication): void => {
    const { counted } = communication;
    if (!counted) return;
    for (const count of counted.counts) count.retain();
    seen.push({ ...communication, counted });
  };
  communicationObservers.add(observer);
  try {
    await body();
    return await Promise.all(seen.map(async ({ kind, bytes: most, counted }) => {
      const counts = await Promise.all(counted.counts.map((count) => count.read()));
      for (const count of counted.counts) count.release();
      return { kind, most, bytes: counted.sent(counts).reduce((sum, sent) => sum + sent) };
    }));
  } finally {
    communicationObservers.delete(observer);
  }
}

const total = (list: readonly { bytes: number }[]) => list.reduce((sum, { bytes }) => sum + bytes, 0);

describe("bytes that are sent", () => {
  const traffic = (shape: MoESizes, grid: Grid, kind: DispatcherKind) => {
    const ranks = grid[0] * grid[1];
    return trafficOf(() => run(shape, weightsFor(shape), ranks, grid, division(grid, kind)));
  };

  test("flex sends a token once to every rank that has experts of it", async () => {
    const grid = [4, 2] as const;
    const { index } = await alone(sizes, weightsFor(sizes), 8);
    let copies = 0;
    index.forEach((e, i) => {
      const [token, own] = [Math.floor(i / 3), Math.floor(e / 2)];
      const isFirst = !index.slice(token * 3, i).some((other) => Math.floor(other / 2) === own);
      // Both ranks with halves of the expert, other than itself.
      if (isFirst) copies += Math.floor(Math.floor(token / T) / 2) === own ? 1 : 2;
    });
    const seen = await traffic(sizes, grid, "flex");
    // Forward: tokens, weights, numbers, and the way back; backward: the way back again, weights, tokens.
    expect(seen.map(({ bytes }) => bytes / 4)).toEqual([12, 3, 3, 12, 12, 3, 12].map((n) => n * copies));
    for (const { most, bytes } of seen) expect(bytes).toBeLessThanOrEqual(most);
    // Tokens alone: numbers and weights are a small part of wider ones.
    expect(4 * 48 * copies).toBeLessThan(total(await traffic(sizes, grid, "alltoall")));
  });

  test("all-to-all sends every choice to its rank, then between those that share the expert", async () => {
    const { index } = await alone(sizes, weightsFor(sizes), 4);
    let [across, between] = [0, 0];
    index.forEach((e, i) => {
      const rank = Math.floor(i / (3 * T));
      if (Math.floor(e / 4) !== Math.floor(rank / 2)) across++;
      between++;
    });
    const seen = await traffic(sizes, [2, 2], "alltoall");
    // There and back, forward and backward.
    const rows = (which: string) => total(seen.filter(({ kind }) => kind === which)) / 48;
    expect(["all_to_all", "all_gather", "reduce_scatter"].map(rows)).toEqual(
      [4 * across, 2 * between, 2 * between]);
  });

  test("a latent width makes them fewer in its proportion", async () => {
    const narrow = await traffic(latent, [2, 2], "alltoall");
    const wide = await traffic(sizes, [2, 2], "alltoall");
    expect(total(narrow) / total(wide)).toBe(4 / 12);
  });
});

test("groups of all ranks that share experts", () => {
  expect(expertGroup(division([2, 2], "flex")).members).toEqual([[0, 1, 2, 3]]);
  const two = division([2, 2], "flex");
  const shifted = (members: readonly (readonly number[])[]) =>
    [...members, ...members.map((ranks) => ranks.map((rank) => rank + 4))];
  const twice = {
    ...two, ep: { ...two.ep, members: shifted(two.ep.members) },
    etp: { ...two.etp, members: shifted(two.etp.members) },
  };
  expect(expertGroup(twice).members).toEqual([[0, 1, 2, 3], [4, 5, 6, 7]]);
});

describe("a model trains as on one rank", () => {
  const batches = smallBatches(4, false);
  let one: ReturnType<typeof trainSmall> | null = null;
  const LAYOUTS = [
    "dp=4,ep=4,dispatch=flex", "tp=2,sp=on,dp=2,ep=2,etp=2", "dp=4,ep=2,dispatch=allgather",
  ];
  test.each(LAYOUTS)("%s, with room for its tokens", async (layout) => {
    one ??= trainSmall(device, "tp=1", batches);
    const expected = await one;
    const before = device.pool.liveBytes;
    const { gradients, steps } = await trainSmall(device, `${layout},expert_budget=1.9`, batches);
    expect(Math.abs(steps[0]!.loss / expected.steps[0]!.loss - 1)).toBeLessThan(1e-6);
    const { name, error } = worstOf(gradients, expected.gradients);
    expect(error, name).toBeLessThan(1e-5);
    expect(steps[0]!.max_violation).toBe(expected.steps[0]!.max_violation);
    expect(device.pool.liveBytes).toBe(before);
  });

  test.each([...LAYOUTS, "dp=2,pp=2,ep=2"])("%s, without room for them: not at all", async (layout) => {
    const { mesh, trainer, dispose } = startLayout(device, `${layout},expert_budget=1`, batches.length);
    const everything = async () => {
      const found: ArrayLike<number>[] = [];
      for (const name of mesh.parameters.keys()) found.push(await mesh.read(name));
      for (const { bytes } of stateEntries(mesh, trainer.optimizers)) {
        found.push(await (bytes as () => Promise<Uint8Array>)());
      }
      return found;
    };
    const before = await everything();
    const error = await trainer.step(batches).catch((reason: unknown) => reason) as ExpertOverflow;
    expect(error).toBeInstanceOf(ExpertOverflow);
    expect(await everything()).toEqual(before);
    expect([trainer.steps, trainer.skipped.total]).toEqual([0, 0]);
    const paths = mesh.stages.flatMap(({ rank, model: { blocks, mtp } }) =>
      [...blocks, ...mtp?.blocks ?? []].flatMap(({ mixer }) =>
        (mixer instanceof MoE ? [[rank, mixer.path]] : [])));
    for (const { rank, layer, found: came, fit } of error.missed) {
      expect(came).toBeGreaterThan(fit);
      expect(paths).toContainEqual([Math.floor(rank * mesh.layout.pp / mesh.world), layer]);
    }
    const { rank, layer, found: came, fit } = error.missed.reduce((a, b) => (b.found > a.found ? b : a));
    expect(error.message).toContain(
      `experts of ${layer} on rank ${rank} got ${came} rows of tokens in step 1, but expert_budget=1 has ` +
      `room for ${fit}`);
    expect(error.message).toMatch(/nothing was updated.* larger expert_budget in the layout \(from \d/);
    // An evaluation has room for all.
    expect(await trainer.evaluate(batches)).toBeGreaterThan(0);
    dispose();
  });
});

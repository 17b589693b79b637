import { afterAll, describe, expect, test } from "vitest";
import { recompute } from "../../src/autograd/recompute.ts";
import { Tape } from "../../src/autograd/tape.ts";
import { listParameters } from "../../src/models/checkpoint_names.ts";
import { parseConfig, type NemotronHConfig } from "../../src/models/config.ts";
import { Attention } from "../../src/nn/attention.ts";
import type { ForwardContext } from "../../src/nn/context.ts";
import { attendOverRanks, zigzag } from "../../src/nn/context_parallel.ts";
import { CONTEXT_KINDS, type ContextKind, type Division, SOLO } from "../../src/nn/division.ts";
import { Mamba2 } from "../../src/nn/mamba2.ts";
import { Weights } from "../../src/nn/weights.ts";
import { attention } from "../../src/ops/attention.ts";
import { communicationObservers, type Communication, type Group } from "../../src/ops/collectives.ts";
import { add } from "../../src/ops/elementwise.ts";
import { embedding } from "../../src/ops/embedding.ts";
import { linear_cross_entropy } from "../../src/ops/linear_cross_entropy.ts";
import { parseLayout } from "../../src/parallel/layout.ts";
import { coordinatesOf, ranksPerStage } from "../../src/parallel/mesh.ts";
import { predictTraffic } from "../../src/parallel/traffic.ts";
import { type Device, openDevice } from "../../src/tensor/device.ts";
import { scope } from "../../src/tensor/scope.ts";
import { localsOf, Sharded, shardedOf } from "../../src/tensor/sharded.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { Draw, type HostTensor } from "../ops/suite.ts";
import { testAdapters } from "../support/adapters.ts";
import { onRanks, shardedModel, wholeGradients } from "../support/parallel.ts";

const groupOf = (...members: number[][]): Group => ({ name: "cp", members, algorithm: "direct" });
const oneGroup = (ranks: number): Group => groupOf(Array.from({ length: ranks }, (_, rank) => rank));
const divided = (ranks: number, cp_kind: ContextKind): Division =>
  ({ ...SOLO, cp: oneGroup(ranks), cp_kind });

/** Of every row [B, S, ...] the positions that each rank holds. */
function cut({ shape, data, dtype }: HostTensor, ranks: number): HostTensor[] {
  const [B, S, ...rest] = shape as [number, number, ...number[]];
  const width = data.length / (B * S);
  return zigzag(ranks, S).map((positions) => {
    const part = new Float64Array(B * positions.length * width);
    for (let b = 0; b < B; b++) {
      positions.forEach((p, i) => {
        const row = data.slice((b * S + p) * width, (b * S + p + 1) * width);
        part.set(row, (b * positions.length + i) * width);
      });
    }
    return { shape: [B, positions.length, ...rest], data: part, dtype };
  });
}

/** The rows of which the ranks hold parts [B, L, ...]. */
function joined(parts: readonly ArrayLike<number>[], [B, S]: readonly number[]): Float64Array {
  const ranks = parts.length;
  const width = (parts[0]!.length * ranks) / (B! * S!);
  const all = new Float64Array(B! * S! * width);
  zigzag(ranks, S!).forEach((positions, rank) => {
    for (let b = 0; b < B!; b++) {
      positions.forEach((p, i) => {
        for (let c = 0; c < width; c++) {
          all[(b * S! + p) * width + c] = parts[rank]![(b * positions.length + i) * width + c]!;
        }
      });
    }
  });
  return all;
}

/** Relative error of a whole tensor: |found - expected| / |expected|. */
function errorOf(found: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(found.length).toBe(expected.length);
  let [error, size] = [0, 0];
  for (let i = 0; i < expected.length; i++) {
    error += (found[i]! - expected[i]!) ** 2;
    size += expected[i]! ** 2;
  }
  return Math.sqrt(error / Math.max(size, 1e-24));
}

function upload(device: Device, { shape, data, dtype }: HostTensor): Tensor {
  return device.tensor(dtype === "i32" ? Int32Array.from(data) : Float32Array.from(data), shape, dtype);
}

interface Outcome {
  /** Whole rows of the result. */
  out: Float64Array;
  /** Gradients by input (whole rows) and by parameter (summed over ranks). */
  rows: Float64Array[];
  parameters: Float64Array[];
}

/**
 * Runs `body` on ranks that share the rows of `inputs` and hold all of `parameters`, and walks back from the
 * gradients `dout` of its result. Nothing that it made is left.
 */
async function run(
  device: Device, ranks: number, inputs: readonly HostTensor[], parameters: readonly HostTensor[],
  seq_idx: HostTensor | null, dout: HostTensor,
  body: (rows: Tensor[], parameters: Tensor[], seq_idx: Tensor | null) => Tensor,
): Promise<Outcome> {
  const before = device.pool.liveBytes;
  const on = (host: HostTensor) => cut(host, ranks).map((part) => upload(device, part));
  const rows = inputs.map(on);
  const whole = parameters.map((host) => Array.from({ length: ranks }, () => upload(device, host)));
  const numbers = seq_idx && on(seq_idx);
  const seeds = on(dout);
  const leaves = [...rows, ...whole].flat();
  for (const leaf of leaves) leaf.requiresGrad = true;
  const tape = new Tape();
  const { outs, gradients } = scope(() => {
    const y = tape.run(() => body(rows.map(shardedOf), whole.map(shardedOf), numbers && shardedOf(numbers)));
    const parts = [...localsOf(y)];
    return { outs: parts, gradients: tape.backward(parts, seeds) };
  });
  const read = async (x: Tensor) => Array.from(await gradients.get(x.key)!.read());
  const [B, S] = dout.shape;
  const outcome: Outcome = {
    out: joined(await Promise.all(outs.map((x) => x.read())), [B!, S!]),
    rows: await Promise.all(rows.map(async (parts) => joined(await Promise.all(parts.map(read)), [B!, S!]))),
    parameters: await Promise.all(whole.map(async (copies) => {
      const each = await Promise.all(copies.map(read));
      return Float64Array.from(each[0]!, (_, i) => each.reduce((sum, values) => sum + values[i]!, 0));
    })),
  };
  const held = [...leaves, ...numbers ?? [], ...seeds, ...outs, ...gradients.values()];
  for (const tensor of new Set(held)) tensor.release();
  expect(device.pool.liveBytes).toBe(before);
  return outcome;
}

/** Two rows of three documents each, which end neither with stretches nor together. */
const S = 40;
const DOCUMENTS = [[13, 9, 18], [1, 30, 9]].flatMap((row) =>
  row.flatMap((length, i) => Array<number>(length).fill(i)));
const r = new Draw(5);
const packed = r.of([2, S], DOCUMENTS, "i32");

/** The same result for every call. */
function once<T>(make: () => T): () => T {
  let made: { value: T } | null = null;
  return () => (made ??= { value: make() }).value;
}

async function observed<T>(body: () => T | Promise<T>): Promise<Communication[]> {
  const seen: Communication[] = [];
  const observer = (communication: Communication) => seen.push(communication);
  communicationObservers.add(observer);
  try {
    await body();
  } finally {
    communicationObservers.delete(observer);
  }
  return seen;
}

/** Bytes that all ranks together send forward and backward. */
const byPass = (seen: readonly Communication[]) => [false, true].map((backward) =>
  seen.reduce((sum, x) => sum + (x.backward === backward ? x.bytes : 0), 0));

const config = (pattern: string) => parseConfig({
  hybrid_override_pattern: pattern, vocab_size: 24, hidden_size: 16, num_attention_heads: 8,
  num_key_value_heads: 2, head_dim: 8, mamba_num_heads: 8, mamba_head_dim: 4, ssm_state_size: 16,
  n_groups: 2, intermediate_size: 8,
});

/** The same as `predictTraffic` says it, for what passes between positions. */
function predictedBytes(text: string, model: NemotronHConfig): number[] {
  const layout = parseLayout(text);
  const [rows] = predictTraffic(layout, model, { batch: 2, seqlen: S, micro_batches: 1 });
  return ["forward", "backward"].map((pass) => rows!.reduce((sum, row) =>
    sum + (row.pass === pass && row.purpose.endsWith("context") ? layout.cp * row.bytes : 0), 0));
}

describe("positions of ranks", () => {
  test("each rank has a stretch from either end", () => {
    expect(zigzag(1, 3)).toEqual([[0, 1, 2]]);
    expect(zigzag(2, 8)).toEqual([[0, 1, 6, 7], [2, 3, 4, 5]]);
    expect(zigzag(4, 8)).toEqual([[0, 7], [1, 6], [2, 5], [3, 4]]);
  });

  test("causal attention is the same work for all of them", () => {
    const work = zigzag(4, 48).map((positions) => positions.reduce((sum, p) => sum + p + 1, 0));
    expect(new Set(work)).toEqual(new Set([(48 * 49) / 2 / 4]));
  });

  test("what is shifted before the cut keeps its neighbour over the ends of stretches", () => {
    const ids = Array.from({ length: 16 }, (_, i) => 100 + i);
    const targets = [...ids.slice(1), -100];
    for (const positions of zigzag(2, 16)) {
      expect(positions.map((p) => targets[p])).toEqual(positions.map((p) => (p === 15 ? -100 : ids[p]! + 1)));
    }
  });

  test("refuses a row that does not divide", () => {
    expect(() => zigzag(2, 10)).toThrow(/that 2 ranks share must have a multiple of 4 positions, found 10/);
  });
});

for (const handle of await testAdapters()) {
  describe(handle.info.id, async () => {
    const device = await openDevice({ adapter: handle });
    afterAll(() => device.destroy());

    describe("attention", () => {
      const [q, k, v, dout] = [[2, S, 8, 8], [2, S, 2, 8], [2, S, 2, 8], [2, S, 8, 8]]
        .map((shape) => r.normal(shape)) as [HostTensor, HostTensor, HostTensor, HostTensor];
      const scale = 8 ** -0.5;
      const alone = new Map<HostTensor | null, Promise<Outcome>>();
      const single = (seq_idx: HostTensor | null) => {
        if (!alone.has(seq_idx)) {
          alone.set(seq_idx, run(device, 1, [q, k, v], [], seq_idx, dout,
            ([a, b, c], _, numbers) => attention(a!, b!, c!, { scale, seq_idx: numbers })));
        }
        return alone.get(seq_idx)!;
      };
      const cases = CONTEXT_KINDS.flatMap((kind) => [2, 4].flatMap((ranks) =>
        [null, packed].map((seq_idx) => ({ kind, ranks, seq_idx, what: seq_idx ? "documents" : "rows" }))));

      test.each(cases)("$kind over $ranks ranks, whole $what", async ({ kind, ranks, seq_idx }) => {
        const expected = await single(seq_idx);
        const found = await run(device, ranks, [q, k, v], [], seq_idx, dout, ([a, b, c], _, numbers) =>
          attendOverRanks(a!, b!, c!, { scale, seq_idx: numbers }, divided(ranks, kind)));
        expect(errorOf(found.out, expected.out)).toBeLessThan(1e-6);
        found.rows.forEach((gradient, i) =>
          expect(errorOf(gradient, expected.rows[i]!)).toBeLessThan(1e-5));
      });

      test.each(CONTEXT_KINDS)("%s keeps groups apart", async (kind) => {
        // Ranks 0 and 2 have the first row, ranks 1 and 3 the second.
        const row = (x: HostTensor, b: number): HostTensor => {
          const half = x.data.length / 2;
          return { ...x, shape: [1, ...x.shape.slice(1)], data: x.data.slice(b * half, (b + 1) * half) };
        };
        const before = device.pool.liveBytes;
        const on = (x: HostTensor) => {
          const parts = [0, 1].map((b) => cut(row(x, b), 2));
          return [parts[0]![0]!, parts[1]![0]!, parts[0]![1]!, parts[1]![1]!].map((p) => upload(device, p));
        };
        const [qs, ks, vs, numbers] = [on(q), on(k), on(v), on(packed)];
        const out = scope(() => attendOverRanks(
          new Sharded(qs!), new Sharded(ks!), new Sharded(vs!), { scale, seq_idx: new Sharded(numbers!) },
          { ...SOLO, cp: groupOf([0, 2], [1, 3]), cp_kind: kind }));
        const parts = await Promise.all(localsOf(out).map((local) => local.read()));
        const rows = [0, 1].map((b) => joined([parts[b]!, parts[b + 2]!], [1, S]));
        const { out: expected } = await single(packed);
        expect(errorOf(rows.flatMap((x) => [...x]), expected)).toBeLessThan(1e-6);
        for (const tensor of [qs, ks, vs, numbers].flat()) tensor!.release();
        out.release();
        expect(device.pool.liveBytes).toBe(before);
      });

      test.each(CONTEXT_KINDS)("%s sends what is predicted, and the numbers of documents", async (kind) => {
        const ranks = 4;
        const sent = async (seq_idx: HostTensor | null) => byPass(await observed(() =>
          run(device, ranks, [q, k, v], [], seq_idx, dout, ([a, b, c], _, numbers) =>
            attendOverRanks(a!, b!, c!, { scale, seq_idx: numbers }, divided(ranks, kind)))));
        const predicted = predictedBytes(`cp=${ranks},cp_kind=${kind}`, config("*"));
        expect(await sent(null)).toEqual(predicted);
        // Every rank's numbers go to every other rank; rings send them along on the way back, too: here among
        // four, or, after two neighbours have gathered theirs, among two.
        const numbers = 4 * packed.data.length;
        const back = { ring: 3, allgather: 0, alltoall: 0, hierarchical: 2 }[kind];
        const there = kind === "hierarchical" ? 1 + back : ranks - 1;
        expect(await sent(packed)).toEqual([predicted[0]! + there * numbers, predicted[1]! + back * numbers]);
      });

      test("a captured ring runs again on new values", async () => {
        const before = device.pool.liveBytes;
        const [qs, ks, vs] = [q, k, v].map((host) => cut(host, 2).map((part) => upload(device, part)));
        const { graph, result } = device.capture(() => scope(() => attendOverRanks(
          new Sharded(qs!), new Sharded(ks!), new Sharded(vs!), { scale, seq_idx: null },
          divided(2, "ring"))));
        const later = cut({ ...q, data: q.data.map((x) => -x) }, 2);
        const read = async () => {
          device.replay(graph);
          return joined(await Promise.all(localsOf(result).map((local) => local.read())), [2, S]);
        };
        const first = await read();
        expect(errorOf(first, (await single(null)).out)).toBeLessThan(1e-6);
        qs!.forEach((x, i) => x.write(Float32Array.from(later[i]!.data)));
        expect(errorOf(await read(), first)).toBeGreaterThan(0.1);
        qs!.forEach((x, i) => x.write(Float32Array.from(cut(q, 2)[i]!.data)));
        expect(await read()).toEqual(first);
        for (const tensor of [qs, ks, vs].flat()) tensor!.release();
        result.release();
        device.stream.disposeGraph(graph);
        expect(device.pool.liveBytes).toBe(before);
      });

      test("refuses heads that it cannot share out", () => {
        const on = (heads: number) => new Sharded([0, 1].map(() => device.zeros([1, 2, heads, 8])));
        scope(() => {
          const refused = (Hq: number, Hkv: number) => () =>
            attendOverRanks(on(Hq), on(Hkv), on(Hkv), { scale, seq_idx: null }, divided(2, "alltoall"));
          expect(refused(3, 1)).toThrow(/cannot share 3 attention heads out among 2 ranks/);
          expect(refused(6, 3)).toThrow(/cannot share 3 key heads out among 2 ranks/);
        });
      });
    });

    describe("layers", () => {
      const hidden = 16;
      const sizes = {
        hidden, nheads: 8, headdim: 4, dstate: 16, ngroups: 2, conv_kernel: 4, chunk_size: 8,
        dt_limit: [0, Infinity] as const, eps: 1e-5, conv_bias: true, proj_bias: false,
      };
      const MAMBA: Readonly<Record<string, number[]>> = {
        "in_proj.weight": [2 * 32 + 2 * 32 + 8, hidden], "conv1d.weight": [96, 1, 4], "conv1d.bias": [96],
        A_log: [8], D: [8], dt_bias: [8], "norm.weight": [32], "out_proj.weight": [hidden, 32],
      };
      const ATTENTION: Readonly<Record<string, number[]>> = {
        "q_proj.weight": [32, hidden], "k_proj.weight": [16, hidden], "v_proj.weight": [16, hidden],
        "o_proj.weight": [hidden, 32],
      };
      const drawn = (shapes: Readonly<Record<string, number[]>>) =>
        Object.values(shapes).map((shape) => r.normal(shape, shape.length > 1 ? 0.25 : 0.5));
      const named = (shapes: Readonly<Record<string, number[]>>, tensors: readonly Tensor[]) =>
        new Weights(new Map(Object.keys(shapes).map((name, i) => [name, tensors[i]!])));
      const plain: ForwardContext = { seq_idx: null, step: null, routing: null };

      test.each([
        { ranks: 2, groups: "a group each" }, { ranks: 4, groups: "a group for two ranks" },
      ])("Mamba-2 over $ranks ranks, $groups", async ({ ranks }) => {
        const [x, dout] = [r.normal([2, S, hidden]), r.normal([2, S, hidden])];
        const parameters = drawn(MAMBA);
        const over = (n: number) => run(device, n, [x], parameters, packed, dout, ([u], w, seq_idx) =>
          new Mamba2(sizes, named(MAMBA, w), n === 1 ? SOLO : divided(n, "ring"))
            .forward(u!, { ...plain, seq_idx }, null));
        const [expected, found] = [await over(1), await over(ranks)];
        expect(errorOf(found.out, expected.out)).toBeLessThan(1e-6);
        for (const of of ["rows", "parameters"] as const) {
          found[of].forEach((gradient, i) =>
            expect(errorOf(gradient, expected[of][i]!), `${of} ${i}`).toBeLessThan(1e-5));
        }
      });

      test("Mamba-2 sends what is predicted, and the numbers of documents", async () => {
        const x = r.normal([2, S, hidden]);
        const seen = await observed(() => run(device, 4, [x], drawn(MAMBA), packed, x, ([u], w, seq_idx) =>
          new Mamba2(sizes, named(MAMBA, w), divided(4, "ring")).forward(u!, { ...plain, seq_idx }, null)));
        const [forward, backward] = predictedBytes("cp=4", config("M"));
        expect(byPass(seen)).toEqual([forward! + 3 * 4 * packed.data.length, backward]);
      });

      /** Embedding, Mamba-2 and attention with residuals, and the loss of every rank's own positions. */
      const vocab = 24;
      const stack = [r.normal([vocab, hidden]), ...drawn(MAMBA), ...drawn(ATTENTION)];
      const ids = r.integers([2, S], 0, vocab);
      const targets: HostTensor = {
        ...ids, data: ids.data.map((_, i) =>
          (i % S === S - 1 || DOCUMENTS[i] !== DOCUMENTS[i + 1] ? -100 : ids.data[i + 1]!)),
      };
      const scored = (x: HostTensor) => x.data.reduce((sum, id) => sum + (id >= 0 ? 1 : 0), 0);

      async function train(ranks: number, kind: ContextKind, isRecomputed = false) {
        const before = device.pool.liveBytes;
        const division = ranks === 1 ? SOLO : divided(ranks, kind);
        const on = (host: HostTensor) => shardedOf(cut(host, ranks).map((part) => upload(device, part)));
        const leaves = stack.map((host) => Array.from({ length: ranks }, () => upload(device, host)));
        for (const leaf of leaves.flat()) leaf.requiresGrad = true;
        const [token, target, seq_idx] = [on(ids), on(targets), on(packed)];
        // A rank's share of the divisor: its scored positions of all.
        const shares = cut(targets, ranks).map((part) => scored(part) / scored(targets));
        const tape = new Tape();
        const seeds = shares.map((share) => device.tensor([share], []));
        const { losses, gradients } = scope(() => {
          const loss = tape.run(() => {
            const [table, ...rest] = leaves.map(shardedOf);
            const mamba = new Mamba2(sizes, named(MAMBA, rest.slice(0, 8)), division);
            const heads = { num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8, bias: false };
            const attend = new Attention({ hidden, ...heads }, named(ATTENTION, rest.slice(8)), division);
            const context = { ...plain, seq_idx };
            const mix = (x: Tensor) => {
              const y = add(x, mamba.forward(x, context, null));
              return [add(y, attend.forward(y, context, null))];
            };
            const x = embedding(token, table!);
            const [h] = isRecomputed ? recompute([x, seq_idx], () => mix(x)) : mix(x);
            const rows = (2 * S) / ranks;
            return linear_cross_entropy(h!.reshape([rows, hidden]), table!, target.reshape([rows]), {});
          });
          const each = [...localsOf(loss)];
          return { losses: each, gradients: tape.backward(each, seeds) };
        });
        const values = await Promise.all(losses.map((loss) => loss.read()));
        const sums = await Promise.all(leaves.map(async (copies) => {
          const parts = await Promise.all(copies.map(async (leaf) =>
            Float64Array.from(await gradients.get(leaf.key)!.read())));
          return parts.reduce((sum, part) => sum.map((value, i) => value + part[i]!));
        }));
        const inputs = [token, target, seq_idx].flatMap((x) => [...localsOf(x), x]);
        const held = [...leaves.flat(), ...inputs, ...seeds, ...losses, ...gradients.values()];
        for (const tensor of new Set(held)) tensor.release();
        expect(device.pool.liveBytes).toBe(before);
        return { loss: values.reduce((sum, [value], rank) => sum + value! * shares[rank]!, 0), sums };
      }

      const alone = once(() => train(1, "ring"));
      const wholeAlone = once(() => whole("tp=1"));

      test.each([...CONTEXT_KINDS.map((kind) => [4, kind] as const), [2, "ring"] as const])(
        "loss and gradients do not depend on the ranks: %i, %s", async (ranks, kind) => {
          const [expected, found] = [await alone(), await train(ranks, kind)];
          expect(Math.abs(found.loss / expected.loss - 1)).toBeLessThan(1e-6);
          found.sums.forEach((gradient, i) =>
            expect(errorOf(gradient, expected.sums[i]!), `parameter ${i}`).toBeLessThan(1e-5));
        });

      test("a second run of a block communicates again and gives the same bits", async () => {
        const [first, second] = [await train(2, "ring"), await train(2, "ring", true)];
        expect(second).toEqual(first);
      });

      test.each([
        "tp=2,cp=2", "tp=2,cp=2,sp=off,cp_kind=alltoall", "cp=4,cp_kind=allgather",
        "tp=2,cp=2,cp_kind=hierarchical",
      ])(
        "a whole model with a prediction block under %s", async (text) => {
          const [expected, found] = [await wholeAlone(), await whole(text)];
          expect(Math.abs(found.loss / expected.loss - 1)).toBeLessThan(1e-6);
          expect([...found.gradients.keys()]).toEqual([...expected.gradients.keys()]);
          for (const [name, gradient] of found.gradients) {
            expect(errorOf(gradient, expected.gradients.get(name)!), name).toBeLessThan(1e-5);
          }
        });

      const model = parseConfig({
        hybrid_override_pattern: "M*-", mtp_hybrid_override_pattern: "*", num_nextn_predict_layers: 1,
        vocab_size: vocab, hidden_size: hidden, num_attention_heads: 4, num_key_value_heads: 2, head_dim: 8,
        mamba_num_heads: 8, mamba_head_dim: 4, ssm_state_size: 16, n_groups: 2, chunk_size: 8,
        intermediate_size: 24,
      });
      const values = new Map(listParameters(model).map(({ name, shape }) =>
        [name, Float32Array.from(r.normal([...shape], shape.length > 1 ? 0.25 : 0.5).data)]));
      /** Tokens, and those that follow one and two positions later: every position counts. */
      const row = Array.from({ length: 2 }, () => r.integers([S + 3], 0, vocab).data);
      const later = (n: number) => r.of([2, S], row.flatMap((x) => Array.from(x.slice(n, n + S))), "i32");

      async function whole(text: string) {
        const before = device.pool.liveBytes;
        const layout = parseLayout(text);
        const sharded = shardedModel(device, model, layout, values);
        const tape = new Tape();
        const { losses, gradients } = scope(() => {
          const on = (host: HostTensor) => onRanks((rank) =>
            upload(device, cut(host, layout.cp)[coordinatesOf(layout, rank).cp]!), ranksPerStage(layout));
          const made = [on(later(0)), on(later(1)), on(later(2)), on(packed)] as const;
          const [input_ids, targets, afterwards, seq_idx] = made;
          const mtp = [{ input_ids: targets, targets: afterwards }];
          const loss = tape.run(() =>
            sharded.loss({ input_ids, targets, mtp, seq_idx }, { mtp_scale: 0.3 }));
          const totals = [...localsOf(loss.total)];
          const seeds = totals.map(() => device.tensor([1 / layout.cp], []));
          const result = { losses: totals, gradients: tape.backward(totals, seeds) };
          for (const tensor of made) tensor.release();
          return result;
        });
        const totals = await Promise.all(losses.map((loss) => loss.item()));
        const joint = await wholeGradients(sharded, layout, gradients);
        for (const tensor of [...losses, ...gradients.values()]) tensor.release();
        sharded.dispose();
        expect(device.pool.liveBytes).toBe(before);
        return { loss: totals.reduce((sum, total) => sum + total, 0) / totals.length, gradients: joint };
      }

      test("refuses caches, and heads and groups that it cannot share out", () => {
        scope(() => {
          const on = (shape: readonly number[]) => new Sharded([0, 1].map(() => device.zeros(shape)));
          const layer = (change: Partial<typeof sizes>, shapes: Readonly<Record<string, number[]>>) =>
            new Mamba2({ ...sizes, ...change }, named(shapes, Object.values(shapes).map(on)),
              divided(2, "ring"));
          expect(() => layer({}, MAMBA).createCache(device, 1))
            .toThrow(/A cache needs rows that lie on one rank, found context parallel 2/);
          const tp = { name: "tp", members: [[0, 1]], algorithm: "direct" } as const;
          expect(() => new Mamba2(sizes, named(MAMBA, Object.values(MAMBA).map(on)), { ...SOLO, tp })
            .createCache(device, 1)).toThrow(/rows that lie on one rank, found tensor parallel 2/);
          const odd = {
            ...MAMBA, "in_proj.weight": [2 * 12 + 2 * 48 + 3, hidden], "conv1d.weight": [108, 1, 4],
            "conv1d.bias": [108], A_log: [3], D: [3], dt_bias: [3], "norm.weight": [12],
            "out_proj.weight": [hidden, 12],
          };
          expect(() => layer({ nheads: 3, ngroups: 3 }, odd).forward(on([1, 4, hidden]), plain, null))
            .toThrow(/cannot share 3 Mamba heads out among 2 ranks/);
        });
      });
    });
  });
}

/**
 * Race detection: every entry point with workgroup memory or barriers is interpreted in lockstep on a small
 * shape, and no two invocations of a workgroup may touch the same bytes between two barriers unless both
 * read.
 *
 * The interpreter cannot size workgroup arrays by an `override` and models subgroups wrongly, so overrides
 * are given as constants and the condition `subgroups` stays off.
 */
import { describe, expect, test } from "vitest";
import { link } from "../../src/kernel/link.ts";
import { manifest } from "../../src/kernel/manifest.ts";
import { shaderSource } from "../../src/kernel/sources.node.ts";
import { router } from "../../src/reference/router.ts";
import { ndarray } from "../../src/tensor/ndarray.ts";
import { Draw } from "../ops/suite.ts";
import { barriersOf, findRaces, usesSharedMemory } from "../support/race_detector.ts";

type Values = Float32Array | Int32Array | Uint32Array;

/** One small launch. Storage buffers hold their initial contents; a number means so many zeros. */
interface Launch {
  readonly bind: Readonly<Record<string, Values | number>>;
  readonly params: Readonly<Record<string, number>>;
  readonly constants?: Readonly<Record<string, number>>;
  readonly conditions?: readonly string[];
  readonly workgroups: readonly number[];
  /** What the interpreter cannot do, and what does as well; both touch the same memory. */
  readonly rewrite?: readonly (readonly [text: string, plain: string])[];
}

interface KernelShape {
  readonly bindings: Readonly<Record<string, { binding: number; access: string }>>;
  readonly params: Readonly<Record<string, string>>;
  readonly entries: Readonly<Record<string, readonly string[]>>;
}

// Drawn anew for every buffer, so that no launch depends on those listed before it.
const normal = (size: number) => Float32Array.from(new Draw(size).normal([size]).data);
const integers = (size: number, below: number) =>
  Int32Array.from(new Draw(size).integers([size], 0, below).data);
const u32 = (...values: number[]) => Uint32Array.from(values);
/** Settings of a sampler: temperature, top_k, top_p, min_p. */
const settings = Float32Array.from([0.8, 6, 0.7, 0]);
const sampled = { params: { rows: 2, vocab: 21 }, constants: { WG: 16 }, workgroups: [2] } as const;
const logits = normal(2 * 21);
/**
 * Two values with many ties, of which some are cut in two. The interpreter takes words through f32 and shifts
 * those with their top bit set as signed; the keys of these values, 0x407fff00 and 0x3fffff00, survive both.
 */
const ties = new Float32Array(u32(...Array.from(logits, (x) => x > 0.5 ? 0xbf8000ff : 0xc00000ff)).buffer);
/** Bits of the largest logit, key and index of the last token kept: here all of them. */
const cuts = u32(0x40000000, 1, 20, 0, 0x40000000, 1, 20, 0);
const MATMUL = {
  m: 5, n: 6, k: 18, batches: 1, row_tiles: 1, splits: 1, split_k: 18, a_row: 18, a_col: 1, a_batch: 90,
  b_row: 6, b_col: 1, b_batch: 108, c_row: 6, c_batch: 30, c_split: 30, b_offset: 0, c_offset: 0, per: 1,
  stored: 18,
};

/** For what may be an element of an array, whose rows the interpreter cannot set. */
const COPY = ["var sum = acc;", "var sum = mat4x4f(acc[0], acc[1], acc[2], acc[3]);"] as const;
/** Of 16 lines that are staged alike four are read, the first and the last among them: most of the time. */
const FEW = "k < HALF; k += 5u";
/** Scales as whole numbers instead of packed halves. */
const HALVES = [["unpack2x16float(word)", "vec2f(f32(word & 0xffffu), f32(word >> 16u))"]] as const;
/** Three queries over 35 keys: two tiles of keys, of which the second holds what masks hide. */
const TILED = {
  params: {
    batch: 1, seqlen: 3, kv_seqlen: 35, nheads: 1, nkv_heads: 1, turn: 0, early: 0, reach: 32, limit: 35,
    q_docs: 0, k_docs: 0, scale: 0.35,
  },
  constants: { HEAD_VEC4: 1 }, workgroups: [1],
} as const;
const tiled = { q: normal(12), k: normal(140), v: normal(140), seq_idx: 35 };

/** By `kernel:entry`. A kernel with workgroup memory or barriers that is not here fails the run. */
const LAUNCHES: Readonly<Record<string, Launch>> = {
  "attention/attention_tile:attention_tile": {
    bind: { ...tiled, out: 12, lse: 3 }, ...TILED,
    rewrite: [
      COPY, ["seen[r] = vec4u(count[r]) > key;", ""], [", seen[r])", ", vec4u(count[r]) > key)"],
    ],
  },
  "attention/attention_tile_dkv:attention_tile_dkv": {
    bind: { ...tiled, dout: normal(12), stats: normal(6), dk: 140, dv: 140 }, ...TILED, workgroups: [2],
    rewrite: [
      COPY, ["let stat = mat4x2f(", "let stat = array<vec2f, 4>("],
      ["transpose(stat)", "array<vec4f, 2>(vec4f(stat[0].x), vec4f(stat[0].y))"],
    ],
  },
  "attention/attention_tile_dq:attention_tile_dq": {
    bind: { ...tiled, dout: normal(12), stats: normal(6), dq: 12 }, ...TILED, rewrite: [COPY],
  },
  "attention/decode_attention:decode_attention": {
    bind: { q: normal(16), key: normal(96), value: normal(96), position: u32(9), out: 16 },
    params: { rows: 2, seqlen: 1, capacity: 12, nheads: 2, nkv_heads: 1, head_dim: 8, length: 12, nparts: 1,
      scale: 0.35, v_scale: 1 },
    constants: { WG: 4, HEAD_VEC4: 2 }, conditions: ["vec4"], workgroups: [2],
  },
  "loss/cross_entropy:chunk_lse": {
    bind: { logits: normal(3 * 20), labels: integers(3, 20), lse: 3, picked: 3 },
    params: { rows: 3, stride: 20, width: 20, chunk: 0, vocab: 20 }, constants: { WG: 16 }, workgroups: [4],
  },
  "loss/cross_entropy:mean": {
    bind: { labels: integers(11, 20), lse: normal(11), picked: normal(11), loss: 1, scale: 1 },
    params: { rows: 11, stride: 20, width: 20, chunk: 0, vocab: 20 }, constants: { WG: 16 }, workgroups: [1],
  },
  "loss/merged_cross_entropy:merge": {
    bind: { lse: normal(22), picked: normal(11), total: normal(11), labels: integers(11, 20), merged: 11,
      scale: 1, loss: 1 },
    params: { rows: 11, parts: 2, vocab: 20, keep: 0.9, spread: 0.005 }, constants: { WG: 4 },
    workgroups: [1],
  },
  "mamba2/state_passing_backward:exponents": {
    bind: { dA_cumsum: 16, start: 4, prev_states: normal(48), dstates: normal(48), dcumsum: 16 },
    params: { nheads: 2, cells: 12, nchunks: 2, chunk_size: 4, total: 4 },
    constants: { WG: 16 }, workgroups: [4],
  },
  "matmul/matmul_tile:matmul_tile": {
    bind: { a: normal(90), b: normal(108), c: 30, bias: normal(6), tiles: 1, table: 1, extra: 1 },
      params: MATMUL,
    conditions: ["bias"], workgroups: [1],
  },
  "matmul/matmul_matrix:matmul_matrix": {
    bind: { a: normal(90), b: normal(108), c: 30, bias: normal(6), tiles: 1, table: 1, extra: 1 },
    params: { ...MATMUL, k: 6, split_k: 6 }, constants: { SUBGROUP: 1, WG: 4 },
    conditions: ["m8", "n8", "k8"], workgroups: [1],
    // Every subgroup multiplies one matrix, which is slow enough. The interpreter takes private memory for
    // shared.
    rewrite: [
      ["written_out[s * M * N + i] = sum;", ""], ["= written_out[s * M * N + i];", "= 0.0;"],
      ["min(DOWN, params.m)", "1u"], ["min(BESIDE, params.n)", "1u"],
      ["array<Sums, DOWN * BESIDE>", "array<u32, 16>"], ["array<Right, BESIDE>", "array<vec2u, 4>"],
      ["array<f32, PART * 32>", "array<f32, 1024>"], ["array<E, SIZE * LINE>", "array<f32, 1280>"],
      ["array<f32, 2 * ACROSS * M * N>", "array<f32, 256>"],
    ],
  },
  "matmul/matvec:matvec": {
    bind: { x: normal(40), weight: normal(120), y: 12, bias: normal(6), offsets: 1, residual: 1 },
    params: { m: 2, n: 6, k: 20, experts: 0, parts: 1, steps: 5 }, constants: { WG: 16 }, workgroups: [4],
  },
  "comm/row_tables:scan": {
    bind: {
      all: u32(0, 2, 3, 3, 5, 0, 0, 4, 6, 7), starts: 5, there: 4, bases: 2, offsets: 3, splits: 4,
      missing: 1,
    },
    params: {
      sources: 2, width: 5, groups: 4, blocks: 2, copies: 1, own: 1, block: 1, rows: 6, sends: 8, limit: 6,
    },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/expert_bias:expert_bias": {
    bind: { bias: 11, counts: Uint32Array.from(integers(11, 9)), gate: 1 },
    params: { experts: 11, rate: 0.01 }, constants: { WG: 16 }, workgroups: [1],
  },
  "moe/plan:scan_experts": {
    bind: { offsets: Uint32Array.from(integers(14, 5)) },
    params: { choices: 12, experts: 13, pieces: 1, length: 12, first: 0, topk: 1 },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/plan:small": {
    bind: { topk_idx: Uint32Array.from(integers(20, 5)), offsets: 6, slot_token: 20, token_slot: 20 },
    params: { choices: 20, experts: 5, pieces: 1, length: 20, first: 0, topk: 1 },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/plan:whole": {
    bind: {
      topk_idx: Uint32Array.from(integers(50, 5)), histogram: 16 * 5, offsets: 6, slot_token: 50,
      token_slot: 50,
    },
    params: { choices: 50, experts: 5, pieces: 16, length: 4, first: 0, topk: 1 },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/router:router": {
    bind: { logits: normal(3 * 12), bias: normal(12), keys: 4 * 12, topk_weight: 9, topk_idx: 9 },
    params: { tokens: 3, experts: 12, topk: 3, topk_group: 2, group_best: 2, normalise: 1, scaling: 2.5 },
    constants: { WG: 16, CHOICE: 0, SCORE: 0, LANES: 4, BLOCKS: 8, GROUPS: 4, WORDS: 1 }, workgroups: [1],
  },
  "moe/router_aux_loss:total": {
    bind: { value: normal(11), loss: 1 },
    params: { tokens: 11, seqlen: 11, experts: 4, factor: 1 },
    constants: { WG: 16, SCORE: 0 }, workgroups: [1],
  },
  "moe/quantile_bias:quantile_bias": {
    bind: { bias: normal(11), estimate: normal(11), gate: 1 }, params: { experts: 11, rate: 0.5 },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/router_quantile:quantile": {
    bind: { logits: normal(20 * 3), alpha: normal(20), estimate: 3 },
    params: { tokens: 20, experts: 3, candidates: 2, rank: 7 }, constants: { WG: 16 }, workgroups: [3],
  },
  "moe/sinkhorn:sinkhorn": {
    bind: { logits: normal(18 * 3), balanced: 18 * 3, d0: 18, d1: 3 },
    params: { tokens: 18, experts: 3, rounds: 2 }, constants: { WG: 16 }, workgroups: [1],
  },
  "moe/router_z_loss:total": {
    bind: { z: normal(11), loss: 1 }, params: { tokens: 11, experts: 4, factor: 1 },
    constants: { WG: 16 }, workgroups: [1],
  },
  "moe/unpermute_backward:unpermute_backward": {
    bind: {
      y: normal(6 * 10), topk_weight: normal(6), token_slot: u32(3, 1, 0, 5, 4, 2), dout: normal(3 * 10),
      dy: 60, dweight: 6,
    },
    params: { choices: 6, cols: 10, topk: 2, slots: 6, experts: 3 },
    constants: { WG: 16, LANES: 4 }, workgroups: [2],
  },
  "moe/weigh:weigh_backward": {
    bind: {
      x: normal(6 * 10), topk_weight: normal(6), slot_token: u32(3, 1, 0, 5, 4, 2), dout: normal(6 * 10),
      dx: 60, dweight: 6,
    },
    params: { slots: 6, cols: 10 }, constants: { WG: 16, LANES: 4 }, workgroups: [2],
  },
  "norm/rms_norm:rms_norm_row": {
    bind: { x: normal(40), z: normal(40), weight: normal(20), out: 40, rstd: 4 },
    params: { tokens: 2, ngroups: 2, cols: 10, n: 10, eps: 1e-5 },
    constants: { WG: 16 }, conditions: ["gated"], workgroups: [4],
  },
  "norm/rms_norm_backward:rms_norm_backward_row": {
    bind: {
      x: normal(40), z: normal(40), weight: normal(20), rstd: normal(4), dout: normal(40), dx: 40, dz: 40,
    },
    params: { tokens: 2, ngroups: 2, cols: 10, n: 10 },
    constants: { WG: 16 }, conditions: ["gated"], workgroups: [4],
  },
  "norm/softmax:softmax": {
    bind: { x: normal(140), y: 140 },
    params: { rows: 2, cols: 70 }, constants: { WG: 16 }, workgroups: [2],
  },
  "norm/softmax:softmax_backward": {
    bind: { weight: normal(80), dy: normal(80), dx: 80 },
    params: { rows: 2, cols: 40 }, constants: { WG: 16 }, workgroups: [2],
  },
  "optim/global_norm:squares": {
    bind: { x: normal(70), partial: 3 }, params: { count: 70, first: 0, max_norm: 1 },
    constants: { WG: 16, EACH: 2 }, workgroups: [3],
  },
  "optim/global_norm:total": {
    bind: { partial: normal(11), norm: 1 }, params: { count: 11, first: 0, max_norm: 1 },
    constants: { WG: 16, EACH: 2 }, workgroups: [1],
  },
  "quant/largest:largest": {
    bind: { x: normal(70), partial: 3, jobs: 1 },
    params: { rows: 1, cols: 70, block: 0, units: 18, each: 1, groups: 2, first: 0, partials: 2, per: 1 },
    constants: { WG: 16 }, workgroups: [2],
  },
  "quant/largest:rotate": {
    bind: { x: normal(20 * 8), y: 32 * 8, partial: 4, jobs: 1, tiles: 4, table: 1 }, conditions: ["vec4"],
    params: { rows: 20, cols: 8, block: 16, units: 4, each: 1, groups: 1, first: 0, partials: 1, per: 1 },
    constants: { WG: 16 }, workgroups: [1],
    // What a rotated row is does not matter, nor where it goes: no two invocations share one.
    rewrite: [
      ["var bits = bitcast<vec4u>(0.25 * v[r]);", "var bits = vec4u(7u);"],
      ["store4(m, row + r, col, bitcast<vec4f>(bits));", ""],
    ],
  },
  "quant/update_scales:update_scales": {
    bind: {
      magnitudes: u32(0x3f800000, 0, 0x40000000, 5), history: normal(2 * 5), scales: normal(2),
      tops: normal(2), counter: u32(0, 0, 0, 7),
    },
    params: { slots: 2, length: 5, entries: 2 }, constants: { WG: 16 }, workgroups: [2],
  },
  "quant/block_matvec:block_matvec": {
    bind: {
      x: normal(2 * 64), codes: integers(6 * 16, 2 ** 31), scales: integers(6, 2 ** 14), y: 12, bias: normal(
        6),
      offsets: 1, residual: 1, outer: 1,
    },
    params: { m: 2, n: 6, k: 64, experts: 0, outer_rows: 1 }, constants: { WG: 16 }, conditions: ["bias"],
    workgroups: [2], rewrite: HALVES,
  },
  "quant/block_tile:block_tile": {
    bind: {
      x: normal(3 * 32), codes: integers(6 * 8, 2 ** 31), scales: integers(3, 2 ** 14), y: 18, bias: normal(
        6),
      tiles: 1, residual: 1, outer: 1,
    },
    params: { m: 3, n: 6, k: 32, row_tiles: 1, outer_rows: 1 }, conditions: ["bias"], workgroups: [1],
    rewrite: [...HALVES, ["k < HALF; k++", FEW]],
  },
  "quant/packed_product:packed_tile": {
    bind: {
      x_codes: integers(3 * 8, 2 ** 31), x_scales: integers(3, 2 ** 14), codes: integers(6 * 8, 2 ** 31),
      scales: integers(6, 2 ** 14), y: 18, tiles: 1, x_outer: 1, outer: 1,
    },
    params: { m: 3, n: 6, k: 32, row_tiles: 1, block: 2, group: 4, x_outer_rows: 1, outer_rows: 1 },
    constants: { WG: 32 }, conditions: ["e4m3", "e8m0"], workgroups: [1],
    rewrite: [["k < UNIT; k++", FEW.replace("HALF", "UNIT")]],
  },
  "sample/argmax:argmax": { bind: { logits, token: 2 }, ...sampled },
  "sample/draw:draw": {
    bind: { logits, settings, cuts, counter: u32(1, 2, 3, 4), token: 2 }, ...sampled,
  },
  "sample/filter:filter_tokens": {
    bind: { logits: ties, settings, cuts: 8 }, ...sampled, constants: { WG: 16, BITS: 4, DIGITS: 16 },
  },
  "sample/probabilities:probabilities": {
    bind: { logits, settings, cuts, probability: 42 }, ...sampled,
  },
};

const kernels = Object.entries(manifest as Readonly<Record<string, KernelShape>>);

/** Links a kernel for its launch. */
function linked(name: string): string {
  const launch = LAUNCHES[name]!;
  const { code } = link(name.split(":")[0]!, shaderSource, {
    conditions: launch.conditions ?? [], constants: launch.constants ?? {},
  });
  const left = /\boverride\s+(\w+)/.exec(code);
  if (left) throw new Error(`The launch of ${name} gives no constant for ${left[1]}.`);
  return (launch.rewrite ?? []).reduce((text, [from, to]) => {
    if (!text.includes(from)) throw new Error(`The launch of ${name} rewrites "${from}", found nowhere.`);
    return text.replaceAll(from, to);
  }, code);
}

/** Interprets a launch: what went wrong, and what the buffers hold afterwards. */
function run(name: string, code: string): { messages: string[]; buffers: Record<string, Uint32Array> } {
  const [kernel, entry] = name.split(":") as [keyof typeof manifest, string];
  const launch = LAUNCHES[name]!;
  const shape: KernelShape = manifest[kernel];
  const params = new DataView(new ArrayBuffer(Math.max(16, 4 * Object.keys(shape.params).length)));
  Object.entries(shape.params).forEach(([field, type], i) => {
    const value = launch.params[field];
    if (value === undefined) throw new Error(`The launch of ${name} gives no ${field}.`);
    if (type === "f32") params.setFloat32(4 * i, value, true);
    else params.setInt32(4 * i, value, true);
  });
  const buffers: Record<string, Uint32Array> = {};
  const storage: Record<number, ArrayBuffer> = {};
  for (const buffer of shape.entries[entry]!) {
    if (buffer === "params" || !code.includes(`> ${buffer}:`)) continue;
    const given = launch.bind[buffer];
    if (given === undefined) throw new Error(`The launch of ${name} binds no ${buffer}.`);
    const bytes = (typeof given === "number" ? new Uint32Array(given) : given.slice()).buffer as ArrayBuffer;
    buffers[buffer] = new Uint32Array(bytes);
    storage[shape.bindings[buffer]!.binding] = bytes;
  }
  return { messages: findRaces(code, entry, launch.workgroups, storage, params.buffer), buffers };
}

test("every entry point with workgroup memory has a launch here, and no other", () => {
  const needed = kernels.flatMap(([kernel, { entries }]) => {
    const { code } = link(kernel, shaderSource);
    const shared = Object.keys(entries).filter((entry) => usesSharedMemory(code, entry));
    return shared.map((entry) => `${kernel}:${entry}`);
  });
  expect(Object.keys(LAUNCHES).sort()).toEqual(needed.sort());
});

describe("no races", () => {
  for (const name of Object.keys(LAUNCHES)) {
    test(name, () => expect(run(name, linked(name)).messages.slice(0, 3)).toEqual([]));
  }
});

/** Left out: a barrier between atomic accesses, which are no data race without it, and what is slow. */
const KEPT_WHOLE =
  /^moe\/expert_bias:|^matmul\/matmul_(tile|matrix):|:(block|packed)_tile$|^attention\/attention_tile/;

describe("a removed barrier is reported", () => {
  for (const name of Object.keys(LAUNCHES).filter((each) => !KEPT_WHOLE.test(each))) {
    const code = linked(name);
    for (const [i, [start, end]] of barriersOf(code, name.split(":")[1]!).entries()) {
      test(`${name}, barrier ${i + 1}`, () => {
        expect(run(name, code.slice(0, start) + code.slice(end)).messages.length).toBeGreaterThan(0);
      });
    }
  }
});

test("the interpreter follows the kernels: their results are right", () => {
  for (const name of ["moe/plan:small", "moe/plan:whole"]) {
    const plan = run(name, linked(name)).buffers;
    const choices = [...plan.topk_idx!].map((expert, choice) => ({ expert, choice }));
    const sorted = choices.sort((a, b) => a.expert - b.expert); // stable, as the plan is
    expect([...plan.slot_token!]).toEqual(sorted.map(({ choice }) => choice));
  }

  const tables = run("comm/row_tables:scan", linked("comm/row_tables:scan")).buffers;
  expect([...tables.starts!]).toEqual([0, 0, 2, 4, 5]);
  expect([...tables.there!]).toEqual([2, 3, 0, 4]);

  const given = LAUNCHES["moe/router:router"]!.bind as Record<string, Float32Array>;
  const [, expected] = router(ndarray([3, 12], given.logits), ndarray([12], given.bias), {
    topk: 3, n_group: 4, topk_group: 2, norm_topk_prob: true, scaling: 2.5,
  });
  const { topk_idx } = run("moe/router:router", linked("moe/router:router")).buffers;
  expect([...topk_idx!]).toEqual([...expected!.data]);
});

/**
 * Our references and our kernels against definitions of another make (kernels.ts): misreadings that both
 * share show here.
 */
import { describe, expect, test } from "vitest";
import * as ops from "../../src/ops/index.ts";
import * as references from "../../src/reference/index.ts";
import { type NdArray, ndarray } from "../../src/tensor/ndarray.ts";
import { scope } from "../../src/tensor/scope.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { compare, defaultTolerance, Draw, type HostTensor } from "../ops/suite.ts";
import { onEveryAdapter } from "../support/devices.ts";
import * as oracle from "./kernels.ts";

/** gpu.js rounds its result to float32, and intermediate results that are handed on. */
const ROUNDING = 2e-7;

type Call = (...args: never[]) => unknown;

interface Case {
  readonly name: string;
  readonly op: Call;
  readonly reference: Call;
  readonly args: readonly unknown[];
  readonly expected: NdArray;
  /** Which output, or what to make of several. */
  readonly pick?: (outputs: NdArray[]) => NdArray;
  /** Length of the longest sum. */
  readonly reduction: number;
}

/** What is checked, and beside it what our own reference says. */
const both = {
  matmul: { op: ops.matmul, reference: references.matmul },
  ssd_scan: { op: ops.ssd_scan, reference: references.ssd_scan },
  chunk_cumsum: { op: ops.chunk_cumsum, reference: references.chunk_cumsum },
  chunk_state: { op: ops.chunk_state, reference: references.chunk_state },
  relu2: { op: ops.relu2, reference: references.relu2 },
  embedding: { op: ops.embedding, reference: references.embedding },
  rms_norm: { op: ops.rms_norm, reference: references.rms_norm },
  gated_rms_norm: { op: ops.gated_rms_norm, reference: references.gated_rms_norm },
  attention: { op: ops.attention, reference: references.attention },
  causal_conv1d: { op: ops.causal_conv1d, reference: references.causal_conv1d },
  router: { op: ops.router, reference: references.router },
} as const;

const r = new Draw(21);

function matmulCases(): Case[] {
  const [A, At] = [r.normal([7, 33]), r.normal([33, 7])];
  const [B, Bt] = [r.normal([33, 10]), r.normal([10, 33])];
  return [[false, false], [false, true], [true, false], [true, true]].map(([transA, transB]) => {
    const args = [transA ? At : A, transB ? Bt : B, { transA: transA!, transB: transB! }] as const;
    const name = `matmul${transA ? ", a transposed" : ""}${transB ? ", b transposed" : ""}`;
    return { name, ...both.matmul, args, expected: oracle.matmul(...args), reduction: 33 };
  });
}

function mambaCases(): Case[] {
  const [B, L, H, P, G, N, Q] = [2, 11, 4, 3, 2, 5, 4] as const;
  const x = r.normal([B, L, H, P]);
  const dt_raw = r.normal([B, L, H]);
  const A_log = r.uniform([H], -1, 1);
  const dt_bias = r.normal([H], 0.5);
  const [Bm, Cm, D] = [r.normal([B, L, G, N]), r.normal([B, L, G, N]), r.normal([H])];
  const limit = [0.1, 1.5] as const;
  const dt = oracle.time_steps(dt_raw, dt_bias, Q, limit);
  const sums = oracle.decay_sums(dt, A_log);
  const host = (array: NdArray): HostTensor => ({ ...array, dtype: "f32" });
  const cumsum = [dt_raw, A_log, dt_bias, Q, limit, null];
  const first = ([output]: NdArray[]) => output!;
  const scanned = (dt_limit: readonly [number, number], chunk_size: number) => ({
    ...both.ssd_scan, pick: first, reduction: L * N,
    args: [
      x, dt_raw, A_log, Bm, Cm, D, dt_bias, { chunk_size, dt_limit, initial_state: null, seq_idx: null },
    ],
    expected: oracle.ssd_scan(x, oracle.time_steps(dt_raw, dt_bias, Q, dt_limit), A_log, Bm, Cm, D),
  } as const);
  return [
    { name: "time steps", ...both.chunk_cumsum, args: cumsum, expected: dt, pick: first, reduction: 1 },
    {
      name: "decay sums", ...both.chunk_cumsum, args: cumsum, expected: sums, pick: ([, second]) => second!,
      reduction: Q,
    },
    {
      name: "chunk_state", ...both.chunk_state, args: [Bm, x, host(dt), host(sums), null], reduction: Q,
      expected: oracle.chunk_state(Bm, x, dt, sums),
    },
    { name: "ssd_scan", ...scanned(limit, Q) },
    { name: "ssd_scan in one chunk, steps without bounds", ...scanned([0, Infinity], 16) },
  ];
}

/** Weights of the chosen experts as a row with a place for every expert. */
const spread = (E: number) => ([weight, index]: NdArray[]): NdArray => {
  const [T, K] = weight!.shape as [number, number];
  const dense = ndarray([T, E]);
  weight!.data.forEach((value, i) => (dense.data[Math.floor(i / K) * E + index!.data[i]!] = value));
  return dense;
};

function otherCases(): Case[] {
  const x = r.normal([5, 37]);
  const weight = r.uniform([37], 0.5, 1.5);
  const [y, z, scale] = [r.normal([2, 3, 24]), r.normal([2, 3, 24]), r.uniform([24], 0.5, 1.5)];
  const [q, k, v] = [r.normal([2, 7, 4, 8]), r.normal([2, 7, 2, 8]), r.normal([2, 7, 2, 8])];
  const [late, options] = [r.normal([2, 3, 4, 8]), { scale: 1 / Math.sqrt(8), seq_idx: null }];
  const [ids, table] = [r.integers([2, 9], 0, 13), r.normal([13, 6])];
  const [xBC, taps, bias] = [r.normal([2, 9, 10]), r.normal([10, 4]), r.normal([10])];
  const [logits, correction] = [r.normal([9, 12]), r.normal([12], 0.2)];
  const routing = { topk: 3, n_group: 1, topk_group: 1, norm_topk_prob: true, scaling: 2.5 };
  return [
    { name: "relu2", ...both.relu2, args: [x], expected: oracle.relu2(x), reduction: 1 },
    {
      name: "embedding", ...both.embedding, args: [ids, table], reduction: 1,
      expected: oracle.embedding(ids, table),
    },
    {
      name: "rms_norm", ...both.rms_norm, args: [x, weight, 1e-5], reduction: 37,
      expected: oracle.rms_norm(x, weight, 1e-5),
    },
    {
      name: "gated_rms_norm", ...both.gated_rms_norm, args: [y, z, scale, 3, 1e-5], reduction: 24,
      expected: oracle.gated_rms_norm(y, z, scale, 3, 1e-5),
    },
    {
      name: "attention", ...both.attention, args: [q, k, v, options], reduction: 15,
      expected: oracle.attention(q, k, v, options),
    },
    {
      name: "attention of the last queries", ...both.attention, args: [late, k, v, options], reduction: 15,
      expected: oracle.attention(late, k, v, options),
    },
    {
      name: "causal_conv1d", ...both.causal_conv1d, args: [xBC, taps, bias, null, null], reduction: 5,
      expected: oracle.causal_conv1d(xBC, taps, bias), pick: ([conv]) => conv!,
    },
    {
      name: "router", ...both.router, args: [logits, correction, routing], reduction: 12,
      expected: oracle.router(logits, correction, routing), pick: spread(12),
    },
  ];
}

const cases = [...matmulCases(), ...mambaCases(), ...otherCases()];
const isHost = (value: unknown): value is HostTensor =>
  typeof value === "object" && value !== null && "dtype" in value;
const pickOne = ({ pick }: Case, outputs: NdArray | NdArray[]) =>
  pick ? pick(outputs as NdArray[]) : outputs as NdArray;

describe("references", () => {
  for (const each of cases) {
    test(each.name, () => {
      const reference = each.reference as (...args: unknown[]) => NdArray | NdArray[];
      const outputs = reference(...each.args.map((arg) => isHost(arg) ? ndarray(arg.shape, arg.data) : arg));
      compare(each.name, pickOne(each, outputs), each.expected, ROUNDING);
    });
  }
});

await onEveryAdapter((device) => {
  for (const each of cases) {
    test(each.name, async () => {
      const op = each.op as (...args: unknown[]) => Tensor | Tensor[];
      const result = scope(() => op(...each.args.map((arg) => {
        if (!isHost(arg)) return arg;
        const values = arg.dtype === "f32" ? Float32Array.from(arg.data) : Int32Array.from(arg.data);
        return device.tensor(values, arg.shape);
      })));
      const tensors = Array.isArray(result) ? result : [result];
      const outputs = await Promise.all(tensors.map(async (tensor) =>
        ndarray(tensor.shape, Float64Array.from(await tensor.read()))));
      for (const tensor of tensors) tensor.dispose();
      const found = pickOne(each, Array.isArray(result) ? outputs : outputs[0]!);
      compare(each.name, found, each.expected, defaultTolerance(each.reduction) + ROUNDING);
      expect(device.pool.liveBytes).toBe(0);
    });
  }
});

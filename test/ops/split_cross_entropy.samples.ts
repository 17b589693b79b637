import { linear_log_sum_exp, merged_cross_entropy } from "../../src/ops/split_cross_entropy.ts";
import * as ref from "../../src/reference/split_cross_entropy.ts";
import { type Draw, opSamples, type Sample } from "./suite.ts";

/** T rows of width D against V words from label 20 on; labels are in and outside of these. */
function part(name: string, [T, D, V]: [number, number, number], options = {}, deviation = 0.5): Sample {
  return {
    name, reduction: Math.max(T, D, V),
    args: (r: Draw) => [
      r.normal([T, D], deviation), r.normal([V, D]), r.integers([T], 10, 30 + V), { begin: 20, ...options },
    ],
  };
}

function merge(name: string, parts: number, T: number, options: Record<string, number>): Sample {
  return {
    name, reduction: T,
    args: (r: Draw) => {
      const labels = r.integers([T], 0, 12);
      labels.data.forEach((_, t) => { if (t % 3 === 2) labels.data[t] = t % 2 === 0 ? -100 : 12; });
      const total = options["label_smoothing"] ? r.normal([T], 10) : null;
      return [r.normal([parts, T], 2), r.normal([T]), total, labels, { vocab: 12, ...options }];
    },
  };
}

export default [
  opSamples({
    op: linear_log_sum_exp, reference: ref.linear_log_sum_exp, vjp: ref.linear_log_sum_exp_vjp,
    samples: [
      part("whole vectors", [20, 16, 48]),
      part("odd sizes", [19, 13, 65]),
      part("chunks, the last of one", [20, 12, 33], { vocab_chunk: 16 }),
      part("totals", [20, 16, 48], { total: true }),
      part("totals of odd chunks", [18, 9, 47], { vocab_chunk: 11, total: true }),
      part("sharp distributions", [16, 24, 40], { vocab_chunk: 12 }, 8),
      part("one row", [1, 12, 30], { total: true }),
      {
        name: "labels outside of every vocabulary",
        args: (r) => [r.normal([4, 8]), r.normal([10, 8]), r.of([4], [-100, -1, 2147483647, 9], "i32"), {}],
      },
      { name: "no rows", args: (r) => [r.normal([0, 8]), r.normal([10, 8]), r.integers([0], 0, 10), {}] },
    ],
    errors: [{
      name: "weight of the wrong width", message: /linear_log_sum_exp.*weight.*\[V, 4\].*\[9, 5\]/,
      args: (r) => [r.normal([2, 4]), r.normal([9, 5]), r.integers([2], 0, 9), {}],
    }],
  }),
  opSamples({
    op: merged_cross_entropy, reference: ref.merged_cross_entropy, vjp: ref.merged_cross_entropy_vjp,
    samples: [
      merge("one part", 1, 9, {}),
      merge("two parts", 2, 20, {}),
      merge("more rows than lanes", 4, 150, {}),
      merge("label smoothing", 4, 70, { label_smoothing: 0.1 }),
      {
        name: "no scored row", args: (r) => [
          r.normal([2, 3]), r.normal([3]), null, r.of([3], [-100, 9, -1], "i32"), { vocab: 9 }],
      },
      merge("no rows", 2, 0, {}),
    ],
    errors: [
      {
        name: "another number of labels", message: /merged_cross_entropy.*labels.*\[3\].*\[2\]/,
        args: (r) => [r.normal([2, 3]), r.normal([3]), null, r.integers([2], 0, 9), { vocab: 9 }],
      },
      {
        name: "a rate of one", message: /merged_cross_entropy: label_smoothing must be at least 0.*found 1/,
        args: (r) => [
          r.normal([2, 3]), r.normal([3]), r.normal([3]), r.integers([3], 0, 9),
          { vocab: 9, label_smoothing: 1 },
        ],
      },
      {
        name: "label smoothing without totals",
        message: /merged_cross_entropy: label_smoothing must be 0 without totals.*found 0.1/,
        args: (r) => [
          r.normal([2, 3]), r.normal([3]), null, r.integers([3], 0, 9), { vocab: 9, label_smoothing: 0.1 },
        ],
      },
    ],
  }),
];
